"""Recipes whose whole step can be captured and replayed."""

from __future__ import annotations

from typing import Any

import torch

import tta

__all__ = ["LEARNING", "RECIPES", "named"]

BOUNDED = tta.get_config("adanpc", capacity=20, ball_radius=0.6)
CODED = {"output": "lsa", "source": [(torch.rand(40, 3, 16, 16), torch.arange(40) % 10)]}
# Each with whether it is bitwise the adapter on a CPU, where norm rules sum in another order.
RECIPES: list[tuple[dict[str, Any], bool]] = [
    ({"recipe": "source"}, True),
    ({"norm": "bn"}, False),
    ({"norm": "alpha_bn"}, False),
    ({"norm": "unmix_tns"}, False),
    ({"norm": "robust_bn"}, False),
    ({"norm": "bn_ema"}, False),
    ({"norm": "adaptive_bn", "output": "drift"}, False),
    ({"norm": "iabn"}, False),
    (CODED, True),
    ({"output": "neo"}, True),
    ({"output": tta.get_config("neo", balanced=True, momentum=0.1)}, True),
    ({"output": "foa_shift"}, True),
    ({"output": tta.get_config("t3a", filter_size=3)}, True),
    ({"norm": "bn", "output": "prior_correction"}, False),
    ({"output": BOUNDED}, True),
    ({"output": "persistence"}, False),
    ({"norm": "robust_bn", "output": "neo"}, False),
]
# Those that learn by gradients.
LEARNING: list[dict[str, Any]] = [
    {"update": "tent.cifar10"},
    {"update": "tent.imagenet"},
    {"update": tta.get_config("tent", optimizer="adamw", weight_decay=0.1, steps=2)},
    {"norm": "unmix_tns", "update": "tent.cifar10"},
    {"norm": "robust_bn", "update": "tent.imagenet", "output": "prior_correction"},
    {"update": tta.get_config("tent", params="all")},
    {"update": "zerosiam"},
    {"update": "shot_im"},
]


def named(recipe: dict[str, Any]) -> str:
    """A name for a test."""
    parts = (v if isinstance(v, str) else v.name for k, v in recipe.items() if k != "source")
    return "+".join(parts)
