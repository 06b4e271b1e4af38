"""``tta bench``: what recipes cost on the user's own model and device."""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from tta.cli.common import (
    adapter_from,
    add_method,
    add_model,
    add_saved,
    open_from,
    whole,
    wrap_arguments,
)
from tta.cli.pictures import like_weights
from tta.core.checks import is_final, is_out_of_memory, new_file, sentence, told
from tta.core.files import writing

if TYPE_CHECKING:
    from torch import Tensor

    from tta.core.adapter import Adapter
    from tta.runtime.model_strings import OpenedModel

__all__ = ["COLUMNS", "PLAIN", "add_arguments", "measured_rows", "run"]

ROUNDS = 30
WARM_UP = 2  # calls of each recipe that are not timed; with a window, more
SOURCE_IMAGES = 16  # random ones, where the user has none
ALL, PLAIN = "all", "plain forward"
PERCENTILES = (50, 95, 99)
COLUMNS = ("p50 ms", "p95 ms", "p99 ms", "ratio", "peak MB", "forwards", "backwards")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the command."""
    add_model(parser, 1)
    add_method(parser, ALL)
    add_saved(parser, "measured")
    add = parser.add_argument
    add("--rounds", type=whole(1), default=ROUNDS, metavar="N",
        help=f"timed calls of each recipe (default: {ROUNDS})")  # fmt: skip
    add("--size", type=whole(1), metavar="PIXELS",
        help="of the images (default: what the model declares, else 224)")  # fmt: skip
    add("--window", type=whole(2), metavar="N", help="images of a call, as wrap(window=) has it")
    add("--threads", type=whole(1, 1024), metavar="N", help="of torch (default: as they are)")
    add("--out", metavar="FILE", help="where a line of JSON is added for each row")
    add("--tune", action="store_true", help="find the fastest setting first, and run with it")
    add("--tune-seconds", type=whole(1), default=60, metavar="S",
        help="to find it (default: 60)")  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Measure and print a table.

    Raises:
        ValueError: When the model does not take such images, or ``--method`` cannot be wrapped.
    """
    out = None if args.out is None else new_file("out", args.out)
    for row in measured_rows(args, print):
        if "left_out" in row:
            print(f"left out: {row['method']}: {row['left_out']}", file=sys.stderr)
            continue
        values = (row[name] for name in COLUMNS)
        print(f"{row['method']:24}" + "".join(f"{v:10.2f}" for v in values), flush=True)
        if out is not None:
            with writing("out", out), out.open("a") as file:
                file.write(json.dumps(row) + "\n")
    return 0


def measured_rows(
    args: argparse.Namespace, say: Callable[[str], Any] = lambda _: None
) -> Iterator[dict[str, Any]]:
    """What the command measures: the plain forward pass first, then each recipe.

    Args:
        args: What was parsed.
        say: Takes lines of text that go before the rows.

    Yields:
        A row with ``method`` and the figures of ``COLUMNS``, or with the reason in ``left_out``;
        these come last.

    Raises:
        ValueError: When the model does not take such images, or ``--method`` cannot be wrapped.
    """
    import torch

    before = torch.get_num_threads()
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    try:
        yield from _rows(args, say)
    finally:
        if args.threads is not None:
            torch.set_num_threads(before)


def _rows(args: argparse.Namespace, say: Callable[[str], Any]) -> Iterator[dict[str, Any]]:
    import torch

    from tta.core.registry import component, list_methods

    opened = open_from(args)
    model = opened.model.eval()
    like = like_weights(model)
    device = like.device
    shape = _shape(model, args)
    batches = [torch.rand(shape, generator=torch.Generator().manual_seed(args.seed + t)).to(like)
               for t in range(4)]  # fmt: skip
    _check_taken(model, batches[0])
    further: dict[str, Any] = {} if args.window is None else {"window": args.window}
    opened = _with_what_methods_ask(opened, args, shape, like)
    # Before anything is measured: it raises for an unknown method.
    recipe, arguments = wrap_arguments(args, opened) if args.method != ALL else (None, {})
    if args.folder is not None:
        if args.tune or further:
            raise ValueError(
                "`folder` holds an adapter that is measured as it is: leave --tune and --window "
                "out."
            )
        adapter_from(args, opened).unwrap()  # raises for what is none
    if args.tune:
        from tta.tuning import tune

        further["setting"] = tune(
            model, batches[0], args.tune_seconds, recipe=recipe, **(arguments | further)
        )
        say(f"setting: {further['setting']}")
    say(f"{tuple(shape)} on {device}, {torch.get_num_threads()} threads, {args.rounds} rounds")
    say(f"{'':24}" + "".join(f"{name:>10}" for name in COLUMNS))
    with torch.no_grad():
        plain = _measured(model, model, batches, args.rounds)
    base = plain["p50 ms"]
    yield {"method": PLAIN, **plain, "ratio": 1.0}
    names = [args.method] if args.method != ALL else list_methods("*")
    if args.folder is not None:
        names = [args.folder]
    left_out: list[dict[str, Any]] = []
    for name in names:
        if len(names) > 1 and not component(name).slot and not component(name).empties_slots:
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                adapter = adapter_from(_with(args, name), opened, **further)
                try:
                    found = _measured(adapter, model, batches, args.rounds)
                finally:
                    adapter.unwrap()
            yield {"method": name, **found, "ratio": found["p50 ms"] / base}
        except (ValueError, TypeError, RuntimeError) as error:
            if len(names) == 1:
                raise
            left_out.append({"method": name, "left_out": sentence(error)})
    yield from left_out


def _check_taken(model: Any, images: Tensor) -> None:
    """Refuse images that the plain model does not take, in whatever way it says so."""
    import torch

    try:
        with torch.no_grad():
            model(images)
    except Exception as error:
        if is_final(error) or is_out_of_memory(error):
            raise
        raise ValueError(
            f"`--size` must be one that the model takes, but of images {tuple(images.shape)} it "
            f"raised {type(error).__name__} ({told(error, 100)}): pass --size PIXELS."
        ) from error


def _with(args: argparse.Namespace, method: str) -> argparse.Namespace:
    found = copy.copy(args)
    found.method = method
    return found


def _with_what_methods_ask(
    opened: OpenedModel, args: argparse.Namespace, shape: tuple[int, ...], like: Tensor
) -> OpenedModel:
    """Random source images and pixels as they come, where the user has none: costs are the same."""
    import torch

    from tta.core.classifier import num_classes

    more: dict[str, Any] = {}
    if opened.mean is None:
        more |= {"mean": (0.0,), "std": (1.0,)}
    if args.source is None and opened.source is None:
        chance = torch.Generator().manual_seed(args.seed)
        images = torch.rand((SOURCE_IMAGES, *shape[1:]), generator=chance)
        try:
            labels = torch.randint(num_classes(opened.model), (SOURCE_IMAGES,), generator=chance)
            more["source"] = [(images.to(like), labels.to(like.device))]
        except (TypeError, ValueError):  # nobody knows the classes
            pass
    return dataclasses.replace(opened, **more)


def _shape(model: Any, args: argparse.Namespace) -> tuple[int, ...]:
    from tta.core.budget import example_shape
    from tta.core.recipe import AdapterConfig
    from tta.core.source import SourceStatistics

    shape = example_shape(model, AdapterConfig(batch_size=args.batch_size), SourceStatistics())
    if args.size is not None:
        shape = (*shape[:2], *(args.size for _ in shape[2:]))
    return shape


def _measured(
    subject: Adapter | Any, model: Any, batches: list[Tensor], rounds: int
) -> dict[str, Any]:
    """Percentiles of time, the peak of memory, and images through the model for each image."""
    import numpy as np
    import torch

    from tta.core.memory_use import PeakBytes, held_bytes
    from tta.core.passes import Passes

    device = batches[0].device
    window = 0 if subject is model else subject.config.window or 0
    for t in range(max(WARM_UP, -(-window // len(batches[0])) + 1)):  # until it is full
        subject(batches[t % len(batches)])
    seconds = []
    passes = Passes(model)
    try:
        for t in range(rounds):
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            started = time.perf_counter()
            subject(batches[t % len(batches)])
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds.append(time.perf_counter() - started)
    finally:
        passes.close()
    with PeakBytes(device) as peak:
        subject(batches[0])
    held = [*model.parameters(), *model.buffers()]
    if subject is not model:
        held += subject.state().values()
    images = rounds * len(batches[0])
    return {
        **{f"p{p} ms": 1000 * float(np.percentile(seconds, p)) for p in PERCENTILES},
        "peak MB": (held_bytes(held) + peak.read()) / 1e6,
        "forwards": passes.forward / images,
        "backwards": passes.backward / images,
    }
