"""Argument checks of the public functions; errors say what was expected, what came, what to do."""

from __future__ import annotations

import difflib
import math
import numbers
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor

from corruptions.messages import shown, told
from corruptions.pictures import OnError
from corruptions.severity import ParameterSet

__all__ = [
    "drawn", "folder", "images", "name", "on_error", "parameters", "seed", "seeds", "severity",
    "shape",
]  # fmt: skip

# RGB, and grey, which counts as three equal channels.
CHANNELS = (3, 1)
# How far outside [0, 1] bicubic interpolation of such pixels may reach (0.445 for two axes).
_OVERSHOOT = 0.45
# Below this the recipes have no room: glass_blur alone moves pixels by up to 4 either way.
_SMALLEST = 8
_AXES = 9  # more than any batch of images has
_MOST_VALUES = 2**33  # of a batch; as float32 they take 32 GiB


def name(value: object, known: Iterable[str]) -> None:
    """Raise unless `value` is a known corruption, naming the nearest one."""
    known = list(known)
    if isinstance(value, str) and value in known:
        return
    if not isinstance(value, str):
        raise TypeError(
            f"`name` must be the name of a corruption, got {type(value).__name__}: "
            "see corruptions.list_corruptions(extra=True)"
        )
    near = difflib.get_close_matches(value[:100].lower().replace(" ", "_"), known, 1)
    advice = f"did you mean {near[0]!r}?" if near else f"choose from {told(', '.join(known), 150)}"
    raise ValueError(f"`name` must be a known corruption, got {shown(value)}: {advice}")


def severity(value: object) -> None:
    """Raise unless `value` is a number from 0 to 5."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(
            f"`severity` must be a number from 0 (clean) to 5, got {type(value).__name__}: "
            "pass one int or float for the whole batch"
        )
    if not 0 <= value <= 5:  # type: ignore[operator]
        raise ValueError(
            f"`severity` must lie in 0..5, got {shown(value)}: 1 to 5 are the published levels, 0 "
            "is the "
            "clean image"
        )


def parameters(value: object) -> None:
    """Raise unless `value` names a parameter set."""
    choices = get_args(ParameterSet)
    if not isinstance(value, str) or value not in choices:
        raise ValueError(
            f"`parameters` must be one of {', '.join(choices)}, got {shown(value)}: use 'auto' to "
            "choose by image size"
        )


def on_error(value: object) -> None:
    """Raise unless `value` says what to do about pictures that cannot be read."""
    choices = get_args(OnError)
    if not isinstance(value, str) or value not in choices:
        raise ValueError(
            f"`on_error` must be one of {', '.join(choices)}, got {shown(value)}: 'skip' leaves "
            "out and "
            "counts pictures that cannot be read"
        )


def folder(value: str | Path | None) -> Path | None:
    """Return `value` as a path; raise unless it is an existing folder or None."""
    if value is not None and not isinstance(value, (str, os.PathLike)):
        raise TypeError(
            f"`frost_pictures` must be a path, got {type(value).__name__}: leave it out for "
            "synthetic frost"
        )
    if value is None or os.path.isdir(value):  # which raises for no path at all
        return None if value is None else Path(value)
    raise ValueError(
        f"`frost_pictures` must be an existing folder, got {shown(str(value))}: check the path, or "
        "leave it out for synthetic frost"
    )


def shape(value: Sequence[int]) -> tuple[int, int, int, int]:
    """Return `value` as a tuple; raise unless it is (B, C, H, W) of sizes that work, C 3 or 1."""
    few = isinstance(value, Sequence) and len(value[:_AXES]) < _AXES  # len fails for long ranges
    integers = few and all(isinstance(n, numbers.Integral) for n in value)
    if not integers:
        raise TypeError(
            f"`shape` must be the whole numbers (B, 3, H, W), got {shown(value)}: pass images.shape"
        )
    size = tuple(int(n) for n in value)
    if len(size) != 4:
        raise ValueError(
            f"images must have shape (B, 3, H, W), got {shown(size)}: {_batched(size)}"
        )
    batch, channels, height, width = size
    if channels not in CHANNELS:
        if width in (1, 3, 4):
            hint = "permute them by images.permute(0, 3, 1, 2), the same as images.movedim(-1, 1)"
        elif channels == 4:
            hint = "drop the transparency by images[:, :3]"
        else:
            hint = "pass RGB images, or grey ones of one channel"
        raise ValueError(
            f"images must have 3 channels in shape (B, 3, H, W), or 1, got {shown(size)}: {hint}"
        )
    if batch < 1:
        raise ValueError(
            f"images must hold at least one image, got shape {tuple(value)}: skip empty batches"
        )
    if min(height, width) < _SMALLEST:
        raise ValueError(
            f"images must be at least {_SMALLEST} x {_SMALLEST} pixels, got {shown(size)}: "
            "enlarge them first"
        )
    if batch * channels * height * width > _MOST_VALUES:
        raise ValueError(
            f"images must hold at most {_MOST_VALUES:.0e} values, got shape {shown(size)}: take "
            "smaller batches"
        )
    return batch, channels, height, width


def _batched(size: tuple[int, ...]) -> str:
    """Advise how to make a batch of a tensor with another number of dimensions."""
    if len(size) == 3 and size[0] not in CHANNELS and size[2] in (1, 3, 4):
        return "for one image of shape (H, W, 3) use image.permute(2, 0, 1)[None]"
    if len(size) == 2:
        return "for one grey image use image[None, None]"
    return "for one image add a batch dimension by image[None]"


def images(value: Tensor) -> None:
    """Raise unless `value` is a batch of RGB or grey images, uint8 or floating point in [0, 1]."""
    if not isinstance(value, Tensor):
        raise TypeError(
            f"images must be a torch.Tensor of shape (B, 3, H, W), got {type(value).__name__}: "
            "convert arrays by torch.from_numpy"
        )
    dense("images", value)
    shape(value.shape)
    if value.dtype == torch.uint8:
        return
    if not value.is_floating_point():
        raise TypeError(
            f"images must be uint8 or floating point, got {value.dtype}: convert levels 0..255 by "
            "images.to(torch.uint8)"
        )
    low, high = (float(bound) for bound in torch.aminmax(value.detach()))
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError(
            "images must be finite, got NaN or infinite values: find them by "
            "images.isfinite().all((1, 2, 3))"
        )
    if low < 0 or high > 1:
        if low >= 0 and high > 2:
            hint = "divide levels by 255"
        elif low >= -_OVERSHOOT and high <= 1 + _OVERSHOOT:
            hint = "clamp what interpolation leaves outside by images.clamp(0, 1)"
        else:
            hint = "undo the normalisation first, and leave it to the model"
        raise ValueError(
            f"floating-point images must lie in [0, 1], got values in [{low:.4g}, {high:.4g}]: "
            f"{hint}"
        )


def seeds(value: Tensor | Sequence[int], batch: int) -> Tensor:
    """Return `value` as CPU int64; raise unless it is one integer for each of `batch` images."""
    few = value[: batch + 1] if isinstance(value, (list, tuple, range)) else ()  # it may be endless
    if (isinstance(value, range) and len(few) != batch) or any(isinstance(n, range) for n in few):
        raise ValueError(
            f"`seeds` must have shape ({batch},), one for each image, got {shown(value)}: make "
            "them by torch.arange(len(images))"
        )
    try:
        tensor = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError, OverflowError, IndexError):
        raise TypeError(
            f"`seeds` must be int64, one for each image, got {shown(value)}: make them by "
            "torch.arange(len(images))"
        ) from None
    dense("`seeds`", tensor)
    if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
        raise TypeError(
            f"`seeds` must be int64, one for each image, got {tensor.dtype}: convert them by "
            ".to(torch.int64)"
        )
    if tuple(tensor.shape) != (batch,):
        raise ValueError(
            f"`seeds` must have shape ({batch},), one for each image, got {tuple(tensor.shape)}: "
            "make them by torch.arange(len(images))"
        )
    return tensor.to("cpu", torch.int64)


# Smallest and largest value of constants in `params`: ten times what is published, or more.
_RANGES = {
    "radius": (0.0, 256.0),
    "reach": (0.0, 64.0),
    "sigma": (0.0, 1024.0),
    "mud_sigma": (0.0, 1024.0),
    "alias_sigma": (0.0, 64.0),
    "factors": (1.0, 16.0),
    "weights": (0.0, 1.0),
    "photons": (1e-3, 1e6),
    "quality": (1.0, 100.0),
    "zoom": (1.0, 64.0),
    "decay": (0.1, 1e3),
}
_MOST = 1e6  # of any other field, and of draws
# Fields of `params` that describe the filter and not the images.
_SHARED = ("radius", "alias_sigma", "factors", "weights")
# Fields with a draw for each pixel, in the last two axes.
_PIXELS = ("crop", "field", "normal", "replace", "salt", "uniform")


def drawn(params: Mapping[str, Tensor], images: Tensor) -> None:
    """Raise unless all draws in `params` are for images (B, 3, H, W) like these."""
    if not isinstance(params, Mapping):
        raise TypeError(
            f"`params` must be a dict of tensors, got {type(params).__name__}: pass what "
            "sample(name, images.shape, ...) returns"
        )
    batch, size = len(images), tuple(images.shape[-2:])
    for key, value in params.items():
        if not isinstance(value, Tensor):
            raise TypeError(
                f"`params` must be a dict of tensors, got {type(value).__name__} for {shown(key)}: "
                "pass what sample(name, images.shape, ...) returns"
            )
        dense(f"`params` at {shown(key)}", value)
        _in_range(key, value)
        if value.ndim and key not in _SHARED and len(value) != batch:
            raise ValueError(
                f"`params` must be drawn for the images, but {shown(key)} was drawn for "
                f"{len(value)} "
                f"images, got {batch}: call sample with the shape of the images"
            )
        made = _size(key, value, params, size)
        if made != size:
            raise ValueError(
                f"`params` must be drawn for the images, but {shown(key)} was drawn for "
                f"{made[0]} x {made[1]} pixels, got {size[0]} x {size[1]}: call sample with the "
                "shape of the images"
            )


def dense(name: str, value: Tensor) -> None:
    """Raise if a tensor is sparse, quantised, nested or on the meta device."""
    if value.is_nested or value.layout != torch.strided or value.is_quantized or value.is_meta:
        kind = "nested" if value.is_nested else "meta" if value.is_meta else str(value.layout)
        kind = "quantised" if value.is_quantized else kind
        raise ValueError(
            f"{name} must be a dense tensor with values, got a {kind} one: convert it, such as by "
            ".to_dense()"
        )


def _held(value: Tensor) -> int:
    """How many values the memory behind a tensor holds."""
    return value.untyped_storage().nbytes() // value.element_size()


def _in_range(key: str, value: Tensor) -> None:
    """Raise for a field with values that no corruption can have."""
    if not value.numel() or value.dtype == torch.bool:
        return
    if value.is_complex():
        raise TypeError(
            f"`params` must hold real numbers, got {value.dtype} for {shown(key)}: call sample "
            "again"
        )
    if value.numel() > max(_held(value), 2**31):
        raise ValueError(
            f"`params` must be drawn for the images, got one value that was expanded to "
            f"{value.numel():.0e} for {shown(key)}: call sample again"
        )
    low, high = _RANGES.get(key, (-_MOST, _MOST))
    least, most = (float(bound) for bound in value.detach().aminmax())
    if not (low <= least and most <= high):
        raise ValueError(
            f"`params` must have {shown(key)} from {low:g} to {high:g}, got values from "
            f"{least:.4g} to {most:.4g}: call sample again"
        )


def _size(
    key: str, value: Tensor, params: Mapping[str, Tensor], size: tuple[int, ...]
) -> tuple[int, ...]:
    """Height and width of the images that a field was drawn for; `size` where it does not say."""
    if key in _PIXELS and value.ndim >= 2:
        return tuple(value.shape[-2:])
    if key == "offsets" and value.ndim == 5 and "reach" in params:  # without the margins
        reach = params["reach"]
        if reach.numel() != 1:
            raise ValueError(
                f"`params` must have one number for 'reach', got {shown(tuple(reach.shape))}: call "
                "sample again"
            )
        margin = 2 * int(reach)
        return value.shape[2] + margin, value.shape[3] + margin
    if key == "noise" and value.ndim == 2:  # fog: a square of the next power of two
        side = 1 << (max(size) - 1).bit_length()
        made = math.isqrt(value.shape[1] + 1)
        return size if made == side else (made, made)
    return size


def seed(value: object) -> None:
    """Raise unless `value` is an integer of 64 bits."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"`seed` must be a whole number, got {shown(value)}: pass an int")
    if not -(2**63) <= value < 2**63:
        raise ValueError(f"`seed` must fit 64 bits, got {value}: pass a smaller one")
