"""The building blocks that scenarios are made of, by name, and the checks of their options."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tta.core.checks import LARGE, LARGEST, boolean, fraction, number, one_of, shown, whole_number
from tta.streams import arrangements, markov, schedules, selections, walk
from tta.streams.sources import Domains

__all__ = [
    "ARRANGEMENTS",
    "SCHEDULES",
    "SELECTIONS",
    "BuildingBlock",
    "Schedule",
    "check_option",
    "options_of",
]


@dataclass(frozen=True, kw_only=True)
class BuildingBlock:
    """A schedule, selection or arrangement.

    Args:
        function: Does the work; its keyword-only parameters are the options.
        same_size: Whether it shows as many samples as it is given, so that the length of a stream
            is known without drawing.
        check: (pool, options) -> None; raises for options that cannot work on a visit's samples.
        fit: (domains, names, options) -> None; raises for options that do not fit the data, and
            fills in options whose default depends on the data.
    """

    function: Callable[..., Any]
    same_size: bool = False
    check: Callable[..., None] | None = None
    fit: Callable[[Domains, Sequence[str], dict[str, Any]], None] | None = None


@dataclass(frozen=True, kw_only=True)
class Schedule(BuildingBlock):
    """An order of the domains.

    Args:
        severities: options -> the severities that it shows; None where it shows every domain at
            the severity that `build` is given.
        smooth: Whether severities move in small steps and several corruptions are combined, so
            that images can only be transformed as they are shown.
        recurs: Whether all domains come again and again, a cycle of visits each time.
        domains: options -> the domains where the caller names none and gives a transform; None
            for the scenario's own.
    """

    severities: Callable[[Mapping[str, Any]], Sequence[float]] | None = None
    smooth: bool = False
    recurs: bool = False
    domains: Callable[[Mapping[str, Any]], Sequence[str]] | None = None


SCHEDULES: dict[str, Schedule] = {
    "in_turn": Schedule(function=schedules.in_turn),
    "pooled": Schedule(function=schedules.pooled),
    "ramped": Schedule(
        function=schedules.ramped, fit=schedules.fit_ramped, severities=schedules.ramped_severities
    ),
    "alternated": Schedule(function=schedules.alternated),
    "recurring": Schedule(function=schedules.recurring, fit=schedules.fit_recurring, recurs=True),
    "walk": Schedule(
        function=walk.walk,
        fit=walk.fit_walk,
        severities=lambda options: walk.LEVELS,
        smooth=True,
        domains=walk.default_domains,
    ),
}
SELECTIONS: dict[str, BuildingBlock] = {
    "everything": BuildingBlock(function=selections.everything, same_size=True),
    "zipf": BuildingBlock(function=selections.zipf, same_size=True),
    "label_shift": BuildingBlock(function=selections.label_shift),
    "long_tail": BuildingBlock(function=selections.long_tail),
}
ARRANGEMENTS: dict[str, BuildingBlock] = {
    "shuffled": BuildingBlock(function=arrangements.shuffled, same_size=True),
    "sorted": BuildingBlock(function=arrangements.sorted_by_class, same_size=True),
    "dirichlet": BuildingBlock(
        function=arrangements.dirichlet, same_size=True, check=arrangements.check_dirichlet
    ),
    "slots": BuildingBlock(function=arrangements.slots, same_size=True),
    "imbalance": BuildingBlock(function=arrangements.imbalance, check=arrangements.check_imbalance),
    "grouped": BuildingBlock(
        function=arrangements.grouped, same_size=True, fit=arrangements.fit_grouped
    ),
    "markov": BuildingBlock(function=markov.markov),
}


def options_of(block: BuildingBlock) -> dict[str, Any]:
    """Return the options of a building block with their defaults."""
    return {
        name: parameter.default
        for name, parameter in inspect.signature(block.function).parameters.items()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    }


_SPREAD = "smaller values (0.1, 0.01) gather each class in fewer places"


def _severities(name: str, value: Any) -> list[float]:
    if isinstance(value, str) or not isinstance(value, Sequence) or not value:
        raise TypeError(
            f"`{name}` must be a list of severities such as [1, 3, 5], got {shown(value)}"
        )
    return [number(name, item, 0.0, 5.0) for item in value]


def _orders(name: str, value: Any) -> list[list[str]]:
    def is_list(item: Any) -> bool:
        return isinstance(item, Sequence) and not isinstance(item, str) and len(item) > 0

    if not is_list(value) or not all(is_list(item) for item in value):
        raise TypeError(f"`{name}` must be a list of lists of domain names, got {shown(value)}")
    return [[str(name) for name in item] for item in value]


def _groups(name: str, value: Any) -> list[int]:
    try:
        groups = [int(item) for item in value]
    except (TypeError, ValueError, OverflowError):
        raise TypeError(
            f"`{name}` must be one group number per sample, got {type(value).__name__}"
        ) from None
    wide = next((group for group in groups if not -(2**63) <= group < 2**63), None)
    if wide is not None:
        raise ValueError(f"`{name}` must be numbers of at most 64 bits, got {shown(wide)}")
    return groups


def _maybe(check: Callable[[str, Any], Any]) -> Callable[[str, Any], Any]:
    return lambda name, value: None if value is None else check(name, value)


def _at_least(low: float) -> Callable[[str, Any], float]:
    return lambda name, value: number(name, value, low, LARGE)


def _one_of(*allowed: str) -> Callable[[str, Any], str]:
    return lambda name, value: one_of(name, value, allowed)


def _count(name: str, value: Any) -> int:
    return whole_number(name, value, 1, LARGEST)


# An option name means the same in every building block that has it, so one table serves all.
_CHECKS: dict[str, Callable[[str, Any], Any]] = {
    "attempts": _count,
    "class_correlation": _maybe(fraction),
    "class_imbalance": _at_least(1.0),
    "class_order": _one_of("fixed", "shuffled"),
    "clean_ratio": fraction,
    "concentration": lambda name, value: number(name, value, 0.0, LARGE, above=True),
    "constant_size": boolean,
    "delta": lambda name, value: number(name, value, 0.0, LARGE, above=True, advice=_SPREAD),
    "difficulty": _one_of(*walk.TARGETS),
    "domain_correlation": _maybe(fraction),
    "domain_imbalance": _at_least(1.0),
    "first_severities": _maybe(_severities),
    "group_by": _one_of("auto", "given", "domain", "class"),
    "groups": _maybe(_groups),
    "imbalance_factor": _at_least(1.0),
    "interleave": boolean,
    "ir": _at_least(1.0),
    "max_state_samples": _maybe(_count),
    "min_chunk": _count,
    "mode": _one_of("test", "validation"),
    "orders": _maybe(_orders),
    "severities": _severities,
    "slot_limit": _count,
    "speed": _maybe(_count),
    "surface": lambda name, value: value,  # checked with the domains' names by `as_surface`
    "target": _maybe(lambda name, value: number(name, value, 0.0, 100.0)),
    "total": _maybe(_count),
    "visits": _count,
    "zipf_exponent": lambda name, value: number(name, value, 1.0, 100.0, above=True),
}


def check_option(name: str, value: Any) -> Any:
    """Check one option's value and return it in plain form."""
    return _CHECKS[name](name, value)
