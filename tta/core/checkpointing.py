"""Whether a pass is one that ``torch.utils.checkpoint`` runs, or will run, a second time."""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["is_recomputation", "may_be_recomputed"]

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
