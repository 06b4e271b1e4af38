"""Counts the images that go through a model."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.autograd.graph import register_multi_grad_hook
from torch.utils._pytree import tree_leaves

__all__ = ["Passes"]


class Passes:
    """Counts images that go through a model forward and backward, until it is closed.

    Args:
        model: Any module that takes a batch first.
    """

    def __init__(self, model: nn.Module) -> None:
        self.forward = self.backward = 0
        self._handle = model.register_forward_hook(self._count)

    def _count(self, module: nn.Module, arguments: Any, output: Any) -> None:
        images = len(arguments[0]) if arguments else 0
        self.forward += images
        trained = [v for v in tree_leaves(output) if isinstance(v, Tensor) and v.requires_grad]
        if trained:
            register_multi_grad_hook(trained, lambda _: self._back(images), mode="any")

    def _back(self, images: int) -> None:
        self.backward += images

    def close(self) -> None:
        """Take the hook off the model."""
        self._handle.remove()
