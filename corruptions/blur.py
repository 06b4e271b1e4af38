"""Blur corruptions: gaussian_blur, zoom_blur, motion_blur.

Source: Hendrycks & Dietterich, ICLR 2019, arXiv 1903.12261. The published code calls
scikit-image, OpenCV, scipy and ImageMagick; what those do is written out here.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from corruptions.filters import (
    SINGLE_PASS_BITS,
    SLACK,
    exact_float,
    levels,
    quantised,
    separable,
)
from corruptions.setting import Params, Setting, scalar
from corruptions.severity import TABLES

__all__ = [
    "apply_gaussian_blur", "apply_motion_blur", "apply_zoom_blur", "directional_blur",
    "sample_gaussian_blur", "sample_motion_blur", "sample_zoom_blur", "zoom_pair",
]  # fmt: skip

# torch enlarges images whose sides are together up to this in vectors of channels, at most so many.
_SMALL, _VECTOR = 128, 16
# Up to this many pixels one dense matrix is the fastest zoom blur.
_DENSE_PIXELS = 1600
_MOST_TERMS = 1024  # of an average of enlargements


def sample_gaussian_blur(setting: Setting) -> Params:
    """Constants of gaussian_blur: `sigma` in pixels."""
    return {"sigma": scalar(setting.constants()["sigma"])}


def apply_gaussian_blur(images: Tensor, params: Params) -> Tensor:
    """Blur by a Gaussian cut at four standard deviations, edges repeated."""
    return levels(separable(images, float(params["sigma"]))).contiguous()


def sample_motion_blur(setting: Setting) -> Params:
    """Draw for motion_blur.

    Returns:
        `radius`, `sigma` in pixels; `angle`, (B,) float64, uniform on [-45, 45) degrees.
    """
    values = setting.constants()
    angle = setting.uniforms("angle").double().mul_(90).sub_(45)
    return {"radius": scalar(values["radius"]), "sigma": scalar(values["sigma"]), "angle": angle}


def apply_motion_blur(images: Tensor, params: Params) -> Tensor:
    """Smear along the drawn direction."""
    return directional_blur(
        images, params["angle"], float(params["radius"]), float(params["sigma"])
    )


def directional_blur(images: Tensor, angle: Tensor, radius: float, sigma: float) -> Tensor:
    """ImageMagick's motion blur: half a Gaussian from the pixel onwards, to one side only.

    Tap i reads the whole pixel nearest to i steps along the angle; edges repeat.

    Args:
        images: (B, C, H, W) uint8.
        angle: (B,) degrees; 0 reads to the right, 90 downwards.
        radius: Sets the number of taps, 2 ceil(radius) + 1.
        sigma: Standard deviation of the Gaussian in pixels.

    Returns:
        (B, C, H, W) uint8.
    """
    batch, _, height, width = images.shape
    device = images.device
    exact = exact_float(device)
    steps = torch.arange(2 * math.ceil(radius) + 1, dtype=torch.float64)
    # Directions on the CPU: a cosine that differs in its last bit could move a whole tap.
    radians = angle.cpu().double() * (math.pi / 180)
    across = (steps * radians.cos()[:, None] - 0.5).ceil().long().to(device)
    down = (steps * radians.sin()[:, None] - 0.5).ceil().long().to(device)
    source = images.flatten(2).to(exact).sub_(128)
    total = torch.zeros_like(source)
    rows, columns = torch.arange(height, device=device), torch.arange(width, device=device)
    for i, weight in enumerate(_half_gaussian(len(steps), sigma)):
        if weight == 0:
            continue
        row = (rows + down[:, i, None]).clamp_(0, height - 1).mul_(width)
        column = (columns + across[:, i, None]).clamp_(0, width - 1)
        place = (row[:, :, None] + column[:, None, :]).view(batch, 1, -1)
        total.add_(source.gather(2, place.expand_as(source)), alpha=weight)
    # ImageMagick rounds to 16 bits before the cut to 8: the same as truncating y + 1/514.
    total.add_(1 / 514).floor_().add_(128)
    return levels(total).view(images.shape)


@lru_cache(maxsize=64)
def _half_gaussian(taps: int, sigma: float) -> list[float]:
    """Weights of the motion blur, exact binary fractions."""
    distance = np.arange(taps)
    weights = np.exp(-0.5 * (distance / sigma) ** 2) if sigma > 0 else (distance == 0) * 1.0
    return quantised((weights / weights.sum())[None], SINGLE_PASS_BITS)[0].tolist()


def sample_zoom_blur(setting: Setting) -> Params:
    """Constants of zoom_blur.

    Returns:
        `factors`, (K,) float64 ascending, and `weights`, (K,) float64, the share of each factor
        in the average. The published average counts the clean image once more.
    """
    constant = TABLES[setting.name]
    shares: dict[float, float] = {}
    for weight, which, level in setting.mixture():
        step, count = (constant[key].level(which, level) for key in ("step", "count"))
        # numpy.arange steps by the rounded difference, which decides some crop sizes.
        factors = [1 + k * ((1 + step) - 1) for k in range(int(count))] if level else []
        for factor in [1.0, *factors]:
            shares[factor] = shares.get(factor, 0) + weight / (1 + len(factors))
    pairs = sorted(shares.items())
    table = torch.tensor(pairs, dtype=torch.float64)
    return {"factors": table[:, 0], "weights": table[:, 1]}


def zoom_pair(size: int, factor: float) -> tuple[int, int, int]:
    """Crop length, enlarged length and crop start of one zoom step along an axis."""
    crop = math.ceil(size / factor)
    return crop, round(crop * factor), (size - crop) // 2


def apply_zoom_blur(images: Tensor, params: Params) -> Tensor:
    """Average the image over enlargements of its middle."""
    height, width = images.shape[-2:]
    pairs = tuple(zip(params["factors"].tolist(), params["weights"].tolist(), strict=True))
    if height * width <= _DENSE_PIXELS:
        exact = exact_float(images.device)
        matrix = _zoom_matrix(height, width, pairs).to(images.device, exact)
        out = images.flatten(2).to(exact).sub_(128) @ matrix
        # A sum that is an integer to 17 bits comes from a flat region.
        return _cut(out.add_(128), 0.0, params["weights"]).view(images.shape)
    source = _channels_alike(images.flatten(0, 1)[None].float())
    total = torch.full_like(source, SLACK)
    for factor, weight in pairs:
        (high, tall, top), (wide, broad, left) = (zoom_pair(n, factor) for n in (height, width))
        crop = source[..., top : top + high, left : left + wide]
        if (high, wide) != (tall, broad):
            crop = F.interpolate(crop, (tall, broad), mode="bilinear", align_corners=True)
        rest_y, rest_x = (tall - height) // 2, (broad - width) // 2
        total.add_(crop[..., rest_y : rest_y + height, rest_x : rest_x + width], alpha=weight)
    total = total[:, : images.shape[0] * images.shape[1]]
    return _cut(total, SLACK, params["weights"]).view(images.shape)


def _channels_alike(source: Tensor) -> Tensor:
    """Add channels of zeros, so that torch enlarges each channel in the same way at any number.

    On a CPU it takes small images in vectors of channels, and those left over in another way, which
    rounds differently; of large ones it takes three channels in another way, with one thread.

    Args:
        source: (1, C, H, W).
    """
    if source.device.type != "cpu":
        return source
    count, (height, width) = source.shape[1], source.shape[2:]
    whole = -(-count // _VECTOR) * _VECTOR if height + width <= _SMALL else max(count, 4)
    return F.pad(source, (0, 0, 0, 0, 0, whole - count)) if whole > count else source


def _cut(averages: Tensor, slack: float, weights: Tensor) -> Tensor:
    """Truncate averages to levels, and flat regions as the published float32 average does.

    Args:
        averages: Averages plus `slack`; changed in place.
        slack: Largest error of an average of equal levels, in levels.
        weights: (K,) shares of the factors.

    Returns:
        uint8, of the shape of `averages`.
    """
    lowered = _float32_average(tuple(weights.tolist()))
    if lowered.any():
        floors = averages.floor()
        flat = averages.sub_(floors) <= 2 * slack
        low = lowered.to(floors.device).index_select(0, floors.flatten().int())
        averages = floors.sub_(low.view(floors.shape).mul_(flat))
    return levels(averages)


@lru_cache(maxsize=32)
def _zoom_matrix(height: int, width: int, pairs: tuple[tuple[float, float], ...]) -> Tensor:
    """zoom_blur of a small image as one matrix (H W, H W), which flat images are multiplied by."""
    down = np.stack([weight * _zoom_axis(height, factor).ravel() for factor, weight in pairs])
    along = np.stack([_zoom_axis(width, factor).ravel() for factor, _ in pairs])
    # From (row out, row in), (column out, column in) to outputs by inputs.
    total = (down.T @ along).reshape(height, height, width, width).transpose(0, 2, 1, 3)
    weights = quantised(total.reshape(height * width, -1), SINGLE_PASS_BITS)
    return torch.from_numpy(weights.T.astype(np.float32).copy())


@lru_cache(maxsize=32)
def _float32_average(weights: tuple[float, ...]) -> Tensor:
    """Find where the published float32 average of equal values falls below them.

    Args:
        weights: Shares of the factors; at a published severity multiples of one fraction.

    Returns:
        (256,) float32, 1 for levels that come out one lower, else 0.
    """
    if min(weights) < 1 / _MOST_TERMS:  # at no published severity, and the sum would be long
        return torch.zeros(256)
    terms = round(1 / min(weights))
    if any(abs(weight * terms - round(weight * terms)) > 1e-6 for weight in weights):
        return torch.zeros(256)
    level = torch.arange(256, dtype=torch.float64).div_(255).float()
    total = torch.zeros(256)
    for _ in range(terms - 1):
        total += level
    average = (level + total).div_(terms).mul_(255).floor_()
    return (average < torch.arange(256)).float()


def _zoom_axis(size: int, factor: float) -> np.ndarray:
    """One zoom step along an axis, corner-aligned and linear, (size, size)."""
    crop, enlarged, start = zoom_pair(size, factor)
    kept = np.arange(size) + (enlarged - size) // 2
    place = kept * (crop - 1) / max(enlarged - 1, 1)
    low = np.minimum(place.astype(int), crop - 1)
    high = np.minimum(low + 1, crop - 1)
    matrix = np.zeros((size, size))
    np.add.at(matrix, (np.arange(size), start + low), 1 - (place - low))
    np.add.at(matrix, (np.arange(size), start + high), place - low)
    return matrix
