"""Estimates of accuracy without labels.

No figure of a model's own tells a good model from one that is certain and wrong. All estimates here
are therefore corrected for collapse: the entropy of the mean prediction is compared with its
largest value (AETTA), or with that of the source on the same stream, which is low too where the
stream shows few classes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from tta.core.backbone import Backbone
from tta.core.component import Context
from tta.core.guard import Batch, Estimator
from tta.core.prediction import Prediction
from tta.core.source import SourceStatistics
from tta.parts.dropout import dropped, keep_mask

__all__ = [
    "AgreementEstimate",
    "ConfidenceEstimate",
    "FeatureDropoutEstimate",
    "confidence_accuracy",
    "dropout_error",
    "relative_spread",
]

GAIN = 3.0  # points of accuracy that go with a point of mean confidence, see `confidence_accuracy`
COLLAPSE = 5.0  # power of the spread of predictions relative to the source's
POWER = 3.0  # of that relative to the largest possible, as in AETTA
IMAGES = 1000  # of the source that are read at most


def dropout_error(
    logits: Tensor, dropped: Tensor, power: float = POWER, rounded: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Error of predictions, from how often they change under dropout (AETTA).

    Args:
        logits: (B, C), without dropout.
        dropped: (N, B, C) of N passes with dropout.
        power: How strongly a low entropy of the mean prediction, as of a collapsed model, raises
            the error.
        rounded: Whether ln C is rounded to four decimals, as in the authors' code.

    Returns:
        Agreement in [0, 1], entropy of the mean prediction in nats, and the error in [0, 1 - 1/C];
        tensors without axes.
    """
    classes = logits.shape[1]
    agreement = (dropped.argmax(2) == logits.argmax(1)).float().mean()
    mean = dropped.float().softmax(2).mean((0, 1))
    spread = -(mean * (mean + 1e-6).log()).sum()
    largest = torch.tensor(float(classes), device=logits.device).log()
    largest = (largest * 1e4).round() / 1e4 if rounded else largest
    error = (1 - agreement) / (spread / largest) ** power
    return agreement, spread, error.nan_to_num(0.0).clamp(0, 1 - 1 / classes)


def confidence_accuracy(
    logits: Tensor, accuracy: Tensor | float, confidence: Tensor | float, spread: float
) -> Tensor:
    """Accuracy of predictions, from how far their mean confidence is below that on source images.

    Confidence falls under a shift, and accuracy falls faster: by about ``GAIN`` points for each
    point. That factor and the power of the spread fit three small networks on eight corruptions,
    with and without an update, shuffled and sorted, collapses included: the mean absolute error was
    7.5 points over 176 sets of 256 images. With batch statistics alone a factor of 2.5 fits better.
    (Differences of confidences without a factor: Guillory et al., ICCV 2021, arXiv 2107.03315.)

    Args:
        logits: (B, C).
        accuracy: On source images.
        confidence: Mean largest probability on source images.
        spread: See :func:`relative_spread`.

    Returns:
        In [1/C, 1], without axes.
    """
    classes = logits.shape[1]
    lost = confidence - logits.float().softmax(1).amax(1).mean()
    kept = (accuracy - GAIN * lost).clamp(1 / classes, 1)
    return (kept * spread**COLLAPSE).clamp_min(1 / classes)


def relative_spread(batch: Batch) -> float:
    """Entropy of the mean prediction as a share of the source's, at most 1, on average.

    Both are of the batches that the source has predicted too, since domains and small batches
    differ in how many classes they show. Before the first such batch it is 1.
    """
    averages = batch.averages
    own, source = averages["paired_concentration"], averages["source_concentration"]
    if math.isnan(own) or math.isnan(source):
        return 1.0
    return min(own / min(source, -1e-6), 1.0)


class ConfidenceEstimate(Estimator):
    """From confidence, as compared with that on source images; no further pass.

    Without labelled source images it takes accuracy and confidence on them to be ``ASSUMED``, and
    is that much worse.
    """

    name = "confidence"
    ASSUMED = 0.9

    accuracy: Tensor  # 0-dimensional, on source images
    confidence: Tensor  # 0-dimensional, on source images

    def __init__(self) -> None:
        super().__init__()
        for name in ("accuracy", "confidence"):
            self.register_buffer(name, torch.tensor(self.ASSUMED), persistent=False)

    @torch.no_grad()
    def fit(self, source: SourceStatistics, network: Backbone) -> str | None:
        """Measure accuracy and confidence on source images, if there are any."""
        pairs = []
        if source.features is not None and isinstance(network.head.module, nn.Linear):
            assert source.feature_labels is not None
            weight = network.classifier.weight
            pairs = [(network.classifier(source.features.to(weight)), source.feature_labels)]
        elif source.batches is not None:
            device = self.accuracy.device
            for images, labels in source.iter_batches(IMAGES):
                if labels is None:
                    return None
                pairs.append((network(images.to(device)).logits, labels))
        if not pairs:
            return None
        logits = torch.cat([logits.float() for logits, _ in pairs])
        labels = torch.cat([labels for _, labels in pairs]).to(logits.device)
        self.accuracy.copy_((logits.argmax(1) == labels).float().mean())
        self.confidence.copy_(logits.softmax(1).amax(1).mean())
        return f"accuracy and confidence on {len(labels)} images"

    def estimate(self, batch: Batch, prediction: Prediction) -> Tensor:
        """Compare the confidence of the batch with that on source images."""
        logits = prediction.logits.detach()
        own = prediction is batch.prediction
        spread = relative_spread(batch) if own else 1.0
        return confidence_accuracy(logits, self.accuracy, self.confidence, spread)


class AgreementEstimate(ConfidenceEstimate):
    """The source's estimate by confidence, times the agreement with it; NaN where it was not asked.

    It sees any failure that the source does not share, and nothing that is better than the source.
    """

    name = "agreement"

    def estimate(self, batch: Batch, prediction: Prediction) -> Tensor:
        """Ask nobody: the source has predicted this batch, or not."""
        if not batch.has_source:
            return self.accuracy.new_full((), float("nan"))
        logits = batch.source().logits.detach()
        same = prediction.logits.argmax(1) == logits.argmax(1)
        return same.float().mean() * confidence_accuracy(
            logits, self.accuracy, self.confidence, 1.0
        )


class FeatureDropoutEstimate(Estimator):
    """From how often predictions change under dropout on the features; no further pass.

    Args:
        network: The wrapped model, with a linear head.
        context: What is known at wrap.
        passes: Number of masks.
        rate: Share of the features that are dropped.
    """

    name = "feature_dropout"

    def __init__(
        self, network: Backbone, context: Context, passes: int = 10, rate: float = 0.5
    ) -> None:
        super().__init__()
        self.network, self.context = network, context
        self.passes, self.rate = passes, rate

    @torch.no_grad()
    def estimate(self, batch: Batch, prediction: Prediction) -> Tensor:
        """Run the head on the features under several masks."""
        features = prediction.features
        if features is None:
            return prediction.logits.new_full((), float("nan"), dtype=torch.float32)
        shape = torch.Size((self.passes, *features.shape))
        masks = keep_mask(shape, self.rate, batch.draws(self.context))
        changed = self.network.classifier(dropped(features.expand(shape), masks, self.rate))
        _, _, error = dropout_error(prediction.logits.detach(), changed)
        return 1 - error
