"""Passes that keep less for their backward pass: in micro-batches, and by checkpoints.

What is not kept is computed again within the backward pass, by ``torch.utils.checkpoint``. The
results are those of one ordinary pass, up to rounding where a batch is cut.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from tta.core.norm_layers import AdaptiveNorm
from tta.core.outputs import joined

__all__ = ["Frugal", "segments"]

CONTAINERS = (nn.Sequential, nn.ModuleList)


@dataclass
class Frugal:
    """How passes that record a graph are run.

    Args:
        micro_batch: Images that go through the model at once; None for all of them.
        checkpointing: Whether the blocks of the model are checkpointed.
    """

    micro_batch: int | None = None
    checkpointing: bool = False
    _segments: list[nn.Module] | None = field(default=None, repr=False)

    def __call__(
        self,
        run: Callable[..., Any],
        model: nn.Module,
        own: bool,
        x: Tensor,
        *rest: Any,
        **more: Any,
    ) -> Any:
        """Return ``run(x, *rest, **more)``.

        Args:
            run: Runs the model.
            model: The model.
            own: Whether it runs with its own tensors, which it still has in the backward pass.
            x: Images (B, ...).
            *rest: Further arguments of the model.
            **more: Further arguments of the model.
        """
        once = partial(self._once, run, model, own)
        with set_checkpoint_early_stop(False):  # a pass is not left in the middle
            if self.micro_batch is None or len(x) <= self.micro_batch:
                return once(x, *rest, **more)
            parts = x.split(self.micro_batch)
            again = partial(_on_a_copy, once)
            found = [checkpoint(again, p, *rest, use_reentrant=False, **more) for p in parts]
        return joined(found, [len(part) for part in parts])

    def _once(
        self, run: Callable[..., Any], model: nn.Module, own: bool, *args: Any, **kwargs: Any
    ) -> Any:
        with self._checkpointed(model, own):
            return run(*args, **kwargs)

    @contextmanager
    def _checkpointed(self, model: nn.Module, own: bool) -> Iterator[None]:
        if not (self.checkpointing and own):
            yield
            return
        if self._segments is None:
            self._segments = segments(model)
        before = [(m.__dict__, m.__dict__.get("forward")) for m in self._segments]
        try:
            for module in self._segments:
                module.__dict__["forward"] = partial(
                    checkpoint, module.forward, use_reentrant=False
                )
            yield
        finally:
            for held, forward in before:
                held.pop("forward", None)
                if forward is not None:
                    held["forward"] = forward

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_segments": None}


def _on_a_copy(run: Callable[..., Any], x: Tensor, *rest: Any, **more: Any) -> Any:
    """Run a model, which may write to its images, so that it can be run on them again."""
    return run(x.clone(), *rest, **more)


def segments(model: nn.Module) -> list[nn.Module]:
    """The blocks of a model that may be run again alone: what its sequences and lists hold.

    A sequence of single layers is one block.
    """
    if isinstance(model, torch.jit.ScriptModule) or hasattr(model, "_orig_mod"):
        return []
    found: list[nn.Module] = []
    for child in model.children():
        if isinstance(child, nn.Sequential) and len(child) > 1 and all(map(_single, child)):
            found.append(child)
        elif isinstance(model, CONTAINERS) and not isinstance(child, CONTAINERS):
            if not _single(child):
                found.append(child)
        else:
            found += segments(child)
    return found


def _single(module: nn.Module) -> bool:
    return isinstance(module, AdaptiveNorm) or not any(True for _ in module.children())
