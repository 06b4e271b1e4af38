"""What NEO and FOA's shift have in common: features are shifted before the linear layer."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tta.core.backbone import Backbone
from tta.core.component import Context
from tta.core.output_rule import Output
from tta.core.prediction import Prediction
from tta.core.source import SourceStatistics
from tta.parts.displacement import ClassDisplacements

__all__ = ["ShiftRule"]

MOST_IMAGES = 100_000  # of source batches


class ShiftRule(Output):
    """Adds a vector to the features, for which the logits need no second pass of the classifier.

    What is added to the logits is the vector times the weight of the linear layer. They may be
    those of an update's teacher, or of the weights before a step.

    Args:
        config: The component's config, with ``balanced``.
        context: What is known at wrap.
    """

    needs_features: ClassVar[bool] = True
    needs_linear_head: ClassVar[bool] = True
    uses_labels: ClassVar[bool] = False
    takes_softmax: ClassVar[bool] = False
    writable: ClassVar[bool] = True

    feature_mean: Tensor  # (D,) of the source; 0 where it plays no part

    def __init__(self, config: Any, context: Context) -> None:
        super().__init__(config, context)
        zeros = torch.zeros(context.feature_size, dtype=torch.float32)
        self.register_buffer("feature_mean", zeros, persistent=False)
        self.classes: ClassDisplacements | None = None
        if config.balanced:
            self.classes = ClassDisplacements(context.num_classes, context.feature_size)

    def offset(self) -> Tensor:
        """What is added to the features (D,)."""
        raise NotImplementedError  # pragma: no cover

    def shifted(self, prediction: Prediction) -> Tensor:
        """Logits (B, C) for features to which :meth:`offset` is added, in float32."""
        return prediction.logits.float() + self._in_logits(self.context.classifier)

    def _in_logits(self, classifier: Any) -> Tensor:
        """What :meth:`offset` adds to the logits (C,)."""
        offset = self.offset()
        with torch.autocast(offset.device.type, enabled=False):
            return F.linear(offset, classifier.weight.flatten(1).float())

    @torch.no_grad()
    def write_to(self, base: Any) -> None:
        """Add what the offset adds to the logits to the bias of the linear layer.

        Args:
            base: The layer; one without a bias gets one.
        """
        change = self._in_logits(base)
        if base.bias is None:
            base.bias = nn.Parameter(change.to(base.weight.dtype))
        else:
            base.bias.copy_(base.bias.float() + change)

    def fit_mean(self, source: SourceStatistics, network: Backbone) -> None:
        """Take the mean of the source's features, or measure it on source batches.

        Raises:
            ValueError: When ``source`` has nothing to take it from, or that of another model.
        """
        if source.feature_mean is not None:
            found, self.source_used = source.feature_mean, "feature mean as given"
        elif source.features is not None:
            found, self.source_used = source.features.float().mean(0), "feature mean from features"
        elif source.batches is not None:
            found = self._measure(source, network)
        else:
            raise ValueError(
                f"`source` must give {self.name} the mean of the features, got "
                f"{source.contents or 'nothing'}: pass source batches, or what "
                f"tta.collect_source(model, loader, for_methods=['{self.name}']) returns."
            )
        if found.shape != self.feature_mean.shape:
            raise ValueError(
                f"`source.feature_mean` must be of shape {tuple(self.feature_mean.shape)}, as this "
                f"model's features, got {tuple(found.shape)}: make it with "
                f"tta.collect_source(model, loader, for_methods=['{self.name}'])."
            )
        self.feature_mean.copy_(found)

    @torch.no_grad()
    def _measure(self, source: SourceStatistics, network: Backbone) -> Tensor:
        total = torch.zeros_like(self.feature_mean, dtype=torch.float64)
        seen = 0
        for images, _ in source.iter_batches(MOST_IMAGES):
            found = network(images.to(total.device)).features
            assert found is not None
            total += found.double().sum(0)
            seen += len(images)
        if seen == 0:
            raise ValueError(
                "`source` must hold at least one batch, got none: pass an iterable of "
                "(images, labels) that was not read to its end."
            )
        self.source_used = f"feature mean from {seen} images"
        return (total / seen).float()
