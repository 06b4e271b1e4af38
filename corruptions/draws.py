"""Random draws that depend on an image's seed and on nothing else.

The generator is SplitMix64 (Steele, Lea and Flood, OOPSLA 2014): word j of a stream is a fixed
mixing of `start + (j + 1) * gamma` in 64-bit integers, so all words of all images come from one
batched expression. `start` mixes the image's seed with the name of the field being drawn. The
words are the same on every machine and library version; uniforms are exact fractions of them, and
normals are looked up in a table of quantiles.

numpy's own normals are not used: numpy promises a stable stream for its bit generators only, and
needs one generator object for each image.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterable
from functools import lru_cache

import numpy as np
import torch
from scipy import special
from torch import Tensor

__all__ = ["entropy_seeds", "image_seeds", "normals", "uniforms", "words"]

_GAMMA = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB
# Temporaries of this many words stay in the processor cache; a GPU takes all there are.
_CHUNK = 1 << 15
_CHUNK_GPU = 1 << 62


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
        seeds: One seed for each image, (B,) int64.
        field: Name of what is drawn; different names give independent streams.
        count: Words for each image.

    Returns:
        (B, count) int64 on the device of `seeds`, uniform over all bit patterns.
    """
    name = zlib.crc32(field.encode()) * _GAMMA
    start = _mix_(_mix_(seeds.clone()) ^ _signed(name))
    steps = _steps(count, seeds.device)
    out = torch.empty(len(seeds), count, dtype=torch.int64, device=seeds.device)
    chunk = _CHUNK if seeds.device.type == "cpu" else _CHUNK_GPU
    rows = max(1, chunk // max(count, 1))
    for first in range(0, len(seeds), rows):
        for left in range(0, count, chunk):
            part = out[first : first + rows, left : left + chunk]
            torch.add(start[first : first + rows, None], steps[left : left + chunk], out=part)
            _mix_(part)
    return out


@lru_cache(maxsize=8)
def _steps(count: int, device: torch.device) -> Tensor:
    """The stream's position at each word, less its start."""
    return torch.arange(1, count + 1, dtype=torch.int64, device=device) * _signed(_GAMMA)


def uniforms(seeds: Tensor, field: str, count: int) -> Tensor:
    """Uniform numbers in [0, 1): exact multiples of 2^-24.

    Args:
        seeds: (B,) int64.
        field: Name of what is drawn.
        count: Numbers for each image.

    Returns:
        (B, count) float32 on the device of `seeds`.
    """
    halves = words(seeds, field, (count + 1) // 2).view(torch.int32)[:, :count]
    return (halves >> 8).float().add_(2**23).mul_(2.0**-24)


def normals(seeds: Tensor, field: str, count: int) -> Tensor:
    """Standard normal numbers from 65,536 equally likely values.

    Four of them come from one word. A distribution function in steps of 2^-16 is finer than any
    test on 8-bit images can see.

    Args:
        seeds: (B,) int64.
        field: Name of what is drawn.
        count: Numbers for each image.

    Returns:
        (B, count) float32 on the device of `seeds`, at most 4.5 in size.
    """
    index = words(seeds, field, (count + 3) // 4).view(torch.int16)[:, :count].int().add_(2**15)
    return _quantiles(seeds.device).index_select(0, index.flatten()).view(len(seeds), count)


@lru_cache(maxsize=4)
def _quantiles(device: torch.device) -> Tensor:
    """Means of the standard normal over 65,536 equally likely intervals, scaled to variance 1."""
    edges = special.ndtri(np.arange(2**16 + 1) / 2**16)
    density = np.exp(-0.5 * edges**2) / np.sqrt(2 * np.pi)
    means = 2**16 * (density[:-1] - density[1:])
    return torch.from_numpy(means / np.sqrt((means**2).mean())).float().to(device)


def entropy_seeds(count: int) -> Tensor:
    """Fresh seeds from the operating system, (count,) int64; no global generator is read."""
    fresh = torch.Generator()
    fresh.seed()
    return torch.randint(-(2**63), 2**63 - 1, (count,), generator=fresh, dtype=torch.int64)


def image_seeds(seed: int, name: str, severity: float, keys: Iterable[int | str]) -> Tensor:
    """Seeds for the images of a data set, such that all its draws are independent.

    Args:
        seed: Seed of the data set.
        name: The corruption.
        severity: Severity of the corruption.
        keys: What tells the images apart: positions or file names.

    Returns:
        (B,) int64.
    """
    texts = (f"{seed}/{name}/{severity:g}/{key}" for key in keys)
    digests = (hashlib.blake2b(text.encode(), digest_size=8).digest() for text in texts)
    return torch.tensor([int.from_bytes(d, "little", signed=True) for d in digests])
