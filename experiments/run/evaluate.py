"""`evaluate`: the runner for a model and data that are Python objects, such as in a notebook."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import tta
from experiments.data import Collection
from experiments.records.config import RunConfig, StreamConfig
from experiments.records.file import RESULTS, read_lines
from experiments.report.collect import collect
from experiments.report.report import Report
from experiments.report.run_table import render_text
from experiments.run.method_strings import Method, check_labels, parse_method
from experiments.run.run import Run
from experiments.run.setup import Setup
from experiments.run.subject import Subject, normalise, pick_device
from models import ModelInfo
from tta.core.checks import channels, folder_or_file, whole
from tta.core.classifier import num_classes
from tta.core.parameters import is_norm
from tta.core.registry import component
from tta.streams import Stream
from tta.streams.sources import ImageSource

__all__ = ["Evaluation", "evaluate"]

Source = tta.SourceStatistics | Iterable[tuple[Tensor, Tensor]]


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
    preprocess: Callable[[Tensor], Tensor] | None = None,
    clean: Any | None = None,
    seed: int = 0,
    device: str | torch.device | None = None,
    name: str | None = None,
    data: str = "given in Python",
    show: str = "all",
) -> Evaluation:
    """Run methods on streams and compare them, as ``python -m experiments run`` does.

    Args:
        model: A classifier from images (B, 3, H, W) to logits (B, C). It is wrapped for each method
            and stream and unwrapped afterwards, so it is left as it was. Or an adapter, which is
            evaluated as it is: every stream begins from the state in which it is given, and it is
            put back to that state in the end.
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
            what the model takes. Methods that augment still need `mean` and `std`.
        clean: Clean images to predict before and after each stream with the method frozen, as
            `tta.streams.build` takes a dataset.
        seed: Seed of the adapters, 0 or more; the streams have seeds of their own.
        device: Device to which the model is moved for the evaluation, such as "cuda". Default: the
            one where it is.
        name: Name of the model in tables. Default: its class.
        data: Name of the data in reports, which compare results of the same data only.
        show: What is printed: "all", "tables" (no progress) or "nothing" (and no plots are drawn).

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
    streams = _check_streams(stream)
    folder = _check_folder(out)
    inner = model.model if isinstance(model, tta.Adapter) else model
    tensors = [*inner.parameters(), *inner.buffers()]
    home = tensors[0].device if tensors else torch.device("cpu")
    where = home if device is None else pick_device(str(device))
    if isinstance(model, tta.Adapter):
        _check_left_out(methods=methods, source=source, device=device)
        mean = model.config.mean if mean is None else mean
        std = model.config.std if std is None else std
    subject = _make_subject(inner, name, where, mean, std, preprocess, source)
    _check_labels(streams, subject.info.num_classes)
    if isinstance(model, tta.Adapter):
        chosen: list[Method] = [_GivenAdapter.of(model)]
    else:
        given = ("source", "tent") if methods is None else methods
        chosen = _parse(given, subject.info.num_classes)
    config = RunConfig(
        name="evaluation",
        model=subject.name,
        data=data,
        clean=None,
        source=None,
        methods=tuple(method.label for method in chosen),
        streams=tuple(_stream_config(key, built) for key, built in streams.items()),
        batch_size=next(iter(streams.values())).config["batch_size"],
        seed=whole("seed", seed, 0),
        device=str(where),
    )
    images = None if clean is None else _CleanImages(clean)
    origin = {"name": data, "origin": data, "domains_on_disk": False}
    setup = Setup(config, subject, chosen, list(streams.values()), images, origin)
    if where != home:
        inner.to(where)
    try:
        folder = Run(setup, folder=folder, fresh=True, show=show).execute()
    finally:
        if where != home:
            inner.to(home)
    summaries: dict[str, dict[str, dict[str, Any]]] = {key: {} for key in streams}
    for row in read_lines(folder / RESULTS, "summary"):
        summaries[row["stream"]][row["method"]] = row
    return Evaluation(folder, summaries)


class _CleanImages:
    """A dataset of the caller's as clean images."""

    def __init__(self, dataset: Any) -> None:
        self._source = ImageSource(dataset, "clean")

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, position: int) -> tuple[Tensor, int]:
        """The image as (3, H, W) float in [0, 1], and its label."""
        image = self._source.images(np.array([position]))[0]
        return image, int(self._source.labels[position])


@dataclass(frozen=True)
class _GivenAdapter(Method):
    """An adapter of the caller's in the place of a method.

    Args:
        adapter: The adapter.
        start: The state in which it was given.
    """

    adapter: tta.Adapter | None = None
    start: dict[str, Tensor] | None = None

    @classmethod
    def of(cls, adapter: tta.Adapter) -> _GivenAdapter:
        """Take the adapter in the state in which it is."""
        config = adapter.config
        parts = {"norm": config.norm, "update": config.update, "output": config.output}
        slots: dict[str, str | tta.ComponentConfig]
        slots = {slot: part for slot, part in parts.items() if part is not None}
        return cls(config.label, slots, adapter=adapter, start=adapter.state())

    @contextmanager
    def applied(self, subject: Subject, batch_size: int, seed: int) -> Iterator[tta.Adapter]:
        """Give the adapter in the state in which it was given, and put it back to it."""
        assert self.adapter is not None and self.start is not None
        self.adapter.load_state(self.start)
        try:
            yield self.adapter
        finally:
            self.adapter.load_state(self.start)

    def warm_up(self, subject: Subject, images: Tensor) -> None:
        """Predict once without learning."""
        with self.applied(subject, len(images), 0) as adapter, adapter.frozen():
            adapter(subject.preprocess(images.to(subject.device)))


def _check_streams(given: Any) -> dict[str, Stream]:
    """The streams by name; one stream alone is named after its scenario."""
    if isinstance(given, Stream):
        given = {given.config["scenario"]: given}
    if not isinstance(given, Mapping) or not given:
        kind = "an empty mapping" if isinstance(given, Mapping) else type(given).__name__
        raise TypeError(
            f"`stream` must be a tta.streams.Stream or several by name, got {kind}: make one with "
            "tta.streams.build"
        )
    for name, stream in given.items():
        if not isinstance(name, str) or not name or set(name) & set("/\\"):
            raise ValueError(
                f"`stream` must have names that are usable in file names, got {name!r}: choose "
                "another name"
            )
        if not isinstance(stream, Stream):
            raise TypeError(
                f"`stream` must hold tta.streams.Stream objects, got {type(stream).__name__} as "
                f"{name!r}: make it with tta.streams.build"
            )
        first = next(stream.rows(), None)
        if first is None or first[0].step != 0:
            raise ValueError(
                f"`stream` must begin at its first batch and hold at least one, got {stream!r} as "
                f"{name!r}: pass the whole stream"
            )
    return dict(given)


def _check_folder(out: str | Path | None) -> Path | None:
    if out is None:
        return None
    folder = folder_or_file("out", out)
    if folder.is_file() or (folder / RESULTS).exists():
        kind = "a file" if folder.is_file() else "a folder that holds results"
        raise ValueError(
            f"`out` must be a new folder or one without results, got {kind}, {folder}: choose "
            "another one"
        )
    return folder


def _check_left_out(**given: Any) -> None:
    for name, value in given.items():
        if value is not None:
            raise ValueError(
                f"`{name}` must be left out where `model` is an adapter, which is evaluated as it "
                f"is, got {value!r}: pass the plain model to compare methods"
            )


def _make_subject(
    model: nn.Module,
    name: str | None,
    device: torch.device,
    mean: Any,
    std: Any,
    preprocess: Callable[[Tensor], Tensor] | None,
    source: Source | None,
) -> Subject:
    """The model as the runner takes it; see `evaluate`."""
    if (mean is None) != (std is None):
        raise ValueError(
            f"`mean` and `std` must be given together, got mean={mean!r} and std={std!r}: pass both"
        )
    if preprocess is not None and not callable(preprocess):
        raise TypeError(
            f"`preprocess` must be callable on pixels (B, 3, H, W) in [0, 1], got {preprocess!r}"
        )
    if mean is None and isinstance(cfg := getattr(model, "pretrained_cfg", None), Mapping):
        mean, std = cfg.get("mean"), cfg.get("std")
    if mean is None and preprocess is None:
        raise ValueError(
            "`mean` and `std` must say how the model's images are normalised, got neither these "
            "nor preprocess=: pass mean=0, std=1 for a model that takes pixels in [0, 1]"
        )
    if source is not None and not isinstance(source, tta.SourceStatistics):
        if not isinstance(source, Iterable):
            raise TypeError(
                "`source` must be a tta.SourceStatistics or batches (images, labels), got "
                f"{type(source).__name__}"
            )
        if iter(source) is source:
            raise TypeError(
                "`source` must be batches that can be read again for each method, got an iterator: "
                "pass a list or a DataLoader, or what tta.collect_source returns"
            )
    means = () if mean is None else channels("mean", mean)
    stds = () if std is None else channels("std", std, above=0)
    info = ModelInfo(
        name=type(model).__name__ if name is None else name,
        mean=means,
        std=stds,
        input_size=(3, 0, 0),  # whatever the streams show
        num_classes=num_classes(model),
        class_names=None,
        norm_types=dict(Counter(type(m).__name__ for m in model.modules() if is_norm(m))),
    )
    ready = normalise(means, stds, device) if preprocess is None else preprocess
    images = Collection("given in Python", None)
    return Subject(info.name, model, info, source, images, None, ready, device)


def _check_labels(streams: Mapping[str, Stream], classes: int) -> None:
    for name, stream in streams.items():
        most = max(stream.preview().class_counts)
        if most >= classes:
            raise ValueError(
                f"`stream` must show labels in 0..{classes - 1}, the classes of the model, got the "
                f"label {most} in {name!r}: pass labels in the order of the model's classes"
            )


def _parse(given: Any, classes: int) -> list[Method]:
    """Read method strings and configs."""
    if isinstance(given, (str, tta.ComponentConfig)):
        given = [given]
    if not isinstance(given, Iterable):
        raise TypeError(
            f"`methods` must be a list of names or configs, got {type(given).__name__}: such as "
            '["source", "tent"]'
        )
    methods = []
    for item in given:
        if isinstance(item, tta.ComponentConfig):
            methods.append(Method(_spell(item), {component(item.name).slot: item}))
        elif isinstance(item, str):
            methods.append(parse_method(item, classes))
        else:
            raise TypeError(
                f"`methods` must hold names or what tta.get_config returns, got "
                f"{type(item).__name__}"
            )
    check_labels(methods)
    return methods


def _spell(config: tta.ComponentConfig) -> str:
    """A config as a method string: its name and the fields that differ from the default's."""
    default, own = tta.get_config(config.name).to_dict(), config.to_dict()
    changed = {key: value for key, value in own.items() if value != default[key]}
    if "lr" in changed:
        changed.pop("lr_scaling", None)  # a rate that is given is not scaled
    fields = [f"{key}={value!r}" for key, value in changed.items()]
    return config.name + (f"[{', '.join(fields)}]" if fields else "")


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
