"""Visual prompts: an image of offsets that is added to every image in pixel space.

Pixels lie in [0, 1] and what a model takes is ``(pixels - mean) / std``. A prompt holds offsets of
pixels; a prompted pixel stays in [0, 1].
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from tta.core.checks import shown

__all__ = ["Space", "add_prompt", "check_pixels", "frame_mask", "levels_of"]

Space: TypeAlias = "tuple[Sequence[float], Sequence[float]]"


def frame_mask(shape: Sequence[int], width: int | None) -> Tensor:
    """Where a prompt acts: everywhere, or in a frame.

    Args:
        shape: (C, H, W).
        width: Of the frame, in pixels; None for the whole image.

    Returns:
        (H, W) bool.

    Example:
        >>> int(frame_mask((3, 4, 6), 1).sum())
        16
    """
    height, breadth = shape[-2:]
    mask = torch.ones(height, breadth, dtype=torch.bool)
    if width is not None and 2 * width < min(height, breadth):
        mask[width : height - width, width : breadth - width] = False
    return mask


def add_prompt(images: Tensor, prompt: Tensor, space: Space, width: int | None = None) -> Tensor:
    """Add a prompt to what a model takes.

    Args:
        images: (B, C, H, W) floating point, or uint8 levels.
        prompt: (C, H, W) offsets of pixels; empty for none.
        space: Mean and standard deviation, one value or one for each channel; levels have none.
        width: As for :func:`frame_mask`.

    Returns:
        Images like those given, whose pixels lie in [0, 1]; gradients flow to both arguments.
    """
    levels = images.dtype == torch.uint8
    wide = images if images.dtype == torch.float64 else images.float()
    mean, std = _column(space[0], wide), _column(space[1], wide)
    if levels:
        wide, mean, std = wide / 255, torch.zeros_like(mean), torch.ones_like(std)
    if prompt.numel() > 0:
        mask = frame_mask(images.shape[1:], width).to(wide.device)
        wide = wide + prompt.to(wide.dtype) * mask / std
    # The ends are computed as those of images are, so that what lies in [0, 1] stays as it is.
    wide = torch.minimum(torch.maximum(wide, (0 - mean) / std), (1 - mean) / std)
    if levels:
        return (wide * 255).round().to(torch.uint8)
    return wide.to(images.dtype)


def levels_of(images: Tensor, space: Space) -> Tensor:
    """The pixels of what a model takes, as uint8 levels.

    Args:
        images: (B, C, H, W), floating point and finite, or uint8.
        space: Mean and standard deviation.
    """
    if images.dtype == torch.uint8:
        return images
    wide = images.float()
    pixels = wide * _column(space[1], wide) + _column(space[0], wide)
    return (pixels * 255).round().clamp(0, 255).to(torch.uint8)


def check_pixels(images: Tensor, space: Space) -> None:
    """Refuse what has no pixels.

    Raises:
        ValueError: When images are not (B, C, H, W) with as many channels as there are means.
    """
    if images.ndim != 4:
        raise ValueError(
            f"`images` must be (B, C, H, W) to get a prompt, got shape {tuple(images.shape)}: use "
            "them without an input rule."
        )
    if {len(space[0]), len(space[1])} - {1, images.shape[1]}:
        raise ValueError(
            f"`mean` and `std` must have one value, or one for each of {images.shape[1]} channels, "
            f"got {shown(tuple(space[0]), 40)} and {shown(tuple(space[1]), 40)}: wrap the model "
            "with those it was trained with."
        )


def _column(values: Sequence[float], like: Tensor) -> Tensor:
    return torch.tensor(tuple(values), dtype=like.dtype, device=like.device).view(1, -1, 1, 1)
