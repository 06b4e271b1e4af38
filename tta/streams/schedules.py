"""In which order a stream visits its domains.

A schedule takes the domain names and returns `Visit`s. Its keyword-only parameters are the
options of the scenarios that use it. What a visit shows is the business of selections and
arrangements.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tta.streams.draws import Draws
from tta.streams.sources import CLEAN, Condition

__all__ = [
    "CANONICAL_ORDER",
    "ROTTA_ORDER",
    "Visit",
    "alternated",
    "in_turn",
    "pooled",
    "ramped",
    "recurring",
]

#: The order of ImageNet-C and CIFAR-C tables (Hendrycks and Dietterich, ICLR 2019, 1903.12261).
CANONICAL_ORDER = (
    "gaussian_noise", "shot_noise", "impulse_noise", "defocus_blur", "glass_blur", "motion_blur",
    "zoom_blur", "snow", "frost", "fog", "brightness", "contrast", "elastic_transform", "pixelate",
    "jpeg_compression",
)  # fmt: skip
#: The order of RoTTA and PeTTA (arXiv 2303.13899, 2311.18193).
ROTTA_ORDER = (
    "motion_blur", "snow", "fog", "shot_noise", "defocus_blur", "contrast", "zoom_blur",
    "brightness", "frost", "elastic_transform", "glass_blur", "gaussian_noise", "pixelate",
    "jpeg_compression", "impulse_noise",
)  # fmt: skip


@dataclass(frozen=True)
class Visit:
    """One stay in a domain, or in several pooled ones.

    Args:
        conditions: What is shown; several are pooled before selecting and ordering.
        repeat: How many earlier visits of the same cycle had the same domains.
        cycle: Number of the recurrence.
        shares: Part of each condition's samples that is used; None = all.
        limit: Most samples of each condition; None = all.
    """

    conditions: tuple[Condition, ...]
    repeat: int = 0
    cycle: int = 0
    shares: tuple[float, ...] | None = None
    limit: int | None = None

    def key(self, shared_order: bool) -> tuple[str | int, ...]:
        """Name this visit's draws: not by its place, so reordering domains changes no order.

        With `shared_order` all visits of one cycle have the same name, as in the published
        protocols that reseed before every domain.
        """
        if shared_order:
            return ("visit", self.cycle)
        return ("visit", self.cycle, *(c.domain for c in self.conditions), self.repeat)


def in_turn(
    domains: Sequence[str], severity: float, draws: Draws, *, clean_ratio: float = 0.0
) -> list[Visit]:
    """Visit each domain once.

    Args:
        domains: Names.
        severity: Of every domain.
        draws: Unused.
        clean_ratio: Part of each visit that comes from the clean set, merged with the other part
            of the shifted samples (TTAB's InOutMixture: 0.5).
    """
    if clean_ratio == 0.0:
        return [Visit((Condition.of(name, severity),)) for name in domains]
    return [
        Visit(
            (Condition.of(name, severity), Condition.of(CLEAN, 0)),
            shares=(1.0 - clean_ratio, clean_ratio),
        )
        for name in domains
    ]


def pooled(domains: Sequence[str], severity: float, draws: Draws) -> list[Visit]:
    """Visit all domains at once, as one pool."""
    return [Visit(tuple(Condition.of(name, severity) for name in domains))]


def ramped(
    domains: Sequence[str],
    severity: float,
    draws: Draws,
    *,
    severities: Sequence[float] = (1, 2, 3, 4, 5, 4, 3, 2, 1),
    first_severities: Sequence[float] | None = None,
) -> list[Visit]:
    """Raise and lower the severity of each domain, so that domains change at the lowest.

    Args:
        domains: Names.
        severity: Unused; `severities` replaces it.
        draws: Unused.
        severities: One pass over the samples at each.
        first_severities: Those of the first domain (CoTTA's original: 5, 4, 3, 2, 1).
    """
    visits = []
    for number, name in enumerate(domains):
        levels = first_severities if number == 0 and first_severities is not None else severities
        visits += [Visit((Condition.of(name, level),), repeat=i) for i, level in enumerate(levels)]
    return visits


def alternated(domains: Sequence[str], severity: float, draws: Draws) -> list[Visit]:
    """Follow each domain by the clean set (EATA: Niu et al., ICML 2022, arXiv 2204.02610)."""
    visits = []
    for number, name in enumerate(domains):
        visits.append(Visit((Condition.of(name, severity),)))
        visits.append(Visit((Condition.of(CLEAN, 0),), repeat=number))
    return visits


def recurring(
    domains: Sequence[str],
    severity: float,
    draws: Draws,
    *,
    visits: int = 20,
    orders: Sequence[Sequence[str]] | None = None,
    interleave: bool = False,
) -> list[Visit]:
    """Repeat the sequence of domains, each time with newly drawn sample orders.

    Source: PeTTA (Hoang et al., NeurIPS 2024, arXiv 2311.18193).

    Args:
        domains: Names.
        severity: Of every domain.
        draws: Unused.
        visits: How often each domain comes.
        orders: The order of the domains in each cycle, in place of `domains`, used in turn.
        interleave: Cut each cycle into runs of batches in random order (ReservoirTTA's CDC);
            done by `plan.interleaved`, which knows the batches.
    """
    cycles = [list(domains)] * visits
    if orders is not None:
        cycles = [list(orders[i % len(orders)]) for i in range(visits)]
    return [
        Visit((Condition.of(name, severity),), repeat=cycle[:place].count(name), cycle=number)
        for number, cycle in enumerate(cycles)
        for place, name in enumerate(cycle)
    ]
