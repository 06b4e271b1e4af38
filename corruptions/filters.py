"""Linear filters on 8-bit images whose sums come out the same in any order.

Outputs are truncated to whole grey levels, so a difference in the last bit can move a pixel by
one level, and BLAS and convolution kernels add in an order that depends on the batch. Weights are
therefore rounded to binary fractions that sum to exactly one. Products of such weights and 8-bit
levels, and all their partial sums, are then exact in floating point: an image's result cannot
depend on its batch, the thread count or the device. The rounding is far below what the truncation
sees: a sum moves by about 0.001 levels.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

__all__ = [
    "SLACK", "Band", "exact_float", "folded", "levels", "pad", "quantised", "separable",
]  # fmt: skip

# With levels centred on zero (8 bits and a sign), 17 more bits fill a float32.
SINGLE_PASS_BITS = 17
# Two passes in float64: 8 + 22 + 22 bits.
TWO_PASS_BITS = 22

# Bound, in levels, on the error of float32 sums with interpolation weights: a value that lies so
# little below an integer level is taken for that level. Otherwise means of equal values would fall
# to the level below.
SLACK = 2.0**-13


def exact_float(device: torch.device) -> torch.dtype:
    """Dtype for single-pass filters: float64 where float32 may be cut to TF32 or bfloat16."""
    shortened = device.type != "cpu" or torch.get_float32_matmul_precision() == "medium"
    return torch.float64 if shortened else torch.float32


def levels(values: Tensor) -> Tensor:
    """Clip to 0..255 and truncate to uint8, as the published scripts do; `values` is consumed."""
    return values.clamp_(0, 255).to(torch.uint8)


def quantised(weights: np.ndarray, bits: int) -> np.ndarray:
    """Round weights to multiples of 2^-bits, so that each row keeps its sum, rounded so too.

    Args:
        weights: (rows, taps); a row that sums to one up to rounding errors does so exactly
            afterwards.
        bits: Fraction bits.

    Returns:
        (rows, taps) float64. Running sums are what is rounded, so no error adds up.
    """
    total = np.round(np.cumsum(weights, axis=1) * 2.0**bits)
    return np.diff(total, axis=1, prepend=0) * 2.0**-bits


def folded(positions: np.ndarray, size: int, mode: str) -> np.ndarray:
    """Map positions beyond an axis of `size` samples back into it.

    Args:
        positions: Integer positions, any shape.
        size: Samples on the axis.
        mode: "edge" (a a | a b c), "mirror101" (c b | a b c) or "symmetric" (b a | a b c).

    Returns:
        Positions in 0..size-1, folded as often as needed.
    """
    if mode == "edge":
        return np.clip(positions, 0, size - 1)
    if mode == "mirror101":
        period = max(2 * size - 2, 1)
        inside = positions % period
        return np.minimum(inside, period - inside)
    assert mode == "symmetric"
    inside = positions % (2 * size)
    return np.minimum(inside, 2 * size - 1 - inside)


@lru_cache(maxsize=64)
def _pad_index(size: int, before: int, after: int, mode: str) -> Tensor:
    return torch.from_numpy(folded(np.arange(-before, size + after), size, mode))


def pad(images: Tensor, rows: int, columns: int, mode: str) -> Tensor:
    """Extend images on all sides, by more than their own size if asked.

    Args:
        images: (..., H, W).
        rows: Rows to add above and below.
        columns: Columns to add left and right.
        mode: See `folded`.

    Returns:
        (..., H + 2 rows, W + 2 columns).
    """
    height, width = images.shape[-2:]
    if rows >= height or columns >= width:
        for axis, margin, size in ((-2, rows, height), (-1, columns, width)):
            if margin:
                index = _pad_index(size, margin, margin, mode).to(images.device)
                images = images.index_select(axis, index)
        return images
    # Blocks are copied, which is several times faster than gathering on a CPU.
    out = images.new_empty(*images.shape[:-2], height + 2 * rows, width + 2 * columns)
    inner = out[..., columns : columns + width]
    inner[..., rows : rows + height, :] = images
    for axis, margin, size, part in ((-2, rows, height, inner), (-1, columns, width, out)):
        if margin:
            first = part.narrow(axis, margin, margin + 1)
            last = part.narrow(axis, size - 1, margin + 1)
            part.narrow(axis, 0, margin).copy_(_mirrored(first, axis, mode, at_start=True))
            end = part.narrow(axis, margin + size, margin)
            end.copy_(_mirrored(last, axis, mode, at_start=False))
    return out


def _mirrored(edge: Tensor, axis: int, mode: str, at_start: bool) -> Tensor:
    """Continue beyond an edge, given one sample more than are wanted."""
    margin = edge.shape[axis] - 1
    if mode == "edge":
        return edge.narrow(axis, 0 if at_start else margin, 1)
    assert mode in ("mirror101", "symmetric")
    without_edge = mode == "mirror101"
    return edge.narrow(axis, int(without_edge == at_start), margin).flip(axis)


# Rows of a band matrix that are multiplied at once.
_BAND_ROWS = 32


class Band(NamedTuple):
    """A matrix whose rows have their few entries near the diagonal.

    Attributes:
        matrix: (M, N).
        blocks: First row, one past the last, first column with an entry, one past the last.
    """

    matrix: Tensor
    blocks: tuple[tuple[int, int, int, int], ...]

    @classmethod
    def of(cls, matrix: Tensor) -> Band:
        """Find the blocks of a matrix on the CPU, `_BAND_ROWS` rows each."""
        blocks = []
        for first in range(0, len(matrix), _BAND_ROWS):
            rows = matrix[first : first + _BAND_ROWS]
            used = (rows != 0).any(0).nonzero().flatten()
            blocks.append((first, first + len(rows), int(used[0]), int(used[-1]) + 1))
        return cls(matrix, tuple(blocks))

    def along(self, values: Tensor) -> Tensor:
        """Apply the matrix along the last axis, which becomes the first: (..., N) to (M, ...)."""
        flat = values.reshape(-1, values.shape[-1])
        matrix = self.matrix.to(values)
        if values.device.type != "cpu":
            found = matrix @ flat.t()
        else:
            found = flat.new_empty(len(matrix), len(flat))
            for top, bottom, left, right in self.blocks:
                part = flat[:, left:right].t()
                torch.mm(matrix[top:bottom, left:right], part, out=found[top:bottom])
        return found.view(len(matrix), *values.shape[:-1])


@lru_cache(maxsize=64)
def gaussian_band(size: int, sigma: float, truncate: float, mode: str) -> Band:
    """A Gaussian filter along one axis, padding included.

    Args:
        size: Samples on the axis.
        sigma: Standard deviation in samples; 0 gives the identity.
        truncate: Radius in standard deviations.
        mode: See `folded`.

    Returns:
        A (size, size) float64 matrix with weights of `TWO_PASS_BITS` bits; row i makes output i.
    """
    radius = int(truncate * sigma + 0.5)
    if sigma <= 0 or radius == 0:
        return Band.of(torch.eye(size, dtype=torch.float64))
    taps = np.arange(-radius, radius + 1)
    kernel = np.exp(-0.5 * (taps / sigma) ** 2)
    source = folded(np.arange(size)[:, None] + taps, size, mode)
    matrix = np.zeros((size, size))
    np.add.at(matrix, (np.arange(size)[:, None], source), kernel / kernel.sum())
    return Band.of(torch.from_numpy(quantised(matrix, TWO_PASS_BITS)))


def separable(images: Tensor, sigma: float, truncate: float = 4.0, mode: str = "edge") -> Tensor:
    """Gaussian filter over rows and columns.

    Args:
        images: (B, ..., H, W) of any dtype; sums are exact if values are whole numbers 0..255.
        sigma: Standard deviation in pixels.
        truncate: Radius in standard deviations.
        mode: See `folded`.

    Returns:
        (B, ..., H, W) float64, a view with other strides.
    """
    height, width = images.shape[-2:]
    across = gaussian_band(width, sigma, truncate, mode).along(images.flatten(0, -3).double())
    both = gaussian_band(height, sigma, truncate, mode).along(across)  # (H, W, ...)
    return both.permute(2, 0, 1).unflatten(0, images.shape[:-2])
