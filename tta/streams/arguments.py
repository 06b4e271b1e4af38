"""Checks of what `build` is given, one argument against another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tta.core.checks import nearest, shown, told
from tta.streams.building_blocks import check_option, options_of
from tta.streams.scenarios import Scenario
from tta.streams.sources import CLEAN, Domains, Transform

__all__ = ["fit_options", "list_domains", "merge_options", "named_datasets"]

#: Other names in use for an option.
_ALIASES = {"gamma": "delta"}


def merge_options(scenario: Scenario, given: Mapping[str, Any]) -> dict[str, Any]:
    """Merge the defaults of a scenario's building blocks and the caller's options.

    Raises:
        ValueError: For an option that the scenario does not have, or a value that cannot work.
    """
    known: dict[str, Any] = {}
    for block in scenario.blocks:
        known.update(options_of(block))
    for name, value in given.items():
        target = _ALIASES.get(name, name)
        if target not in known:
            hint = nearest(name, known, room=100) if known else "it has no options of its own"
            raise ValueError(
                f'`{told(name, 60)}` must be an option of the scenario "{scenario.name}", which '
                "has "
                "none of "
                f"that name; {hint}"
            )
        if target != name and target in given:
            raise ValueError(
                f"`{told(name)}` must be left out where `{target}` is given: they are one"
            )
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
    scenario: Scenario,
    domains: Sequence[Any] | Mapping[str, Any] | None,
    transform: Transform | None,
    options: Mapping[str, Any],
) -> tuple[Sequence[str] | Mapping[str, Any], list[str]]:
    """Check the domains, fill in the default, and list the names."""
    domains = named_datasets(domains)
    if isinstance(domains, str):
        raise TypeError(
            f"`domains` must be a list of names, got {shown(domains)}; pass [{shown(domains)}]"
        )
    if domains is None:
        domains = [CLEAN] if transform is None else scenario.default_domains(options)
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
            f"`domains` must be different names, got {told(listed)}; use the scenario "
            '"recurring" to come back to a domain'
        )
    return domains, listed


def fit_options(
    scenario: Scenario, domains: Domains, names: Sequence[str], options: dict[str, Any]
) -> None:
    """Check options against the data, and fill in those whose default depends on it.

    Args:
        scenario: Its building blocks do the checks.
        domains: The data.
        names: Names of the domains, in the order of the caller.
        options: What `merge_options` returned; changed in place.
    """
    for block in scenario.blocks:
        if block.fit is not None:
            block.fit(domains, names, options)
