"""Items of datasets as they come: which part is the image, which the label, and their pixels."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tta.core.checks import LARGEST, dense, told
from tta.core.pictures import as_rgb, is_picture

__all__ = [
    "as_array", "as_pixels", "concatenate", "image_of", "join", "label_of", "length_of", "scale",
]  # fmt: skip

# Keys of items that are dictionaries, as datasets and image processors of transformers name them.
IMAGE_KEYS = ("image", "img", "pixel_values", "images", "pixels", "x")
LABEL_KEYS = ("label", "labels", "fine_label", "target", "targets", "y")
OVERSHOOT = 0.5  # beyond [0, 1], by sharp resizing of pixels; normalised ones go further
LEVELS = 16.0  # pixels above are levels up to 255, since normalised ones stay below


def length_of(values: Any, name: str) -> int:
    """How many items there are.

    Raises:
        TypeError: When it has no length, as a class, a number or an array without axes.
        ValueError: When there are more than can be numbered here.
    """
    try:
        length = len(values)
    except (TypeError, RuntimeError) as error:
        raise TypeError(
            f"`{name}` must have a length, got a {type(values).__name__} ({told(error)}): pass a "
            "dataset or an array"
        ) from None
    except OverflowError:
        length = LARGEST + 1
    if length > LARGEST:
        raise ValueError(
            f"`{name}` must hold at most {LARGEST} items, got more: pass a part of them"
        )
    return length


def as_array(values: Any, name: str) -> np.ndarray:
    """Values as an array.

    Raises:
        TypeError: When they are no array, such as rows that differ in length.
    """
    if isinstance(values, Tensor):
        dense(name, values)
        values = values.detach().cpu()
    if isinstance(values, Sequence):
        length_of(values, name)  # not more than memory can hold
    try:
        return np.asarray(values)
    except (TypeError, ValueError, RuntimeError, MemoryError) as error:
        raise TypeError(
            f"`{name}` must be an array of numbers, got a {type(values).__name__} that is none "
            f"({told(error) or type(error).__name__}): convert it"
        ) from None


def image_of(item: Any, name: str, number: int) -> Any:
    """The image of an item: the first of a pair, or what a dictionary has under a known key.

    Items without a label, such as arrays, are taken for images; their labels are told otherwise.

    Args:
        item: What ``dataset[number]`` returned.
        name: The dataset's name in error messages.
        number: The item's place in the dataset.

    Raises:
        TypeError: When the item is None or of another kind, or has no known key.
    """
    if isinstance(item, (Tensor, np.ndarray)) or is_picture(item):
        return item
    return _part(item, 0, IMAGE_KEYS, name, number)


def label_of(item: Any, name: str, number: int) -> Any:
    """The label of an item; see `image_of`."""
    return _part(item, 1, LABEL_KEYS, name, number)


def _part(item: Any, place: int, keys: tuple[str, ...], name: str, number: int) -> Any:
    if isinstance(item, Mapping):
        found = next((key for key in keys if key in item), None)
        if found is None:
            raise TypeError(
                f"`{name}` must give dictionaries with one of the keys {', '.join(keys)}, got item "
                f"{number} with {told(', '.join(map(str, item)), 40) or 'no key'}: rename the "
                "key, or wrap "
                "the dataset so that it gives pairs (image, label)"
            )
        return item[found]
    if isinstance(item, (tuple, list)) and len(item) > place:
        return item[place]
    if item is None:
        raise TypeError(
            f"`{name}` must give pairs (image, label), got None for item {number}: leave out the "
            "items that cannot be read, for example by torch.utils.data.Subset"
        )
    kind = f"a {type(item).__name__}"
    raise TypeError(
        f"`{name}` must give pairs (image, label) or dictionaries such as "
        f'{{"image": ..., "label": ...}}, got {kind} for item {number}: wrap the dataset so that '
        "it gives pairs"
    )


def as_pixels(image: Any, name: str = "dataset") -> Tensor:
    """Turn one image into (3, H, W) float32 in [0, 1].

    Args:
        image: A Pillow picture of any mode, which becomes RGB and is turned upright as its EXIF
            orientation says; or an array or tensor of uint8 or floating-point pixels in [0, 1], of
            shape (H, W, 3) or (3, H, W).
        name: The dataset's name in error messages.

    Raises:
        ValueError: For images of another shape, or pixels of another range.
        TypeError: For pixels of another type.
    """
    if is_picture(image):
        image = np.asarray(as_rgb(image, name))
    is_tensor = isinstance(image, Tensor)
    if is_tensor:
        dense(name, image)
    pixels = image if is_tensor else _tensor(as_array(image, name), name)
    last = pixels.ndim == 3 and pixels.shape[-1] == 3
    if last and not (is_tensor and pixels.shape[0] == 3):  # such a tensor has channels first
        pixels = pixels.permute(2, 0, 1)
    if pixels.ndim != 3 or pixels.shape[0] != 3:
        raise ValueError(
            f"`{name}` must give colour images, a (3, H, W) tensor or an (H, W, 3) array, "
            f"got shape {told(tuple(pixels.shape))}; convert it to RGB"
        )
    return scale(pixels, name)


def _tensor(array: np.ndarray, name: str) -> Tensor:
    if array.dtype.kind in "SUO":
        raise TypeError(
            f"`{name}` must give pictures, arrays or tensors as images, got text, bytes or "
            "objects: open them in the dataset, such as by PIL.Image.open."
        )
    try:
        return torch.from_numpy(np.array(array))
    except TypeError:
        raise TypeError(
            f"`{name}` must give uint8 or float images, got an array of {array.dtype}; convert to "
            "uint8"
        ) from None


def scale(pixels: Tensor, name: str = "dataset") -> Tensor:
    """Bring uint8 or float pixels to float32 in [0, 1]; the errors say how to mend others."""
    if pixels.dtype == torch.uint8:
        return pixels.float().div_(255.0)
    if not pixels.is_floating_point():
        raise TypeError(
            f"`{name}` must give uint8 or float images, got {pixels.dtype}; convert to uint8"
        )
    pixels = pixels.float()
    if not pixels.numel():
        return pixels
    low, high = (float(value) for value in pixels.aminmax())
    if low >= 0.0 and high <= 1.0:
        return pixels
    got = f"{low:.7g}..{high:.7g}"
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError(
            f"`{name}` must give pixels in [0, 1], got {got}; remove the values that are not finite"
        )
    if low >= -OVERSHOOT and high <= 1 + OVERSHOOT:
        raise ValueError(
            f"`{name}` must give pixels in [0, 1], got {got}; clamp them with clamp(0, 1), as "
            "bicubic resizing overshoots"
        )
    if low >= -255 * OVERSHOOT and high > LEVELS:
        raise ValueError(
            f"`{name}` must give pixels in [0, 1], got {got}; divide them by 255, or give uint8"
        )
    raise ValueError(
        f"`{name}` must give pixels in [0, 1], got {got}; leave normalisation to the model"
    )


def join(images: Sequence[Tensor], name: str, numbers: Sequence[int]) -> Tensor:
    """Put images (3, H, W) of one size together to (B, 3, H, W).

    Args:
        images: The images, at least one.
        name: The dataset's name in error messages.
        numbers: Their places in the dataset.

    Raises:
        ValueError: When sizes differ.
    """
    for image, number in zip(images, numbers, strict=True):
        if image.shape != images[0].shape:
            raise ValueError(
                f"`{name}` must give images of one size in a batch, got {_size(images[0])} pixels "
                f"for item {numbers[0]} and {_size(image)} for item {number}: resize them in the "
                "dataset, or pass a function as `before` that puts a list of images together"
            )
    return torch.stack(list(images))


def concatenate(parts: Sequence[Tensor]) -> Tensor:
    """Put batches (B, 3, H, W) of one size together, of several domains or steps of a stream.

    Raises:
        ValueError: When sizes differ.
    """
    sizes = list(dict.fromkeys(_size(part) for part in parts))
    if len(sizes) > 1:
        raise ValueError(
            f"`dataset` and `domains` must give images of one size where a batch or a window holds "
            f"several, got {' and '.join(sizes)} pixels: resize them in the dataset"
        )
    return torch.cat(list(parts))


def _size(image: Tensor) -> str:
    return f"{image.shape[-2]} x {image.shape[-1]}"
