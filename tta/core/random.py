"""Random numbers that an adapter draws in a batch: the same on every device.

torch's generators give other numbers on a GPU than on a CPU. The generator here is SplitMix64
(Steele, Lea and Flood, OOPSLA 2014), whose output is a sequence of 64-bit words: word j is a fixed
mixing of ``start + j * gamma`` in 64-bit integers, which every device computes alike, and all words
come from one expression. Uniform numbers are exact fractions of words and normal ones come from a
table, so no logarithm or cosine rounds differently. `corruptions.draws` has the same generator,
with a start for each image: neither package needs the other.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

__all__ = ["CountedDraws", "fork"]

_GAMMA = 0x9E3779B97F4A7C15
_FACTORS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
_QUANTILES = 2**16


class CountedDraws:
    """A sequence of random numbers.

    Args:
        seed: Any integer; where the sequence begins.
        device: Device of the tensors that are drawn.

    Example:
        >>> CountedDraws(0).uniforms(2).tolist() == [*CountedDraws(0).numbers(2)]
        True
    """

    def __init__(self, seed: int, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self._at = seed

    def words(self, count: int, device: torch.device | None = None) -> Tensor:
        """Draw the next words, (count,) int64, uniform over all bit patterns."""
        device = self.device if device is None else device
        # 64-bit integers wrap around, as SplitMix64's do.
        state = torch.arange(1, count + 1, dtype=torch.int64, device=device)
        state = state.mul_(_signed(_GAMMA)).add_(_signed(self._at))
        self._at += count * _GAMMA
        for shift, factor in zip((30, 27, 31), (*_FACTORS, None), strict=True):
            # torch shifts int64 arithmetically; the mask makes the shift a logical one.
            state ^= (state >> shift).bitwise_and_((1 << (64 - shift)) - 1)
            if factor is not None:
                state *= _signed(factor)
        return state

    def uniforms(self, *shape: int) -> Tensor:
        """Draw uniform numbers, multiples of 2^-53 in [0, 1), float64."""
        return _fractions(self.words(torch.Size(shape).numel())).view(shape)

    def numbers(self, count: int) -> list[float]:
        """Draw uniform numbers as Python floats, without waiting for a device."""
        return _fractions(self.words(count, torch.device("cpu"))).tolist()

    def normals(self, *shape: int) -> Tensor:
        """Draw standard normals, float32: 65,536 equally likely values, at most 4.5 in size."""
        count = torch.Size(shape).numel()
        index = self.words((count + 3) // 4).view(torch.int16)[:count].int().add_(_QUANTILES // 2)
        return _quantiles(self.device).index_select(0, index).view(shape)


def fork(generator: torch.Generator, device: torch.device) -> CountedDraws:
    """Start a new sequence of numbers for ``device``, seeded by one draw from ``generator``.

    Whatever is drawn from it, ``generator`` has advanced by the same single draw.
    """
    return CountedDraws(int(torch.randint(2**62, (), generator=generator)), device)


def _signed(value: int) -> int:
    """The int64 that has the low 64 bits of an integer."""
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >= 1 << 63 else value


def _fractions(words: Tensor) -> Tensor:
    return (words >> 11).bitwise_and_((1 << 53) - 1).double().mul_(2.0**-53)


@lru_cache(maxsize=4)
def _quantiles(device: torch.device) -> Tensor:
    """Middles of equally likely intervals of the standard normal, scaled to variance 1."""
    middles = (torch.arange(_QUANTILES, dtype=torch.float64) + 0.5) / _QUANTILES
    values = torch.special.ndtri(middles)
    return (values / values.square().mean().sqrt()).float().to(device)
