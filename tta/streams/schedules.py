"""In which order a stream visits its domains.

A schedule takes the domain names and returns `PlannedVisit`s. Its keyword-only parameters are the
options of the scenarios that use it. Selections and arrangements decide what a visit shows.

A *visit* is a time for which the stream shows one domain, or one pool of several domains. The
schedule plans visits. Two planned visits to one domain that follow each other look like a single
one, and the visits of `Preview` are those that can be seen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tta.core.checks import nearest
from tta.streams.draws import Draws
from tta.streams.sources import CLEAN, Condition, Domains

__all__ = [
    "CANONICAL_ORDER",
    "ROTTA_ORDER",
    "PlannedVisit",
    "alternated",
    "fit_ramped",
    "fit_recurring",
    "in_turn",
    "pooled",
    "ramped",
    "ramped_severities",
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
class PlannedVisit:
    """One visit of the stream to a domain, or to several pooled domains.

    Args:
        conditions: The conditions that are shown; the samples of several are pooled before they
            are selected and ordered.
        repeat: How many earlier visits of the same cycle had the same domains.
        cycle: Number of the recurrence.
        shares: Share of each condition's samples that is used; None = all.
        limit: Largest number of samples of each condition; None = all.
    """

    conditions: tuple[Condition, ...]
    repeat: int = 0
    cycle: int = 0
    shares: tuple[float, ...] | None = None
    limit: int | None = None

    def key(self, shared_order: bool) -> tuple[str | int, ...]:
        """Return the key of this visit's draws.

        The key does not hold the visit's place in the stream, so the samples of a domain keep
        their order when the domains are put in another order.

        Args:
            shared_order: Give all visits of one cycle the same key, as in the published protocols
                that seed their generator again before every domain.
        """
        if shared_order:
            return ("visit", self.cycle)
        return ("visit", self.cycle, *(c.domain for c in self.conditions), self.repeat)


def in_turn(
    domains: Sequence[str], severity: float, draws: Draws, *, clean_ratio: float = 0.0
) -> list[PlannedVisit]:
    """Visit each domain once.

    Args:
        domains: Names.
        severity: Severity of every domain.
        draws: Unused.
        clean_ratio: Part of each visit that comes from the clean set, merged with the other part
            of the shifted samples (TTAB's InOutMixture: 0.5).
    """
    if clean_ratio == 0.0:
        return [PlannedVisit((Condition.of(name, severity),)) for name in domains]
    return [
        PlannedVisit(
            (Condition.of(name, severity), Condition.of(CLEAN, 0)),
            shares=(1.0 - clean_ratio, clean_ratio),
        )
        for name in domains
    ]


def pooled(domains: Sequence[str], severity: float, draws: Draws) -> list[PlannedVisit]:
    """Visit all domains at once, as one pool."""
    return [PlannedVisit(tuple(Condition.of(name, severity) for name in domains))]


def ramped(
    domains: Sequence[str],
    severity: float,
    draws: Draws,
    *,
    severities: Sequence[float] = (1, 2, 3, 4, 5, 4, 3, 2, 1),
    first_severities: Sequence[float] | None = None,
) -> list[PlannedVisit]:
    """Raise and lower the severity of each domain, so that domains change at the lowest.

    Args:
        domains: Names.
        severity: Unused; `severities` replaces it.
        draws: Unused.
        severities: One pass over the samples at each.
        first_severities: Severities of the first domain (CoTTA's original: 5, 4, 3, 2, 1).
    """
    visits = []
    for number, name in enumerate(domains):
        levels = first_severities if number == 0 and first_severities is not None else severities
        visits += [
            PlannedVisit((Condition.of(name, level),), repeat=i) for i, level in enumerate(levels)
        ]
    return visits


def ramped_severities(options: Mapping[str, Any]) -> tuple[float, ...]:
    """List the severities that `ramped` shows with these options."""
    severities = options.get("severities", (1, 2, 3, 4, 5))
    return (*severities, *(options.get("first_severities") or ()))


def fit_ramped(domains: Domains, names: Sequence[str], options: dict[str, Any]) -> None:
    """Reject domains that hold one severity only."""
    if not all(domains.has_levels(name) for name in names):
        raise ValueError(
            "`domains` must hold each severity of a gradual stream, got one dataset per name; map "
            "each name to {severity: dataset}, or pass names and `transform`"
        )


def alternated(domains: Sequence[str], severity: float, draws: Draws) -> list[PlannedVisit]:
    """Follow each domain by the clean set (EATA: Niu et al., ICML 2022, arXiv 2204.02610)."""
    visits = []
    for number, name in enumerate(domains):
        visits.append(PlannedVisit((Condition.of(name, severity),)))
        visits.append(PlannedVisit((Condition.of(CLEAN, 0),), repeat=number))
    return visits


def recurring(
    domains: Sequence[str],
    severity: float,
    draws: Draws,
    *,
    visits: int = 20,
    orders: Sequence[Sequence[str]] | None = None,
    interleave: bool = False,
) -> list[PlannedVisit]:
    """Repeat the sequence of domains, each time with newly drawn sample orders.

    Source: PeTTA (Hoang et al., NeurIPS 2024, arXiv 2311.18193).

    Args:
        domains: Names.
        severity: Severity of every domain.
        draws: Unused.
        visits: How often each domain comes.
        orders: The order of the domains in each cycle, in place of `domains`, used in turn.
        interleave: Cut each cycle into runs of batches in random order (ReservoirTTA's CDC);
            `plan.interleaved` does so, since it knows the batches.
    """
    cycles = [list(domains)] * visits
    if orders is not None:
        cycles = [list(orders[i % len(orders)]) for i in range(visits)]
    return [
        PlannedVisit(
            (Condition.of(name, severity),), repeat=cycle[:place].count(name), cycle=number
        )
        for number, cycle in enumerate(cycles)
        for place, name in enumerate(cycle)
    ]


def fit_recurring(domains: Domains, names: Sequence[str], options: dict[str, Any]) -> None:
    """Reject orders of domains that are not there."""
    for name in sorted({name for order in options["orders"] or () for name in order} - set(names)):
        raise ValueError(
            f'`orders` must use names in `domains`, got "{name}"; {nearest(name, names)}'
        )
