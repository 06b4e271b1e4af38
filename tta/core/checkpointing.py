"""Whether a pass is one that ``torch.utils.checkpoint`` runs, or will run, a second time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["gradients_by_backward", "is_recomputation", "is_reentrant", "may_be_recomputed"]

_C: Any = torch._C  # torch has no public function for either


def is_recomputation() -> bool:
    """Whether this runs within a backward pass, where a checkpointed part runs again."""
    return _C._current_graph_task_id() != -1


def may_be_recomputed() -> bool:
    """Whether this runs within a checkpointed part of a pass that records a graph.

    Reentrant checkpoints switch gradients off, the others put hooks on saved tensors.
    """
    if not torch.is_grad_enabled():
        return True
    return _C._autograd._top_saved_tensors_default_hooks(True) is not None


def is_reentrant(loss: Tensor) -> bool:
    """Whether the graph of a loss has a part with a reentrant checkpoint."""
    nodes, seen = [loss.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        if node.name() == "CheckpointFunctionBackward":
            return True
        seen.add(node)
        nodes += [following for following, _ in node.next_functions]
    return False


def gradients_by_backward(loss: Tensor, inputs: Sequence[Tensor]) -> list[Tensor | None]:
    """As ``torch.autograd.grad``, whose graph ends at a reentrant checkpoint, for leaves.

    Other leaves get gradients too, which the caller takes away.
    """
    before = [p.grad for p in inputs]
    try:
        for p in inputs:
            p.grad = None
        loss.backward()
        return [p.grad for p in inputs]
    finally:
        for p, gradient in zip(inputs, before, strict=True):
            p.grad = gradient
