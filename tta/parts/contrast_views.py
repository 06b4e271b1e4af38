"""Weak and strong views of a batch, for losses that contrast them.

The recipes are those of MoCo (He et al., CVPR 2020, arXiv 1911.05722), version 2, as AdaContrast
uses them at test time. The numbers of a view are drawn once for the batch.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from tta.core.random import CountedDraws
from tta.parts.augment import (
    BRIGHTNESS,
    CONTRAST,
    GREY,
    HUE,
    SATURATION,
    View,
    blur,
    jitter_colours,
)

__all__ = ["strong_view", "weak_view"]

ENLARGED = 8 / 7  # 256 pixels of which 224 are cut out
JITTERED, GREYED, BLURRED, FLIPPED = 0.8, 0.2, 0.5, 0.5  # probabilities
FACTORS = (0.6, 1.4)  # of brightness, contrast and saturation
TURNS = (-0.1, 0.1)  # of hue, as a share of the colour circle
SIGMA = (0.1, 2.0)  # pixels of the blur
COLOURS = (BRIGHTNESS, CONTRAST, SATURATION, HUE)


def weak_view(pixels: Tensor, draws: CountedDraws) -> Tensor:
    """Enlarge, cut out a part of the old size, and flip or not.

    Args:
        pixels: (B, C, H, W) in [0, 1].
        draws: Random numbers.

    Returns:
        (B, C, H, W) in [0, 1].
    """
    height, width = pixels.shape[2:]
    down, right, flip = draws.numbers(3)
    size = (math.ceil(height * ENLARGED), math.ceil(width * ENLARGED))
    large = F.interpolate(pixels, size, mode="bilinear", align_corners=False)
    top, left = int(down * (size[0] - height + 1)), int(right * (size[1] - width + 1))
    return _flipped(large[:, :, top : top + height, left : left + width], flip)


def strong_view(pixels: Tensor, draws: CountedDraws) -> Tensor:
    """Jitter colours, make grey, blur and flip, each or not.

    Args:
        pixels: (B, C, H, W) in [0, 1]; colours of others than C = 3 are jittered in brightness and
            contrast alone.
        draws: Random numbers.

    Returns:
        (B, C, H, W) in [0, 1].
    """
    places, u = draws.numbers(len(COLOURS)), draws.numbers(9)
    x = pixels
    if u[0] < JITTERED:
        ranges = dict.fromkeys(COLOURS, FACTORS) | {HUE: TURNS}
        factors = [0.0] * 5
        for colour, r in zip(COLOURS, u[1:5], strict=True):
            low, high = ranges[colour]
            factors[colour] = low + (high - low) * r
        order = tuple(COLOURS[i] for i in sorted(range(len(COLOURS)), key=places.__getitem__))
        x = jitter_colours(x, View(order, tuple(factors), 0.0, (0, 0), 1.0, 0.0, False))
    if u[5] < GREYED and x.shape[1] == len(GREY):
        grey = (x * x.new_tensor(GREY).view(1, -1, 1, 1)).sum(1, keepdim=True)
        x = grey.expand_as(x)
    if u[6] < BLURRED:
        sigma = SIGMA[0] + (SIGMA[1] - SIGMA[0]) * u[7]
        margin = math.ceil(3 * sigma)
        x = blur(F.pad(x, (margin,) * 4, mode="replicate"), sigma, margin)
    return _flipped(x, u[8]).clamp(0, 1)


def _flipped(x: Tensor, u: float) -> Tensor:
    return x.flip(3) if u < FLIPPED else torch.clone(x)
