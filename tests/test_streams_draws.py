"""The generator: its raw words are Philox 4x64-10, its distributions have the right moments."""

import hashlib
import json
import math

import numpy as np
import pytest

from tta.streams.draws import Draws, exp, log

MASK = 2**64 - 1


def philox_block(counter: list[int], key: list[int]) -> list[int]:
    """Philox 4x64-10 in plain integers, from Salmon et al. (SC 2011), section 3.3."""
    x, k = list(counter), list(key)
    for _ in range(10):
        a = 0xD2E7470EE14C6C93 * x[0]
        b = 0xCA5A826395121157 * x[2]
        x = [(b >> 64) ^ x[1] ^ k[0], b & MASK, (a >> 64) ^ x[3] ^ k[1], a & MASK]
        k = [(k[0] + 0x9E3779B97F4A7C15) & MASK, (k[1] + 0xBB67AE8584CAA73B) & MASK]
    return x


def test_raw_words_are_philox_of_the_documented_key():
    digest = hashlib.sha256(json.dumps([3, "order", "fog", 2]).encode()).digest()
    key = [int.from_bytes(digest[i : i + 8], "little") for i in (0, 8)]
    expected = philox_block([1, 0, 0, 0], key) + philox_block([2, 0, 0, 0], key)
    assert Draws(3, "order", "fog", 2).raw(8).tolist() == expected


def test_the_numbers_never_change():
    # Made by this code once; a change here changes every published stream.
    draws = Draws(0, "pinned")
    assert draws.raw(2).tolist() == PINNED_RAW
    assert draws.permutation(8).tolist() == PINNED_PERMUTATION
    assert draws.normal(2).tolist() == PINNED_NORMAL
    assert draws.dirichlet(0.1, 3).tolist() == PINNED_DIRICHLET


PINNED_RAW = [12077487307275926045, 5708121490443930270]
PINNED_PERMUTATION = [2, 6, 5, 0, 3, 1, 7, 4]
PINNED_NORMAL = [0.4732918169262159, 0.566351392547622]
PINNED_DIRICHLET = [5.6313227161713535e-06, 0.9759462308167314, 0.024048137860552522]


def test_log_and_exp_agree_with_the_library():
    x = np.exp(np.linspace(-600.0, 600.0, 20001))
    x = np.concatenate([x, 1.0 + np.linspace(-1e-3, 1e-3, 2001)])
    assert np.allclose(log(x), np.log(x), rtol=1e-15, atol=1e-18)
    y = np.linspace(-699.0, 699.0, 20001)
    assert np.allclose(exp(y), np.exp(y), rtol=1e-15, atol=0)
    assert exp(np.array([-701.0, -1e9])).tolist() == [0.0, 0.0]


def test_uniform_and_below_stay_in_range_and_are_flat():
    u = Draws(1, "u").uniform(50_000)
    assert u.min() >= 0.0 and u.max() < 1.0 and abs(u.mean() - 0.5) < 0.005
    counts = np.bincount(Draws(1, "b").below(7, 70_000), minlength=7)
    assert counts.min() > 9_600 and counts.max() < 10_400 and len(counts) == 7


def test_permutations_are_uniform():
    draws = Draws(2, "p")
    seen = [tuple(draws.permutation(3).tolist()) for _ in range(6000)]
    counts = [seen.count(order) for order in sorted(set(seen))]
    assert len(counts) == 6 and min(counts) > 880 and max(counts) < 1120


def test_normal_moments():
    x = Draws(3, "n").normal(100_000)
    moments = [(x**k).mean() for k in (1, 2, 3, 4)]
    assert np.allclose(moments, [0, 1, 0, 3], atol=0.06)


@pytest.mark.parametrize("shape", [0.1, 0.5, 1.0, 4.0])
def test_gamma_moments(shape):
    x = np.exp(Draws(4, "g").log_gamma(shape, 100_000))
    assert math.isclose(x.mean(), shape, rel_tol=0.04)
    assert math.isclose(x.var(), shape, rel_tol=0.08)


@pytest.mark.parametrize("concentration", [0.001, 0.1, 10.0])
def test_dirichlet_sums_to_one_with_the_right_variance(concentration):
    draws = Draws(5, "d")
    p = np.stack([draws.dirichlet(concentration, 4) for _ in range(4000)])
    assert np.allclose(p.sum(1), 1.0) and np.all(p >= 0.0)
    assert np.allclose(p.mean(0), 0.25, atol=0.03)
    assert np.allclose(p.var(0), 0.25 * 0.75 / (4 * concentration + 1), rtol=0.12)


def test_zipf_frequencies():
    x = Draws(6, "z").zipf(2.0, 100_000)
    zeta = math.pi**2 / 6
    for k in (1, 2, 3, 10):
        assert math.isclose((x == k).mean(), k**-2 / zeta, abs_tol=0.005)


def test_keys_are_independent():
    a, b = Draws(0, "a").uniform(10_000), Draws(0, "b").uniform(10_000)
    assert abs(np.corrcoef(a, b)[0, 1]) < 0.05
    assert Draws(0, "a", 1).raw(4).tolist() != Draws(0, "a", 2).raw(4).tolist()
    assert Draws(0, "a").raw(4).tolist() != Draws(1, "a").raw(4).tolist()
