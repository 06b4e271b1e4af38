"""The one source of randomness of every stream: the same numbers on every machine.

``numpy.random.Generator`` may change its distributions from one version to the next, and the
C library's ``log`` differs in the last bit between processors; one flipped comparison would then
reorder a stream. So everything here rests on three things that do not move:

1. the raw 64-bit output of Philox 4x64-10 (Salmon et al., "Parallel Random Numbers: As Easy as
   1, 2, 3", SC 2011), keyed by the SHA-256 of ``[seed, *key]`` written as JSON;
2. additions, products, quotients and square roots of float64, which IEEE 754 rounds exactly, and
   sums taken by ``cumsum`` (sequential), never by ``sum`` (whose grouping depends on the machine);
3. our own logarithm and exponential, built from those operations alone.

A key names what is drawn (``Draws(0, "order", "fog", 2)``), so no draw depends on another, on how
many were made before, or on any global generator.

>>> Draws(0, "order", "fog").permutation(5).tolist() == Draws(0, "order", "fog").permutation(
...     5).tolist()
True
"""

from __future__ import annotations

import hashlib
import json

import numpy as np
from numpy.typing import NDArray

__all__ = ["Draws", "exp", "log"]

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

# ln 2 in two pieces: the first has 32 trailing zero bits, so its product with an exponent is exact.
_LN2_HIGH = 0.693147180369123816490
_LN2_LOW = 1.90821492927058770002e-10


def log(x: Floats) -> Floats:
    """Natural logarithm of positive normal numbers, from exactly rounded operations only.

    With x = m 2^e and m in [sqrt(1/2), sqrt(2)), log m = 2 artanh(s), s = (m - 1)/(m + 1),
    |s| < 0.172, so twelve terms of the series reach double precision.

    Args:
        x: Any shape, greater than 0.

    Returns:
        Same shape, within about 2 units in the last place.
    """
    mantissa, exponent = np.frexp(x)
    small = mantissa < 0.7071067811865476
    mantissa = np.where(small, mantissa * 2.0, mantissa)
    exponent = np.where(small, exponent - 1, exponent).astype(np.float64)
    s = (mantissa - 1.0) / (mantissa + 1.0)
    square = s * s
    series = np.full_like(s, 1.0 / 23.0)
    for k in range(10, -1, -1):
        series = series * square + 1.0 / (2 * k + 1)
    return exponent * _LN2_HIGH + (exponent * _LN2_LOW + 2.0 * s * series)


def exp(x: Floats) -> Floats:
    """Exponential from exactly rounded operations only; exactly 0 below -700.

    Args:
        x: Any shape, at most 700.

    Returns:
        Same shape, within about 2 units in the last place.
    """
    tiny = x < -700.0
    x = np.where(tiny, 0.0, x)
    k = np.rint(x * 1.4426950408889634)
    r = (x - k * _LN2_HIGH) - k * _LN2_LOW
    series = np.full_like(r, 1.0)
    for n in range(13, 0, -1):
        series = series * r / n + 1.0
    return np.where(tiny, 0.0, np.ldexp(series, k.astype(np.int32)))


class Draws:
    """A keyed generator: the same seed and key give the same numbers, whatever ran before.

    Args:
        seed: Any whole number.
        key: Strings and numbers that name what is drawn.

    >>> draws = Draws(7, "example")
    >>> bool(0.0 <= draws.uniform(1)[0] < 1.0)
    True
    """

    def __init__(self, seed: int, *key: str | int | float) -> None:
        text = json.dumps([int(seed), *key])
        digest = hashlib.sha256(text.encode("utf-8")).digest()
        key_bits = np.frombuffer(digest[:16], dtype="<u8").astype(np.uint64)
        self._bits = np.random.Philox(key=key_bits)

    def raw(self, count: int) -> NDArray[np.uint64]:
        """Draw `count` random 64-bit numbers as the generator gives them, (count,)."""
        return np.asarray(self._bits.random_raw(count), dtype=np.uint64)

    def seed(self) -> int:
        """Draw one whole number in [0, 2**63), to seed another generator."""
        return int(self.raw(1)[0] >> np.uint64(1))

    def uniform(self, count: int) -> Floats:
        """Draw uniform numbers in [0, 1): the 53 high bits of each raw number times 2**-53."""
        return (self.raw(count) >> np.uint64(11)).astype(np.float64) * 2.0**-53

    def below(self, bound: int | Ints, count: int) -> Ints:
        """Draw whole numbers in [0, bound): floor(u * bound), bias below bound / 2**53.

        Args:
            bound: One bound, or (count,) of them, each at least 1.
            count: How many.

        Returns:
            (count,) int64.
        """
        return np.floor(self.uniform(count) * bound).astype(np.int64)

    def permutation(self, count: int) -> Ints:
        """Draw a uniform order of 0..count-1: the stable sort order of `count` raw numbers."""
        return np.argsort(self.raw(count), kind="stable").astype(np.int64)

    def normal(self, count: int) -> Floats:
        """Draw standard normal numbers by Marsaglia's polar method, (count,)."""
        result = np.empty(count)
        have = 0
        while have < count:
            # A pair is kept with probability pi/4; asking for 1.3 times what is missing
            # mostly ends in one round.
            pairs = max(4, int((count - have) * 0.65) + 4)
            points = 2.0 * self.uniform(2 * pairs) - 1.0
            a, b = points[:pairs], points[pairs:]
            square = a * a + b * b
            keep = (square > 0.0) & (square < 1.0)
            a, b, square = a[keep], b[keep], square[keep]
            scale = np.sqrt(-2.0 * log(square) / square)
            fresh = np.concatenate([a * scale, b * scale])[: count - have]
            result[have : have + len(fresh)] = fresh
            have += len(fresh)
        return result

    def log_gamma(self, shape: float, count: int) -> Floats:
        """Draw logarithms of Gamma(shape, 1) variables, so that tiny shapes do not underflow.

        Marsaglia and Tsang (2000); for shape < 1, Gamma(shape) = Gamma(shape + 1) U^(1/shape).

        Args:
            shape: Greater than 0.
            count: How many.

        Returns:
            (count,) float64.
        """
        boosted = shape + 1.0 if shape < 1.0 else shape
        d = boosted - 1.0 / 3.0
        c = 1.0 / float(np.sqrt(9.0 * d))
        result = np.empty(count)
        pending = np.arange(count)
        while len(pending):
            x = self.normal(len(pending))
            u = 1.0 - self.uniform(len(pending))
            cube_root = 1.0 + c * x
            v = cube_root * cube_root * cube_root
            log_v = log(np.where(v > 0.0, v, 1.0))
            accept = (v > 0.0) & (log(u) < 0.5 * x * x + d - d * v + d * log_v)
            result[pending[accept]] = float(log(np.array(d))) + log_v[accept]
            pending = pending[~accept]
        if shape < 1.0:
            result = result + log(1.0 - self.uniform(count)) / shape
        return result

    def dirichlet(self, concentration: float, count: int) -> Floats:
        """Draw one vector of the symmetric Dirichlet distribution.

        Args:
            concentration: The common parameter, greater than 0 (small = spiky).
            count: Length of the vector.

        Returns:
            (count,) float64, at least 0, sum 1.
        """
        logs = self.log_gamma(concentration, count)
        weights = exp(logs - logs.max())
        return weights / np.cumsum(weights)[-1]

    def zipf(self, a: float, count: int) -> Floats:
        """Draw Zipf variables, P(k) proportional to k^-a, by Devroye's rejection (1986, ch. X.6).

        Args:
            a: Exponent, greater than 1.
            count: How many.

        Returns:
            (count,) float64 holding whole numbers from 1.
        """
        b = float(exp(np.array((a - 1.0) * 0.6931471805599453)))
        result = np.empty(count)
        pending = np.arange(count)
        while len(pending):
            u = 1.0 - self.uniform(len(pending))
            v = self.uniform(len(pending))
            x = np.floor(exp(np.minimum(-log(u) / (a - 1.0), 700.0)))
            t = exp((a - 1.0) * log(1.0 + 1.0 / x))
            accept = v * x * (t - 1.0) / (b - 1.0) <= t / b
            result[pending[accept]] = x[accept]
            pending = pending[~accept]
        return result
