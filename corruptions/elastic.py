"""elastic_transform: a random affine map, then a smooth random displacement.

Source: Hendrycks & Dietterich, ICLR 2019, arXiv 1903.12261. Lengths are in pixels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from corruptions.filters import SLACK, levels, separable
from corruptions.setting import Params, Setting, scalar

__all__ = ["apply_elastic_transform", "sample_elastic_transform"]

# OpenCV computes the source coordinates of an affine map in the second of these fractions of a
# pixel and rounds them to the first.
_SUBPIXEL = 32
_FIXED = 1024


def sample_elastic_transform(setting: Setting) -> Params:
    """Draw for elastic_transform.

    Returns:
        `strength`, `sigma`, `affine`; `points`, (B, 3, 2), how far the three points of
        the affine map move in x and y, uniform on [-1, 1) in units of `affine`; `field`,
        (B, 2, H, W), the raw displacements in x and y, uniform on [-1, 1).
    """
    values = setting.constants()
    params = {
        key: scalar(values[f"{key}_fraction"] * setting.side)
        for key in ("strength", "sigma", "affine")
    }
    params["points"] = setting.uniforms("points", 3, 2).mul_(2).sub_(1)
    params["field"] = setting.uniforms("field", 2, *setting.shape[2:]).mul_(2).sub_(1)
    return params


def apply_elastic_transform(images: Tensor, params: Params) -> Tensor:
    """Warp twice by bilinear interpolation."""
    height, width = images.shape[-2:]
    device = images.device
    x, y = _affine_source(height, width, params["points"], float(params["affine"]))
    out = _bilinear(images.float(), x, y, mirror_edge=True)
    strength = float(params["strength"])
    if strength > 0:
        sigma = float(params["sigma"])
        moved = separable(params["field"], sigma, 3.0, "symmetric").contiguous().mul_(strength)
        x = moved[:, 0] + torch.arange(width, device=device)
        y = moved[:, 1] + torch.arange(height, device=device)[:, None]
        out = _bilinear(out, x, y, mirror_edge=False)
    return levels(out.add_(SLACK))


def _affine_source(height: int, width: int, points: Tensor, affine: float) -> tuple[Tensor, Tensor]:
    """Source position of each output pixel of the affine map, x and y, (B, H, W) float64."""
    centre_x, centre_y, arm = width // 2, height // 2, min(height, width) // 3
    before = torch.tensor(
        [[centre_x + arm, centre_y + arm], [centre_x + arm, centre_y - arm],
         [centre_x - arm, centre_y - arm]],
        dtype=torch.float64,
    )  # fmt: skip
    # These are float32, as published: rounding below makes the difference visible. The few numbers
    # of each image come from the CPU, since their last bit counts; what follows is exact.
    device = points.device
    after = (before + points.cpu().double() * affine).float().double()
    # The map back takes `after` to `before`: the edges u, v of the moved triangle to (0, 2 arm)
    # and (-2 arm, 0). Cramer's rule gives its matrix.
    origin = after[:, 1]
    u, v = after[:, 0] - origin, after[:, 2] - origin
    scale = 2 * arm / (u[:, 0] * v[:, 1] - u[:, 1] * v[:, 0])
    per_x = torch.stack((u[:, 1], v[:, 1]), 1) * scale[:, None]
    per_y = torch.stack((u[:, 0], v[:, 0]), 1) * -scale[:, None]
    offset = before[1] - per_x * origin[:, :1] - per_y * origin[:, 1:]
    per_x, per_y, offset = (values.to(device) for values in (per_x, per_y, offset))
    # OpenCV adds a term for the column and a term for the row, each rounded separately.
    x = torch.arange(width, dtype=torch.float64, device=device)
    y = torch.arange(height, dtype=torch.float64, device=device)
    column = (per_x[..., None] * (x * _FIXED)).round_()
    row = ((per_y[..., None] * y + offset[..., None]) * _FIXED).round_()
    step = _FIXED // _SUBPIXEL
    place = (row[..., None] + column[:, :, None] + step // 2).div_(step).floor_().div_(_SUBPIXEL)
    return place[:, 0], place[:, 1]


def _bilinear(images: Tensor, x: Tensor, y: Tensor, *, mirror_edge: bool) -> Tensor:
    """Read images between pixels.

    Args:
        images: (B, C, H, W) float32.
        x: Columns to read, (B, H, W).
        y: Rows to read, (B, H, W).
        mirror_edge: Beyond the image, c b | a b c (mirror101) if true, else b a | a b c.

    Returns:
        (B, C, H, W).
    """
    height, width = images.shape[-2:]
    if mirror_edge:
        grid = torch.stack((x * (2 / (width - 1)) - 1, y * (2 / (height - 1)) - 1), -1)
    else:
        grid = torch.stack(((x * 2 + 1) / width - 1, (y * 2 + 1) / height - 1), -1)
    return F.grid_sample(
        images, grid.to(images.dtype), padding_mode="reflection", align_corners=mirror_edge
    )
