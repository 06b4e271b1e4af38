"""The scenarios by name: each a choice of parts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from tta.streams.schedules import CANONICAL_ORDER, ROTTA_ORDER

__all__ = ["SCENARIOS", "Scenario", "list_scenarios"]


@dataclass(frozen=True)
class Scenario:
    """A published way to order a test stream.

    Args:
        text: What it is, in a line.
        schedule: Order of the domains.
        select: Which samples.
        arrange: Order of the samples.
        reset: "start" or "shift".
        last_batch: "keep", "drop" or "span".
        order: Domains where the caller names none.
    """

    text: str
    schedule: str = "in_turn"
    select: str = "everything"
    arrange: str = "shuffled"
    reset: str = "start"
    last_batch: str = "keep"
    order: Sequence[str] = CANONICAL_ORDER


SCENARIOS: dict[str, Scenario] = {
    "reset_each_shift": Scenario("each domain once, i.i.d., reset before each", reset="shift"),
    "continual": Scenario("each domain once, i.i.d., no reset in between"),
    "gradual": Scenario("severity 1 to 5 and back for each domain (CoTTA)", schedule="ramped"),
    "lifelong": Scenario("each domain is followed by the clean set (EATA)", schedule="alternated"),
    "sorted": Scenario("classes one after the other in each domain", arrange="sorted"),
    "dirichlet": Scenario("classes spread over chunks by a Dirichlet (NOTE)", arrange="dirichlet"),
    "dirichlet_slots": Scenario(
        "classes spread over slots by a Dirichlet (RoTTA)", arrange="slots", order=ROTTA_ORDER
    ),
    "imbalance": Scenario(
        "one class after the other dominates (SAR)", arrange="imbalance", reset="shift"
    ),
    "mixed": Scenario("all domains in one shuffled pool", schedule="pooled"),
    "single": Scenario("one image at a time, reset before each domain (SAR)", reset="shift"),
    "lame_imbalance": Scenario("class sizes by a Zipf law (LAME)", select="zipf"),
    "lame_noniid": Scenario(
        "videos, domains or classes one after the other (LAME)",
        schedule="pooled",
        arrange="grouped",
    ),
    "label_shift": Scenario("class proportions by a Dirichlet (TTAB)", select="label_shift"),
    "long_tailed": Scenario(
        "long-tailed classes over Dirichlet slots (TRIBE)",
        select="long_tail",
        arrange="slots",
        order=ROTTA_ORDER,
    ),
    "markov": Scenario(
        "domain and class follow Markov chains (UniTTA)", schedule="pooled", arrange="markov"
    ),
    "recurring": Scenario(
        "the domains come back again and again (PeTTA)",
        schedule="recurring",
        arrange="slots",
        order=ROTTA_ORDER,
    ),
    "walk": Scenario(
        "a smooth walk through pairs of corruptions (CCC)", schedule="walk", last_batch="span"
    ),
}


def list_scenarios(pattern: str = "*") -> list[str]:
    """List the scenarios' names.

    Args:
        pattern: Shell wildcards.

    >>> list_scenarios("dirichlet*")
    ['dirichlet', 'dirichlet_slots']
    """
    return [name for name in SCENARIOS if fnmatchcase(name, pattern)]
