"""spatter: drops of water or mud on the lens.

Source: Hendrycks & Dietterich, ICLR 2019, arXiv 1903.12261. The published code finds the drops'
edges and lights them by a chain of OpenCV calls; what those compute is written out for batches.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from corruptions.filters import levels, pad, separable
from corruptions.setting import Params, Setting, scalar

__all__ = ["apply_spatter", "sample_spatter"]

_WATER = (175 / 255, 238 / 255, 238 / 255)
_MUD = (63 / 255, 42 / 255, 20 / 255)
# Canny's two thresholds and the tangents of 22.5 and 67.5 degrees.
_WEAK, _STRONG = 50, 150
_TANGENT = 2**0.5 - 1
# Chamfer lengths of an axial, a diagonal and a knight's step, in OpenCV's 16-bit fixed point.
_AXIAL, _DIAGONAL, _KNIGHT = 65536, 91750, 143976
_FARTHEST = 20


def sample_spatter(setting: Setting) -> Params:
    """Draw for spatter.

    Returns:
        `normal`, (B, H, W); and the constants `mean`, `scale`, `sigma`, `threshold` of the
        liquid, `mud` (1 or 0 for water), `mud_sigma`, and `strength` of the water.
    """
    params = {key: scalar(value) for key, value in setting.constants().items()}
    params["normal"] = setting.normals("normal", *setting.shape[2:])
    return params


def apply_spatter(images: Tensor, params: Params) -> Tensor:
    """Add bright water, or cover with mud, where smoothed noise is high."""
    noise = params["normal"].double().mul(float(params["scale"])).add_(float(params["mean"]))
    liquid = separable(noise, float(params["sigma"]))
    threshold = float(params["threshold"])
    liquid = torch.where(liquid < threshold, 0, liquid)
    source = images.float().div_(255)
    if float(params["mud"]):
        cover = separable(liquid > threshold, float(params["mud_sigma"]))
        cover = torch.where(cover < 0.8, 0, cover).float()[:, None]
        out = source.mul_(1 - cover).add_(cover * _colour(_MUD, source))
    else:
        # An 8-bit integer type, in which values beyond 255 wrap around.
        liquid = liquid.mul_(255).int().bitwise_and_(255)
        light = liquid * _edge_light(liquid)
        brightest = light.amax((1, 2), keepdim=True)
        # Without any light the published code divides 0 by 0; here such an image stays as it is.
        light = light.float().div_(brightest.clamp(min=1)).mul_(float(params["strength"]))
        out = source.add_(light[:, None] * _colour(_WATER, source))
    return levels(out.clamp_(0, 1).mul_(255))


def _colour(colour: tuple[float, float, float], like: Tensor) -> Tensor:
    return torch.tensor(colour, dtype=like.dtype, device=like.device)[:, None, None]


def _edge_light(liquid: Tensor) -> Tensor:
    """Embossed light along the edges of the drops.

    Args:
        liquid: (B, H, W) int32 levels 0..255.

    Returns:
        (B, H, W) int32 levels 0..255.
    """
    distance = _chamfer(_canny(liquid))
    mean = _box_sum(distance).double().mul_(2.0**-16).mul_(1 / 9)
    relief = _equalised(mean.float().int()).to(torch.int16)
    around = pad(relief, 1, 1, "mirror101")
    height, width = relief.shape[1:]
    emboss = torch.zeros_like(relief)
    for dy, row in enumerate(((-2, -1, 0), (-1, 1, 1), (0, 1, 2))):
        for dx, weight in enumerate(row):
            if weight:
                emboss.add_(around[:, dy : dy + height, dx : dx + width], alpha=weight)
    # A ninth of an integer is never an integer plus a half, so rounding has no ties.
    return _box_sum(emboss.clamp_(0, 255)).float().mul_(1 / 9).round_().int()


def _box_sum(values: Tensor) -> Tensor:
    """Sum over 3x3 neighbourhoods, edges mirrored, (B, H, W)."""
    around = pad(values, 1, 1, "mirror101")
    rows = around[:, :-2] + around[:, 1:-1] + around[:, 2:]
    return rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:]


def _neighbour(around: Tensor, down: int, across: int, margin: int = 1) -> Tensor:
    """View of a padded map, shifted by some pixels."""
    height, width = around.shape[1] - 2 * margin, around.shape[2] - 2 * margin
    top, left = margin + down, margin + across
    return around[:, top : top + height, left : left + width]


def _canny(level: Tensor) -> Tensor:
    """Canny's edges of integer maps (B, H, W), as OpenCV finds them, (B, H, W) bool."""
    around = pad(level.to(torch.int16), 1, 1, "edge")

    def at(down: int, across: int) -> Tensor:
        return _neighbour(around, down, across)

    gx = at(-1, 1) + 2 * at(0, 1) + at(1, 1) - at(-1, -1) - 2 * at(0, -1) - at(1, -1)
    gy = at(1, -1) + 2 * at(1, 0) + at(1, 1) - at(-1, -1) - 2 * at(-1, 0) - at(-1, 1)
    across_size, down_size = gx.abs(), gy.abs()
    size = across_size + down_size
    outside = F.pad(size, (1, 1, 1, 1))

    def above(down: int, across: int) -> Tensor:
        return size > _neighbour(outside, down, across)

    flat = down_size < _TANGENT * across_size
    steep = down_size > (_TANGENT + 2) * across_size
    along = above(0, -1) & (size >= _neighbour(outside, 0, 1))
    upright = above(-1, 0) & (size >= _neighbour(outside, 1, 0))
    falling = above(-1, -1) & above(1, 1)
    rising = above(-1, 1) & above(1, -1)
    same = (gx < 0) == (gy < 0)
    slanted = (same & falling) | (~same & rising)
    ridge = (flat & along) | (~flat & ((steep & upright) | (~steep & slanted)))
    weak = (ridge & (size > _WEAK)).to(torch.uint8)
    edges = weak * (size > _STRONG)
    while True:
        around = F.pad(edges, (1, 1, 1, 1))
        grown = torch.maximum(around[:, :-2], around[:, 2:]).maximum(around[:, 1:-1])
        grown = torch.maximum(grown[..., :-2], grown[..., 2:]).maximum(grown[..., 1:-1])
        grown *= weak
        if torch.equal(grown, edges):
            return edges.bool()
        edges = grown


def _chamfer(edges: Tensor) -> Tensor:
    """Distance to the nearest edge pixel by axial, diagonal and knight's steps, at most 20.

    In each row only the nearest edge pixel counts, so it is a search along rows, then over rows.

    Args:
        edges: (B, H, W) bool.

    Returns:
        (B, H, W) int32 in units of 2^-16.
    """
    width = edges.shape[2]
    along = torch.where(edges, 0, _FARTHEST).to(torch.uint8)
    step = 1
    while step < min(_FARTHEST, width):
        around = F.pad(along, (step, step), value=_FARTHEST)
        nearest = torch.minimum(around[..., : -2 * step], around[..., 2 * step :])
        along = torch.minimum(along, nearest.add_(step))
        step *= 2
    table = _lengths().to(edges.device)
    distance = table[0].index_select(0, along.flatten().int()).view(edges.shape)
    around = F.pad(along, (0, 0, _FARTHEST, _FARTHEST), value=_FARTHEST)
    height = edges.shape[1]
    for down in range(1, min(_FARTHEST, height)):
        if int(distance.max()) <= down * _AXIAL:
            break  # nothing this far is nearer
        above, below = (around[:, at : at + height] for at in (_FARTHEST - down, _FARTHEST + down))
        nearest = torch.minimum(above, below).flatten().int()
        through = table[down].index_select(0, nearest).view(edges.shape)
        distance = torch.minimum(distance, through)
    return distance


@lru_cache(maxsize=1)
def _lengths() -> Tensor:
    """Chamfer length of each step (down, across), at most 20, (20, 21) int32 by 2^-16."""
    steps = torch.arange(_FARTHEST + 1)
    down, across = steps[:-1, None], steps
    long, short = torch.maximum(down, across), torch.minimum(down, across)
    flat = _KNIGHT * short + _AXIAL * (long - 2 * short)
    steep = _DIAGONAL * (2 * short - long) + _KNIGHT * (long - short)
    lengths = torch.where(2 * short <= long, flat, steep)
    # Beyond the reach of the search along rows.
    lengths[:, _FARTHEST] = _FARTHEST * _AXIAL
    return lengths.clamp(max=_FARTHEST * _AXIAL).int()


def _equalised(level: Tensor) -> Tensor:
    """Histogram equalisation of integer maps (B, H, W) with levels 0.._FARTHEST."""
    values = torch.arange(_FARTHEST + 1, device=level.device)
    flat = level.flatten(1)
    row = torch.arange(len(flat), device=level.device)[:, None] * len(values)
    place = (flat + row).flatten()
    counts = torch.bincount(place, minlength=len(flat) * len(values))
    counts = counts.view(len(flat), -1)
    first = (counts > 0).int().argmax(1, keepdim=True)
    rest = flat.shape[1] - counts.gather(1, first)
    above = torch.where(values > first, counts, 0).cumsum(1)
    # float32, as OpenCV multiplies; a constant map stays as it is.
    table = (above.float() * (255 / rest.double()).float()).round()
    table = torch.where(rest == 0, values.float(), table).int()
    return table.flatten().index_select(0, place).view(level.shape)
