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
from tta.core.source import SourceStatistics, missing_artefact
from tta.parts.displacement import ClassDisplacements
from tta.parts.far_features import FarFeatures

__all__ = ["MOST_IMAGES", "ShiftRule", "in_logits", "take_mean"]

MOST_IMAGES = 100_000  # of source batches


class ShiftRule(Output):
    """Adds a vector to the features, for which the logits need no second pass of the classifier.

    What is added to the logits is the vector times the weight of the linear layer. They may be
    those of an update's teacher, or of the weights before a step.

    Args:
        config: The component's config, with ``balanced`` and ``official``.
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
        self.far = None if config.official else FarFeatures()
        self.classes: ClassDisplacements | None = None
        if config.balanced:
            self.classes = ClassDisplacements(context.num_classes, context.feature_size)

    def offset(self) -> Tensor:
        """What is added to the features (D,)."""
        raise NotImplementedError  # pragma: no cover

    def features_of(self, prediction: Prediction, centre: Tensor) -> Tensor:
        """Features (B, D) to average, with the centre (D,) in place of those of bad images."""
        assert prediction.features is not None
        features = prediction.features.float()
        return features if self.far is None else self.far.left_out(features, centre)

    def shifted(self, prediction: Prediction) -> Tensor:
        """Logits (B, C) for features to which :meth:`offset` is added, in float32."""
        return prediction.logits.float() + in_logits(self.offset(), self.context.classifier)

    @torch.no_grad()
    def write_to(self, base: Any) -> None:
        """Add what the offset adds to the logits to the bias of the linear layer.

        Args:
            base: The layer; one without a bias gets one.
        """
        change = in_logits(self.offset(), base)
        if base.bias is None:
            base.bias = nn.Parameter(change.to(base.weight.dtype))
        else:
            base.bias.copy_(base.bias.float() + change)

    def fit_mean(self, source: SourceStatistics, network: Backbone) -> None:
        """Take the mean of the source's features, or measure it on source batches.

        Raises:
            ValueError: When ``source`` has nothing to take it from, or that of another model.
        """
        self.source_used = take_mean(self.feature_mean, source, network, self.name)
        if self.source_used is None:
            raise missing_artefact(source, self.name, "the mean of the features")


def in_logits(offset: Tensor, classifier: Any) -> Tensor:
    """What an offset of the features (D,) adds to the logits of a linear layer (C,)."""
    with torch.autocast(offset.device.type, enabled=False):
        return F.linear(offset, classifier.weight.flatten(1).float())


def take_mean(mean: Tensor, source: SourceStatistics, network: Backbone, name: str) -> str | None:
    """Fill in the mean of the source's features: as given, or measured on source batches.

    Args:
        mean: (D,), which is written to.
        source: Where to take it from.
        network: The source model, with features.
        name: Of the component, for what is said.

    Returns:
        What it was taken from, in words; None where the source has nothing to take it from.

    Raises:
        ValueError: When it is that of another model, or a source without batches.
    """
    if source.feature_mean is not None:
        found, words = source.feature_mean, "feature mean as given"
    elif source.features is not None:
        found, words = source.features.float().mean(0), "feature mean from features"
    elif source.batches is not None:
        found, words = _measured(mean, source, network)
    else:
        return None
    if found.shape != mean.shape:
        raise ValueError(
            f"`source.feature_mean` must be of shape {tuple(mean.shape)}, as this model's "
            f"features, got {tuple(found.shape)}: make it with "
            f"tta.collect_source(model, loader, for_methods=['{name}'])."
        )
    mean.copy_(found)
    return words


@torch.no_grad()
def _measured(like: Tensor, source: SourceStatistics, network: Backbone) -> tuple[Tensor, str]:
    total, seen = torch.zeros_like(like, dtype=torch.float64), 0
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
    return (total / seen).float(), f"feature mean from {seen} images"
