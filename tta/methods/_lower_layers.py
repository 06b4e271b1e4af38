"""What SAR and DeYO share: which norm layers they train, and learning rates for small batches.

The last blocks and the final norm are not trained. They are found by position: of the norm layers,
in the order in which a forward pass first calls them, the last ``skip_blocks`` share is left out,
rounded up and at least one; one layer is always trained. The order is recorded during the first
batch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor

from tta.core.backbone import Backbone
from tta.core.checks import number
from tta.core.component import Context
from tta.core.config import UpdateConfig
from tta.core.prediction import Prediction
from tta.core.update import Update

__all__ = ["LowerLayersConfig", "LowerLayersUpdate"]

OFFICIAL_LEFT_OUT = ("layer4", "blocks.9", "blocks.10", "blocks.11", "norm.")

Self = TypeVar("Self", bound="LowerLayersConfig")


@dataclass(frozen=True, kw_only=True)
class LowerLayersConfig(UpdateConfig):
    """Fields of updates that do not train the last norm layers."""

    skip_blocks: float = 0.25  # share of the norm layers left out at the end, and the final norm

    def __post_init__(self) -> None:
        super().__post_init__()
        number("skip_blocks", self.skip_blocks, 0, 1, below=True)

    def for_batch_size(self: Self, batch_size: int | None) -> Self:
        """Scale ``lr`` as every update does; the scripts' two rules double it for single images."""
        scaled = super().for_batch_size(batch_size)
        if batch_size == 1 and self.lr_scaling in ("linear", "small_batch"):
            return scaled.replace(lr=2 * scaled.lr)
        return scaled


class LowerLayersUpdate(Update):
    """Trains the lower norm layers; a subclass calls :meth:`leave_out_last` after its forward."""

    def __init__(self, config: LowerLayersConfig, network: Backbone, context: Context) -> None:
        super().__init__(config, network, context)
        self.order_unknown = config.params == "norm" and not config.official
        if self.order_unknown:
            network.watch_calls({_layer(name) for name in context.parameters})

    def learn(self, x: Tensor) -> Prediction:
        """As any update; what was left out in this batch asks for no gradient afterwards.

        Not before, since a checkpointed part of the model runs again in the backward pass and must
        find the parameters as they were.
        """
        if not self.order_unknown:
            self.network.end_watching()
        prediction = super().learn(x)
        for p in self.left_out:
            p.requires_grad_(False)
        self.left_out = []
        return prediction

    @classmethod
    def leaves_out(cls, config: Any, names: Iterable[str]) -> set[str]:
        """Return what the official code leaves out, which goes by the names of layers."""
        if not config.official or config.params != "norm":
            return set()
        return {n for n in names if _officially_left_out(_layer(n))}

    def leave_out_last(self) -> None:
        """Stop training the layers that the first forward pass called last; later calls do nothing.

        Until then ``parameters_adapted`` names all norm layers; the keys of the state always do.
        """
        if not self.order_unknown:
            return
        self.order_unknown = False
        order = self.network.call_order()
        if not order:  # the model uses their weights without calling them
            order = list(dict.fromkeys(_layer(n) for n in self.parameters_adapted))
        # Rounded before rounding up: 0.1 * 30 must not make 4.
        skipped = max(1, math.ceil(round(self.config.skip_blocks * len(order), 6)))
        trained = set(order[: max(1, len(order) - skipped)])
        self.left_out = [
            p for name, p in self.parameters_adapted.items() if _layer(name) not in trained
        ]
        self.parameters_adapted = {
            n: p for n, p in self.parameters_adapted.items() if _layer(n) in trained
        }


def _layer(parameter: str) -> str:
    return parameter.rpartition(".")[0]


def _officially_left_out(layer: str) -> bool:
    return layer == "norm" or any(part in layer for part in OFFICIAL_LEFT_OUT)
