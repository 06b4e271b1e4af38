"""Smooth walks through pairs of corruptions at a chosen difficulty (CCC).

Source: Press et al., "RDumb: A simple approach that questions our progress in continual test-time
adaptation", NeurIPS 2023, arXiv 2306.05401. Two corruptions are applied in turn, at severities
that move in steps of 0.25: the first fades out while the second comes in, along a path whose mean
accuracy is near a target. The accuracies come from a surface, measured on a model; without one,
a smooth made-up surface is used, so the difficulty is then only nominal.

In the published files every image is also cropped and flipped at random before, and compressed as
JPEG of quality 85 after: ``before=corruptions.CropAndFlip(224), after=corruptions.Jpeg(85)``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tta.streams.draws import Draws, exp
from tta.streams.schedules import CANONICAL_ORDER, PlannedVisit
from tta.streams.sources import CLEAN, Condition, Domains

__all__ = [
    "LEVELS",
    "TARGETS",
    "as_surface",
    "best_path",
    "default_domains",
    "fit_walk",
    "synthetic_surface",
    "walk",
    "walk_domains",
]

#: Severities 0, 0.25, ..., 5.
LEVELS = tuple(i / 4 for i in range(21))
#: Target accuracy in percent of each difficulty.
TARGETS = {"hard": 0.0, "medium": 20.0, "easy": 40.0}
_SPEED, _PASSES, _LONGEST = 1000, 150, 7_500_000


def walk_domains(difficulty: str) -> list[str]:
    """List the published corruptions of a difficulty.

    >>> walk_domains("hard")
    ['gaussian_noise', 'shot_noise', 'impulse_noise', 'contrast']
    """
    if difficulty == "hard":
        return ["gaussian_noise", "shot_noise", "impulse_noise", "contrast"]
    left_out = {"brightness", "jpeg_compression"} if difficulty == "medium" else {"brightness"}
    return [name for name in CANONICAL_ORDER if name not in left_out]


def synthetic_surface() -> np.ndarray:
    """Make a smooth surface that falls with both severities, (21, 21) accuracies in percent.

    76 exp(-(s1 + s2) / 2): the clean accuracy of a ResNet-50, 6 % under one corruption at
    severity 5. Its paths are as long as on measured ones: 41, 22 and 12 points.
    """
    levels = np.array(LEVELS)
    return 76.0 * exp(-0.5 * (levels[:, None] + levels[None, :]))


def as_surface(value: Any, names: Sequence[str]) -> dict[str, dict[str, np.ndarray]] | None:
    """Check a surface and bring it to {first: {second: (21, 21) accuracies in percent}}.

    Args:
        value: That form, or {(first, second): array}, or None.
        names: All ordered pairs of different names must be there.
    """
    if value is None:
        return None
    if not isinstance(value, Mapping):
        raise TypeError(
            "`surface` must map each ordered pair of domains to a (21, 21) array of accuracies, "
            f"got {type(value).__name__}"
        )
    result: dict[str, dict[str, np.ndarray]] = {}
    for first in names:
        for second in names:
            if first == second:
                continue
            inner = value.get(first)
            item = inner.get(second) if isinstance(inner, Mapping) else value.get((first, second))
            if item is None:
                raise ValueError(
                    f'`surface` must hold every ordered pair of domains, got none for ("{first}", '
                    f'"{second}"); measure it, or leave the domain out'
                )
            array = np.asarray(item, dtype=np.float64)
            if array.shape != (21, 21) or not np.all((array >= 0.0) & (array <= 100.0)):
                raise ValueError(
                    f"`surface` must be (21, 21) accuracies in percent, got shape {array.shape} "
                    f'for ("{first}", "{second}")'
                    + (f", values {array.min():.3g}..{array.max():.3g}" if array.size else "")
                )
            result.setdefault(first, {})[second] = array
    return result


def best_path(surface: np.ndarray, target: float) -> list[tuple[float, float]]:
    """Find the path of one pair whose mean accuracy is near a target.

    A path starts at (s1, 0), at each step lowers the first severity or raises the second by 0.25,
    and ends when the first is 0. From each point, worked out from the end backwards, it takes the
    branch that brings the mean over the rest of the path nearest the target; the start s1 in
    0.25..5 is the one with the nearest mean.

    Args:
        surface: (21, 21) accuracies A[s1][s2].
        target: Accuracy in the surface's unit.

    Returns:
        The points (s1, s2) in order.
    """
    size = len(LEVELS)
    total = surface.copy()
    count = np.ones((size, size))
    raise_second = np.zeros((size, size), dtype=bool)
    for i in range(1, size):
        for j in range(size - 1, -1, -1):
            chosen = (total[i - 1, j] + surface[i, j], count[i - 1, j] + 1)
            if j + 1 < size:
                upper = (total[i, j + 1] + surface[i, j], count[i, j + 1] + 1)
                # A tie goes to raising, so that a flat zero surface gives the full path.
                if abs(upper[0] / upper[1] - target) <= abs(chosen[0] / chosen[1] - target):
                    chosen, raise_second[i, j] = upper, True
            total[i, j], count[i, j] = chosen
    misses = np.abs(total[1:, 0] / count[1:, 0] - target)
    i, j = int(np.flatnonzero(misses == misses.min())[-1]) + 1, 0
    path = [(LEVELS[i], LEVELS[j])]
    while i > 0:
        if raise_second[i, j]:
            j += 1
        else:
            i -= 1
        path.append((LEVELS[i], LEVELS[j]))
    return path


def walk(
    domains: Sequence[str],
    severity: float,
    draws: Draws,
    *,
    difficulty: str = "medium",
    target: float | None = None,
    surface: Any | None = None,
    speed: int | None = None,
    total: int | None = None,
) -> list[PlannedVisit]:
    """Chain the paths of random pairs; each point shows newly drawn samples.

    Args:
        domains: Names, at least two.
        severity: Unused.
        draws: Source of randomness.
        difficulty: "hard", "medium" or "easy".
        target: Accuracy in percent, in place of the difficulty's.
        surface: See `as_surface`; None = `synthetic_surface` for all pairs.
        speed: Images per point; default 1000, or the whole dataset if smaller.
        total: Images in all; default 150 passes over the dataset, at most 7,500,000.
    """
    assert speed is not None and total is not None  # `fit_walk` has filled them in
    goal = TARGETS[difficulty] if target is None else target
    surfaces = as_surface(surface, domains)
    made_up = synthetic_surface()
    paths: dict[tuple[str, str], list[tuple[float, float]]] = {}
    visits: list[PlannedVisit] = []
    first = domains[int(draws.below(len(domains), 1)[0])]
    while len(visits) * speed < total:
        others = [name for name in domains if name != first]
        second = others[int(draws.below(len(others), 1)[0])]
        if (first, second) not in paths:
            field = made_up if surfaces is None else surfaces[first][second]
            paths[first, second] = best_path(field, goal)
        for s1, s2 in paths[first, second]:
            left = total - len(visits) * speed
            if left <= 0:
                break
            condition = Condition(((first, s1), (second, s2)))
            visits.append(PlannedVisit((condition,), cycle=len(visits), limit=min(speed, left)))
        first = second
    return visits


def default_domains(options: Mapping[str, Any]) -> list[str]:
    """List the domains of a walk whose caller names none.

    They are the published ones of the difficulty, or those of a surface that lacks some of these.
    """
    published, surface = walk_domains(options["difficulty"]), options["surface"]
    names: set[str] = set()
    for key, inner in surface.items() if isinstance(surface, Mapping) else ():
        pair = (
            key if isinstance(key, tuple) else (key, *(inner if isinstance(inner, Mapping) else ()))
        )
        names.update(str(name) for name in pair)
    if names.issuperset(published) or not names:
        return published
    usual = [name for name in CANONICAL_ORDER if name in names]
    return usual + sorted(names.difference(usual))


def fit_walk(domains: Domains, names: Sequence[str], options: dict[str, Any]) -> None:
    """Check a walk's options against the data, and fill in the sizes that depend on it."""
    if len(names) < 2 or CLEAN in names:
        raise ValueError(
            f'`domains` must be at least two corruptions, without "{CLEAN}", for a walk, got '
            f"{list(names)}"
        )
    options["surface"] = as_surface(options["surface"], names)
    if domains.base is None or domains.transform is None:
        raise ValueError(
            "`transform` must be given for a walk, which shows each image under two corruptions "
            "in turn, got domains that are datasets; pass names in `domains`"
        )
    size = len(domains.base)
    if options["speed"] is None:
        options["speed"] = min(_SPEED, size)
    if options["total"] is None:
        options["total"] = min(_PASSES * size, _LONGEST)
    if options["speed"] > size:
        raise ValueError(
            f"`speed` must be at most the dataset's size, {size}, got {options['speed']}: a point "
            "shows each image at most once"
        )
