"""NEO: centre the features of the test images before they are classified.

Murphy et al.: NEO: No-Optimization Test-Time Adaptation through Latent Re-Centering, ICLR 2026,
arXiv 2510.05635.

A corruption moves the features of all images in much the same direction. The mean of all features
seen so far is subtracted before the linear layer; nothing is trained, one forward pass is all that
it takes, and the state is one vector. It wants streams that show the classes alike: on a stretch of
one class the mean is that class.

    m <- (n m + sum_b h_b) / (n + B),   n <- n + B,   z_b = W (h_b - m) + bias

h are the features that the linear layer takes. The batch itself is in m. With ``momentum=a`` it is
m <- (1 - a) m + a mean_b h_b, which follows a stream that changes; it starts at 0, as in the
authors' code, so that the first batches lose a part of their mean only. A frozen adapter uses m as
it is. Here z - W m is computed from the logits z that the model or an update gives, which is the
same where the logits are those of the features and of the weights at hand.

Ours, and not the authors': ``use_source_mean=True`` adds the mean of the source's features, without
which the logits of features that are not centred, as after a ReLU, all move by W times that mean;
m then starts there, but for a moving average under ``official=True``, which starts at 0 as without.
``balanced=True`` replaces m - r, with r the source's mean or 0, by

    1/C sum_c d_c,   d_c = sum_{b: y_b = c} (h_b - r) / (n_c + 4),   y_b = argmax_k z_bk

in which every predicted class counts once. A class of which there are few images, or none, leaves
the mean where it is, so that a stretch of one class moves it by one part in C. With ``momentum`` a
batch has at least the weight a in the mean of each class that it shows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from tta.core.backbone import Backbone
from tta.core.checks import boolean, fraction
from tta.core.component import Context
from tta.core.config import ComponentConfig
from tta.core.prediction import Prediction
from tta.core.registry import register
from tta.core.source import SourceStatistics
from tta.core.tracing import count_rows
from tta.methods._shift import ShiftRule

__all__ = ["Neo", "NeoConfig"]


@dataclass(frozen=True, kw_only=True)
class NeoConfig(ComponentConfig):
    """Fields of ``neo``."""

    momentum: float | None = None  # a, weight of the new batch; None = the mean of all images
    use_source_mean: bool = False  # add the mean of the source's features (ours)
    balanced: bool = False  # every predicted class counts once (ours)
    official: bool = False  # without the rule for bad images; a moving average starts at 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.momentum is not None:
            fraction("momentum", self.momentum)
        boolean("use_source_mean", self.use_source_mean)
        boolean("balanced", self.balanced)
        boolean("official", self.official)


@register("neo")
class Neo(ShiftRule):
    """Features without the mean of all features so far."""

    Config = NeoConfig
    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {"continual": {"momentum": 0.1}}
    artefact_fields: ClassVar[dict[str, Any]] = {"use_source_mean": True}

    centre: Tensor  # m (D,)
    count: Tensor  # 0-dimensional, n; moves only without momentum

    def __init__(self, config: NeoConfig, context: Context) -> None:
        super().__init__(config, context)
        self.register_buffer("centre", torch.zeros_like(self.feature_mean))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def correct(self, prediction: Prediction) -> Tensor:
        """Logits (B, C) of the features less the centre, which these features have moved before."""
        if self.learning:
            self._move(prediction)
        return self.shifted(prediction)

    def offset(self) -> Tensor:
        """The source's mean, or 0, less the centre."""
        return self.feature_mean - self.centre

    def fit(self, source: SourceStatistics, network: Backbone) -> None:
        """Take or measure the source's mean where it is used; the centre starts there.

        Raises:
            ValueError: When ``source`` has nothing to take it from, or that of another model.
        """
        if self.config.use_source_mean:
            self.fit_mean(source, network)
            if self.config.momentum is None or not self.config.official:
                self.centre.copy_(self.feature_mean)

    def source_artefacts(self) -> dict[str, Any]:
        """The mean of the features, where it is used."""
        return {"feature_mean": self.feature_mean} if self.config.use_source_mean else {}

    @torch.no_grad()
    def _move(self, prediction: Prediction) -> None:
        features, rate = self.features_of(prediction, self.centre), self.config.momentum
        if rate is None:
            self.count += count_rows(features)
        if self.classes is not None:
            offsets = features - self.feature_mean
            self.classes.move(offsets, prediction.logits.argmax(1), rate or 0.0)
            self.centre.copy_(self.feature_mean + self.classes.mean())
            return
        weight = count_rows(features) / self.count if rate is None else rate
        self.centre += weight * (features.mean(0) - self.centre)
