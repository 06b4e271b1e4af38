"""What a caller gives to `evaluate` in Python, as the runner takes it, or a sentence why not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import tta
from experiments.data import Collection
from experiments.records.file import is_file_name
from experiments.run.method_strings import Method, check_labels, parse_method
from experiments.run.subject import Subject, normalise
from models import ModelInfo
from tta.core.checks import channels, is_iterable, shown
from tta.core.head import find_head
from tta.core.outputs import LogitsReader
from tta.core.parameters import is_norm
from tta.core.registry import component
from tta.streams import Stream
from tta.streams.sources import ImageSource

__all__ = [
    "CleanImages",
    "GivenAdapter",
    "Preprocess",
    "Source",
    "check_classes",
    "check_left_out",
    "check_streams",
    "make_subject",
    "read_methods",
]

Source = tta.SourceStatistics | Iterable[tuple[Tensor, Tensor]]
Preprocess = Callable[[Tensor], Tensor]


class CleanImages:
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
class GivenAdapter(Method):
    """An adapter of the caller's in the place of a method.

    Args:
        adapter: The adapter.
        start: The state in which it was given.
    """

    adapter: tta.Adapter | None = None
    start: dict[str, Tensor] | None = None

    @classmethod
    def of(cls, adapter: tta.Adapter) -> GivenAdapter:
        """Take the adapter in the state in which it is."""
        config = adapter.config
        slots: dict[str, str | tta.ComponentConfig] = dict(config.components)
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
        """Predict without learning."""
        with self.applied(subject, len(images), 0) as adapter, adapter.frozen():
            adapter(subject.preprocess(images.to(subject.device)))


def check_streams(given: Any) -> dict[str, Stream]:
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
        if not isinstance(name, str) or not is_file_name(name):
            raise ValueError(
                f"`stream` must have names that are usable in file names, got {shown(name)}: "
                "choose "
                "another name"
            )
        if not isinstance(stream, Stream):
            raise TypeError(
                f"`stream` must hold tta.streams.Stream objects, got {type(stream).__name__} as "
                f"{shown(name)}: make it with tta.streams.build"
            )
        first = next(stream.rows(), None)
        if first is None or first[0].step != 0:
            raise ValueError(
                "`stream` must begin at its first batch and hold at least one, got "
                f"{shown(stream)} as "
                f"{shown(name)}: pass the whole stream"
            )
    return dict(given)


def check_left_out(**given: Any) -> None:
    """Refuse arguments that say nothing of an adapter, which is evaluated as it is."""
    for name, value in given.items():
        if value is not None:
            raise ValueError(
                f"`{name}` must be left out where `model` is an adapter, which is evaluated as it "
                f"is, got {shown(value)}: pass the plain model to compare methods"
            )


def make_subject(
    model: nn.Module | tta.Adapter,
    streams: Mapping[str, Stream],
    *,
    name: str | None,
    device: torch.device,
    mean: Any,
    std: Any,
    preprocess: Preprocess | None,
    source: Source | None,
    reading: Mapping[str, Any],
) -> Subject:
    """The model as the runner takes it.

    Args:
        model: As for `evaluate`, as are `name`, `mean`, `std`, `preprocess` and `source`.
        streams: Whose images `preprocess` is tried on.
        name: In tables.
        device: Where the model will be.
        mean: Of channels.
        std: Of channels.
        preprocess: In their place.
        source: Of the training data.
        reading: Arguments of `tta.wrap` that say how the model is read.
    """
    inner = model
    if isinstance(model, tta.Adapter):
        inner, classes = model.model, model.num_classes
        mean = model.config.mean if mean is None else mean
        std = model.config.std if std is None else std
    else:
        reader = LogitsReader(reading["logits"])
        classes = find_head(model, reader, reading["num_classes"], reading["features"]).num_classes
    _check_source(source)
    means, stds = _scale(inner, mean, std, preprocess)
    if preprocess is None:
        ready = normalise(means, stds, device)
    else:
        ready = preprocess
        _check_preprocess(ready, next(iter(next(iter(streams.values())))).images.to(device))
    info = ModelInfo(
        name=type(inner).__name__ if name is None else name,
        mean=means,
        std=stds,
        input_size=(3, 0, 0),  # whatever the streams show
        num_classes=classes,
        class_names=None,
        norm_types=dict(Counter(type(m).__name__ for m in inner.modules() if is_norm(m))),
    )
    images = Collection("given in Python", None)
    return Subject(info.name, inner, info, source, images, None, ready, device)


def _scale(
    model: nn.Module, mean: Any, std: Any, preprocess: Any
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Means and standard deviations of the three channels; empty where nobody knows them."""
    if (mean is None) != (std is None):
        raise ValueError(
            f"`mean` and `std` must be given together, got mean={shown(mean)} and "
            f"std={shown(std)}: pass both"
        )
    if mean is None and isinstance(cfg := getattr(model, "pretrained_cfg", None), Mapping):
        mean, std = cfg.get("mean"), cfg.get("std")
    if mean is None and preprocess is None:
        raise ValueError(
            "`mean` and `std` must say how the model's images are normalised, got neither these "
            "nor preprocess=: pass mean=0, std=1 for a model that takes pixels in [0, 1]"
        )
    if mean is None:
        return (), ()
    means, stds = channels("mean", mean), channels("std", std, low=0, above=True)
    for name, values in (("mean", means), ("std", stds)):
        if len(values) not in (1, 3):
            raise ValueError(
                f"`{name}` must be one number, or one for each of the 3 channels of the stream's "
                f"images, got {len(values)} of them, {values}: pass 1 or 3"
            )
    return means, stds


def _check_preprocess(preprocess: Any, images: Tensor) -> None:
    if not callable(preprocess):
        raise TypeError(
            "`preprocess` must be callable on pixels (B, 3, H, W) in [0, 1], got "
            f"{shown(preprocess)}: "
            "pass a function"
        )
    ready = preprocess(images)
    shape = f"a tensor of shape {tuple(ready.shape)}" if isinstance(ready, Tensor) else repr(ready)
    if not isinstance(ready, Tensor) or ready.shape[:1] != images.shape[:1]:
        raise TypeError(
            f"`preprocess` must return a tensor with a row for each of the {len(images)} images, "
            f"got {shape}: return what the model takes"
        )


def _check_source(source: Any) -> None:
    if source is None or isinstance(source, tta.SourceStatistics):
        return
    if not is_iterable(source):
        raise TypeError(
            "`source` must be a tta.SourceStatistics or batches (images, labels), got "
            f"{type(source).__name__}: pass what tta.collect_source returns"
        )
    if iter(source) is source:
        raise TypeError(
            "`source` must be batches that can be read again for each method, got an iterator: "
            "pass a list or a DataLoader, or what tta.collect_source returns"
        )


def check_classes(streams: Mapping[str, Stream], classes: int) -> None:
    """Refuse streams with labels that the model does not have."""
    for name, stream in streams.items():
        most = max(stream.preview().class_counts)
        if most >= classes:
            raise ValueError(
                f"`stream` must show labels in 0..{classes - 1}, the classes of the model, got the "
                f"label {most} in {shown(name)}: pass labels in the order of the model's classes"
            )


def read_methods(given: Any, classes: int, further: Mapping[str, Any]) -> list[Method]:
    """Read method strings and configs.

    Args:
        given: As for `evaluate`.
        classes: The model's number of classes.
        further: Arguments of `tta.wrap` for all of them.
    """
    if isinstance(given, (str, tta.ComponentConfig)):
        given = [given]
    if not is_iterable(given):
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
    return [replace(method, further=dict(further)) for method in methods]


def _spell(config: tta.ComponentConfig) -> str:
    """A config as a method string: its name and the fields that differ from the default's."""
    default, own = tta.get_config(config.name).to_dict(), config.to_dict()
    changed = {key: value for key, value in own.items() if value != default[key]}
    if "lr" in changed:
        changed.pop("lr_scaling", None)  # a rate that is given is not scaled
    fields = [f"{key}={value!r}" for key, value in changed.items()]
    return config.name + (f"[{', '.join(fields)}]" if fields else "")
