"""Colour changes in HSV, in float64 and in the order of operations of the usual code.

Changes by tenths often give levels that are integers, and whether such a level is truncated to
itself or to the one below depends on the last bit of exactly this sequence of operations.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from corruptions.filters import levels

__all__ = ["through_hsv"]

# Which of (value, falling, low, rising) red, green and blue take in the six sectors of hue.
_ORDER = ((0, 1, 2, 2, 3, 0), (3, 0, 0, 1, 2, 2), (2, 2, 3, 0, 0, 1))


def through_hsv(
    pixels: Tensor, change: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
) -> Tensor:
    """Convert to HSV, change saturation and value, convert back.

    Args:
        pixels: (B, 3, ...) uint8.
        change: Maps (saturation, value) to new ones, each (B, ...) float64 in [0, 1].

    Returns:
        (B, 3, ...) uint8.
    """
    # Tensors as divisors: on a GPU torch multiplies by the reciprocal of a plain number, which
    # rounds twice.
    levels_of_one, sectors = (torch.tensor(n, device=pixels.device).double() for n in (255, 6))
    source = pixels.double().div_(levels_of_one)
    red, green, blue = source.unbind(1)
    value = source.amax(1)
    spread = value - source.amin(1)
    coloured = spread > 0
    saturation = torch.where(coloured, spread / value, 0)
    safe = torch.where(coloured, spread, 1)
    # With equal maxima the last channel decides. Grey has hue 0, which is red.
    sector = torch.where(green == value, 2 + (blue - red) / safe, (green - blue) / safe)
    sector = torch.where(blue == value, 4 + (red - green) / safe, sector)
    hue = torch.where(coloured, (sector / sectors).remainder(1.0), 0)
    saturation, value = change(saturation, value)
    index = (hue * 6).floor()
    part = hue * 6 - index
    low = value * (1 - saturation)
    falling = value * (1 - part * saturation)
    rising = value * (1 - (1 - part) * saturation)
    choices = torch.stack((value, falling, low, rising), 1)
    order = torch.tensor(_ORDER, device=pixels.device)
    pick = order[:, index.long() % 6].movedim(0, 1)
    return levels(choices.gather(1, pick).clamp_(0, 1).mul_(255))
