"""``tune``: which setting is fastest on this device for the passes that recipes make."""

from __future__ import annotations

import dataclasses
import os
import statistics
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tta.core.adapter import Adapter
from tta.core.allocator import as_before
from tta.core.checks import boolean, number, one_of
from tta.core.config import SLOTS, ComponentConfig
from tta.core.model_checks import check_model
from tta.core.parameters import select
from tta.core.recipe import AdapterConfig
from tta.core.setting import PRECISIONS, Setting
from tta.wrapping import wrap

__all__ = ["tune"]

BATCHES = 6  # of the stream over which decisions are compared
LEAST_AGREEMENT = {"float32": 0.999, "bfloat16": 0.99, "float16": 0.99}
GAIN = 1.03  # speed-up below which a change is not worth it
COMPILING_S = 20  # about what a compiler takes, which cannot be stopped, forward and backward


def tune(
    model: nn.Module,
    example: Tensor,
    budget_s: float = 60,
    *,
    recipe: str | ComponentConfig | AdapterConfig | None = None,
    precisions: Sequence[str] = ("float32", "bfloat16"),
    compile: bool = True,
    **arguments: Any,
) -> Setting:
    """Find the fastest setting for this model on this device by measuring.

    Memory formats, kept memory and thread counts (on a CPU), precisions and compilation are tried
    one after the other, each on top of what was fastest so far. What is timed is a call of an
    adapter of the recipe, with the passes that it makes. A change is taken when it is faster by 3 %
    and agrees with the plain one over a short adapted stream: decisions equal for 99.9 % of images
    in float32, for 99 % in half precision.

    Args:
        model: A classifier, unwrapped; it is left as it was.
        example: A batch as the model will get it (B, ...), on its device.
        budget_s: Seconds that may be spent, about; the plain setting is always measured, and
            compiling is begun only while 20 are left.
        recipe: As for :func:`tta.wrap`. By default the passes are those of a step that minimises
            entropy, forward and backward, or a forward pass where the model has no norm layer; or
            those of the slots alone, where ``arguments`` fill some.
        precisions: Which may be tried, of ``float32``, ``bfloat16`` and ``float16``; ``float32``,
            which is as the model comes, is among them in any case.
        compile: Whether ``torch.compile`` may be tried, which can take longer than the budget has.
        **arguments: Further ones of :func:`tta.wrap`: slots, fields, ``source``, ``mean``, and so
            on. The adapter is made anew for each setting, so ``source`` should hold artefacts
            rather than batches from which they are made each time.

    Returns:
        The setting, for ``wrap(..., setting=)``, with what was measured in it.

    Raises:
        TypeError: When an argument is of the wrong kind.
        ValueError: When the model does not take the example, or :func:`tta.wrap` refuses the
            recipe or the arguments.
    """
    check_model(model)
    number("budget_s", budget_s, 0, 86400)
    if not isinstance(example, Tensor):
        raise TypeError(
            f"`example` must be a tensor, got {type(example).__name__}: pass a batch of images."
        )
    if "setting" in arguments:
        raise TypeError(
            "`setting` must be left out, got one: it is what tune looks for; give its fields to "
            "tta.Setting yourself to use another."
        )
    if isinstance(precisions, str) or not isinstance(precisions, Sequence):
        raise TypeError(
            f"`precisions` must be a list of names, got {type(precisions).__name__}: pass "
            "['float32'], say."
        )
    for precision in precisions:
        one_of("precisions", precision, PRECISIONS)
    boolean("compile", compile)
    end, count = time.monotonic() + budget_s, max((1, *example.shape[:1]))
    if recipe is None and not set(SLOTS) & arguments.keys():
        recipe = _recipe(model)

    def make(setting: Setting) -> Adapter:
        if isinstance(recipe, AdapterConfig):
            return wrap(model, dataclasses.replace(recipe, setting=setting), **arguments)
        return wrap(model, recipe, **{"batch_size": count, "setting": setting, **arguments})

    return _fastest(make, example, _changes(example, precisions, compile), end)


def _fastest(
    make: Callable[[Setting], Adapter],
    example: Tensor,
    changes: Iterable[dict[str, object]],
    end: float,
) -> Setting:
    """Try one change after the other until ``end``, by the monotonic clock."""
    best = Setting()
    plain, decisions = _run(make, example, best)
    fastest, found = plain, best
    for change in changes:
        if time.monotonic() >= end - (COMPILING_S if "compile" in change else 0):
            break
        candidate = dataclasses.replace(best, **change)
        try:
            seconds, logits = _run(make, example, candidate)
        except Exception:  # whatever a kernel or a compiler that is not there raises
            continue
        difference = float((logits - decisions).abs().max())
        agreement = float((logits.argmax(1) == decisions.argmax(1)).float().mean())
        if agreement < LEAST_AGREEMENT[candidate.precision] or seconds * GAIN >= fastest:
            continue
        # Once more, as something else may have kept the machine busy before.
        fastest = min(fastest, _run(make, example, best)[0])
        if best == Setting():
            plain = fastest
        if seconds * GAIN < fastest:
            fastest, best = seconds, candidate
            found = dataclasses.replace(
                best, speedup=plain / seconds, difference=difference, agreement=agreement
            )
    return found


def _recipe(model: nn.Module) -> str:
    try:
        select(model, "norm")
    except ValueError:
        return "source"
    return "tent"


def _changes(
    example: Tensor, precisions: Sequence[str], compile: bool
) -> Iterator[dict[str, object]]:
    if example.ndim == 4:
        yield {"memory_format": "channels_last"}
    if example.device.type == "cpu":
        yield {"keep_memory": True}
        most, threads = os.cpu_count() or 1, 1
        while threads <= most:
            if threads != torch.get_num_threads():
                yield {"threads": threads}
            threads *= 2
    for precision in dict.fromkeys(precisions):
        if precision != "float32":
            yield {"precision": precision}
    if compile:
        yield {"compile": "default"}


def _run(make: Callable[[Setting], Adapter], x: Tensor, setting: Setting) -> tuple[float, Tensor]:
    """Median seconds of a call, and the logits (N, C) of a short adapted stream."""
    with as_before(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of presets for another number of classes
        adapter = make(setting)
        try:
            adapter(x)  # warms up
            adapter.reset()
            found, seconds = [], []
            for t in range(-(-(adapter.config.window or 0) // len(x))):  # until it is full
                adapter(x.roll(-t, -1))
            for t in range(BATCHES):
                batch = x.roll(t, -1) * (1 - 0.05 * t) if x.is_floating_point() else x.roll(t, -1)
                _wait(x)
                started = time.perf_counter()
                answer = adapter(batch)
                _wait(x)
                seconds.append(time.perf_counter() - started)
                found.append(adapter.network.reader.read(answer).float().cpu())
        finally:
            adapter.unwrap()
    return statistics.median(seconds), torch.cat(found)


def _wait(x: Tensor) -> None:
    if x.device.type == "cuda":
        torch.cuda.synchronize(x.device)
