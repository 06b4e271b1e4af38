"""What ZeroSiam and SPA share: a square predictor on the features, with a learning rate of its own.

Its losses are in a method's own file.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn

from tta.core.backbone import Backbone
from tta.core.checks import LARGE, number, one_of
from tta.core.component import Context
from tta.core.config import LR_SCALINGS, UpdateConfig, lr_share
from tta.core.update import Update

__all__ = ["PredictorConfig", "PredictorUpdate"]

Self = TypeVar("Self", bound="PredictorConfig")


@dataclass(frozen=True, kw_only=True)
class PredictorConfig(UpdateConfig):
    """Fields of the predictor's learning rate."""

    predictor_lr: float = 0.025  # learning rate of the predictor P
    predictor_lr_scaling: str = "none"  # of predictor_lr by batch_size, as lr_scaling

    def __post_init__(self) -> None:
        super().__post_init__()
        number("predictor_lr", self.predictor_lr, 0, LARGE)
        one_of("predictor_lr_scaling", self.predictor_lr_scaling, LR_SCALINGS)

    def override(self: Self, **changes: Any) -> Self:
        """Replace fields; a rate that the caller names is never scaled."""
        named = {"predictor_lr_scaling": "none"} if "predictor_lr" in changes else {}
        return super().override(**named | changes)

    def for_batch_size(self: Self, batch_size: int | None) -> Self:
        """Scale both rates, each by its own rule."""
        rule = self.predictor_lr_scaling
        share = 1.0 if batch_size is None else lr_share(rule, batch_size, self.lr_batch_size)
        scaled = super().for_batch_size(batch_size)
        return scaled.replace(predictor_lr=self.predictor_lr * share, predictor_lr_scaling="none")


class PredictorUpdate(Update):
    """An update with a predictor (D, D), the identity at first, in float32."""

    needs_features = True
    needs_linear_head = True

    def __init__(self, config: PredictorConfig, network: Backbone, context: Context) -> None:
        super().__init__(config, network, context)
        size = context.feature_size
        kind: dict[str, Any] = {"dtype": torch.float32}
        kind["device"] = next(iter(context.parameters.values())).device
        # Not by nn.Linear's own start, which would advance the global generator.
        self.predictor: Any = nn.utils.skip_init(nn.Linear, size, size, bias=False, **kind)
        nn.init.eye_(self.predictor.weight)
        self.optimizer = self._make_optimizer()  # again, now with the predictor

    def learning_rates(self) -> dict[str, float]:
        """That of the predictor."""
        return {"update.predictor.weight": self.config.predictor_lr}
