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
from tests.nets import FAMILIES, tiny
from tta.norm import batch_norm_layers
from tta.registry import component
from tta.slots import NormRule, Update

__all__ = ["BATCH", "CASES", "FAMILIES", "images", "make", "source_batches"]

BATCH = 8


def images(seed: int, count: int = BATCH) -> Tensor:
    """Random images (count, 3, 32, 32) in [0, 1]."""
    return torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def source_batches() -> list[tuple[Tensor, Tensor]]:
    """Two batches of source images with labels."""
    generator = torch.Generator().manual_seed(7)
    return [(images(100 + i), torch.randint(0, 10, (BATCH,), generator=generator)) for i in (0, 1)]


def _compositions() -> list[dict[str, Any]]:
    """One recipe for each component, then every norm rule under every update and output."""
    norms, updates, outputs = (tta.list_methods(slot=s) for s in ("norm", "update", "output"))
    alone = [{"recipe": name} for name in tta.list_methods()]
    pairs = [{"norm": n, "update": u} for n in norms for u in updates]
    triples = [
        {"norm": n, "update": u, "output": o} for n in norms for u in updates for o in outputs
    ]
    with_output = [{"update": u, "output": o} for u in updates for o in outputs]
    return alone + pairs + with_output + triples


def _fits(case: dict[str, Any], family: str) -> bool:
    has_bn = bool(batch_norm_layers(tiny(family)))
    names = [v for v in case.values() if isinstance(v, str)]
    wants_bn = any(issubclass(component(n), NormRule) for n in names)
    return has_bn or not wants_bn


CASES = [(family, case) for case in _compositions() for family in FAMILIES if _fits(case, family)]


def make(family: str, case: dict[str, Any], **arguments: Any) -> tuple[nn.Module, tta.Adapter]:
    """A fresh model of the family and its adapter, with a learning rate that moves things."""
    net = tiny(family)
    parts = dict(case)
    for slot, name in parts.items():
        if issubclass(component(name), Update):
            parts[slot] = tta.get_config(name, lr=0.05, **_loose(name))
    recipe = parts.pop("recipe", None)
    adapter = tta.wrap(net, recipe, source=source_batches(), **parts, **arguments)
    return net, adapter


def _loose(name: str) -> dict[str, Any]:
    """Thresholds wide enough that an untrained network's samples pass them."""
    fields = tta.get_config(name).to_dict()
    return {key: 10.0 for key in ("entropy_margin", "redundancy_margin") if key in fields}
