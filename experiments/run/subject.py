"""The model and the images of a run, opened and checked against each other."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

import models
import tta
from corruptions.pictures import OnError
from experiments.data import Collection, LabelledSet, open_data
from experiments.records.config import RunConfig
from tta.core.checks import path_like, shown
from tta.runtime.model_strings import pick_device

__all__ = ["Subject", "load_subject", "normalise", "pick_device", "subject_arguments"]


@dataclass
class Subject:
    """A model and the images that it is shown.

    Args:
        name: The model's name.
        model: The model, on `device`.
        info: What a caller of the model must know. Where `mean` and `std` are empty, nobody knows
            how `preprocess` scales pixels.
        source: Artefacts made from its training images, or such images in batches, or None.
        data: Shifted domains, or the images to shift.
        clean: Clean images, or None.
        preprocess: Pixels (B, 3, H, W) in [0, 1] to what the model takes.
        device: Where the model is.
    """

    name: str
    model: nn.Module
    info: models.ModelInfo
    source: tta.SourceStatistics | Iterable[tuple[Tensor, Tensor]] | None
    data: Collection
    clean: LabelledSet | None
    preprocess: Callable[[Tensor], Tensor]
    device: torch.device

    def warm_up(self, images: Tensor) -> None:
        """Run the plain model once, which is left as it was.

        Args:
            images: (B, 3, H, W) in [0, 1].
        """
        modes = [(module, module.training) for module in self.model.modules()]
        self.model.eval()
        try:
            with torch.no_grad():
                self.model(self.preprocess(images.to(self.device)))
        finally:
            for module, mode in modes:
                module.training = mode

    def describe(self) -> dict[str, Any]:
        """The model for a results file."""
        return {
            "name": self.name,
            "architecture": type(self.model).__name__,
            "norm_layers": self.info.norm_types,
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "source_artefacts": self._source_artefacts(),
            "card": None if self.info.card is None else str(self.info.card),
        }

    def _source_artefacts(self) -> list[str]:
        if isinstance(self.source, tta.SourceStatistics):
            return list(self.source.contents)
        return [] if self.source is None else ["batches"]


def subject_arguments(config: RunConfig, device: torch.device) -> tuple[Any, ...]:
    """What a run's configuration says of its model and images, as `load_subject` takes it."""
    files = config.clean, config.source, config.classes, config.labels
    return (config.model, config.data, device, *files, config.on_error, config.match)


def load_subject(
    model_name: str,
    data_name: str,
    device: torch.device,
    clean_name: str | None = None,
    source_path: str | None = None,
    classes_path: str | None = None,
    labels_path: str | None = None,
    on_error: OnError = "raise",
    match: Literal["name", "order"] = "name",
) -> Subject:
    """Load a model and open the data it is shown.

    Args:
        model_name: For `models.load`.
        data_name: For `experiments.data.open_data`.
        device: Where the model goes.
        clean_name: Path of clean images; those of `data_name` are shifted ones then.
        source_path: File of a `tta.SourceStatistics`; default: what comes with the model.
        classes_path: File of class folders' names in label order, a line each.
        labels_path: File of the label of each picture in a folder without class folders.
        on_error: What to do about pictures that cannot be read.
        match: How the tensors of a checkpoint in `model_name` are paired, see `models.load`.
    """
    options: dict[str, Any] = {} if match == "name" else {"match": match}
    model, info = models.load(model_name, **options)
    size, classes = info.input_size[-1], None if classes_path is None else _lines(classes_path)
    if classes is not None and len(classes) != info.num_classes:
        raise ValueError(
            f"`classes` must name the {info.num_classes} classes of {model_name}, got "
            f"{len(classes)} lines in {classes_path}: one line for each, in label order"
        )

    def read(where: str) -> Collection:
        return open_data(
            where, size, classes, info.num_classes, labels=labels_path, on_error=on_error
        )

    data = shifted = read(data_name)
    clean = data.clean
    if clean_name is not None:
        clean = read(clean_name).clean
        if clean is None:
            raise ValueError(f"`clean` must be a path of clean images, got {shown(clean_name)}")
        shifted = data.as_shifted()
    for images in (data.clean, clean):
        if images is not None and len(images.classes) > info.num_classes:
            raise ValueError(
                f"`data` must not have more classes than the model, got {len(images.classes)} in "
                f"{images.origin} and {info.num_classes} in {model_name}: choose another model"
            )
    source = info.source
    if source_path is not None:
        if not path_like("source", source_path).is_file():
            raise FileNotFoundError(
                f"`{source_path}` is missing: make it with tta.collect_source(...).save(path)"
            )
        source = tta.SourceStatistics.load(source_path)
    preprocess = normalise(info.mean, info.std, device)
    model = model.to(device).eval()
    return Subject(model_name, model, info, source, shifted, clean, preprocess, device)


def _lines(path: str) -> list[str]:
    if not path_like("classes", path).is_file():
        raise FileNotFoundError(f"`classes` must be a text file, but {path} is none")
    lines = [line.strip() for line in Path(path).read_text().splitlines() if line.strip()]
    if len(set(lines)) < len(lines):
        twice = next(line for line in lines if lines.count(line) > 1)
        raise ValueError(
            f"`classes` must name each class once, but {path} has {shown(twice)} again"
        )
    return lines


def normalise(
    mean: Sequence[float], std: Sequence[float], device: torch.device
) -> Callable[[Tensor], Tensor]:
    """Make the function from pixels (B, 3, H, W) in [0, 1] to what a model takes.

    Args:
        mean: Mean of each channel, or one for all.
        std: Standard deviation of each channel, or one for all.
        device: Where the pixels are.
    """
    means, stds = (torch.tensor(v, device=device).view(1, -1, 1, 1) for v in (mean, std))
    if bool((means == 0).all()) and bool((stds == 1).all()):
        return lambda images: images
    return lambda images: (images - means) / stds
