"""Every registered component and composition, on every family of norm layers that it can take.

Nothing here names a method. A component is found in the registry; what it needs beyond a name (a
model with BatchNorm, a filter that lets samples pass) is read off its class and its config.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import cache
from typing import Any, TypeAlias

from torch import nn

import tta
from tests.helpers.batches import BATCH, surroundings
from tests.helpers.denoisers import diffusion
from tests.helpers.nets import FAMILIES, tiny
from tta.core.config import SLOTS
from tta.core.guard import Guard
from tta.core.input_rule import Input
from tta.core.registry import component
from tta.core.update import Update

__all__ = [
    "ALONE",
    "CASES",
    "FED",
    "GUARDED",
    "LOOSE",
    "PAIRS",
    "SAMPLED_GUARDED",
    "SAMPLED_PAIRS",
    "SAMPLED_TRIPLES",
    "TRIPLES",
    "Case",
    "arguments",
    "components",
    "given",
    "label",
    "make",
    "suiting",
]

Case: TypeAlias = "tuple[str, dict[str, str]]"  # a norm family, and a component's name in each slot


def _on_every_family(parts: list[dict[str, str]], families: list[str] | None = None) -> list[Case]:
    return [(f, p) for p in parts for f in families or FAMILIES if _fits((f, p))]


@cache
def suiting(family: str) -> tuple[str, ...]:
    """Names of the components that can work on a family at all."""
    net = tiny(family)
    return tuple(name for name in tta.list_methods() if component(name).suits(net))


def _fits(case: Case) -> bool:
    """Whether the components of the case can work on the family, and with each other."""
    family, parts = case
    if not all(name in suiting(family) for name in parts.values()):
        return False
    if "norm" not in parts:
        return True
    slots = dict.fromkeys(SLOTS) | {slot: tta.get_config(name) for slot, name in parts.items()}
    try:
        for name in parts.values():
            component(name).check_slots(tta.get_config(name), slots, tiny(family))
    except ValueError:
        return False
    return True


def _only_family(parts: dict[str, str]) -> Case:
    """The case on the family with BatchNorm; without its norm rule elsewhere where that must be."""
    names = [name for slot, name in parts.items() if slot != "norm"]
    family = next(f for f in FAMILIES if all(name in suiting(f) for name in names))
    if not _fits((family, parts)):
        parts = {slot: name for slot, name in parts.items() if slot != "norm"}
    return family, parts


def components(case: Case) -> list[type[Any]]:
    """The classes of a case's components."""
    return [component(name) for name in case[1].values()]


_NORMS, _UPDATES, _OUTPUTS, _GUARDS, _INPUTS = (
    tta.list_methods(slot=slot) for slot in ("norm", "update", "output", "guard", "input")
)

ALONE = _on_every_family([{"recipe": name} for name in tta.list_methods()])
"""Single components: each recipe on each family."""

PAIRS = _on_every_family(
    [{"norm": n, "update": u} for n in _NORMS for u in _UPDATES]
    + [{"update": u, "output": o} for u in _UPDATES for o in _OUTPUTS]
)
"""Every norm rule with every update, and every update with every output rule."""

# All triples would be thousands of cases. Each pair of a norm rule and an output rule comes with
# some update, and one family is enough, because a triple adds little to the pairs that it holds.
TRIPLES = _on_every_family(
    [
        {"norm": _NORMS[(i + j) % len(_NORMS)], "update": u, "output": o}
        for i, u in enumerate(_UPDATES)
        for j, o in enumerate(_OUTPUTS)
    ],
    ["bn"],  # updates for other families are without a norm rule, and among the pairs
)
"""A component in all three slots: every pair of components is in one of them."""

GUARDED = [
    _only_family({"norm": _NORMS[(i + j) % len(_NORMS)], "update": u, "guard": g})
    for i, u in enumerate(_UPDATES)
    for j, g in enumerate(_GUARDS)
]
"""Every guard over every update, and over every norm rule with some update."""

FED = _on_every_family(
    [
        {"input": i, "update": _UPDATES[(5 * k) % len(_UPDATES)], "output": o, "guard": g}
        for k, (i, o, g) in enumerate(
            (i, o, g)
            for i in _INPUTS
            for o, g in zip(_OUTPUTS, itertools.cycle(_GUARDS), strict=False)
        )
    ],
    ["bn"],
)
"""Every input rule with every output rule, some update and some guard."""

CASES = ALONE + PAIRS + TRIPLES + GUARDED + FED


def _in_turn(cases: list[Case], key: Callable[[Case], Any], count: int = 1) -> list[Case]:
    """Some cases of each group that has the same key, beginning with another one each time."""
    groups: dict[Any, list[Case]] = {}
    for case in cases:
        groups.setdefault(key(case), []).append(case)
    return [
        group[(turn + k * len(group) // count) % len(group)]
        for turn, group in enumerate(groups.values())
        for k in range(min(count, len(group)))
    ]


# What every run of the tests has: it must not grow with the square of the number of components.
SAMPLED_PAIRS = _in_turn(PAIRS, lambda case: tuple(case[1].values()))
"""Every pair, each on one family."""

SAMPLED_TRIPLES = _in_turn(TRIPLES, lambda case: case[1]["update"], 4)
"""Every update in four triples."""

SAMPLED_GUARDED = _in_turn(GUARDED, lambda case: case[1]["update"], 2)
"""Every update under two guards."""


def label(case: Case) -> str:
    """The case in words that can stand in the name of a test."""
    return f"{case[0]}-{'+'.join(case[1].values())}"


# Thresholds wide enough that an untrained network's samples pass them and that guards act; short
# source passes.
LOOSE = {
    "entropy_margin": 10.0,
    "redundancy_margin": 10.0,
    "confidence_threshold": 10.0,
    "views": 2,
    "warmup_samples": 2 * BATCH,
    "posterior_epochs": 2,
    "plpd_threshold": -1.0,
    "update_every": BATCH,
    "every": 2,
    "threshold": 1.0,
    "passes": 2,
    "population": 4,
    "prompts": 2,
    "steps_new": 2,
    "prior_strength": None,
    "start_confidence": 0.0,
    "patch_size": 8,
    "queue_size": 3 * BATCH,
    "bank_size": 3 * BATCH,
    "refine_after": BATCH,
}


def _loose(name: str) -> dict[str, Any]:
    fields = tta.get_config(name).to_dict()
    return {key: value for key, value in LOOSE.items() if key in fields}


def arguments(parts: dict[str, str]) -> dict[str, Any]:
    """The arguments of ``wrap``, with a learning rate that moves things and little to compute."""
    chosen: dict[str, Any] = dict(parts)
    for slot, name in parts.items():
        if issubclass(component(name), Update):
            config = tta.get_config(name, **_loose(name))
            rate = {"lr": 0.05} if isinstance(config, tta.UpdateConfig) else {}
            chosen[slot] = config.override(**rate)
        elif issubclass(component(name), Guard):
            chosen[slot] = tta.get_config(name, **_loose(name))
        elif "views" in tta.get_config(name).to_dict():
            chosen[slot] = tta.get_config(name, views=LOOSE["views"])
    return chosen | surroundings() | given(parts)


def given(parts: dict[str, str]) -> dict[str, Any]:
    """What no file holds of an adapter: the denoiser of an input rule that needs one."""
    rules = [component(name) for name in parts.values() if issubclass(component(name), Input)]
    names = [rule.name for rule in rules if rule.prompt_buffer is None]  # a prompt needs none
    return {"input": diffusion(names[0])} if names else {}


def make(family: str, parts: dict[str, str], **extra: Any) -> tuple[nn.Module, tta.Adapter]:
    """A fresh model of the family and its adapter."""
    net = tiny(family)
    return net, tta.wrap(net, **arguments(parts), **extra)
