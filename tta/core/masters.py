"""Trained parameters in float32 where the model holds them in half precision.

A step of an optimiser is often smaller than the distance between two numbers of bfloat16 or
float16, and rounding then drops it. Therefore a master copy in float32 is trained, and every pass
of the model uses its rounded values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

__all__ = ["HALF", "KeepsDtype", "Masters", "NeverHalf"]

HALF = (torch.bfloat16, torch.float16)


class KeepsDtype:
    """What moves a tensor, without changing its dtype.

    Args:
        fn: What moves it, as ``torch.nn.Module`` applies it to all its tensors.
    """

    def __init__(self, fn: Callable[[Tensor], Tensor]) -> None:
        self.fn = fn

    def __call__(self, tensor: Tensor) -> Tensor:
        """Return the tensor where ``fn`` puts it."""
        moved = self.fn(tensor)
        return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)


class NeverHalf(KeepsDtype):
    """What moves a tensor and changes its dtype, but to float32 instead of half precision."""

    def __call__(self, tensor: Tensor) -> Tensor:
        """Return what ``fn`` makes of the tensor, or that in float32."""
        moved = self.fn(tensor)
        return tensor.to(moved.device, torch.float32) if moved.dtype in HALF else moved


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

    def move(self, fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        """Move the master copies, before ``fn`` is applied to the model.

        Args:
            fn: As ``torch.nn.Module`` applies it to all its tensors.

        Returns:
            What is to be applied to copies of what is trained.
        """
        if not self.pairs:
            return fn
        whole = NeverHalf(fn)
        for master, _ in self.pairs:
            master.data = whole(master.data)
        return whole

    @property
    def rounds(self) -> bool:
        """Whether steps are rounded to half precision, as no master copy takes them."""
        return any(p.dtype in HALF for p in self.trained.values())

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
