"""The scenarios by name, each a choice of building blocks and of rules for batches and resets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

from tta.core.checks import nearest, one_of, shown
from tta.streams.building_blocks import (
    ARRANGEMENTS,
    SCHEDULES,
    SELECTIONS,
    BuildingBlock,
    Schedule,
    options_of,
)
from tta.streams.schedules import CANONICAL_ORDER, ROTTA_ORDER

__all__ = ["SCENARIOS", "Scenario", "get_scenario", "list_scenarios"]

#: What each choice of a scenario may be.
_CHOICES: dict[str, Sequence[str]] = {
    "schedule": list(SCHEDULES),
    "select": list(SELECTIONS),
    "arrange": list(ARRANGEMENTS),
    "reset": ["start", "shift", "never"],
    "last_batch": ["keep", "drop", "span"],
}


@dataclass(frozen=True)
class Scenario:
    """A published way to order a test stream, with all that sets it apart from the others.

    Args:
        text: What it is, in a line.
        schedule: Name of the order of the domains, in `SCHEDULES`.
        select: Name of the choice of samples, in `SELECTIONS`.
        arrange: Name of the order of the samples, in `ARRANGEMENTS`.
        reset: When the model is reset: "start" (before the first batch), "shift" (also whenever
            the domain changes) or "never".
        last_batch: What happens to a short batch at the end of a visit: "keep" it, "drop" it, or
            let batches "span" visits.
        order: The domains where the caller names none.
        batch_size: Samples per batch, whatever the caller asks for; None = as the caller asks.
        name: Its name in `SCENARIOS`.
    """

    text: str
    schedule: str = "in_turn"
    select: str = "everything"
    arrange: str = "shuffled"
    reset: str = "start"
    last_batch: str = "keep"
    order: Sequence[str] = CANONICAL_ORDER
    batch_size: int | None = None
    name: str = ""

    @property
    def blocks(self) -> tuple[Schedule, BuildingBlock, BuildingBlock]:
        """The schedule, the selection and the arrangement."""
        return SCHEDULES[self.schedule], SELECTIONS[self.select], ARRANGEMENTS[self.arrange]

    @property
    def smooth(self) -> bool:
        """Whether severities move in small steps and corruptions are combined (as in CCC)."""
        return SCHEDULES[self.schedule].smooth

    @property
    def own_severities(self) -> bool:
        """Whether it shows severities of its own, and not the one that `build` is given."""
        return SCHEDULES[self.schedule].severities is not None

    def severities(self, severity: float, options: Mapping[str, Any]) -> tuple[float, ...]:
        """List all severities that the scenario can show, in ascending order.

        Args:
            severity: The one that `build` is given.
            options: Those that `build` is given; others have their defaults.

        >>> SCENARIOS["gradual"].severities(5, {"severities": [1, 3, 1]})
        (1, 3)
        """
        own = SCHEDULES[self.schedule].severities
        return (severity,) if own is None else tuple(sorted({*own(options)}))

    def default_domains(self, options: Mapping[str, Any]) -> list[str]:
        """List the domains where the caller names none.

        Args:
            options: Those that `build` is given; others have their defaults.

        >>> SCENARIOS["walk"].default_domains({"difficulty": "hard"})
        ['gaussian_noise', 'shot_noise', 'impulse_noise', 'contrast']
        """
        schedule = SCHEDULES[self.schedule]
        if schedule.domains is None:
            return list(self.order)
        return list(schedule.domains({**options_of(schedule), **options}))

    def with_choices(self, **given: str | None) -> Scenario:
        """Return the scenario with other choices.

        Args:
            given: New values of `schedule`, `select`, `arrange`, `reset` and `last_batch`; None
                for the scenario's own.

        Raises:
            ValueError: For a value that is not among the choices.
            TypeError: For a value that is no string.
        """
        chosen = {
            name: one_of(name, value, _CHOICES[name])
            for name, value in given.items()
            if value is not None
        }
        return replace(self, **chosen)


_PUBLISHED: dict[str, Scenario] = {
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
    "single": Scenario(
        "one image at a time, reset before each domain (SAR)", reset="shift", batch_size=1
    ),
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

SCENARIOS = {name: replace(scenario, name=name) for name, scenario in _PUBLISHED.items()}


def get_scenario(name: str) -> Scenario:
    """Return the scenario of that name.

    Raises:
        ValueError: For an unknown name; the message says which one is nearest.
    """
    if not isinstance(name, str) or name not in SCENARIOS:
        raise ValueError(
            f"`scenario` must be one of the names in list_scenarios(), got {shown(name, 60)}; "
            f"{nearest(name, SCENARIOS, room=100)}"
        )
    return SCENARIOS[name]


def list_scenarios(pattern: str = "*") -> list[str]:
    """List the scenarios' names.

    Args:
        pattern: Shell wildcards.

    >>> list_scenarios("dirichlet*")
    ['dirichlet', 'dirichlet_slots']
    """
    return [name for name in SCENARIOS if fnmatchcase(name, pattern)]
