"""Weather corruptions without a texture of their own: snow, fog, brightness.

Source: Hendrycks & Dietterich, ICLR 2019, arXiv 1903.12261.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from corruptions.blur import directional_blur, zoom_pair
from corruptions.filters import levels
from corruptions.hsv import through_hsv
from corruptions.setting import Params, Setting, scalar

__all__ = [
    "apply_brightness", "apply_fog", "apply_snow", "plasma", "sample_brightness", "sample_fog",
    "sample_snow",
]  # fmt: skip


def sample_snow(setting: Setting) -> Params:
    """Draw for snow.

    Returns:
        `normal`, (B, H, W), the flakes; `angle`, (B,) float64, uniform on [-135, -45) degrees;
        and the constants `mean`, `scale`, `zoom`, `threshold`, `radius`, `sigma`, `keep`.
    """
    params = {key: scalar(value) for key, value in setting.constants().items()}
    params["normal"] = setting.normals("normal", *setting.shape[2:])
    params["angle"] = setting.uniforms("angle").double().mul_(90).sub_(135)
    return params


def apply_snow(images: Tensor, params: Params) -> Tensor:
    """Whiten the image and add the flakes twice, once turned by 180 degrees."""
    flakes = params["normal"].mul(float(params["scale"])).add_(float(params["mean"]))
    flakes = _enlarged(_enlarged(flakes, -2, float(params["zoom"])), -1, float(params["zoom"]))
    flakes = torch.where(flakes < float(params["threshold"]), 0, flakes).mul_(255)
    layer = directional_blur(
        levels(flakes)[:, None], params["angle"], float(params["radius"]), float(params["sigma"])
    )
    twice = layer.to(torch.int16) + layer.flip((-2, -1))
    keep = float(params["keep"])
    source = images.float()
    grey = source[:, 0] * 0.299 + source[:, 1] * 0.587 + source[:, 2] * 0.114
    white = torch.maximum(source, grey.mul_(1.5).add_(127.5)[:, None])
    return levels(white.mul_(1 - keep).add_(source, alpha=keep).add_(twice))


def _enlarged(field: Tensor, axis: int, factor: float) -> Tensor:
    """Enlarge the middle of an axis by linear interpolation, corner-aligned."""
    size = field.shape[axis]
    crop, enlarged, start = zoom_pair(size, factor)
    if crop == enlarged == size:
        return field
    kept = torch.arange(size, dtype=torch.float64) + (enlarged - size) // 2
    place = kept * ((crop - 1) / max(enlarged - 1, 1))
    low = place.long().clamp_(max=crop - 1)
    high = (low + 1).clamp_(max=crop - 1)
    share = (place - low).to(field.device, field.dtype)
    if axis == -2:
        share = share[:, None]
    below = field.index_select(axis, (low + start).to(field.device))
    above = field.index_select(axis, (high + start).to(field.device))
    return below.mul_(1 - share).add_(above.mul_(share))


def sample_fog(setting: Setting) -> Params:
    """Draw for fog.

    Returns:
        `amount`, `decay`; `noise`, (B, n * n - 1), uniform on [-1, 1), in the order in which
        `plasma` uses it. n is the power of two at or above both image sides.
    """
    values = setting.constants()
    size = 1 << (max(setting.shape[2:]) - 1).bit_length()
    noise = setting.uniforms("noise", size * size - 1).mul_(2).sub_(1)
    return {
        "amount": scalar(values["amount"]),
        "decay": scalar(values["decay"]),
        "noise": noise,
    }


def plasma(noise: Tensor, decay: float) -> Tensor:
    """Diamond-square landscape on a torus, scaled to [0, 1].

    Args:
        noise: (B, n * n - 1) uniform on [-1, 1). For each step from n down to 2: the centres of
            the squares, the middles of the horizontal edges, those of the vertical edges, each
            (n / step, n / step) in row-major order.
        decay: What the noise width is divided by from one step to the next.

    Returns:
        (B, n, n) in the dtype of `noise`.
    """
    size = round((noise.shape[1] + 1) ** 0.5)
    corner = noise.new_zeros(len(noise), 1, 1)
    width, used = 100.0, 0
    while corner.shape[1] < size:
        cells = corner.shape[1]
        # The published code multiplies its uniform on (-w, w) by w once more.
        fresh = noise[:, used : used + 3 * cells**2].reshape(-1, 3, cells, cells) * width**2
        used += 3 * cells**2
        # One row and column more, from the other side of the torus.
        wide = torch.cat((corner, corner[..., :1]), 2)
        wide = torch.cat((wide, wide[:, :1]), 1)
        across = wide[..., :-1] + wide[..., 1:]
        down = wide[:, :-1] + wide[:, 1:]
        centre = (across[:, :-1] + across[:, 1:]).mul_(0.25).add_(fresh[:, 0])
        around = torch.cat((centre[..., -1:], centre), 2)
        around = torch.cat((around[:, -1:], around), 1)
        middle = torch.empty_like(corner.expand(len(noise), cells, cells))
        grid = corner.new_empty(len(noise), cells, 2, cells, 2)
        grid[:, :, 0, :, 0] = corner
        grid[:, :, 1, :, 1] = centre
        torch.add(around[:, :-1, 1:], around[:, 1:, 1:], out=middle)
        grid[:, :, 0, :, 1] = middle.add_(across[:, :-1]).mul_(0.25).add_(fresh[:, 1])
        torch.add(around[:, 1:, :-1], around[:, 1:, 1:], out=middle)
        grid[:, :, 1, :, 0] = middle.add_(down[..., :-1]).mul_(0.25).add_(fresh[:, 2])
        corner, width = grid.view(len(noise), 2 * cells, 2 * cells), width / decay
    corner -= corner.amin((1, 2), keepdim=True)
    return corner.div_(corner.amax((1, 2), keepdim=True))


def apply_fog(images: Tensor, params: Params) -> Tensor:
    """Add the landscape and scale back to the brightest value."""
    height, width = images.shape[-2:]
    amount = float(params["amount"])
    haze = plasma(params["noise"], float(params["decay"]))[:, None, :height, :width]
    brightest = images.amax((1, 2, 3), keepdim=True).to(haze.dtype)
    hazy = images + haze * (255 * amount)
    return levels(hazy.mul_(brightest / (brightest + 255 * amount)))


def sample_brightness(setting: Setting) -> Params:
    """Constants of brightness: `shift`, what is added to the HSV value in [0, 1]."""
    return {"shift": scalar(setting.constants()["shift"])}


def apply_brightness(images: Tensor, params: Params) -> Tensor:
    """Raise the HSV value: every channel grows in proportion to the largest one."""
    shift = float(params["shift"])
    table, doubtful = (entry.to(images.device) for entry in _brightness_table(shift))
    largest = images.amax(1, keepdim=True).to(torch.int32).mul_(256)
    place = (largest + images).flatten()
    out = table.index_select(0, place).view(images.shape)
    doubt = doubtful.index_select(0, place).view(images.shape).any(1).nonzero(as_tuple=True)
    image, row, column = doubt
    pixels = images[image, :, row, column]
    out[image, :, row, column] = through_hsv(pixels, lambda s, v: (s, (v + shift).clamp(0, 1)))
    return out


@lru_cache(maxsize=32)
def _brightness_table(shift: float) -> tuple[Tensor, Tensor]:
    """Output for [largest channel, channel], (65536,) uint8, and where it depends on the hue.

    The middle channel depends on the hue in its last bits only, which count where the result is an
    integer.
    """
    level = torch.arange(256, dtype=torch.float64) / 255
    value = (level + shift).clamp_(0, 1)[:, None]
    saturation = (level[:, None] - level) / level[:, None]
    # Black has no hue: all channels get the new value.
    saturation[0] = 0
    out = (value * (1 - saturation)).mul_(255)
    doubtful = (out - out.round()).abs() < 1e-6
    # A middle channel is neither black nor the largest.
    doubtful[:, 0] = False
    doubtful.fill_diagonal_(False)
    return levels(out).flatten(), doubtful.flatten()
