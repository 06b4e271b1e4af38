"""Noise corruptions: gaussian_noise, shot_noise, impulse_noise, speckle_noise.

Source: Hendrycks & Dietterich, ICLR 2019, arXiv 1903.12261. With f = level / 255 the published
formulas are f + s z, Poisson(L f) / L, salt and pepper, and f + f s z, clipped to [0, 1] and
truncated to 8 bits. Every pixel and channel is drawn on its own.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from scipy import special
from torch import Tensor

from corruptions.filters import levels
from corruptions.setting import Params, Setting, scalar

__all__ = [
    "apply_gaussian_noise", "apply_impulse_noise", "apply_shot_noise", "apply_speckle_noise",
    "sample_impulse_noise", "sample_normal_noise", "sample_shot_noise",
]  # fmt: skip

_BINS = 4096
# Above this many photons (severity below 0.25 only) counts are drawn as normals, not by table.
_MANY = 2000


def sample_normal_noise(setting: Setting) -> Params:
    """Draw for gaussian_noise and speckle_noise.

    Returns:
        `scale` s; `normal` z, (B, 3, H, W).
    """
    scale = setting.constants()["scale"]
    return {"scale": scalar(scale), "normal": setting.normals("normal", *setting.shape[1:])}


def apply_gaussian_noise(images: Tensor, params: Params) -> Tensor:
    """Add noise of the same strength everywhere: f + s z."""
    noise = params["normal"] * (255 * float(params["scale"]))
    return levels(noise.add_(images))


def apply_speckle_noise(images: Tensor, params: Params) -> Tensor:
    """Add noise in proportion to the pixel: f + f s z."""
    gain = params["normal"] * float(params["scale"])
    return levels(gain.add_(1).mul_(images))


def sample_impulse_noise(setting: Setting) -> Params:
    """Draw for impulse_noise.

    Returns:
        `replace`, which values go, and `salt`, whether they turn white, (B, 3, H, W) bool.
    """
    draw = setting.integers("uniform", *setting.shape[1:])
    amount = setting.constants()["amount"] * 2**32
    # Given that a value is replaced, its draw is uniform below the amount: half are salt.
    return {"replace": draw < round(amount) - 2**31, "salt": draw < round(amount / 2) - 2**31}


def apply_impulse_noise(images: Tensor, params: Params) -> Tensor:
    """Replace single values by black or white."""
    # Operations on bits are eight times as fast as choices by torch.where.
    gone = params["replace"].view(torch.uint8) * 255
    white = (params["salt"].view(torch.uint8) * 255).bitwise_and_(gone)
    return gone.bitwise_not_().bitwise_and_(images).bitwise_or_(white)


def sample_shot_noise(setting: Setting) -> Params:
    """Draw for shot_noise.

    Returns:
        `photons` L; `uniform`, (B, 3, H, W): the quantile of each Poisson count. Put `counts`,
        (B, 3, H, W), in its place to give the counts themselves.
    """
    photons = setting.constants()["photons"]
    uniform = setting.uniforms("uniform", *setting.shape[1:])
    return {"photons": scalar(photons), "uniform": uniform}


def apply_shot_noise(images: Tensor, params: Params) -> Tensor:
    """Count photons: Poisson(L f) / L."""
    photons = float(params["photons"])
    counts = params.get("counts")
    if counts is None and photons > _MANY:
        spread = torch.special.ndtri(params["uniform"] + 2.0**-25).mul_(255 / photons**0.5)
        return levels(spread.mul_((images / 255).sqrt_()).add_(images))
    if counts is None:
        counts = _poisson_quantile(images, params["uniform"], photons)
    # A table, because counts / L * 255 must be rounded as the published float64 formula is.
    top = int(photons) + 2
    table = levels(torch.arange(top, dtype=torch.float64).div_(photons).clamp_(0, 1).mul_(255))
    index = counts.clamp(max=top - 1).to(torch.int32)
    return table.to(images.device).index_select(0, index.flatten()).view(images.shape)


@lru_cache(maxsize=16)
def _poisson_tables(photons: float, device: torch.device) -> tuple[Tensor, Tensor, int]:
    """Quantiles of Poisson(L level / 255) for the 256 levels.

    Returns:
        `guide` (256 * _BINS,) int16: the count at the lower end of each bin of u; `cdf`
        (256 * width,) float32: P(count <= k); and `width`, the number of counts kept.
    """
    rates = photons * np.arange(256) / 255
    width = int(photons + 8 * np.sqrt(photons) + 12)
    cdf = special.pdtr(np.arange(width)[None, :], rates[:, None])
    # The draws are multiples of 2^-24; the last column ends every search.
    cdf = np.ceil(cdf * 2.0**24) / 2.0**24
    cdf[:, -1] = 2
    edges = np.arange(_BINS) / _BINS
    guide = np.stack([np.searchsorted(row, edges, side="right") for row in cdf])
    flat = torch.from_numpy(cdf.astype(np.float32)).flatten()
    return torch.from_numpy(guide.astype(np.int16)).flatten().to(device), flat.to(device), width


def _poisson_quantile(images: Tensor, uniform: Tensor, photons: float) -> Tensor:
    """Smallest count k with u < P(Poisson(L f) <= k), (B, 3, H, W) int32."""
    guide, cdf, width = _poisson_tables(photons, images.device)
    draw = uniform.flatten()
    level = images.flatten().to(torch.int32)
    counts = guide.index_select(0, (draw * _BINS).to(torch.int32).add_(level, alpha=_BINS))
    counts = counts.to(torch.int32)
    place = counts.add(level, alpha=width)
    # Nearly every bin holds at most one step of the distribution function.
    counts += draw >= cdf.index_select(0, place)
    place = counts.add(level, alpha=width)
    left = (draw >= cdf.index_select(0, place)).nonzero().squeeze(1)
    while len(left):
        counts[left] += 1
        left = left[draw[left] >= cdf[counts[left] + level[left] * width]]
    return counts.view(images.shape)
