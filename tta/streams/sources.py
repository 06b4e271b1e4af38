"""Where the pixels and labels of a stream come from: datasets, seen through named domains."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tta.core.checks import dense, shown, told
from tta.streams.items import (
    as_array,
    as_pixels,
    image_of,
    join,
    label_of,
    length_of,
    scale,
)

__all__ = ["CLEAN", "Condition", "Domains", "ImageSource", "Images", "Transform"]

ROUNDING = 1e-3  # beyond [0, 1], which a transform may leave

Transform = Callable[..., Tensor]
Images = Tensor | list[Tensor]  # (B, 3, H, W), or (3, H, W) each
CLEAN = "clean"


@dataclass(frozen=True)
class Condition:
    """The transforms that an image goes through in turn, as pairs (domain, severity).

    There is one pair, except in smooth walks, which have two. The domain called "clean" changes
    nothing.
    """

    steps: tuple[tuple[str, float], ...]

    @property
    def domain(self) -> str:
        """The domain's name; two are joined by a plus sign."""
        return "+".join(name for name, _ in self.steps)

    @property
    def severity(self) -> float | tuple[float, ...]:
        """The severity; one per transform where there are two."""
        values = tuple(value for _, value in self.steps)
        return values[0] if len(values) == 1 else values

    @staticmethod
    def of(domain: str, severity: float) -> Condition:
        """Make the condition of one domain; "clean" always has severity 0."""
        value = 0 if domain == CLEAN else severity
        return Condition(((domain, int(value) if value == int(value) else float(value)),))


def _found_labels(dataset: Any) -> Any | None:
    """Look for labels that can be read without loading images; None where there are none."""
    if getattr(dataset, "target_transform", None) is not None:
        return None  # torchvision: items then have other labels than `targets` says
    if hasattr(dataset, "indices") and hasattr(dataset, "dataset"):  # torch's Subset
        inner = _found_labels(dataset.dataset)
        return None if inner is None else np.asarray(inner)[np.asarray(dataset.indices)]
    for name in ("targets", "labels"):
        values = getattr(dataset, name, None)
        if values is not None and hasattr(values, "__len__") and len(values) == len(dataset):
            return values
    tensors = getattr(dataset, "tensors", None)  # torch's TensorDataset
    return tensors[1] if isinstance(tensors, tuple) and len(tensors) == 2 else None


class ImageSource:
    """One dataset, of which pixels are read by index and all labels at once.

    Args:
        dataset: Anything with `__len__` and `__getitem__ -> (image, label)`, whose items may also
            be dictionaries such as ``{"image": ..., "label": ...}``; or a pair of arrays (images
            (N, H, W, 3) uint8, labels (N,)), which may lie in a file, as those of HDF5 do.
        name: Its name in error messages.
        labels: (N,) labels, to spare reading a dataset whose labels are not in `targets`,
            `labels` or `tensors[1]`; without it such a dataset is read through once.
    """

    def __init__(self, dataset: Any, name: str, labels: Any | None = None) -> None:
        if _is_pair_of_lists(dataset):
            dataset = (np.asarray(dataset[0]), np.asarray(dataset[1]))
        self.name = name
        self._dataset = dataset
        self._arrays: Any | None = None
        if (
            isinstance(dataset, (tuple, list))
            and len(dataset) == 2
            and (isinstance(dataset[0], Tensor) or hasattr(dataset[0], "shape"))
        ):
            images, own = dataset
            if isinstance(images, Tensor):
                dense(name, images)
            shape = tuple(images.shape)
            if len(shape) != 4 or (shape[3] != 3 and shape[1] != 3):
                raise ValueError(
                    f"`{name}` must be a pair of images (N, H, W, 3) and labels (N,), "
                    f"got images of shape {shape}; give them three channels, as of RGB"
                )
            if length_of(own, name) != shape[0]:
                raise ValueError(
                    f"`{name}` must hold one label per image, got {shape[0]} images "
                    f"and {len(own)} labels; pass arrays of the same length"
                )
            self._arrays = images
            labels = own if labels is None else labels
        elif isinstance(dataset, Mapping):
            raise TypeError(
                f"`{name}` must be one dataset or a pair of arrays, got a {type(dataset).__name__} "
                f"with the keys {told(', '.join(map(str, list(dataset)[:5])), 60) or '(none)'}: "
                "choose one "
                'of its datasets, or pass the pair (data["images"], data["labels"])'
            )
        elif (
            isinstance(dataset, (str, bytes))
            or not hasattr(dataset, "__len__")
            or not hasattr(dataset, "__getitem__")
        ):
            came = shown(dataset) if isinstance(dataset, str) else type(dataset).__name__
            raise TypeError(
                f"`{name}` must have __len__ and __getitem__ giving (image, label), or be a pair "
                f"of arrays (N, H, W, 3) and (N,), got {came}; open the images first, such as by "
                "torchvision.datasets.ImageFolder"
            )
        self._size = length_of(dataset if self._arrays is None else self._arrays, name)
        if self._size == 0:
            raise ValueError(f"`{name}` must hold at least one image, got an empty dataset")
        if labels is not None and length_of(labels, "labels") != self._size:
            raise ValueError(
                f"`labels` must hold one label per image of `{name}`, got {len(labels)} labels "
                f"for {self._size} images"
            )
        self._given = labels

    def __len__(self) -> int:
        """Return the number of images."""
        return self._size

    @property
    def in_memory(self) -> bool:
        """Whether images are rows of an array; an item of another dataset may be a file."""
        return self._arrays is not None

    @cached_property
    def labels(self) -> NDArray[np.int64]:
        """All labels, (N,) int64."""
        found = self._given if self._given is not None else _found_labels(self._dataset)
        if found is None:
            found = [self._label(i) for i in range(self._size)]
        labels = as_array(found, f"labels of {self.name}")
        if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
            raise TypeError(
                f"the labels of `{self.name}` must be whole numbers of shape (N,), got "
                f"{labels.dtype} of shape {labels.shape}; pass class numbers"
            )
        if int(labels.min()) < 0:
            raise ValueError(
                f"the labels of `{self.name}` must be class numbers from 0, "
                f"got {int(labels.min())}; remove or renumber the samples without a class"
            )
        return labels.astype(np.int64)

    def _label(self, number: int) -> int:
        found = label_of(self._item(number), self.name, number)
        try:
            label = int(found)
            if isinstance(found, float) and found != label:
                raise ValueError(f"{found} is no whole number")
            return label
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(
                f"`{self.name}` must give pairs (image, label), got items whose label cannot "
                f"be read ({told(error)}); pass labels= or such a data set"
            ) from error

    def each(self, index: NDArray[np.int64]) -> Images:
        """Read the images at `index` (B,), one by one where their sizes may differ."""
        if self._arrays is not None:
            return self.images(index)
        numbers = [int(i) for i in index]
        return [as_pixels(image_of(self._item(i), self.name, i), self.name) for i in numbers]

    def images(self, index: NDArray[np.int64]) -> Tensor:
        """Read the images at `index` (B,), as (B, 3, H, W) float32 in [0, 1]."""
        if self._arrays is None:
            return join(list(self.each(index)), self.name, index.tolist())
        pixels = self._rows(self._arrays, index)
        if pixels.shape[-1] == 3:
            pixels = pixels.permute(0, 3, 1, 2)
        return scale(pixels, self.name).contiguous()

    def _item(self, number: int) -> Any:
        """One item; an exception of the dataset is given a note that says which."""
        try:
            return self._dataset[number]
        except Exception as error:
            add_note = getattr(error, "add_note", None)  # from Python 3.11 on
            if add_note is not None:
                add_note(f"raised by `{self.name}` for its item {number}")
            raise

    @staticmethod
    def _rows(arrays: Any, index: NDArray[np.int64]) -> Tensor:
        """Rows of an array, whatever kind it is."""
        if isinstance(arrays, Tensor):
            return arrays[torch.from_numpy(index)]
        if isinstance(arrays, np.ndarray):
            return torch.from_numpy(np.ascontiguousarray(arrays[index]))
        # Arrays in files, as those of HDF5, give rows in ascending order and each row once.
        ascending, back = np.unique(index, return_inverse=True)
        rows = arrays[ascending]
        if isinstance(rows, Tensor):
            return rows[torch.from_numpy(back).to(rows.device)]
        return torch.from_numpy(np.ascontiguousarray(np.asarray(rows)[back]))


class Domains:
    """All domains of a stream: which dataset each one reads, and how its pixels are changed.

    Args:
        dataset: The dataset behind every named domain, and the "clean" one; None if `domains`
            brings its own datasets.
        domains: Names, or a mapping from name to a dataset, or from name to a mapping from
            severity to a dataset (files of one corruption at several levels).
        transform: `transform(images, domain, severity, generator=g)`, for named domains.
        labels: (N,) labels of `dataset`, if it cannot tell them itself.
        before: `before(images, generator=g)`, for every batch of pixels that was read.
        after: `after(images)`, for every batch once it is transformed.
    """

    def __init__(
        self,
        dataset: Any | None,
        domains: Sequence[str] | Mapping[str, Any],
        transform: Transform | None,
        labels: Any | None = None,
        before: Transform | None = None,
        after: Transform | None = None,
    ) -> None:
        _check_functions(transform, before, after)
        own = isinstance(domains, Mapping)
        if own and transform is not None:
            raise ValueError(
                "`transform` must be None where `domains` are datasets of their own, got both; "
                "pass names in `domains` to have `dataset` transformed"
            )
        if dataset is None and not own:
            raise ValueError(
                "`dataset` must be a dataset or a pair of arrays, got None; it may be left out "
                "only where `domains` maps names to datasets"
            )
        self.names = [str(name) for name in domains]
        if not own and transform is None and set(self.names) != {CLEAN}:
            raise ValueError(
                f"`transform` must be given for the domains {shown(self.names)}, got None; pass "
                "transform=corruptions.corrupt, or map each name to its own dataset in `domains`"
            )
        self.transform = transform
        self.before, self.after = before, after
        self.base = None if dataset is None else ImageSource(dataset, "dataset", labels)
        self._own = _own_sources(domains) if isinstance(domains, Mapping) else {}

    def source(self, condition: Condition) -> ImageSource:
        """Return the dataset that a condition reads."""
        name, severity = condition.steps[0]
        levels = self._own.get(name)
        if levels is None:
            if self.base is None:
                raise ValueError(
                    f'`dataset` must be given for the domain "{name}", got None; pass the clean '
                    f'set as `dataset`, or as domains["{name}"]'
                )
            return self.base
        if None in levels:
            return levels[None]
        if severity not in levels:
            raise ValueError(
                f'`domains["{name}"]` must hold severity {severity}, got only '
                f"{sorted(level for level in levels if level is not None)}; add that level's files"
            )
        return levels[severity]

    @property
    def has_items(self) -> bool:
        """Whether some images are items of a dataset, and not rows of an array."""
        own = [source for levels in self._own.values() for source in levels.values()]
        every = own if self.base is None else [self.base, *own]
        return any(not source.in_memory for source in every)

    def read(self, condition: Condition, index: NDArray[np.int64]) -> Images:
        """Read the images at `index` (B,); one by one where `before` puts them together."""
        source = self.source(condition)
        return source.images(index) if self.before is None else source.each(index)

    def has_levels(self, name: str) -> bool:
        """Tell whether a domain can be shown at more than one severity."""
        levels = self._own.get(name)
        return self.transform is not None if levels is None else None not in levels

    def render(self, condition: Condition, images: Images, seed: Callable[[], int]) -> Tensor:
        """Transform images.

        Args:
            condition: The transforms.
            images: The B images, as `read` returned them.
            seed: Gives the seed of the transform's own generator, where there is any.

        Returns:
            (B, 3, H, W) float32 in [0, 1].
        """
        draws, count = self.transform is not None or self.before is not None, len(images)
        generator = torch.Generator().manual_seed(seed()) if draws else None
        if self.before is not None:
            images = _batch("before", self.before(images, generator=generator), count)
        assert isinstance(images, Tensor)  # `read` leaves them apart for `before` alone
        for name, severity in condition.steps:
            if (
                self.transform is None
                or name == CLEAN
                or (severity == 0 and len(condition.steps) > 1)
            ):
                continue
            result = self.transform(images, name, severity, generator=generator)
            images = _batch("transform", result, count, f" for {name}")
        return images if self.after is None else _batch("after", self.after(images), count)


def _check_functions(transform: Any, before: Any, after: Any) -> None:
    for name, function in (("before", before), ("after", after)):
        if function is not None and not callable(function):
            raise TypeError(
                f"`{name}` must be callable on a batch of images, got {type(function).__name__}"
            )
    if transform is not None and not callable(transform):
        raise TypeError(
            f"`transform` must be callable as transform(images, domain, severity, "
            f"generator=g), got {type(transform).__name__}"
        )


def _own_sources(domains: Mapping[str, Any]) -> dict[str, dict[float | None, ImageSource]]:
    """Open the datasets of domains that bring their own, by name and severity.

    Args:
        domains: Name to a dataset, which is then found under None, or to {severity: dataset}.
    """
    found: dict[str, dict[float | None, ImageSource]] = {}
    for name, data in domains.items():
        levels = data if isinstance(data, Mapping) else {None: data}
        found[str(name)] = {
            level: ImageSource(item, f'domains["{name}"]') for level, item in levels.items()
        }
    return found


def _batch(argument: str, images: Any, count: int, where: str = "") -> Tensor:
    """Check the images that a function of the user returned for `count` images."""
    if isinstance(images, Tensor):
        dense(argument, images)
        if images.is_complex():
            raise TypeError(f"`{argument}` must return real numbers, got {images.dtype}{where}")
    if not isinstance(images, Tensor) or images.ndim != 4 or images.shape[:2] != (count, 3):
        kind = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
        raise TypeError(
            f"`{argument}` must return a tensor of shape ({count}, 3, H, W), got {kind}{where}"
        )
    if images.numel() == 0:
        raise ValueError(
            f"`{argument}` must return images with pixels, got {tuple(images.shape)}{where}"
        )
    low, high = images.aminmax()
    if not (low >= -ROUNDING and high <= 1 + ROUNDING):
        raise ValueError(
            f"`{argument}` must return pixels in [0, 1], got values from {float(low):g} to "
            f"{float(high):g}{where}"
        )
    return images


def _is_pair_of_lists(dataset: Any) -> bool:
    """Whether these are a list of arrays (H, W, 3) of one shape and a list of their labels."""
    if not isinstance(dataset, (tuple, list)) or len(dataset) != 2:
        return False
    images, labels = dataset
    if not (isinstance(images, list) and isinstance(labels, list) and len(images) > 2):
        return False
    shapes = {image.shape if isinstance(image, np.ndarray) else None for image in images}
    numbers = all(isinstance(label, (int, np.integer)) for label in labels)
    return len(shapes) == 1 and None not in shapes and numbers and len(images) == len(labels)
