"""CAFA: features move to the source distribution of their class, away from those of the others.

Jung, Lee, Kim, Shaban, Boots, Choo: CAFA: Class-Aware Feature Alignment for Test-Time Adaptation,
ICCV 2023, arXiv 2206.00205. No official code was found; there is no trace to compare with.

Before adaptation the mean and covariance of the features of each class are measured on source
images. A test image's features are then pulled to the Gaussian of its pseudo-label and pushed from
those of all other classes, in one ratio of Mahalanobis distances without a weight to tune. The
returned logits are those of the forward pass before the update.

    D(x; c) = (g(x) - mu_c)^T Sigma_c^-1 (g(x) - mu_c),   y_i = argmax_k p_k(x_i)
    L = mean_i log( D(x_i; y_i) / sum_{c != y_i} D(x_i; c) )

The formula is from memory. The abstract confirms that there is neither a hyper-parameter nor
another loss; it does not say where the logarithm stands, nor whether the other classes are summed
or averaged (which adds a constant). Whether there is one Sigma for each class or one for all
(tied), and how it is regularised, is not known. Here it is tied (``covariance="class"`` gives one
for each class) with a ridge of ``shrinkage`` times its mean variance, because the covariance of a
class with fewer images than features is singular. That only BatchNorm's affine parameters are
trained, under batch statistics and with TENT's optimiser, is taken from notes and inferred.
Features are those that the classifier takes, and their moments are measured under batch statistics,
as for RMT, since that is what adaptation sees; this is our choice too. A class without source
images has no Gaussian: images predicted as that class are left out of the loss, and the class is
left out of the sum.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from tta.core.backbone import Backbone
from tta.core.checks import LARGE, number, one_of, shown
from tta.core.component import Context
from tta.core.config import CIFAR_ADAM, UpdateConfig
from tta.core.prediction import Prediction, Report
from tta.core.registry import register
from tta.core.source import SourceStatistics, missing_artefact
from tta.core.update import Update
from tta.parts.class_moments import class_moments, mahalanobis, whitening

__all__ = ["Cafa", "CafaConfig", "alignment"]


@dataclass(frozen=True, kw_only=True)
class CafaConfig(UpdateConfig):
    """Fields of ``cafa``."""

    covariance: str = "tied"  # Sigma: "tied", one within all classes, or "class", one for each
    shrinkage: float = 1e-3  # ridge on Sigma, as a share of its mean variance

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("covariance", self.covariance, ("tied", "class"))
        number("shrinkage", self.shrinkage, 0, LARGE)


def alignment(distances: Tensor, labels: Tensor, known: Tensor) -> Tensor:
    """``log(D(x; y) / sum_{c != y} D(x; c))`` for each row.

    Args:
        distances: (B, C), squared.
        labels: y (B,), of known classes.
        known: (C,) bool, the classes that have a distance.

    Returns:
        (B,).
    """
    intra = distances.gather(1, labels[:, None])[:, 0]
    others = known.repeat(len(labels), 1).scatter(1, labels[:, None], False)
    inter = (distances * others).sum(1)
    tiny = torch.finfo(distances.dtype).tiny
    return intra.clamp_min(tiny).log() - inter.clamp_min(tiny).log()


@register("cafa")
class Cafa(Update):
    """Mahalanobis distance to the features of the pseudo-label, relative to other classes."""

    Config = CafaConfig
    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "imagenet": {"lr": 2.5e-4, "lr_scaling": "linear_below"},
        "cifar10": CIFAR_ADAM,
        "cifar100": CIFAR_ADAM,
    }
    needs_features = True

    prototypes: Tensor  # mu (C, D), NaN for a class without images
    covariance: Tensor  # Sigma (D, D) or (C, D, D), without the ridge
    whitening: Tensor  # like covariance, with the ridge: |W x|^2 = x^T Sigma^-1 x

    def __init__(self, config: CafaConfig, network: Backbone, context: Context) -> None:
        super().__init__(config, network, context)
        classes, size = context.num_classes, context.feature_size
        each = (classes,) if config.covariance == "class" else ()
        self.register_buffer(
            "prototypes",
            torch.full((classes, size), float("nan"), dtype=torch.float32),
            persistent=False,
        )
        for name in ("covariance", "whitening"):
            self.register_buffer(
                name, torch.zeros(*each, size, size, dtype=torch.float32), persistent=False
            )

    def adapt(self, x: Tensor) -> Prediction:
        """Predict, measure distances, step on their log ratio."""
        prediction = self.network(x)
        assert prediction.features is not None
        labels = prediction.logits.detach().argmax(1)
        known = self._known()
        chosen = known[labels]
        count = int(chosen.sum())
        self.report = Report(selected=count, kept=chosen, loss=float("nan"), stepped=False)
        if count == 0:
            return prediction
        with torch.autocast(x.device.type, enabled=False):
            means = self.prototypes.nan_to_num(0.0)  # NaN would spoil all gradients
            distances = mahalanobis(prediction.features[chosen], means, self.whitening)
            loss = alignment(distances, labels[chosen], known).mean()
        self.report |= {"loss": loss.detach(), "stepped": self.step(loss)}
        return prediction

    def fit(self, source: SourceStatistics) -> None:
        """Take mean and covariance of the classes, or measure them on source batches.

        Raises:
            ValueError: When ``source`` has neither, or those of another model.
        """
        given = {"prototypes": source.prototypes, "covariance": source.covariance}
        if all(value is not None for value in given.values()):
            self.source_used = "class moments as given"
        elif source.batches is not None:
            kind = self.config.covariance
            means, spread = class_moments(self.network, source, self.prototypes, kind)
            given = {"prototypes": means, "covariance": spread}
            self.source_used = "class moments from batches"
        else:
            raise missing_artefact(source, self.name, "prototypes and covariance of the classes")
        for name, value in given.items():
            self._take(name, value)
        if not bool(self._known().any()):
            raise ValueError("`source` must give at least one class a prototype, got none.")
        self.whitening.copy_(whitening(self._covariance_of_known(), self.config.shrinkage))

    def source_artefacts(self) -> dict[str, Any]:
        """Class means and covariance."""
        return {"prototypes": self.prototypes, "covariance": self.covariance}

    def _covariance_of_known(self) -> Tensor:
        """The covariances, with the identity where a class has none."""
        if self.covariance.ndim == 2:
            return self.covariance
        identity = torch.eye(self.covariance.shape[-1]).to(self.covariance)
        return torch.where(self._known()[:, None, None], self.covariance, identity)

    def _known(self) -> Tensor:
        """The classes (C,) that have a mean."""
        return ~self.prototypes.isnan().any(1)

    def _take(self, name: str, given: Any) -> None:
        mine = getattr(self, name)
        if given.shape != mine.shape:
            raise ValueError(
                f"`source.{name}` must be of shape {tuple(mine.shape)} for this model and "
                f"covariance={shown(self.config.covariance)}, got {tuple(given.shape)}: make it "
                "with "
                "tta.collect_source(model, loader, for_methods=['cafa'])."
            )
        mine.copy_(given)
