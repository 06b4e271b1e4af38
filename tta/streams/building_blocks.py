"""The parts that scenarios are made of, by name, and the checks of their options."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tta.core.checks import flag, fraction, number, one_of, whole
from tta.streams import arrangements, markov, schedules, selections, walk

__all__ = ["ARRANGEMENTS", "SCHEDULES", "SELECTIONS", "Part", "check_option", "options_of"]


@dataclass(frozen=True)
class Part:
    """A schedule, selection or arrangement.

    Args:
        function: Does the work; its keyword-only parameters are the options.
        same_size: Whether it shows as many samples as it is given, so that the length of a stream
            is known without drawing.
        check: (pool, options) -> None, raises for options that cannot work.
    """

    function: Callable[..., Any]
    same_size: bool = False
    check: Callable[..., None] | None = None


SCHEDULES = {
    "in_turn": Part(schedules.in_turn),
    "pooled": Part(schedules.pooled),
    "ramped": Part(schedules.ramped),
    "alternated": Part(schedules.alternated),
    "recurring": Part(schedules.recurring),
    "walk": Part(walk.walk),
}
SELECTIONS = {
    "everything": Part(selections.everything, same_size=True),
    "zipf": Part(selections.zipf, same_size=True),
    "label_shift": Part(selections.label_shift),
    "long_tail": Part(selections.long_tail),
}
ARRANGEMENTS = {
    "shuffled": Part(arrangements.shuffled, same_size=True),
    "sorted": Part(arrangements.sorted_by_class, same_size=True),
    "dirichlet": Part(arrangements.dirichlet, same_size=True, check=arrangements.check_dirichlet),
    "slots": Part(arrangements.slots, same_size=True),
    "imbalance": Part(arrangements.imbalance, check=arrangements.check_imbalance),
    "grouped": Part(arrangements.grouped, same_size=True),
    "markov": Part(markov.markov),
}


def options_of(part: Part) -> dict[str, Any]:
    """Return the options of a part with their defaults."""
    return {
        name: parameter.default
        for name, parameter in inspect.signature(part.function).parameters.items()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    }


_SPREAD = "smaller values (0.1, 0.01) gather each class in fewer places"


def _severities(name: str, value: Any) -> list[float]:
    if isinstance(value, str) or not isinstance(value, Sequence) or not value:
        raise TypeError(f"`{name}` must be a list of severities such as [1, 3, 5], got {value!r}")
    return [number(name, item, 0.0, 5.0) for item in value]


def _orders(name: str, value: Any) -> list[list[str]]:
    def is_list(item: Any) -> bool:
        return isinstance(item, Sequence) and not isinstance(item, str) and len(item) > 0

    if not is_list(value) or not all(is_list(item) for item in value):
        raise TypeError(f"`{name}` must be a list of lists of domain names, got {value!r}")
    return [[str(word) for word in item] for item in value]


def _groups(name: str, value: Any) -> list[int]:
    try:
        return [int(item) for item in value]
    except (TypeError, ValueError):
        raise TypeError(
            f"`{name}` must be one group number per sample, got {type(value).__name__}"
        ) from None


def _maybe(check: Callable[[str, Any], Any]) -> Callable[[str, Any], Any]:
    return lambda name, value: None if value is None else check(name, value)


def _at_least(low: float) -> Callable[[str, Any], float]:
    return lambda name, value: number(name, value, low)


def _words(*allowed: str) -> Callable[[str, Any], str]:
    return lambda name, value: one_of(name, value, allowed)


def _count(name: str, value: Any) -> int:
    return whole(name, value, 1)


# An option name means the same in every part that has it, so one table serves all.
_CHECKS: dict[str, Callable[[str, Any], Any]] = {
    "attempts": _count,
    "class_correlation": _maybe(fraction),
    "class_imbalance": _at_least(1.0),
    "class_order": _words("fixed", "shuffled"),
    "clean_ratio": fraction,
    "concentration": lambda name, value: number(name, value, 0.0, above=True),
    "constant_size": flag,
    "delta": lambda name, value: number(name, value, 0.0, above=True, advice=_SPREAD),
    "difficulty": _words(*walk.TARGETS),
    "domain_correlation": _maybe(fraction),
    "domain_imbalance": _at_least(1.0),
    "first_severities": _maybe(_severities),
    "group_by": _words("auto", "given", "domain", "class"),
    "groups": _maybe(_groups),
    "imbalance_factor": _at_least(1.0),
    "interleave": flag,
    "ir": _at_least(1.0),
    "max_state_samples": _maybe(_count),
    "min_chunk": _count,
    "mode": _words("test", "validation"),
    "orders": _maybe(_orders),
    "severities": _severities,
    "slot_limit": _count,
    "speed": _maybe(_count),
    "surface": lambda name, value: value,  # checked with the domains' names by `as_surface`
    "target": _maybe(lambda name, value: number(name, value, 0.0, 100.0)),
    "total": _maybe(_count),
    "visits": _count,
    "zipf_exponent": lambda name, value: number(name, value, 1.0, above=True),
}


def check_option(name: str, value: Any) -> Any:
    """Check one option's value and return it in plain form."""
    return _CHECKS[name](name, value)
