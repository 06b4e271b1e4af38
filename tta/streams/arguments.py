"""Checks of what `build` is given, one argument against another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tta.core.checks import nearest
from tta.streams.building_blocks import (
    ARRANGEMENTS,
    SCHEDULES,
    SELECTIONS,
    check_option,
    options_of,
)
from tta.streams.scenarios import Scenario
from tta.streams.sources import CLEAN, Domains, Transform
from tta.streams.walk import as_surface, check_walk_domains, resolve_walk, walk_domains

__all__ = ["fit_options", "list_domains", "merge_options"]

#: Other names in use for an option.
_ALIASES = {"gamma": "delta"}


def merge_options(
    scenario: str, names: Mapping[str, str], given: Mapping[str, Any]
) -> dict[str, Any]:
    """Merge the parts' defaults and the caller's options."""
    known: dict[str, Any] = {}
    for kind, table in (("schedule", SCHEDULES), ("select", SELECTIONS), ("arrange", ARRANGEMENTS)):
        known.update(options_of(table[names[kind]]))
    for name, value in given.items():
        target = _ALIASES.get(name, name)
        if target not in known:
            hint = nearest(name, known) if known else "it has no options of its own"
            raise ValueError(
                f'`{name}` must be an option of the scenario "{scenario}", which has none of that '
                f"name; {hint}"
            )
        if target != name and target in given:
            raise ValueError(f"`{name}` must be left out where `{target}` is given: they are one")
        known[target] = check_option(target, value)
    return known


def named_datasets(domains: Any) -> Any:
    """A list of datasets by names: those of pairs (name, dataset), else "0", "1", ... in order."""
    if not isinstance(domains, list) or not domains or any(isinstance(d, str) for d in domains):
        return domains
    pairs = [d for d in domains if isinstance(d, tuple) and len(d) == 2 and isinstance(d[0], str)]
    if pairs and len(pairs) < len(domains):
        raise ValueError(
            f"`domains` must be all datasets or all pairs (name, dataset), got {len(pairs)} pairs "
            f"among {len(domains)}; name each"
        )
    if not pairs:
        return {str(number): dataset for number, dataset in enumerate(domains)}
    named = dict(pairs)
    if len(named) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"`domains` must have different names, got {names}; rename one of them")
    return named


def list_domains(
    spec: Scenario,
    domains: Sequence[Any] | Mapping[str, Any] | None,
    transform: Transform | None,
    schedule: str,
    options: Mapping[str, Any],
) -> tuple[Sequence[str] | Mapping[str, Any], list[str]]:
    """Check the domains, fill in the default, and list the names."""
    domains = named_datasets(domains)
    if isinstance(domains, str):
        raise TypeError(f"`domains` must be a list of names, got {domains!r}; pass [{domains!r}]")
    if domains is None:
        domains = [CLEAN] if transform is None else list(spec.order)
        if schedule == "walk" and transform is not None:
            domains = walk_domains(options["difficulty"])
    if not isinstance(domains, (Sequence, Mapping)):
        raise TypeError(
            "`domains` must be a list of names or a mapping from names to datasets, got "
            f"{type(domains).__name__}"
        )
    listed = list(domains)
    if not listed or any(not isinstance(name, str) for name in listed):
        kinds = ", ".join(sorted({type(name).__name__ for name in listed})) or "none"
        raise ValueError(
            f"`domains` must be at least one name, as strings, got {kinds}; pass data sets of "
            "their own as {'name': dataset}"
        )
    if len(set(listed)) < len(listed):
        raise ValueError(
            f"`domains` must be different names, got {listed}; use the scenario "
            '"recurring" to come back to a domain'
        )
    return domains, listed


def fit_options(source: Domains, schedule: str, listed: list[str], options: dict[str, Any]) -> None:
    """Check options against the data, and fill in those that depend on it."""
    if schedule == "walk":
        check_walk_domains(listed)
        options["surface"] = as_surface(options["surface"], listed)
        if source.base is None or source.transform is None:
            raise ValueError(
                "`transform` must be given for a walk, which shows each image under two "
                "corruptions in turn, got domains that are datasets; pass names in `domains`"
            )
        resolve_walk(options, len(source.base))
    if schedule == "ramped" and not all(source.has_levels(name) for name in listed):
        raise ValueError(
            "`domains` must hold each severity of a gradual stream, got one dataset per name; map "
            "each name to {severity: dataset}, or pass names and `transform`"
        )
    if options.get("orders") is not None:
        for name in sorted({name for order in options["orders"] for name in order} - set(listed)):
            raise ValueError(
                f'`orders` must use names in `domains`, got "{name}"; {nearest(name, listed)}'
            )
    if options.get("group_by") == "given" and options["groups"] is None:
        raise ValueError(
            '`groups` must be given for group_by="given", got None; pass one number per image'
        )
    if options.get("groups") is not None:
        size = None if source.base is None else len(source.base)
        if len(options["groups"]) != size:
            raise ValueError(
                f"`groups` must hold one number per image of `dataset`, {size}, got "
                f"{len(options['groups'])}"
            )
