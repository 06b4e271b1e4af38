"""The norm slot: where BatchNorm layers take their statistics from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from tta.core.component import Component, Context
from tta.core.masters import NeverHalf

__all__ = ["NormRule"]


class NormRule(Component):
    """Decides where one BatchNorm layer takes its statistics from; one is built for each layer.

    A subclass defines :meth:`forward`, usually with :func:`tta.core.norm_layers.normalize`.
    ``learning`` is False while the adapter is frozen; ``fell_back`` is set when a batch had too few
    values for batch statistics and the source statistics were used instead.

    Args:
        config: The component's config.
        base: The BatchNorm layer of the model.
        context: What is known at wrap.
    """

    slot = "norm"
    must_define = ("forward",)
    needs_source_stats: ClassVar[bool] = False  # the layer must have running statistics
    # Whether the rule moves in no pass but those of `learning_pass`, by `learn`.
    learns_apart: ClassVar[bool] = False
    # Whether no channel's result depends on another channel, and buffers end in the channels.
    channelwise: ClassVar[bool] = False

    def __init__(self, config: Any, base: Any, context: Context) -> None:
        super().__init__(config)
        self.learning = True
        self.fell_back = False
        # Of the images that are learned from at once, the share in this pass; see `part_of_batch`.
        self.part_size = 1.0
        # Set by `with_statistics`: normalises in place of this rule.
        self.override: Callable[[Tensor, Any], Tensor] | None = None
        self.session: Any = None  # of the adapter, from the wrapper around the layer

    takes_softmax: ClassVar[bool] = False

    @property
    def following(self) -> bool:
        """Whether the caller asks for gradients to the images, which then flow through all."""
        return self.session is not None and self.session.following and torch.is_grad_enabled()

    @classmethod
    def suits(cls, model: nn.Module) -> bool:
        """Whether the model has a BatchNorm layer."""
        return any(isinstance(module, _BatchNorm) for module in model.modules())

    @classmethod
    def update_fields(cls, config: Any) -> dict[str, Any]:
        """Fields for an update on top of this rule that is named without a learning rate."""
        return {}

    @classmethod
    def begin_graph(cls, layers: Sequence[tuple[Any, Any]]) -> None:
        """Called when a graph is recorded, before the pass, with all rules and their layers.

        What a rule computes of its state alone can be one operation for all layers here.
        """

    def mixed_images(self, count: int) -> float:
        """About how many images of the stream the statistics of one image come from.

        Args:
            count: Images in a batch.
        """
        return float(count)

    @property
    def learns_first(self) -> bool:
        """Whether a pass in which the rule may move is led by one that calls :meth:`learn`.

        The rule moves in the first of the two alone, and the first one's result is dropped.
        """
        return False

    def learn(self, x: Tensor, base: Any) -> Tensor:
        """Move, and normalise ``x`` (B, C, ...) for the layers that follow.

        Called only if the rule ``learns_first``, then without a graph, or ``learns_apart``.
        """
        raise NotImplementedError  # pragma: no cover

    def write_to(self, base: Any) -> None:
        """Write the present statistics of this rule into a BatchNorm layer.

        Called only if the class is ``writable``.
        """
        raise NotImplementedError  # pragma: no cover

    def forward(self, x: Tensor, base: Any) -> Tensor:
        """Normalise ``x`` (B, C, ...) with this rule's statistics and the base's affine part."""
        raise NotImplementedError  # pragma: no cover

    def _apply(self, fn: Any, recurse: bool = True) -> NormRule:
        """Move with the layer, whose dtype statistics take, but for half precision."""
        nn.Module._apply(self, NeverHalf(fn), recurse)
        return self
