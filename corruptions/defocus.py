"""defocus_blur: convolution with a disc whose rim is softened.

Source: Hendrycks & Dietterich, ICLR 2019, arXiv 1903.12261. The published code softens the disc and
convolves with it. Here the image is summed over the hard disc, in integers and by runs of pixels,
which takes two additions for a row of the disc; the small Gaussian that softens the rim follows as
a separate filter. The two differ only where the published picture of the disc ends at the disc
itself, and there the difference is added.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from corruptions.filters import folded, levels, pad
from corruptions.setting import Params, Setting
from corruptions.severity import TABLES

__all__ = ["apply_defocus_blur", "sample_defocus_blur"]


def sample_defocus_blur(setting: Setting) -> Params:
    """Constants of defocus_blur.

    Returns:
        `radius` and `alias_sigma` in pixels and `weights`, (K,) float64 each: the disc of each
        surrounding published point and its share, which sum to one. Radius 0 is the clean image.
    """
    table = TABLES[setting.name]
    discs = []
    for weight, which, level in setting.mixture():
        radius, sigma = (table[key].level(which, level) for key in ("radius", "alias_sigma"))
        discs.append((radius if level else 0.0, sigma if level else 0.0, weight))
    radius, sigma, weights = torch.tensor(discs, dtype=torch.float64).unbind(1)
    return {"radius": radius, "alias_sigma": sigma, "weights": weights}


def apply_defocus_blur(images: Tensor, params: Params) -> Tensor:
    """Convolve with the disc, mirroring at the edges."""
    keys = ("radius", "alias_sigma", "weights")
    discs = list(zip(*(params[key].tolist() for key in keys), strict=True))
    planes = images.flatten(0, 1)
    out = torch.empty_like(planes)
    few = len(planes) if images.device.type != "cpu" else max(1, _PIXELS // planes[0].numel())
    for part, target in zip(planes.split(few), out.split(few), strict=True):
        radius, sigma, weight = discs[0]
        blurred = _through_disc(part, _disc(radius, sigma))
        if len(discs) > 1:
            blurred.mul_(weight)
        for radius, sigma, weight in discs[1:]:
            blurred.add_(_through_disc(part, _disc(radius, sigma)).mul_(weight))
        target.copy_(levels(blurred))
    return out.view(images.shape)


# Numbers that are added at once, few enough to stay in the cache.
_PIXELS = 1 << 18
# Softening weights below this move no level.
_NEGLIGIBLE = 1e-12


class _Disc(NamedTuple):
    """A disc with a softened rim.

    Attributes:
        halves: How far each row of the hard disc reaches to either side, from the centre down.
        soft: Weights of the softening filter, from the centre on.
        area: Pixels of the hard disc.
        share: Sum of the published float32 weights, which is one up to rounding.
        edges: (half of a run, distance of its row, weight), the shortest run first, of what
            softening does differently at the ends of the published picture of the disc.
    """

    halves: tuple[int, ...]
    soft: tuple[float, ...]
    area: int
    share: float
    edges: tuple[tuple[int, int, float], ...]


@lru_cache(maxsize=64)
def _disc(radius: float, sigma: float) -> _Disc:
    reach = 8 if radius <= 8 else int(radius)
    rim = 1 if radius <= 8 else 2
    steps = np.arange(rim + 1)
    weights = np.exp(-0.5 * (steps / sigma) ** 2) if sigma > 0 else (steps == 0) * 1.0
    soft = weights / (2 * weights.sum() - weights[0])
    halves = [math.isqrt(int(radius**2) - k * k) for k in range(int(radius) + 1)]
    area = 2 * sum(2 * half + 1 for half in halves) - 2 * halves[0] - 1
    return _Disc(
        tuple(halves),
        tuple(soft.tolist()),
        area,
        _published_share(radius, reach, soft) if radius else 1.0,
        tuple(_edges(halves, reach, soft.tolist())),
    )


def _published_share(radius: float, reach: int, soft: np.ndarray) -> float:
    """Sum of the published float32 weights over the exact sum, which is 1 to seven digits.

    Whether it is just below one decides the level of every flat region.
    """
    grid = np.arange(-reach, reach + 1)
    rim = np.arange(1 - len(soft), len(soft))
    source = folded(grid[:, None] + rim + reach, len(grid), "mirror101")
    totals = []
    for dtype in (np.float32, np.float64):
        disc = (grid[:, None] ** 2 + grid**2 <= radius**2).astype(dtype)
        disc /= disc.sum()
        taps = soft[np.abs(rim)].astype(dtype)
        for _ in range(2):
            disc = np.sum([taps[k] * disc[source[:, k]] for k in range(len(rim))], axis=0).T
        totals.append(float(disc.astype(np.float64).sum()))
    return totals[0] / totals[1]


def _edges(halves: list[int], reach: int, soft: list[float]) -> list[tuple[int, int, float]]:
    """Corrections for rows at the end of the disc's picture, which softening mirrors there."""
    rim = len(soft) - 1
    mirrored = [(k, j - k, soft[j]) for k in range(rim) for j in range(k + 1, rim + 1)]
    beyond = [(k, j, -soft[j - k]) for k in range(-rim, 0) for j in range(rim + k + 1)]
    # Rows are counted inwards from the last one.
    return sorted(
        (halves[reach - j], reach - k, weight)
        for k, j, weight in mirrored + beyond
        if reach - j < len(halves)
    )


def _through_disc(images: Tensor, disc: _Disc) -> Tensor:
    """Filter levels (B, H, W) uint8, to float64."""
    rim = len(disc.soft) - 1
    margin = len(disc.halves) - 1 + rim
    integer = torch.int16 if disc.area * 256 < 2**15 else torch.int32
    centred = pad(images.to(integer).sub_(128), margin, margin, "mirror101")
    out = _softened(_disc_sums(centred, disc.halves), disc.soft, -2)
    if not disc.edges:
        out = _softened(out, disc.soft, -1)
    else:
        out = _softened(out.add_(_edge_rows(centred, disc)), disc.soft, -1)
        # The disc is symmetric: columns are the rows of the image turned over its diagonal.
        turned = _edge_rows(centred.mT.contiguous(), disc)
        out += _softened(turned, disc.soft, -1).mT
    # In the units of `out`, the level that centring took away counts as often as weights do.
    out += 128 * (disc.area + sum(4 * w * (2 * half + 1) for half, _, w in disc.edges))
    return out.mul_(disc.share / disc.area)


def _disc_sums(centred: Tensor, halves: tuple[int, ...]) -> Tensor:
    """Sums over the hard disc, smaller than `centred` by its radius on every side."""
    radius = len(halves) - 1
    height, width = (size - 2 * radius for size in centred.shape[-2:])
    runs = centred[..., radius : radius + width].clone()
    out, half = runs.new_zeros(*centred.shape[:-2], height, width), 0
    # From the shortest run, at the top and bottom, to the longest.
    for k in range(radius, -1, -1):
        while half < halves[k]:
            half += 1
            runs += centred[..., radius - half : radius - half + width]
            runs += centred[..., radius + half : radius + half + width]
        out += runs[..., radius + k : radius + k + height, :]
        if k:
            out += runs[..., radius - k : radius - k + height, :]
    return out


def _edge_rows(centred: Tensor, disc: _Disc) -> Tensor:
    """Sum of the corrections in `disc.edges`, (B, H, W + 2 rim) float64."""
    rim = len(disc.soft) - 1
    margin = len(disc.halves) - 1 + rim
    left, height = margin - rim, centred.shape[-2] - 2 * margin
    width = centred.shape[-1] - 2 * left
    runs, reached = centred[..., left : left + width].clone(), 0
    sums = {
        abs(weight): runs.new_zeros(*runs.shape[:-2], height, width) for *_, weight in disc.edges
    }
    for half, distance, weight in disc.edges:
        while reached < half:
            reached += 1
            runs += centred[..., left - reached : left - reached + width]
            runs += centred[..., left + reached : left + reached + width]
        for first in (margin - distance, margin + distance):
            row = runs[..., first : first + height, :]
            sums[abs(weight)].add_(row, alpha=1 if weight > 0 else -1)
    out = torch.zeros_like(next(iter(sums.values())), dtype=torch.float64)
    for weight, total in sums.items():
        out += total.double().mul_(weight)
    return out


def _softened(values: Tensor, soft: tuple[float, ...], axis: int) -> Tensor:
    """Filter along an axis, which loses one rim on either side, float64."""
    rim = len(soft) - 1
    size = values.shape[axis] - 2 * rim
    out = values.narrow(axis, rim, size).to(torch.float64, copy=True).mul_(soft[0])
    for k, weight in enumerate(soft[1:], 1):
        if weight > _NEGLIGIBLE:
            pair = values.narrow(axis, rim - k, size) + values.narrow(axis, rim + k, size)
            out += pair.double().mul_(weight)
    return out
