"""PeTTA: RoTTA that holds on to the source as its features drift away from it.

Hoang, Vo, Do: Persistent Test-time Adaptation in Recurring Testing Scenarios, NeurIPS 2024,
arXiv 2311.18193.

Teacher, memory and statistics are those of RoTTA (see ``rotta``). Means of the teacher's features
by predicted class are followed over the stream; how far they are from the source's is the
divergence. The farther, the more the student's weights are kept near the source's and the slower
the teacher follows. The source model, with statistics that move as the others' do, also teaches the
student. There is an update after every batch.

    g = mean_{c in U, d} (pi_cd - mu_cd)^2 / (s_cd + 1e-6),   gamma = 1 - exp(-g)
    L = cls + gamma lambda_0 R(theta) + w mean_i CE(f_0(x_i) -> f_s(A(x_i)))
    cls = mean_i (SCE(f_s(x_i), f_t(x_i)) + SCE(f_s(A(x_i)), f_t(x_i))) / 2
    theta_t <- (1 - a) theta_t + a theta,   a = (1 - gamma) alpha_0

U are the classes that are predicted in the batch, mu and s the source's means and variances of
features, and i goes over the memory. R is the mean over the trained tensors of -cos(theta, theta_0)
or, with ``regulariser="l2"``, of |theta - theta_0|^2. With ``consistency_loss="ce"`` cls is
mean_i CE(f_t(x_i) -> f_s(A(x_i))). gamma is taken before pi moves, pi_c <- 0.95 pi_c + 0.05 times
the mean of the batch's features of class c, and pi starts at mu, so that gamma is 0 in the first
batch. In an update the teacher, the student on the memory, the source and the student on one view
of it run in this order, and statistics move with each.

mu and s are measured on source images by predicted label under running statistics. A class that is
predicted for fewer than two images has the mean and variance of all images (ours; the authors' code
gives NaN). A row of NaN in ``SourceStatistics.class_mean`` or ``class_variance`` is replaced by the
mean of the other rows.

Images are kept as ``rotta`` keeps them. Differences: entropies are exact, where the
authors add 1e-6 inside the logarithm. They have no reset. They do not scale the learning rate;
below the batch size of the preset it falls with ``wrap(batch_size=)`` here (``lr_scaling="none"``
is theirs). All norm layers are trained, not BatchNorm alone. Equation numbers are not given: this
follows the authors' code.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from tta.core.backbone import Backbone
from tta.core.checks import LARGE, fraction, number, one_of
from tta.core.component import Context
from tta.core.prediction import Prediction, Report
from tta.core.random import fork
from tta.core.registry import register
from tta.core.source import SourceStatistics, missing_artefact
from tta.methods._image_memory import BalancedMemoryConfig, BalancedMemoryUpdate
from tta.parts.class_moments import predicted_moments
from tta.parts.losses import soft_cross_entropy, symmetric_cross_entropy
from tta.parts.teachers import OtherWeights

__all__ = ["Petta", "PettaConfig", "distance_from"]

VARIANCE_FLOOR = 1e-6


@dataclass(frozen=True, kw_only=True)
class PettaConfig(BalancedMemoryConfig):
    """Fields of ``petta``."""

    regulariser: str = "cosine"  # R, of weights and source weights: "cosine" or "l2"
    regulariser_weight: float = 10.0  # lambda_0, times the divergence
    teacher_rate: float = 1e-3  # alpha_0, share of the student at a divergence of 0
    anchor_weight: float = 1.0  # w of the source model's cross-entropy
    consistency_loss: str = "sce"  # "sce" on images and view, or "ce" on the view
    prototype_rate: float = 0.05  # share of a batch in the class means

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("regulariser", self.regulariser, ("cosine", "l2"))
        one_of("consistency_loss", self.consistency_loss, ("sce", "ce"))
        number("regulariser_weight", self.regulariser_weight, 0, LARGE)
        number("anchor_weight", self.anchor_weight, 0, LARGE)
        fraction("teacher_rate", self.teacher_rate)
        fraction("prototype_rate", self.prototype_rate)


def distance_from(weights: Sequence[Tensor], source: Sequence[Tensor], kind: str) -> Tensor:
    """How far tensors are from others, averaged over the tensors.

    Args:
        weights: Any shapes.
        source: Like ``weights``.
        kind: "cosine" for the negative cosine, "l2" for the squared distance.

    Returns:
        Without axes, with a graph.

    Example:
        >>> float(distance_from([torch.tensor([1.0, 0.0])], [torch.tensor([0.0, 2.0])], "l2"))
        5.0
    """
    pairs = [
        (w.flatten().float(), s.flatten().float()) for w, s in zip(weights, source, strict=True)
    ]
    if kind == "cosine":
        terms = [-F.cosine_similarity(w, s, dim=0) for w, s in pairs]
    else:
        terms = [(w - s).square().sum() for w, s in pairs]
    return torch.stack(terms).mean()


@register("petta")
class Petta(BalancedMemoryUpdate):
    """RoTTA's memory and teacher, with a pull to the source that grows with the divergence."""

    Config = PettaConfig
    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "imagenet": {"lr_scaling": "linear_below", "consistency_loss": "ce"},
        "cifar10": {"lr_scaling": "linear_below"},
        "cifar100": {"lr_scaling": "linear_below"},
        "domainnet126": {
            "lr_scaling": "linear_below",
            "consistency_loss": "ce",
            "regulariser_weight": 1.0,
        },
    }
    needs_features: ClassVar[bool] = True
    uses_labels: ClassVar[bool] = False
    cost: ClassVar[float] = 6.0

    prototypes: Tensor  # pi (C, D)
    class_mean: Tensor  # mu (C, D)
    class_variance: Tensor  # s (C, D)

    def __init__(self, config: PettaConfig, network: Backbone, context: Context) -> None:
        super().__init__(config, network, context)
        self.anchor = OtherWeights(network, context.parameters, constant=True, own_statistics=True)
        zeros = torch.zeros(context.num_classes, context.feature_size, dtype=torch.float32)
        self.register_buffer("prototypes", zeros)
        self.register_buffer("class_mean", zeros.clone(), persistent=False)
        self.register_buffer("class_variance", zeros.clone(), persistent=False)

    def fit(self, source: SourceStatistics) -> None:
        """Take mean and variance of each class, or measure them on source batches.

        Raises:
            ValueError: When ``source`` has neither, or those of another model.
        """
        if source.class_mean is not None and source.class_variance is not None:
            mean, variance = source.class_mean, source.class_variance
            for name in ("class_mean", "class_variance"):
                value, mine = getattr(source, name), getattr(self, name)
                if value.shape != mine.shape or bool(value.isnan().all()):
                    got = (
                        "no class with images" if value.shape == mine.shape else tuple(value.shape)
                    )
                    raise ValueError(
                        f"`source.{name}` must be of shape {tuple(mine.shape)}, as this model's "
                        f"classes and features, got {got}: make it with "
                        "tta.collect_source(model, loader, for_methods=['petta'])."
                    )
            self.source_used = "class means and variances as given"
        elif source.batches is not None:
            mean, variance = predicted_moments(self.network, source, self.prototypes)
            self.source_used = "class means and variances from source images"
        else:
            raise missing_artefact(
                source, self.name, "the means and variances of features by class"
            )
        self.class_variance.copy_(_filled(variance, variance.nanmean(0)))
        self.class_mean.copy_(_filled(mean, mean.nanmean(0)))
        self.prototypes.copy_(self.class_mean)

    def source_artefacts(self) -> dict[str, Any]:
        """Means and variances of features by class."""
        return {"class_mean": self.class_mean, "class_variance": self.class_variance}

    def adapt(self, x: Tensor) -> Prediction:
        """Predict with the teacher, remember the batch, and take one step on the memory."""
        self.augmenter.check(x)
        prediction = self.teacher.predict(x)
        self.remember(x, prediction)
        divergence = self._divergence(prediction)
        self._learn_from_memory(x.dtype, divergence)
        self.report["remembered"] = (self.bank.labels >= 0).sum()
        return prediction

    @torch.no_grad()
    def _divergence(self, prediction: Prediction) -> float:
        """Gamma of the classes that were predicted, whose means then move."""
        assert prediction.features is not None
        labels, features = prediction.logits.argmax(1), prediction.features.float()
        seen, place = labels.unique(return_inverse=True)
        offset = (self.prototypes - self.class_mean)[seen].square()
        squares = offset / (self.class_variance[seen] + VARIANCE_FLOOR)
        means = torch.zeros_like(offset).index_add_(0, place, features)
        means /= place.bincount()[:, None]
        moved = self.prototypes[seen].lerp(means, self.config.prototype_rate)
        self.prototypes[seen] = moved
        return float(1 - torch.exp(-squares.mean()))

    def _learn_from_memory(self, dtype: torch.dtype, divergence: float) -> None:
        config = self.config
        images = self.remembered(dtype)
        (view,) = self.augmenter.views(images, 1, fork(self.context.generator, images.device))
        target = self.teacher.learn_statistics(images).logits.detach()
        logits = self.network(images).logits
        source = self.anchor.learn_statistics(images).logits.detach()
        of_view = self.network(view).logits
        if config.consistency_loss == "sce":
            losses = symmetric_cross_entropy(logits, target)
            consistency = (losses + symmetric_cross_entropy(of_view, target)).mean() / 2
        else:
            consistency = soft_cross_entropy(of_view, target).mean()
        anchor = soft_cross_entropy(of_view, source).mean()
        weights = list(self.parameters_adapted.values())
        regulariser = distance_from(
            weights, self.anchor.tensors()[: len(weights)], config.regulariser
        )
        loss = consistency + divergence * config.regulariser_weight * regulariser
        loss = loss + config.anchor_weight * anchor
        stepped = self.step(loss)
        rate = (1 - divergence) * config.teacher_rate
        if stepped:
            self.teacher.follow(1 - rate)
        self.report = Report(
            selected=len(images),
            loss=loss.detach(),
            stepped=stepped,
            divergence=divergence,
            teacher_rate=rate,
            regulariser=regulariser.detach(),
            consistency=consistency.detach(),
            anchor=anchor.detach(),
        )


def _filled(values: Tensor, others: Tensor) -> Tensor:
    """(C, D) with (D,) in place of rows that have NaN."""
    return torch.where(values.isnan().any(1, keepdim=True), others.nan_to_num(0.0), values)
