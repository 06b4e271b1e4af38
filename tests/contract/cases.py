"""What the contract suite runs on: every registered component on every norm family it can take.

Nothing here names a method. A component is found in the registry; what it needs beyond a name (a
source, a model with BatchNorm) is read off its class, and what it may do differently (a buffer
that survives an official reset) is declared there too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import tta
from tests.helpers.nets import FAMILIES, tiny
from tta.core.norm_layers import batch_norm_layers
from tta.core.norm_rule import NormRule
from tta.core.registry import component
from tta.core.update import Update

__all__ = [
    "BATCH",
    "CASES",
    "FAMILIES",
    "arguments",
    "images",
    "make",
    "source_batches",
    "surroundings",
]

BATCH = 8


def images(seed: int, count: int = BATCH) -> Tensor:
    """Random images (count, 3, 32, 32) in [0, 1]."""
    return torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def source_batches() -> list[tuple[Tensor, Tensor]]:
    """Two batches of source images with labels."""
    generator = torch.Generator().manual_seed(7)
    return [(images(100 + i), torch.randint(0, 10, (BATCH,), generator=generator)) for i in (0, 1)]


def _compositions() -> list[dict[str, Any]]:
    """One recipe for each component, every pair of components, and triples that hold every pair."""
    norms, updates, outputs = (tta.list_methods(slot=s) for s in ("norm", "update", "output"))
    alone = [{"recipe": name} for name in tta.list_methods()]
    pairs = [{"norm": n, "update": u} for n in norms for u in updates]
    # All triples would be thousands of tests: of norm and output, each pair comes with some update.
    triples = [
        {"norm": norms[(i + j) % len(norms)], "update": u, "output": o}
        for i, u in enumerate(updates)
        for j, o in enumerate(outputs)
    ]
    with_output = [{"update": u, "output": o} for u in updates for o in outputs]
    return alone + pairs + with_output + triples


def _fits(case: dict[str, Any], family: str) -> bool:
    has_bn = bool(batch_norm_layers(tiny(family)))
    names = [v for v in case.values() if isinstance(v, str)]
    wants_bn = any(issubclass(component(n), NormRule) for n in names)
    return (has_bn or not wants_bn) and (len(case) < 3 or family == "bn")


# Triples add only what a pair and another pair do not show; one family is enough for them.
CASES = [(family, case) for case in _compositions() for family in FAMILIES if _fits(case, family)]


def surroundings() -> dict[str, Any]:
    """What any component may ask for beside a model: source batches, and that it takes pixels."""
    return {"source": source_batches(), "mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}


def arguments(case: dict[str, Any]) -> dict[str, Any]:
    """The arguments of ``wrap``, with a learning rate that moves things and little to compute."""
    parts = dict(case)
    for slot, name in parts.items():
        if issubclass(component(name), Update):
            parts[slot] = tta.get_config(name, lr=0.05, **_loose(name))
    return parts | surroundings()


def make(family: str, case: dict[str, Any], **extra: Any) -> tuple[nn.Module, tta.Adapter]:
    """A fresh model of the family and its adapter."""
    net = tiny(family)
    return net, tta.wrap(net, **arguments(case), **extra)


# Thresholds wide enough that an untrained network's samples pass them, and short source passes.
LOOSE = {
    "entropy_margin": 10.0,
    "redundancy_margin": 10.0,
    "confidence_threshold": 10.0,
    "views": 2,
    "warmup_samples": 2 * BATCH,
    "posterior_epochs": 2,
    "plpd_threshold": -1.0,
    "update_every": BATCH,
}


def _loose(name: str) -> dict[str, Any]:
    fields = tta.get_config(name).to_dict()
    return {key: value for key, value in LOOSE.items() if key in fields}
