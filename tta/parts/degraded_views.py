"""Views of a batch that keep geometry and lose the rest: amplitudes masked, patches with noise."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["low_frequencies", "mask_amplitudes", "noise_patches"]


def low_frequencies(height: int, width: int, share: float) -> tuple[slice, slice]:
    """Rows and columns of the low square of a shifted spectrum, whose sides are shares of it."""
    sides = [(n, int(share * n)) for n in (height, width)]
    rows, columns = (slice((n - s) // 2, (n - s) // 2 + s) for n, s in sides)
    return rows, columns


def mask_amplitudes(images: Tensor, kept: Tensor, share: float) -> Tensor:
    """Leave out low frequencies of images, whose phases stay.

    A mask of a real image is the same at a frequency and at its opposite. Of the two the one in the
    upper half of the shifted spectrum decides or, in its middle row, the one on the right.

    Args:
        images: (B, C, H, W).
        kept: (B, C, h, w) bool for the low square (:func:`low_frequencies`); False = left out.
        share: Side of the square as a share of the spectrum's.

    Returns:
        (B, C, H, W) float32.
    """
    height, width = images.shape[2:]
    rows, columns = low_frequencies(height, width, share)
    mask = torch.ones(images.shape, dtype=torch.bool, device=images.device)
    mask[:, :, rows, columns] = kept
    middle, centre = height // 2, width // 2
    down = torch.arange(height, device=images.device)[:, None] - middle
    right = torch.arange(width, device=images.device)[None] - centre
    decides = (down < 0) | ((down == 0) & (right >= 0))  # (H, W)
    opposite = mask[:, :, (middle - down[:, 0]) % height][..., (centre - right[0]) % width]
    mask = torch.where(decides, mask, opposite)
    spectrum = torch.fft.fftshift(torch.fft.fft2(images.float()), dim=(2, 3))
    return torch.fft.ifft2(torch.fft.ifftshift(spectrum * mask, dim=(2, 3))).real


def noise_patches(images: Tensor, alpha: Tensor, noise: Tensor) -> Tensor:
    """Mix each patch with noise, the same for all images: ``(1 - a^2) x + a^2 n``, in [-1, 1].

    Args:
        images: (B, C, H, W) in [-1, 1].
        alpha: (patches,) a, row by row; gradients flow to it.
        noise: (patches, C, p, p) n. Patches at the right and lower border may stick out.

    Returns:
        (B, C, H, W) in [-1, 1].
    """
    height, width = images.shape[2:]
    side = noise.shape[-1]
    down, across = math.ceil(height / side), math.ceil(width / side)
    whole = noise.view(down, across, -1, side, side).permute(2, 0, 3, 1, 4)
    whole = whole.reshape(-1, down * side, across * side)[:, :height, :width]
    share = alpha.square().view(down, across)
    share = share.repeat_interleave(side, 0).repeat_interleave(side, 1)[:height, :width]
    return ((1 - share) * images + share * whole).clamp(-1, 1)
