"""AugMix views of an image, as MEMO has them: chains of operations on 8-bit pixels, mixed.

Hendrycks et al.: AugMix, ICLR 2020, arXiv 1912.02781. The operations do their arithmetic as Pillow
does, so that a recorded view can be made again to the last bit; Pillow itself is not needed.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tta.core.random import CountedDraws

__all__ = ["OPERATIONS", "Mix", "draw_mix", "random_view", "view"]

OPERATIONS = (
    "autocontrast",
    "equalize",
    "rotate",
    "solarize",
    "shear_x",
    "shear_y",
    "translate_x",
    "translate_y",
    "posterize",
)
AUTOCONTRAST, EQUALIZE, ROTATE, SOLARIZE, SHEAR_X, SHEAR_Y = range(6)
TRANSLATE_X, TRANSLATE_Y, POSTERIZE = range(6, 9)
END = -1  # in place of an operation: the chain ends
CHAINS, LONGEST = 3, 3
LEVELS = (0.1, 1.0)  # range of strengths
BORDER = 128  # of the first channel, where a warp shows what lies beyond the image; others 0
# Images of at most this side are padded and cropped beforehand, larger ones cropped and resized,
# as MEMO has it for CIFAR and for ImageNet.
SMALL = 64
AREA, ASPECT = (0.08, 1.0), (3 / 4, 4 / 3)  # of such a crop, torchvision's


class Mix(NamedTuple):
    """The parameters of one view."""

    ops: Tensor  # (3, 3) int64, a chain in each row; -1 ends it
    levels: Tensor  # (3, 3) strengths in [-1, 1]; a negative one is the other direction
    weights: Tensor  # (3,) shares of the chains, with sum 1
    mixing: float  # share of the image itself


def draw_mix(draws: CountedDraws) -> Mix:
    """Draw the parameters of a view: chains of one to three operations, Dirichlet(1, 1, 1), U."""
    places = CHAINS * LONGEST
    u = draws.numbers(CHAINS + 3 * places + CHAINS + 1)
    lengths, u = u[:CHAINS], u[CHAINS:]
    ops, sizes, signs, rest = u[:places], u[places:], u[2 * places :], u[3 * places :]
    low, high = LEVELS
    chosen = torch.full((CHAINS, LONGEST), END)
    levels = torch.zeros(CHAINS, LONGEST)
    for chain, length in enumerate(lengths):
        for place in range(1 + int(length * LONGEST)):
            i = chain * LONGEST + place
            chosen[chain, place] = int(ops[i] * len(OPERATIONS))
            size = low + (high - low) * sizes[i]
            levels[chain, place] = -size if signs[i] > 0.5 else size
    # Exponential numbers over their sum are Dirichlet(1, 1, 1); Beta(1, 1) is uniform.
    weights = torch.tensor([-math.log1p(-r) for r in rest[:CHAINS]]).clamp_min(1e-12)
    return Mix(chosen, levels, weights / weights.sum(), rest[CHAINS])


def random_view(pixels: Tensor, draws: CountedDraws) -> Tensor:
    """Crop, flip and mix: a view for each image of (B, C, H, W) in [0, 1], all drawn anew."""
    return torch.stack([view(_cropped(image, draws), *draw_mix(draws)) for image in pixels])


def view(
    image: Tensor, ops: Tensor, levels: Tensor, weights: Tensor, mixing: Tensor | float
) -> Tensor:
    """Mix an image with what chains of operations make of it, without crop and flip.

    Args:
        image: (C, H, W) uint8.
        ops: (3, 3) int64, a chain in each row: indices into ``OPERATIONS``, -1 ends the chain.
        levels: (3, 3) strengths in [-1, 1]; a negative one is the other direction.
        weights: (3,) shares of the chains.
        mixing: Share of the image itself.

    Returns:
        (C, H, W) float32 in [0, 1].

    Example:
        >>> image = torch.arange(48, dtype=torch.uint8).view(3, 4, 4)
        >>> none = torch.full((3, 3), -1)
        >>> same = view(image, none, torch.zeros(3, 3), torch.full((3,), 1 / 3), 0.5)
        >>> bool((same * 255 - image).abs().max() < 1e-4)
        True
    """
    mixed = torch.zeros(image.shape, dtype=torch.float32, device=image.device)
    for chain, strengths, weight in zip(
        ops.tolist(), levels.tolist(), weights.tolist(), strict=True
    ):
        x = image
        for operation, level in zip(chain, strengths, strict=True):
            if operation == END:
                break
            x = _apply(x, operation, level)
        mixed += weight * (x.float() / 255)
    share = float(mixing)
    return share * (image.float() / 255) + (1 - share) * mixed


def _apply(x: Tensor, operation: int, level: float) -> Tensor:
    """One operation on (C, H, W) uint8."""
    size, sign = abs(level), -1 if level < 0 else 1
    height, width = x.shape[1:]
    if operation == AUTOCONTRAST:
        return _autocontrast(x)
    if operation == EQUALIZE:
        return _equalize(x)
    if operation == SOLARIZE:
        return torch.where(x.int() < 256 - int(size * 25.6), x, 255 - x)
    if operation == POSTERIZE:
        return x & (256 - (1 << (8 - (4 - int(size * 0.4)))))
    if operation == ROTATE:
        return _rotate(x, sign * int(size * 3))
    if operation == SHEAR_X:
        return _warp(x, (1.0, 0.03 * level, 0.0, 0.0, 1.0, 0.0))
    if operation == SHEAR_Y:
        return _warp(x, (1.0, 0.0, 0.0, 0.03 * level, 1.0, 0.0))
    if operation == TRANSLATE_X:
        return _warp(x, (1.0, 0.0, float(sign * _pixels(size, width)), 0.0, 1.0, 0.0))
    return _warp(x, (1.0, 0.0, 0.0, 0.0, 1.0, float(sign * _pixels(size, height))))


def _pixels(size: float, side: int) -> int:
    """A shift of a thirtieth of the side at most."""
    return int(size * (side / 3) / 10)


def _autocontrast(x: Tensor) -> Tensor:
    """Stretch each channel to [0, 255]; one that has a single value stays."""
    low, high = x.flatten(1).aminmax(dim=1)
    low, high = low.double()[:, None, None], high.double()[:, None, None]
    # Two tensors, since torch divides a number by a tensor as a product with its reciprocal.
    scale = torch.full_like(low, 255) / (high - low).clamp_min(1)
    stretched = (x * scale - low * scale).clamp(0, 255).to(torch.uint8)
    return torch.where(high > low, stretched, x)


def _equalize(x: Tensor) -> Tensor:
    """Give each channel a flat histogram."""
    values = x.flatten(1).long()
    counts = torch.zeros(len(x), 256, dtype=torch.int64, device=x.device)
    counts.scatter_add_(1, values, torch.ones_like(values))
    # All images but those of the largest value that occurs share 255 steps.
    last = counts.gather(1, values.amax(1, keepdim=True))
    step = (values.shape[1] - last) // 255
    before = counts.cumsum(1) - counts
    table = ((step // 2 + before) // step.clamp_min(1)).clamp_max(255)
    equal = table.gather(1, values).to(torch.uint8).view_as(x)
    return torch.where((step > 0)[:, :, None], equal, x)


def _rotate(x: Tensor, degrees: int) -> Tensor:
    """Rotate about the centre, counter-clockwise."""
    if degrees == 0:
        return x
    height, width = x.shape[1:]
    angle = -math.radians(degrees % 360)
    cos, sin = round(math.cos(angle), 15), round(math.sin(angle), 15)
    across, down = width / 2, height / 2
    right = across - (cos * across + sin * down)
    below = down - (-sin * across + cos * down)
    return _warp(x, (cos, sin, right, -sin, cos, below))


def _warp(x: Tensor, matrix: tuple[float, ...]) -> Tensor:
    """Read (C, H, W) uint8 at affine places, bilinear; beyond the image is a border colour."""
    a, b, c, d, e, f = matrix
    height, width = x.shape[1:]
    like = {"dtype": torch.float64, "device": x.device}
    across = torch.arange(width, **like)[None] + 0.5
    down = torch.arange(height, **like)[:, None] + 0.5
    column, row = a * across + b * down + c, d * across + e * down + f  # (H, W)
    inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
    column, row = column - 0.5, row - 0.5
    left, top = column.floor(), row.floor()
    right_share, low_share = column - left, row - top
    left, top = left.long(), top.long()
    columns = [(left + i).clamp(0, width - 1) for i in (0, 1)]
    rows = [(top + i).clamp(0, height - 1) for i in (0, 1)]
    values = x.double()
    upper, lower = (
        values[:, r, columns[0]]
        + (values[:, r, columns[1]] - values[:, r, columns[0]]) * right_share
        for r in rows
    )
    warped = (upper + (lower - upper) * low_share).to(torch.uint8)
    border = torch.zeros(len(x), 1, 1, dtype=torch.uint8, device=x.device)
    border[0] = BORDER
    return torch.where(inside, warped, border)


def _cropped(pixels: Tensor, draws: CountedDraws) -> Tensor:
    """A random crop of (C, H, W) in [0, 1], flipped or not, as uint8 of the same shape."""
    height, width = pixels.shape[1:]
    u = draws.numbers(5)
    if max(height, width) <= SMALL:
        margins = [round(side / 8) for side in (height, width)]  # 4 pixels of 32
        down, right = (int(r * (2 * m + 1)) for r, m in zip(u, margins, strict=False))
        padded = F.pad(pixels, (margins[1], margins[1], margins[0], margins[0]))
        crop = padded[:, down : down + height, right : right + width]
    else:
        area = height * width * (AREA[0] + (AREA[1] - AREA[0]) * u[2])
        low, high = (math.log(side) for side in ASPECT)
        aspect = math.exp(low + (high - low) * u[3])
        rows = min(height, max(1, round(math.sqrt(area / aspect))))
        columns = min(width, max(1, round(math.sqrt(area * aspect))))
        down, right = int(u[0] * (height - rows + 1)), int(u[1] * (width - columns + 1))
        part = pixels[None, :, down : down + rows, right : right + columns]
        crop = F.interpolate(part, (height, width), mode="bilinear", antialias=True)[0]
    crop = crop.flip(2) if u[4] < 0.5 else crop
    return (crop.clamp(0, 1) * 255).round().to(torch.uint8)
