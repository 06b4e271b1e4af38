"""Which samples a visit shows and how often, the second of a stream's three choices.

A selection takes a `Pool` and returns row numbers, in any order (the arrangement orders them).
Its keyword-only parameters are the options of the scenarios that use it.
"""

from __future__ import annotations

import numpy as np

from tta.streams.draws import Draws, exp, log
from tta.streams.pool import Ints, Pool, by_class

__all__ = ["everything", "label_shift", "long_tail", "zipf"]


def everything(pool: Pool, draws: Draws) -> Ints:
    """Show every sample once."""
    return np.arange(len(pool))


def _filled(rows: Ints, count: int, draws: Draws) -> Ints:
    """Take `count` rows without replacement, starting over only once all have been used."""
    parts = []
    while count > 0:
        parts.append(rows[draws.permutation(len(rows))][:count])
        count -= len(parts[-1])
    return np.concatenate(parts) if parts else rows[:0]


def zipf(pool: Pool, draws: Draws, *, zipf_exponent: float = 2.0, mode: str = "test") -> Ints:
    """Draw class sizes from a Zipf law (LAME: Boudiaf et al., CVPR 2022, arXiv 2201.05718).

    Class sizes are Zipf(a) variables normalised to the pool's size, redrawn until the largest
    tenth of the classes holds under 90 % ("validation": the largest fifth under 80 %); samples
    are drawn with replacement. Sizes are rounded by largest remainder, so the total is exact.

    Args:
        pool: The visit's samples.
        draws: Source of randomness.
        zipf_exponent: a, greater than 1.
        mode: "test" or "validation".

    Returns:
        (n,) row numbers, as many as the pool has.
    """
    classes = by_class(pool.labels)
    share, limit = (0.1, 0.9) if mode == "test" else (0.2, 0.8)
    top = max(1, round(share * len(classes)))
    for _ in range(10_000):
        sizes = draws.zipf(zipf_exponent, len(classes))
        shares = sizes / np.cumsum(sizes)[-1]
        if len(classes) == top or np.cumsum(np.sort(shares)[::-1])[top - 1] < limit:
            break
    else:
        raise ValueError(
            f"`zipf_exponent` must leave the largest {share:.0%} of the classes under "
            f"{limit:.0%} of the samples, got {zipf_exponent} with {len(classes)} classes, which "
            "never did in 10000 draws; raise it, or use more classes"
        )
    counts = _apportion(shares, len(pool))
    return np.concatenate(
        [rows[draws.below(len(rows), int(n))] for rows, n in zip(classes, counts, strict=True)]
    )


def _apportion(shares: np.ndarray, total: int) -> Ints:
    """Round `total * shares` to whole numbers with that total, by largest remainder."""
    exact = shares * total
    counts = np.floor(exact).astype(np.int64)
    rest = np.argsort(-(exact - counts), kind="stable")[: total - int(counts.sum())]
    counts[rest] += 1
    return counts


def label_shift(
    pool: Pool, draws: Draws, *, concentration: float = 4.0, constant_size: bool = False
) -> Ints:
    """Draw the class proportions from a Dirichlet (TTAB: Zhao et al., ICML 2023, 2306.03536).

    One draw p ~ Dirichlet(concentration) over the classes. The total is n_max / max(p), with
    n_max the size of the class that p favours, so that no class needs a sample twice; with
    `constant_size` the total stays the pool's, and a class repeats samples once all are used.

    Args:
        pool: The visit's samples.
        draws: Source of randomness.
        concentration: Greater than 0; small = a few classes dominate.
        constant_size: Keep the number of samples.

    Returns:
        (m,) row numbers.
    """
    classes = by_class(pool.labels)
    sizes = np.array([len(rows) for rows in classes])
    shares = draws.dirichlet(concentration, len(classes))
    if constant_size:
        counts = _apportion(shares, len(pool))
        parts = [_filled(rows, int(n), draws) for rows, n in zip(classes, counts, strict=True)]
    else:
        total = sizes[np.argmax(shares)] / shares.max()
        # An unbalanced pool can have a class smaller than its share: it is then shown whole.
        counts = np.minimum(np.floor(total * shares + 1e-9).astype(np.int64), sizes)
        parts = [
            rows[draws.permutation(len(rows))][:n] for rows, n in zip(classes, counts, strict=True)
        ]
    return np.concatenate(parts)


def long_tail(
    pool: Pool, draws: Draws, *, imbalance_factor: float = 10.0, class_order: str = "fixed"
) -> Ints:
    """Thin the classes out geometrically (TRIBE: Su et al., AAAI 2024, arXiv 2309.14949).

    The class of rank k keeps n_max IF^(-k/(C-1)) samples, at least one, drawn without
    replacement. Rank is the class number ("fixed", GLI-TTA-F) or shuffled for each visit
    ("shuffled", GLI-TTA-V).

    Args:
        pool: The visit's samples.
        draws: Source of randomness.
        imbalance_factor: IF, head size over tail size, at least 1.
        class_order: "fixed" or "shuffled".

    Returns:
        (m,) row numbers.
    """
    classes = by_class(pool.labels)
    largest = max(len(rows) for rows in classes)
    ranks = np.arange(len(classes))
    if class_order == "shuffled":
        ranks = draws.permutation(len(classes))
    decay = exp(-log(np.array(float(imbalance_factor))) * ranks / max(1, len(classes) - 1))
    counts = np.maximum(1, np.floor(largest * decay + 1e-9).astype(np.int64))
    return np.concatenate(
        [rows[draws.permutation(len(rows))][:n] for rows, n in zip(classes, counts, strict=True)]
    )
