"""`evaluate`: the runner for a model and data that are Python objects, such as in a notebook."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import tta
from experiments.records.config import RunConfig, StreamConfig
from experiments.records.file import RESULTS, read_lines
from experiments.report.collect import collect
from experiments.report.report import Report
from experiments.report.run_table import render_text
from experiments.run.given import (
    CleanImages,
    GivenAdapter,
    Preprocess,
    Source,
    check_classes,
    check_left_out,
    check_streams,
    make_subject,
    read_methods,
)
from experiments.run.method_strings import Method
from experiments.run.run import Run
from experiments.run.setup import Setup
from experiments.run.subject import pick_device
from tta.core.checks import boolean, path_like, whole_number
from tta.core.head import FeatureSpec
from tta.core.outputs import LogitsSpec
from tta.streams import Stream

__all__ = ["Evaluation", "evaluate"]


@dataclass(frozen=True)
class Evaluation:
    """The results of `evaluate`.

    Args:
        folder: Where the results file, the tables, the plots and the TensorBoard events are.
        summaries: The figures of each method on each stream, by name of the stream and label of
            the method; errors are shares in [0, 1].
    """

    folder: Path
    summaries: dict[str, dict[str, dict[str, Any]]]

    def __str__(self) -> str:
        """The table of each stream."""
        tables = [render_text(list(found.values())) for found in self.summaries.values()]
        return "\n\n".join(tables)

    def report(self) -> Path:
        """Write tables, plots and one HTML page to ``report`` in the folder; returns the page."""
        return Report(collect([self.folder]), self.folder / "report", self.folder.name).execute()


def evaluate(
    model: nn.Module | tta.Adapter,
    stream: Stream | Mapping[str, Stream],
    methods: Sequence[str | tta.ComponentConfig] | str | None = None,
    out: str | Path | None = None,
    *,
    source: Source | None = None,
    mean: float | Sequence[float] | None = None,
    std: float | Sequence[float] | None = None,
    preprocess: Preprocess | None = None,
    clean: Any | None = None,
    seed: int = 0,
    device: str | torch.device | None = None,
    name: str | None = None,
    data: str = "given in Python",
    show: str = "all",
    logits: LogitsSpec = None,
    num_classes: int | None = None,
    features: FeatureSpec = None,
    activation: str | None = None,
    health: bool | None = None,
) -> Evaluation:
    """Run methods on streams and compare them, as ``python -m experiments run`` does.

    Args:
        model: A classifier from images (B, 3, H, W) to logits (B, C), or to something that holds
            them, see `logits`. It is wrapped for each method and stream and unwrapped afterwards,
            so it is left as it was. Or an adapter, which is evaluated as it is: every stream begins
            from the state in which it is given, and it is put back to that state in the end.
        stream: A stream from `tta.streams.build`, or several by name.
        methods: Method strings as on the command line, such as "source", "tent" or
            "unmix_tns+eata[lr=1e-3]", or configs from `tta.get_config`. Default: "source" and
            "tent". Must be left out for an adapter.
        out: Folder of the results, without results so far. Default: a new folder
            ``runs/<date>-evaluation`` in the current directory.
        source: Source artefacts for methods that need something of the training data, see
            `tta.wrap`: a `tta.SourceStatistics`, or batches that can be read again for each method.
        mean: Channel means that turn pixels in [0, 1] into what the model takes; 0 for a model that
            takes pixels. Default: those of timm's ``pretrained_cfg``, or of the adapter.
        std: Channel standard deviations, likewise; 1 for a model that takes pixels.
        preprocess: Replaces the normalisation by `mean` and `std`: pixels (B, 3, H, W) in [0, 1] to
            what the model takes. Methods that augment still need `mean` and `std`. It is also
            called before the run begins, on the first batch, so that its result can be checked.
        clean: Clean images to predict before and after each stream with the method frozen, as
            `tta.streams.build` takes a dataset.
        seed: Seed of the adapters, 0 or more; the streams have seeds of their own.
        device: Device to which the model is moved for the evaluation, such as "cuda". Default: the
            one where it is.
        name: Name of the model in tables. Default: its class.
        data: Name of the data in reports, which compare results of the same data only.
        show: What is printed: "all", "tables" (no progress) or "nothing" (and no plots are drawn).
        logits: How to take logits out of what the model returns, as `tta.wrap` takes it. Like the
            next three, it must be left out for an adapter, which was told when it was made.
        num_classes: Number of classes, for heads that are no linear layer, likewise.
        features: What the features of such heads are, likewise.
        activation: What the logits are for, "softmax" or "sigmoid", likewise. Default: "softmax".
        health: Whether figures that need no labels are recorded of methods without a guard too, as
            ``wrap(..., health=True)`` fills them; must be left out for an adapter, which has them
            or not. Default: False.

    Returns:
        The figures and the folder, which ``python -m experiments report`` reads.

    Raises:
        TypeError: For an argument of the wrong kind.
        ValueError: For unknown methods, a method that does not fit the model, labels that the model
            does not have, or a folder that holds results.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"`model` must be a torch.nn.Module or a tta.Adapter, got {type(model).__name__}: a "
            "bundled model by its name is models.load(name)[0]"
        )
    streams = check_streams(stream)
    folder = _check_folder(out)
    images = None if clean is None else CleanImages(clean)
    inner = model.model if isinstance(model, tta.Adapter) else model
    tensors = [*inner.parameters(), *inner.buffers()]
    home = tensors[0].device if tensors else torch.device("cpu")
    where = home if device is None else pick_device(str(device))
    reading = {"logits": logits, "num_classes": num_classes, "features": features}
    if isinstance(model, tta.Adapter):
        check_left_out(
            methods=methods,
            source=source,
            device=device,
            activation=activation,
            health=health,
            **reading,
        )
    subject = make_subject(
        model,
        streams,
        name=name,
        device=where,
        mean=mean,
        std=std,
        preprocess=preprocess,
        source=source,
        reading=reading,
    )
    classes = subject.info.num_classes
    check_classes(streams, classes)
    if isinstance(model, tta.Adapter):
        chosen: list[Method] = [GivenAdapter.of(model)]
    else:
        given = ("source", "tent") if methods is None else methods
        reading["activation"] = "softmax" if activation is None else activation
        watched = health is not None and boolean("health", health)
        chosen = read_methods(given, classes, reading | {"health": watched})
    config = RunConfig(
        name="evaluation",
        model=subject.name,
        data=data,
        clean=None,
        source=None,
        methods=tuple(method.label for method in chosen),
        streams=tuple(_stream_config(key, built) for key, built in streams.items()),
        batch_size=next(iter(streams.values())).config["batch_size"],
        seed=whole_number("seed", seed, 0, 2**63 - 1),
        device=str(where),
        health=bool(health),
    )
    origin = {"name": data, "origin": data, "domains_on_disk": False}
    setup = Setup(config, subject, chosen, list(streams.values()), images, origin)
    with _moved(inner, home, where):
        folder = Run(setup, folder=folder, fresh=True, show=show).execute()
    return Evaluation(folder, _summaries(folder, streams))


@contextmanager
def _moved(model: nn.Module, home: torch.device, where: torch.device) -> Iterator[None]:
    """The model on another device for as long as a ``with`` block runs."""
    if where == home:
        yield
        return
    model.to(where)
    try:
        yield
    finally:
        model.to(home)


def _summaries(folder: Path, streams: Mapping[str, Stream]) -> dict[str, dict[str, dict[str, Any]]]:
    """The ``summary`` lines of a run, by stream and method."""
    found: dict[str, dict[str, dict[str, Any]]] = {name: {} for name in streams}
    for row in read_lines(folder / RESULTS, "summary"):
        found[row["stream"]][row["method"]] = row
    return found


def _check_folder(out: str | Path | None) -> Path | None:
    if out is None:
        return None
    folder = path_like("out", out)
    if folder.is_file() or (folder / RESULTS).exists():
        kind = "a file" if folder.is_file() else "a folder that holds results"
        raise ValueError(
            f"`out` must be a new folder or one without results, got {kind}, {folder}: choose "
            "another one"
        )
    return folder


def _stream_config(name: str, stream: Stream) -> StreamConfig:
    """A stream of the caller's, as results files have it."""
    build = stream.config
    return StreamConfig(
        name=name,
        scenario=build["scenario"],
        domains=tuple(build["domains"]),
        severity=build["severity"],
        batch_size=build["batch_size"],
        options={} if build["window"] is None else {"window": build["window"]},
    )
