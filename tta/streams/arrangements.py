"""In which order a visit shows its samples, the last of a stream's three choices.

An arrangement takes a `Pool` and returns row numbers in the order shown. Its keyword-only
parameters are the options of the scenarios that use it. `check_*` functions reject what cannot
work before anything is drawn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tta.streams.draws import Draws, exp
from tta.streams.pool import Ints, Pool, by_class
from tta.streams.sources import Domains

__all__ = [
    "check_dirichlet",
    "check_imbalance",
    "dirichlet",
    "fit_grouped",
    "grouped",
    "imbalance",
    "shuffled",
    "slots",
    "sorted_by_class",
]


def shuffled(pool: Pool, draws: Draws) -> Ints:
    """Show the samples in uniform random order."""
    return draws.permutation(len(pool))


def sorted_by_class(pool: Pool, draws: Draws) -> Ints:
    """Shuffle, then stable sort by label: one class after the other, ascending."""
    order = draws.permutation(len(pool))
    return order[np.argsort(pool.labels[order], kind="stable")]


def check_dirichlet(pool: Pool, options: Mapping[str, Any]) -> None:
    """Explain the case in which NOTE's generator has no solution."""
    chunks = len(by_class(pool.labels))
    least = options["min_chunk"]
    if len(pool) < chunks * least:
        raise ValueError(
            f"`min_chunk` must be at most the mean chunk, {len(pool) / chunks:.3g} samples "
            f"({len(pool)} samples over {chunks} chunks, one per class), got {least}: NOTE's "
            "generator closes a chunk at the mean, so it has no solution here; lower `min_chunk`, "
            'show more images per class, or use the scenario "dirichlet_slots"'
        )


def dirichlet(
    pool: Pool,
    draws: Draws,
    *,
    delta: float = 0.1,
    min_chunk: int = 10,
    attempts: int = 10_000,
) -> Ints:
    """Order by classes unevenly spread over time (NOTE: Gong et al., NeurIPS 2022, 2208.05117).

    There are as many chunks as classes. Each class in turn is shuffled and cut over the chunks by
    p ~ Dirichlet(delta), restricted to the chunks that hold fewer samples than the mean and
    renormalised; all of it is redrawn until the smallest chunk holds `min_chunk` samples. Chunks
    follow each other; inside one, classes come in random order, each as one block. So even a
    large delta leaves blocks: look at the run length in `preview()`.

    Args:
        pool: The visit's samples.
        draws: Source of randomness.
        delta: Greater than 0; small = each class falls into few chunks.
        min_chunk: Least size of a chunk: 10 in NOTE, 5 in TTAB.
        attempts: Redraws before giving up.

    Returns:
        (n,) row numbers, each row once.
    """
    classes = by_class(pool.labels)
    chunks = len(classes)
    mean = len(pool) / chunks
    for _ in range(attempts):
        # A Dirichlet vector is normalised Gamma variables; normalising over the open chunks alone
        # is what setting the closed ones to zero and renormalising comes to.
        logs = draws.log_gamma(delta, chunks * chunks).reshape(chunks, chunks)
        weights = exp(logs - logs.max(axis=1, keepdims=True))
        sizes = np.zeros(chunks, dtype=np.int64)
        cuts = np.zeros((chunks, chunks + 1), dtype=np.int64)
        for k, rows in enumerate(classes):
            is_open = sizes < mean
            cumulative = np.cumsum(weights[k] * is_open)
            if cumulative[-1] == 0.0:
                # All the weight of a spiky vector lay in closed chunks, the rest underflowed.
                kept = np.where(is_open, logs[k], -np.inf)
                cumulative = np.cumsum(exp(np.maximum(kept - kept.max(), -1000.0)))
            cuts[k, 1:] = np.floor(cumulative / cumulative[-1] * len(rows)).astype(np.int64)
            sizes += np.diff(cuts[k])
        if sizes.min() >= min_chunk:
            break
    else:
        raise ValueError(
            f"`delta` must leave at least `min_chunk` = {min_chunk} samples in each of the "
            f"{chunks} chunks, got {delta}, which did not in {attempts} draws over {len(pool)} "
            "samples; raise `delta` or `attempts`, lower `min_chunk`, or use the scenario "
            '"dirichlet_slots"'
        )
    mixed = [rows[draws.permutation(len(rows))] for rows in classes]
    return _emit(mixed, cuts, draws)


def slots(pool: Pool, draws: Draws, *, delta: float = 0.1, slot_limit: int = 100) -> Ints:
    """Order by classes unevenly spread over slots (RoTTA: Yuan et al., CVPR 2023, 2303.13899).

    Each class, in the dataset's order, is cut over min(C, `slot_limit`) slots by its own
    Dirichlet(delta) vector, with no balancing and no least size. Slots follow each other; inside
    one, classes come in random order, each as one block.

    Args:
        pool: The visit's samples.
        draws: Source of randomness.
        delta: RoTTA's gamma, greater than 0; small = each class falls into few slots.
        slot_limit: Most slots.

    Returns:
        (n,) row numbers, each row once.
    """
    classes = by_class(pool.labels)
    count = min(len(classes), slot_limit)
    logs = draws.log_gamma(delta, len(classes) * count).reshape(len(classes), count)
    cumulative = np.cumsum(exp(logs - logs.max(axis=1, keepdims=True)), axis=1)
    sizes = np.array([[len(rows)] for rows in classes])
    cuts = np.zeros((len(classes), count + 1), dtype=np.int64)
    cuts[:, 1:] = np.floor(cumulative / cumulative[:, -1:] * sizes).astype(np.int64)
    in_order = [rows[np.argsort(pool.index[rows], kind="stable")] for rows in classes]
    return _emit(in_order, cuts, draws)


def _emit(classes: list[Ints], cuts: np.ndarray, draws: Draws) -> Ints:
    """Lay chunks one after the other, each as class blocks in random order.

    Args:
        classes: Rows of each class, in the order to be used up.
        cuts: (C, chunks + 1) borders of the chunks inside each class.
        draws: Source of randomness.

    Returns:
        (n,) row numbers.
    """
    blocks = []
    for m in range(cuts.shape[1] - 1):
        present = np.flatnonzero(cuts[:, m + 1] > cuts[:, m])
        for k in present[draws.permutation(len(present))]:
            blocks.append(classes[k][cuts[k, m] : cuts[k, m + 1]])
    return np.concatenate(blocks)


def check_imbalance(pool: Pool, options: Mapping[str, Any]) -> None:
    """Reject a total that gives some class no turn."""
    classes = len(by_class(pool.labels))
    if options["total"] is not None and options["total"] < classes:
        raise ValueError(
            f"`total` must be at least the number of classes, {classes}, so that each has a turn, "
            f"got {options['total']}"
        )


def imbalance(pool: Pool, draws: Draws, *, ir: float = 500_000.0, total: int | None = None) -> Ints:
    """Let one class after the other dominate (SAR: Niu et al., ICLR 2023, arXiv 2302.12400).

    The K classes take turns in random order, T/K draws each. A draw is of the class in turn with
    probability p_max = ir p_min and of each other with p_min = 1/(ir + K - 1); its image is
    uniform in the class, with replacement.

    Args:
        pool: The visit's samples.
        draws: Source of randomness.
        ir: Imbalance ratio, at least 1 (1 = uniform, 500000 = practically sorted).
        total: T; default twice the pool, SAR's 100,000 for the 50,000 of ImageNet.

    Returns:
        (T // K * K,) row numbers, with repeats.
    """
    classes = by_class(pool.labels)
    k = len(classes)
    count = (2 * len(pool) if total is None else total) // k * k
    turn = np.repeat(draws.permutation(k), count // k)
    # The mixture of "the class in turn" and "any class" with these weights has p_max and p_min.
    dominant = draws.uniform(count) < (ir - 1.0) / (ir + k - 1.0)
    drawn = np.where(dominant, turn, draws.below(k, count))
    sizes = np.array([len(rows) for rows in classes])
    starts = np.cumsum(sizes) - sizes
    return np.concatenate(classes)[starts[drawn] + draws.below(sizes[drawn], count)]


def grouped(
    pool: Pool,
    draws: Draws,
    *,
    group_by: str = "auto",
    groups: list[int] | None = None,
) -> Ints:
    """Show one group after the other (LAME's non-i.i.d. streams, arXiv 2201.05718).

    Groups come in random order. Given groups (a video each) keep the dataset's order inside;
    domains and classes are shuffled inside.

    Args:
        pool: The visit's samples.
        draws: Source of randomness.
        group_by: "given", "domain" or "class"; "auto" takes the first of these that there is.
        groups: (N,) group number of each sample of the dataset.

    Returns:
        (n,) row numbers, each row once.
    """
    given = groups is not None and group_by in ("auto", "given")
    if given:
        keys = np.asarray(groups, dtype=np.int64)[pool.index]
        order = np.argsort(pool.index, kind="stable")
    else:
        domains = group_by == "domain" or (group_by == "auto" and len(np.unique(pool.which)) > 1)
        keys = pool.which if domains else pool.labels
        order = draws.permutation(len(pool))
    blocks = by_class(keys[order])
    return np.concatenate([order[blocks[i]] for i in draws.permutation(len(blocks))])


def fit_grouped(domains: Domains, names: Sequence[str], options: dict[str, Any]) -> None:
    """Reject groups that are missing, or that are not one for each image."""
    groups = options["groups"]
    if options["group_by"] == "given" and groups is None:
        raise ValueError(
            '`groups` must be given for group_by="given", got None; pass one number per image'
        )
    size = None if domains.base is None else len(domains.base)
    if groups is not None and len(groups) != size:
        raise ValueError(
            f"`groups` must hold one number per image of `dataset`, {size}, got {len(groups)}"
        )
