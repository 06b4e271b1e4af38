"""What the first layer of a model is given, after whatever the model does to its images."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tta.core.backbone import Backbone
from tta.core.compiled import without_graphs
from tta.core.norm_layers import frozen_statistics

__all__ = ["first_input"]


class _ReachedError(BaseException):
    """Ends a pass at the first layer; no ``except Exception`` of a model catches it."""

    def __init__(self, value: Tensor) -> None:
        super().__init__("the first layer is reached")
        self.value = value


def _stop(module: nn.Module, args: tuple[Any, ...]) -> None:
    raise _ReachedError(args[0])


@torch.no_grad()
def first_input(network: Backbone, x: Tensor) -> Tensor:
    """Run the model on images (B, ...) up to its first layer, ``network.entry``.

    Returns:
        The layer's input, of all images: processes that share a batch each get the whole of it.

    Raises:
        ValueError: When the model does not call that layer.
    """
    session = network.session
    ranks, meeting = session.ranks, session.meeting
    session.ranks = session.meeting = None
    handle = network.entry.register_forward_pre_hook(_stop)
    try:
        with frozen_statistics(network.wrappers), without_graphs():
            network(x)
    except _ReachedError as reached:
        return reached.value.detach()
    finally:
        handle.remove()
        session.ranks, session.meeting = ranks, meeting
    raise ValueError(
        f"`model` must call its first layer for a method that moves it, but this "
        f"{type(network.model).__name__} does not call its {type(network.entry).__name__}: use "
        "another method."
    )
