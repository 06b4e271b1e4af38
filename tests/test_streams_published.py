"""The figures that published generators were measured to have, at the published sizes."""

import numpy as np
import pytest

from tta.streams import build
from tta.streams.arrangements import dirichlet, imbalance, slots
from tta.streams.draws import Draws
from tta.streams.pool import Pool


def pool(classes, size):
    labels = np.random.default_rng(1).permutation(np.arange(size) % classes)
    return Pool(np.arange(size), np.zeros(size, dtype=np.int64), lambda: labels)


def figures(arrange, classes, size, delta, seeds):
    """Return the mean distinct labels per 64 and P(next label equal)."""
    samples = pool(classes, size)
    distinct, equal = [], []
    for seed in range(seeds):
        labels = samples.labels[arrange(samples, Draws(seed, "published"), delta=delta)]
        assert sorted(np.bincount(labels)) == sorted(np.bincount(samples.labels))
        blocks = labels[: size // 64 * 64].reshape(-1, 64)
        distinct.append(np.mean([len(np.unique(b)) for b in blocks]))
        equal.append(np.mean(labels[1:] == labels[:-1]))
    return np.mean(distinct), np.mean(equal)


@pytest.mark.parametrize("arrange", [dirichlet, slots])
@pytest.mark.parametrize(
    ("classes", "delta", "distinct", "equal"),
    [
        (10, 0.01, 1.1, 0.998),
        (10, 0.1, 1.3, 0.995),
        (10, 1.0, 1.6, 0.991),
        (10, 10.0, 1.6, 0.990),
        (100, 0.01, 4.3, 0.947),
        (100, 0.1, 14.9, 0.775),
        (100, 1.0, 37.7, 0.393),
        (100, 10.0, 51.7, 0.144),
    ],
)
def test_cifar_sized_dirichlet_streams(arrange, classes, delta, distinct, equal):
    got = figures(arrange, classes, 10_000, delta, seeds=3)
    # The figures are of either generator; RoTTA's, without balancing, mixes up to 10 % more.
    assert got[0] == pytest.approx(distinct, rel=0.06 if arrange is dirichlet else 0.13)
    assert 1 - got[1] == pytest.approx(1 - equal, rel=0.2, abs=6e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arrange", "delta", "distinct", "equal"),
    [
        (dirichlet, 0.01, 26.2, 0.598),
        (dirichlet, 0.1, 59.6, 0.065),
        (slots, 0.01, 7.7, 0.893),
        (slots, 0.1, 26.3, 0.598),
    ],
)
def test_imagenet_sized_dirichlet_streams(arrange, delta, distinct, equal):
    got = figures(arrange, 1000, 50_000, delta, seeds=1)
    assert got[0] == pytest.approx(distinct, rel=0.03)
    assert got[1] == pytest.approx(equal, abs=0.02)


def test_five_images_per_class_have_no_solution():
    data = (np.zeros((5000, 1, 1, 3), dtype=np.uint8), np.arange(5000) % 1000)
    with pytest.raises(ValueError, match=r"mean chunk, 5 samples .* got 10: NOTE's generator"):
        build("dirichlet", data, domains=["clean"])
    assert len(build("dirichlet_slots", data, domains=["clean"]).preview().class_counts) == 1000


@pytest.mark.parametrize(("ir", "share"), [(500_000, 0.997), (2000, 0.664), (1, 0.021)])
def test_sar_label_imbalance(ir, share):
    samples = pool(1000, 50_000)
    rows = imbalance(samples, Draws(0, "published"), ir=ir)
    assert len(rows) == 100_000
    blocks = samples.labels[rows].reshape(1000, 100)
    largest = np.mean([np.bincount(block).max() for block in blocks]) / 100
    # 100,000 draws with p_max = 0.6669 (ir 2000) have a standard error of 0.0015.
    assert largest == pytest.approx(share, abs=0.005)
    assert len(np.unique(rows)) == pytest.approx(43_300, abs=300)
