"""Random draws that depend on an image's seed and on nothing else.

The generator is SplitMix64 (Steele, Lea and Flood, OOPSLA 2014): word j of a stream is a fixed
mixing of `start + (j + 1) * gamma` in 64-bit integers, so all words of all images come from one
batched expression. `start` mixes the image's seed with the name of the field being drawn. The
words are the same on every machine and library version; uniforms are exact fractions of them, and
normals differ at most in the last bit of the logarithm and cosine.

numpy's own normals are not used: numpy promises a stable stream for its bit generators only, and
needs one generator object for each image.
"""

from __future__ import annotations

import math
import zlib

import torch
from torch import Tensor

__all__ = ["entropy_seeds", "normals", "uniforms", "words"]

_GAMMA = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB
# Temporaries of this many words stay in the processor cache.
_CHUNK = 1 << 17


def _signed(value: int) -> int:
    """The int64 that has the bits of an unsigned 64-bit value."""
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >= 1 << 63 else value


def _mix_(state: Tensor) -> Tensor:
    """SplitMix64's output function on int64, in place."""
    for shift, factor in ((30, _MIX_1), (27, _MIX_2), (31, None)):
        # torch shifts int64 arithmetically; the mask makes the shift a logical one.
        state ^= (state >> shift).bitwise_and_((1 << (64 - shift)) - 1)
        if factor is not None:
            state *= _signed(factor)
    return state


def words(seeds: Tensor, field: str, count: int) -> Tensor:
    """Independent 64-bit words for each image.

    Args:
        seeds: One seed for each image, (B,) int64 on the CPU.
        field: Name of what is drawn; other names give independent streams.
        count: Words for each image.

    Returns:
        (B, count) int64, uniform over all bit patterns.
    """
    name = zlib.crc32(field.encode()) * _GAMMA
    start = _mix_(_mix_(seeds.clone()) ^ _signed(name))
    steps = torch.arange(1, count + 1, dtype=torch.int64) * _signed(_GAMMA)
    out = torch.empty(len(seeds), count, dtype=torch.int64)
    rows = max(1, _CHUNK // max(count, 1))
    for first in range(0, len(seeds), rows):
        part = out[first : first + rows]
        torch.add(start[first : first + rows, None], steps, out=part)
        _mix_(part)
    return out


def uniforms(seeds: Tensor, field: str, count: int) -> Tensor:
    """Uniform numbers in [0, 1): exact multiples of 2^-24.

    Args:
        seeds: (B,) int64 on the CPU.
        field: Name of what is drawn.
        count: Numbers for each image.

    Returns:
        (B, count) float32.
    """
    halves = words(seeds, field, (count + 1) // 2).view(torch.int32)[:, :count]
    return (halves >> 8).float().add_(2**23).mul_(2.0**-24)


def normals(seeds: Tensor, field: str, count: int) -> Tensor:
    """Standard normal numbers by the Box-Muller transform.

    Args:
        seeds: (B,) int64 on the CPU.
        field: Name of what is drawn.
        count: Numbers for each image.

    Returns:
        (B, count) float32, at most 5.8 in size.
    """
    half = (count + 1) // 2
    out = torch.empty(len(seeds), 2 * half)
    rows = max(1, _CHUNK // max(half, 1))
    for first in range(0, len(seeds), rows):
        flat = uniforms(seeds[first : first + rows], field, 2 * half)
        # 1 - u lies in (0, 1], so the logarithm is finite.
        radius = (1 - flat[:, :half]).log_().mul_(-2).sqrt_()
        angle = flat[:, half:] * (2 * math.pi)
        part = out[first : first + rows]
        torch.mul(radius, angle.cos(), out=part[:, :half])
        torch.mul(radius, angle.sin_(), out=part[:, half:])
    return out[:, :count]


def entropy_seeds(count: int) -> Tensor:
    """Fresh seeds from the operating system, (count,) int64; no global generator is read."""
    fresh = torch.Generator()
    fresh.seed()
    return torch.randint(-(2**63), 2**63 - 1, (count,), generator=fresh, dtype=torch.int64)
