"""frost: a picture of ice blended over the image.

Source: Hendrycks & Dietterich, ICLR 2019, arXiv 1903.12261. The published script crops one of
five photographs whose licence is unknown, so they are not shipped. By default crops are taken from
random fields of ice needles with the statistics that were measured on those photographs: mean,
contrast, correlation of the channels and power in eight bands of spatial frequency.
Whether a classifier makes the same errors under it as under the photographs is not known. With a
folder of pictures of their own, users get the published procedure on those.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS

from corruptions.draws import normals
from corruptions.filters import levels
from corruptions.messages import shown
from corruptions.pictures import is_picture, read_picture
from corruptions.setting import Params, Setting, scalar

__all__ = ["apply_frost", "crop_pictures", "sample_frost", "synthetic_frost"]

Triple = tuple[float, float, float]


@dataclass(frozen=True)
class _Texture:
    """Statistics of crops of one picture, values in [0, 1], channels R, G, B.

    Attributes:
        mean: Mean over crops.
        mean_spread: Standard deviation of the crop mean over crops.
        contrast: Mean standard deviation within a crop.
        contrast_spread: Standard deviation of `contrast` over crops.
        correlation: Correlation of the channels within a crop: RG, GB, RB.
        bands: Share of the variance in eight radial frequency bands up to Nyquist.
        sign: Sign of the skewness: 1 where needles are brighter than what is between them.
    """

    mean: Triple
    mean_spread: Triple
    contrast: Triple
    contrast_spread: Triple
    correlation: Triple
    bands: tuple[float, ...]
    sign: int


# The script's choice among five files falls on four different pictures: the second exists twice.
_SHARES = (0.2, 0.4, 0.2, 0.2)
# Fields of each texture from which crops are taken; they repeat after `_TILE` pixels.
_FIELDS = 4
_TILE = 512
# Directions of ice needles.
_DIRECTIONS = 7
# Measured at shrink 5, for 32x32 crops.
_SMALL = (
    _Texture((.302, .581, .646), (.069, .038, .031), (.083, .051, .049), (.015, .009, .008),
             (.79, .92, .52), (.321, .160, .072, .058, .058, .067, .080, .184), 1),
    _Texture((.777, .794, .830), (.033, .036, .038), (.070, .072, .074), (.010, .011, .012),
             (.995, .995, .991), (.162, .121, .095, .090, .094, .104, .111, .223), -1),
    _Texture((.561, .619, .669), (.040, .040, .043), (.102, .102, .106), (.008, .009, .009),
             (.997, .992, .990), (.104, .083, .078, .088, .104, .115, .137, .292), -1),
    _Texture((.402, .447, .493), (.062, .060, .056), (.136, .135, .132), (.026, .025, .024),
             (1.00, .999, .998), (.106, .151, .121, .096, .092, .095, .110, .228), 1),
)  # fmt: skip
# Measured at full size, for 224x224 crops.
_LARGE = (
    _Texture((.298, .577, .642), (.056, .031, .024), (.092, .055, .052), (.017, .008, .007),
             (.79, .93, .53), (.631, .061, .062, .069, .063, .049, .034, .031), 1),
    _Texture((.776, .793, .829), (.023, .025, .027), (.077, .079, .082), (.007, .008, .009),
             (.995, .995, .991), (.543, .156, .091, .070, .055, .041, .025, .020), -1),
    _Texture((.569, .627, .678), (.026, .025, .027), (.102, .102, .107), (.008, .008, .008),
             (.997, .992, .990), (.353, .147, .132, .114, .095, .073, .047, .040), -1),
    _Texture((.399, .443, .490), (.049, .047, .044), (.141, .139, .137), (.025, .023, .022),
             (1.00, .999, .998), (.486, .154, .092, .067, .052, .043, .038, .067), 1),
)  # fmt: skip


def sample_frost(setting: Setting) -> Params:
    """Draw for frost.

    Returns:
        `image_weight`, `frost_weight`; `crop`, (B, 3, H, W) uint8: the ice over each image.
    """
    values = setting.constants()
    shrink = int(values["shrink"])
    if setting.frost_pictures is None:
        crop = synthetic_frost(setting, _SMALL if shrink > 1 else _LARGE)
    else:
        crop = crop_pictures(setting, shrink)
    return {
        "image_weight": scalar(values["image_weight"]),
        "frost_weight": scalar(values["frost_weight"]),
        "crop": crop,
    }


def apply_frost(images: Tensor, params: Params) -> Tensor:
    """Blend the crop over the image; the two weights need not sum to one."""
    table = _blend_table(float(params["image_weight"]), float(params["frost_weight"]))
    place = images.to(torch.int32).mul_(256).add_(params["crop"])
    return table.to(images.device).index_select(0, place.flatten()).view(images.shape)


@lru_cache(maxsize=32)
def _blend_table(image_weight: float, frost_weight: float) -> Tensor:
    """Output for [level, level of the crop], (65536,) uint8."""
    level = torch.arange(256, dtype=torch.float64)
    return levels((level * image_weight)[:, None] + level * frost_weight).flatten()


def synthetic_frost(setting: Setting, textures: tuple[_Texture, ...]) -> Tensor:
    """Random fields with the statistics of crops of the published pictures.

    Args:
        setting: Shape and seeds.
        textures: One for each picture.

    Returns:
        (B, 3, H, W) uint8.
    """
    batch, channels, height, width = setting.shape
    tall, wide = min(height, _TILE), min(width, _TILE)
    draw = setting.uniforms("crop", 4).double()
    device = draw.device
    steps = torch.tensor(_SHARES, dtype=torch.float64).cumsum(0)[:-1].to(device)
    choice = torch.bucketize(draw[:, 0].contiguous(), steps, right=True)
    pick = choice * _FIELDS + (draw[:, 1] * _FIELDS).long()
    top, left = (draw[:, 2] * tall).long(), (draw[:, 3] * wide).long()
    rows = (torch.arange(height, device=device) + top[:, None]).remainder_(tall).mul_(wide).int()
    columns = (torch.arange(width, device=device) + left[:, None]).remainder_(wide).int()
    plane = torch.arange(channels, device=device) + pick[:, None] * channels
    plane = plane.mul_(tall * wide).int()
    place = (plane[:, :, None] + rows[:, None])[..., None] + columns[:, None, None]
    field = _bank(tall, wide, textures, device).index_select(0, place.flatten())
    spread = setting.normals("spread", 2)
    scale, offset = spread[:, :1], spread[:, 1:]

    def of(key: str) -> Tensor:
        return torch.tensor([getattr(texture, key) for texture in textures], device=device)[choice]

    relative = (of("contrast_spread") / of("contrast")).mean(1, keepdim=True)
    contrast = of("contrast") * (1 + scale * relative) * 255
    mean = (of("mean") + of("mean_spread") * offset) * 255
    field = field.view(batch, channels, -1).mul_(contrast[:, :, None]).add_(mean[:, :, None])
    return levels(field).view(setting.shape)


@lru_cache(maxsize=8)
def _bank(height: int, width: int, textures: tuple[_Texture, ...], device: torch.device) -> Tensor:
    """Periodic fields, `_FIELDS` of each texture, mean 0 and variance 1, flat float32.

    They stand for the published pictures: they are always the same, and a crop is taken from them
    at random. Being periodic, they have a crop at every pixel.
    """
    needles = torch.fft.rfft2(_needles(height, width))
    band = _bands(height, width)
    # A frequency and its mirror image both count, but only one is stored.
    columns = torch.arange(width // 2 + 1)
    twice = torch.where((columns == 0) | (columns * 2 == width), 1.0, 2.0)
    power = (needles.abs().square() * twice).flatten(2)
    fields = []
    for texture in textures:
        share = torch.tensor(texture.bands, dtype=torch.float64)
        now = torch.zeros(*power.shape[:2], len(share), dtype=torch.float64)
        now.index_add_(2, band.flatten(), power)
        # Small images have too few frequencies to fill every band.
        gain = (share / now.clamp(min=1e-30)).where(now > 1e-12, 0.0).sqrt_()
        gain /= (gain.square() * now).sum(2, keepdim=True).sqrt_()
        shaped = needles * gain[:, :, band] * (texture.sign * height * width)
        field = torch.fft.irfft2(shaped, s=(height, width))
        fields.append(_mixed(field, _channel_mixing(texture.correlation)).float())
    return torch.cat(fields).flatten().to(device)


def _bands(height: int, width: int) -> Tensor:
    """Band of each frequency of a real transform, 0 to 7 by radius, (H, W // 2 + 1) int64."""
    radius = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width))
    return torch.from_numpy(np.minimum((radius * 16 + 1e-9).astype(int), 7))


def _needles(height: int, width: int) -> Tensor:
    """Ice needles: streaks with barbs, of one direction in one place and another elsewhere.

    Returns:
        (`_FIELDS`, 3, height, width) float64, periodic.
    """
    seeds, shape = torch.arange(_FIELDS), (_FIELDS, 3, height, width)
    rows = torch.fft.fftfreq(height, dtype=torch.float64)[:, None]
    columns = torch.fft.rfftfreq(width, dtype=torch.float64)
    side = min(height, width)
    # Regions of one direction are a fifth of the image wide.
    smooth = torch.exp(-0.5 * (rows**2 + columns**2) * (0.6 * side) ** 2)
    total, weights = torch.zeros(shape, dtype=torch.float64), 0.0
    for k in range(_DIRECTIONS):
        noise = normals(seeds, f"frost/{k}", 6 * height * width).view(2, *shape).double()
        region = torch.fft.irfft2(torch.fft.rfft2(noise[0]) * smooth, s=(height, width))
        region = (region / region.std((2, 3), keepdim=True)).mul_(6).exp_()
        angle = math.pi * k / _DIRECTIONS
        # A needle and two shorter barbs, thinner than a pixel.
        streak = torch.zeros(height, width // 2 + 1, dtype=torch.float64)
        for turn, length, share in ((0.0, 0.03, 1.0), (1.0, 0.015, 0.5), (-1.0, 0.015, 0.5)):
            along = columns * math.cos(angle + turn) + rows * math.sin(angle + turn)
            across = rows * math.cos(angle + turn) - columns * math.sin(angle + turn)
            square = (along * length * side) ** 2 + (across * 0.4) ** 2
            streak += share * torch.exp(-2 * math.pi**2 * square)
        # Needles start at few points.
        points = (noise[1] - 0.5).clamp_(min=0)
        grown = torch.fft.irfft2(torch.fft.rfft2(points) * streak, s=(height, width))
        total += region * grown
        weights = weights + region
    total /= weights
    return total - total.mean((2, 3), keepdim=True)


def _mixed(field: Tensor, mixing: Tensor) -> Tensor:
    """Mix three channels, (B, 3, H, W), by a lower triangular matrix, in a fixed order of sums."""
    rows = [[mixing[i, j] * field[:, j] for j in range(i + 1)] for i in range(3)]
    return torch.stack([torch.stack(row).sum(0) for row in rows], 1)


def _channel_mixing(correlation: Triple) -> Tensor:
    """Cholesky factor of the channel correlation, (3, 3)."""
    rg, gb, rb = (min(value, 0.9995) for value in correlation)
    matrix = np.array([[1, rg, rb], [rg, 1, gb], [rb, gb, 1]])
    return torch.from_numpy(np.linalg.cholesky(matrix))


def crop_pictures(setting: Setting, shrink: int) -> Tensor:
    """Random crops of the user's own pictures, each picture equally likely.

    Args:
        setting: Shape, seeds and folder.
        shrink: Keep every `shrink`-th pixel of each row and column, from the middle of the first
            `shrink`, before cropping.

    Returns:
        (B, 3, H, W) uint8.
    """
    assert setting.frost_pictures is not None
    _, _, height, width = setting.shape
    start = shrink // 2
    pictures = [
        picture[:, start::shrink, start::shrink] for picture in _pictures(setting.frost_pictures)
    ]
    for picture in pictures:
        if picture.shape[1] < height or picture.shape[2] < width:
            raise ValueError(
                f"`frost_pictures` must hold pictures of at least {height * shrink} x "
                f"{width * shrink} pixels for images of {height} x {width}, got one of about "
                f"{picture.shape[1] * shrink} x {picture.shape[2] * shrink}: enlarge or remove it"
            )
    draw = setting.uniforms("crop", 3).double()
    crops = []
    for pick, down, across in draw.tolist():
        picture = pictures[int(pick * len(pictures))]
        top = int(down * max(picture.shape[1] - height, 1))
        left = int(across * max(picture.shape[2] - width, 1))
        crops.append(picture[:, top : top + height, left : left + width])
    return torch.stack(crops)


@lru_cache(maxsize=4)
def _pictures(folder: Path) -> list[Tensor]:
    """All pictures of a folder in name order, (3, rows, columns) uint8 each.

    The sixth of the published pictures is left out where all six are there.
    """
    files = sorted(path for path in folder.glob("*") if is_picture(path))
    if not files:
        raise ValueError(
            f"`frost_pictures` must be a folder with pictures ({', '.join(IMG_EXTENSIONS)}), got "
            f"{shown(str(folder))}, which holds none: check the path, or leave it out"
        )
    if {path.stem for path in files} == {f"frost{i}" for i in range(1, 7)}:
        files = [path for path in files if path.stem != "frost6"]  # the script never chooses it
    return [torch.from_numpy(np.array(read_picture(path))).movedim(2, 0) for path in files]
