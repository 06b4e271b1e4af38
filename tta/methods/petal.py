"""PETAL: CoTTA with a pull towards the source posterior and restoration by Fisher information.

Brahma, Rai: A Probabilistic Framework for Lifelong Test-Time Adaptation, CVPR 2023,
arXiv 2212.09713.

Adaptation is seen as inference with the posterior of the source weights, a diagonal Gaussian from a
short SGD run on source data (SWAG), as its prior: the student is pulled to the posterior mean, and
most where the variance is small. The teacher, the views and the rule for using them are CoTTA's.
After every step the elements whose squared gradient is among the smallest, which carry the least
information about the batch, go back to their source values; ``restore="random"`` restores as CoTTA
does (the authors' S-Res).

    L = mean_b CE(y -> f_s(x)) + w R,   R = 0.5 sum_i (theta_i - mu_i)^2 / (sigma_i^2 + 1e-6)
    F = (dL/dtheta)^2,   theta_s <- theta_0 where F < quantile_q(F)

The Fisher information, as in the code, is the squared gradient of the batch mean of the whole loss,
prior included; the paper, as recalled, squares that of a log-likelihood. It is taken on one batch
only, with one threshold for all tensors. Where more than a share q of all elements has no gradient
at all, the threshold is 0 and nothing is restored. ImageNet's symmetric loss is in the code only.
The authors start from mu; ``wrap`` does not move the model there, and restores to the weights it
found: load ``posterior_mean`` before wrapping to do as they do. Where no mean is given, mu is those
weights.

Differences: a variance that rounding left below 0 is taken as 0 (``official=True``: as it is). The
prior covers the trained parameters only. A posterior made at wrap follows the recipe for CIFAR
(five epochs at batch 200); the ImageNet script, as released, takes no step at all, and so has no
recipe to follow. The weight w and q are the authors' constants; nothing derives them.
The authors do not scale the rate; below the batch size of the preset it falls with
``wrap(batch_size=)`` here (``lr_scaling="none"`` is theirs).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from tta.core.backbone import Backbone
from tta.core.checks import LARGE, fraction, number, one_of, shown, whole_number
from tta.core.component import Context
from tta.core.foreach import foreach
from tta.core.prediction import Prediction
from tta.core.registry import register
from tta.core.source import SourceStatistics, missing_artefact
from tta.methods._mean_teacher import ConsistencyConfig, ConsistencyUpdate, presets
from tta.parts.posterior import diagonal_swag, prior
from tta.parts.teachers import NamedTensors, low_values, restore

__all__ = ["Petal", "PetalConfig"]


@dataclass(frozen=True, kw_only=True)
class PetalConfig(ConsistencyConfig):
    """Fields of ``petal``."""

    prior_weight: float = 1e-11  # w of the prior term
    damping: float = 1e-6  # added to the variance
    restore: str = "fisher"  # "fisher": the least informative elements; "random": as CoTTA
    restore_quantile: float = 0.003  # q, share of elements restored; "fisher" only
    posterior_epochs: int = 5  # of SGD on source batches, where no posterior is given

    def __post_init__(self) -> None:
        super().__post_init__()
        number("prior_weight", self.prior_weight, 0, LARGE)
        number("damping", self.damping, 0, LARGE, above=True)
        one_of("restore", self.restore, ("fisher", "random"))
        fraction("restore_quantile", self.restore_quantile)
        whole_number("posterior_epochs", self.posterior_epochs, 2, 10**6)


@register("petal")
class Petal(ConsistencyUpdate):
    """CoTTA with a source posterior as prior and restoration by Fisher information."""

    Config = PetalConfig
    PRESETS: ClassVar[dict[str, dict[str, Any]]] = presets(prior_weight=1e-9, restore_quantile=0.03)

    def __init__(self, config: PetalConfig, network: Backbone, context: Context) -> None:
        super().__init__(config, network, context)
        values = {n: p.detach() for n, p in context.parameters.items()}
        self.posterior_mean = NamedTensors(values, constant=True)
        self.posterior_variance = NamedTensors(values, constant=True)

    def adapt(self, x: Tensor) -> Prediction:
        """Learn from teacher and prior, move the teacher, restore uninformative elements."""
        config = self.config
        target, loss = self.compare(x)
        parameters = list(self.parameters_adapted.values())
        by_fisher = config.restore == "fisher" and self.context.restore_mask is None
        value, pull = prior(
            parameters,
            self.posterior_mean.tensors(),
            self.posterior_variance.tensors(),
            config.damping,
        )
        masks: list[Tensor] = []
        given = self.given_masks()

        def see(gradients: list[Tensor]) -> None:
            foreach._foreach_add_(gradients, pull, alpha=config.prior_weight)
            if by_fisher:
                fisher = torch.cat([g.flatten() for g in gradients]).float().square_()
                mask, threshold = low_values(fisher, config.restore_quantile)
                masks.extend(mask.split([g.numel() for g in gradients]))
                restored = torch.count_nonzero(mask)
                self.report |= {"fisher_threshold": threshold, "restored": restored}

        stepped = self.step(loss, see=see)
        if stepped:
            self.teacher.follow(config.teacher_momentum)
            if by_fisher:
                restore(parameters, self.anchor.tensors(), masks)
            else:
                self.restore_at_random(given)
        self.report |= {
            "loss": loss.detach() + config.prior_weight * value,
            "consistency": loss.detach(),
            "prior": value,
            "stepped": stepped,
        }
        return target

    def fit(self, source: SourceStatistics) -> None:
        """Take the posterior, or make it from labelled source batches.

        Raises:
            ValueError: When ``source`` has neither, or a posterior of other parameters.
        """
        mean, variance = source.posterior_mean, source.posterior_variance
        if variance is None and source.batches is not None:
            mean, variance = diagonal_swag(
                self.network, self.parameters_adapted, source.batches, self.config.posterior_epochs
            )
        if variance is None:
            raise missing_artefact(
                source,
                self.name,
                "the posterior of the source weights",
                "posterior_variance, source batches",
            )
        self.source_used = "posterior" if source.batches is None else "posterior from batches"
        self._take("posterior_variance", variance)
        if not self.config.official:
            foreach._foreach_clamp_min_(self.posterior_variance.tensors(), 0.0)
        if mean is not None:
            self._take("posterior_mean", mean)

    def source_artefacts(self) -> dict[str, Any]:
        """Mean and variance of the posterior by parameter name."""
        kinds = ("posterior_mean", "posterior_variance")
        return {kind: getattr(self, kind).named() for kind in kinds}

    def _take(self, kind: str, given: dict[str, Tensor]) -> None:
        for name, value in getattr(self, kind).named().items():
            if name not in given or given[name].shape != value.shape:
                got = tuple(given[name].shape) if name in given else "nothing"
                raise ValueError(
                    f"`source.{kind}` must hold {shown(name)} of shape {tuple(value.shape)}, got "
                    f"{got}: "
                    "make it for this model with "
                    "tta.collect_source(model, loader, for_methods=['petal'])."
                )
            value.copy_(given[name])
