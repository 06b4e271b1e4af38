"""Trained parameters in float32 where the model holds them in half precision.

A step of an optimiser is often smaller than the distance between two numbers of bfloat16 or
float16, and rounding then drops it. Therefore a master copy in float32 is trained, and every pass
of the model uses its rounded values.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

__all__ = ["Masters"]

HALF = (torch.bfloat16, torch.float16)


class Masters:
    """The trained parameters: the model's own, or master copies of those in half precision.

    Args:
        own: The model's parameters that are to be trained, by name.
    """

    def __init__(self, own: Mapping[str, nn.Parameter]) -> None:
        self.own = dict(own)
        self.trained = {
            name: nn.Parameter(p.detach().float()) if p.dtype in HALF else p
            for name, p in own.items()
        }
        self.pairs = [
            (master, p)
            for master, p in zip(self.trained.values(), self.own.values(), strict=True)
            if master is not p
        ]

    def in_model(self, tensors: Iterable[Tensor]) -> list[Tensor]:
        """The model's own parameter for each tensor that is a master; others as they are."""
        own = {id(master): p for master, p in self.pairs}
        return [own.get(id(tensor), tensor) for tensor in tensors]

    @torch.no_grad()
    def give_back(self, originals: Mapping[str, Tensor]) -> None:
        """Give the model's own parameters the values they had, by name."""
        for name, p in self.own.items():
            p.copy_(originals[name])

    @torch.no_grad()
    def write_to_model(self) -> None:
        """Give the model the rounded values of the master copies."""
        for master, p in self.pairs:
            p.copy_(master)
