"""What ROID and CMF share: the weights of samples, the two losses, and a pull on the weights after.

How the weights are drawn back is in a method's own file.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from tta.core.backbone import Backbone
from tta.core.checks import LARGE, fraction, number
from tta.core.component import Context
from tta.core.config import UpdateConfig
from tta.core.norm_layers import frozen_statistics, part_of_batch
from tta.core.prediction import Prediction, Report
from tta.core.random import fork
from tta.core.update import Update
from tta.parts.augment import Augmenter
from tta.parts.losses import entropy, soft_likelihood_ratio, symmetric_cross_entropy
from tta.parts.selection import move_average
from tta.parts.teachers import NamedTensors

__all__ = ["CertainDiverseConfig", "CertainDiverseUpdate", "sample_weights"]


@dataclass(frozen=True, kw_only=True)
class CertainDiverseConfig(UpdateConfig):
    """Fields of the weights and the losses."""

    nesterov: bool = True  # SGD only
    temperature: float = 1 / 3  # T of the weights
    probs_momentum: float = 0.9  # share of the old q that stays
    consistency: bool = True  # the second loss; without it no mean= and std= are needed

    def __post_init__(self) -> None:
        super().__post_init__()
        number("temperature", self.temperature, 0, LARGE, above=True)
        fraction("probs_momentum", self.probs_momentum)


def sample_weights(logits: Tensor, average: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Weigh the samples of a batch by certainty and diversity.

    Args:
        logits: (B, C).
        average: q (C,).
        temperature: T.

    Returns:
        Weights (B,) in [1, exp(1 / T)], and which samples (B,) are kept.

    Example:
        >>> weights, kept = sample_weights(torch.zeros(1, 4), torch.full((4,), 0.25), 1 / 3)
        >>> weights, kept
        (tensor([1.]), tensor([True]))
    """
    diversity = _scaled(1 - F.cosine_similarity(average[None], logits.float().softmax(1), dim=1))
    certainty = _scaled(-entropy(logits))
    return torch.exp(diversity * certainty / temperature), diversity >= diversity.mean()


def _scaled(values: Tensor) -> Tensor:
    """Scale values linearly to [0, 1]; all are 0 where all are equal."""
    low, high = values.aminmax()
    return (values - low) / (high - low) if bool(high > low) else torch.zeros_like(values)


class CertainDiverseUpdate(Update):
    """A soft likelihood ratio and a consistency loss on certain and diverse samples.

    A subclass defines :meth:`draw_back`.

    Args:
        config: The component's config.
        network: The wrapped model.
        context: What is known at wrap.
    """

    default_output: ClassVar[str | None] = "prior_correction"
    injects: ClassVar[tuple[str, ...]] = ("augment",)
    learns_from_whole_batch: ClassVar[bool] = False

    ema_probs: Tensor  # q (C,)

    def __init__(self, config: CertainDiverseConfig, network: Backbone, context: Context) -> None:
        super().__init__(config, network, context)
        classes = context.num_classes
        self.register_buffer("ema_probs", torch.full((classes,), 1 / classes, dtype=torch.float32))
        self.anchor = NamedTensors(
            {n: p.detach() for n, p in context.parameters.items()}, constant=True
        )
        self.augmenter: Augmenter | None = None
        if config.consistency:
            self.augmenter = Augmenter(network.model, context, padding="reflect", soften=False)

    def draw_back(self) -> None:
        """Move the weights after a step."""
        raise NotImplementedError  # pragma: no cover

    def adapt(self, x: Tensor) -> Prediction:
        """Predict, weigh, step on both losses, draw the weights back."""
        config = self.config
        if self.augmenter is not None:
            self.augmenter.check(x)
        selection = self.selection_pass(x)
        logits = selection.logits
        weights, kept = sample_weights(logits, self.ema_probs, config.temperature)
        selection.keep(kept)
        chosen = selection.kept_logits()
        losses = soft_likelihood_ratio(chosen)
        self.report = Report(selected=len(chosen), kept=kept, likelihood_ratio=_mean(losses))
        if self.augmenter is not None:
            agreement = symmetric_cross_entropy(self._logits_of_view(x, kept), chosen)
            losses = losses + agreement
            self.report["consistency"] = _mean(agreement)
        loss = (weights[kept] * losses).sum() / (self.context.batch_size or len(x))
        move_average(self.ema_probs, logits.float().softmax(1).mean(0), config.probs_momentum)
        stepped = self.step(loss)
        if stepped:
            self.draw_back()
        self.report |= {"loss": loss.detach(), "stepped": stepped}
        return selection.prediction

    def _logits_of_view(self, x: Tensor, kept: Tensor) -> Tensor:
        """Logits (N, C) of one augmented view of the kept rows, in a pass of its own."""
        assert self.augmenter is not None
        images, wrappers = x[kept], self.network.wrappers
        (view,) = self.augmenter.views(images, 1, fork(self.context.generator, images.device))
        with frozen_statistics(wrappers), part_of_batch(wrappers, len(images) / len(x)):
            return self.network(view).logits


def _mean(losses: Tensor) -> Tensor:
    return losses.detach().mean()
