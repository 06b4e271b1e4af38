"""Destroy the object of an image while colours and textures stay, for DeYO.

Without shapes, a prediction that stays as confident as before did not rest on them.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from tta.core.random import CountedDraws

__all__ = ["occlude", "random_orders", "shuffle_patches", "shuffle_pixels"]


def random_orders(count: int, length: int, draws: CountedDraws) -> Tensor:
    """Draw permutations of ``range(length)``: (count, length) int64, on the device of ``draws``."""
    return draws.words(count * length).view(count, length).argsort(1)


def shuffle_patches(images: Tensor, grid: int, orders: Tensor) -> Tensor:
    """Cut each image into grid x grid patches and put these back in another order.

    Sides that are no multiple of ``grid`` are resized down to one, and back afterwards.

    Args:
        images: (B, C, H, W), with sides of at least ``grid``.
        grid: Patches along each side.
        orders: (B, grid * grid) int64; the new patch j is the old patch ``orders[:, j]``, both
            counted row by row.

    Returns:
        (B, C, H, W).
    """
    b, c, h, w = images.shape
    height, width = h // grid, w // grid
    x = _resize(images, height * grid, width * grid)
    patches = x.view(b, c, grid, height, grid, width).permute(0, 2, 4, 1, 3, 5)
    patches = _permute(patches.reshape(b, grid * grid, -1), orders)
    patches = patches.view(b, grid, grid, c, height, width).permute(0, 3, 1, 4, 2, 5)
    return _resize(patches.reshape(b, c, height * grid, width * grid), h, w)


def shuffle_pixels(images: Tensor, orders: Tensor) -> Tensor:
    """Put the pixels of each image, all channels together, in another order.

    Args:
        images: (B, C, H, W).
        orders: (B, H * W) int64, as for :func:`shuffle_patches`.
    """
    pixels = images.flatten(2).transpose(1, 2)
    return _permute(pixels, orders).transpose(1, 2).reshape(images.shape)


def occlude(images: Tensor, share: float) -> Tensor:
    """Cover the middle of each image (B, C, H, W) with its own mean colour.

    Args:
        images: (B, C, H, W).
        share: Side of the covered rectangle as a share of the image's, rounded to pixels.
    """
    height, width = (round(share * n) for n in images.shape[2:])
    top, left = (images.shape[2] - height) // 2, (images.shape[3] - width) // 2
    covered = images.clone()
    mean = images.mean((2, 3), keepdim=True)
    covered[:, :, top : top + height, left : left + width] = mean
    return covered


def _permute(rows: Tensor, orders: Tensor) -> Tensor:
    """The rows (B, N, D) of each image in the order (B, N)."""
    return rows.gather(1, orders[:, :, None].expand(rows.shape))


def _resize(images: Tensor, height: int, width: int) -> Tensor:
    if tuple(images.shape[2:]) == (height, width):
        return images
    return F.interpolate(images, (height, width), mode="bilinear", antialias=True)
