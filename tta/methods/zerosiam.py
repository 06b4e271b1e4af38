"""ZeroSiam: entropy of a branch with a predictor, tied to the plain prediction.

Chen et al., ICLR 2026, arXiv 2509.23183.

Minimising entropy has a short cut, one class for everything. Here entropy is minimised on a branch
that passes the features through a square matrix P, the predictor, before the linear layer; the
plain branch gets no gradient and holds the first one near. P can take up what would ruin the
features, and only what both branches agree on reaches these. Returned is the plain branch, before
the step.

    z = W h + b,   z' = W P h + b,   p' = softmax(z'),   p = softmax(z) without gradient
    L = mean_b H(p'_b) + a mean_b sum_k (p'_bk - p_bk)(log p'_bk - log p_bk)

P starts as the identity, where the second term (the sum of both Kullback-Leibler divergences) and
its gradient are 0. The linear layer is not trained, the norm layers are, the last ones included. P
has a learning rate of its own, ``predictor_lr``, with the same optimiser. Rates fall with the batch
size as the authors' do: lr B/64, and for ResNets lr unchanged from 32 images up and lr 2 B/64
below; both are doubled for single images. ``reset`` makes P the identity again, with the momentum
gone.

Presets are the authors' for ImageNet, by network: ``imagenet`` (ResNet-50 with GroupNorm),
``imagenet_vit`` (ViT-B), ``imagenet_vit_small``, ``imagenet_convnext`` and ``imagenet_swin`` (tiny
ones). Their model runs in train mode, here in eval mode with batch statistics. They give no
settings for smaller images. The linear layer gets no gradient even where ``params`` names it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch.nn.functional as F
from torch import Tensor

from tta.core.checks import LARGE, number
from tta.core.prediction import Prediction, Report
from tta.core.registry import register
from tta.methods._predictor import PredictorConfig, PredictorUpdate
from tta.parts.losses import entropy

__all__ = ["Zerosiam", "ZerosiamConfig", "symmetric_divergence"]

Self = TypeVar("Self", bound="ZerosiamConfig")


@dataclass(frozen=True, kw_only=True)
class ZerosiamConfig(PredictorConfig):
    """Fields of ``zerosiam``."""

    lr: float = 2.5e-3  # learning rate of the norm layers
    alignment_weight: float = 1.0  # a of the divergence between the branches

    def __post_init__(self) -> None:
        super().__post_init__()
        number("alignment_weight", self.alignment_weight, 0, LARGE)

    def for_batch_size(self: Self, batch_size: int | None) -> Self:
        """Scale both rates, each by its own rule."""
        scaled = super().for_batch_size(batch_size)
        rates = ((scaled.lr, self.lr_scaling), (scaled.predictor_lr, self.predictor_lr_scaling))
        lr, predictor_lr = (rate * _doubled(rule, batch_size) for rate, rule in rates)
        return scaled.replace(lr=lr, predictor_lr=predictor_lr)


def _doubled(rule: str, batch_size: int | None) -> float:
    """By what the scripts' two rules multiply a rate besides, for single images."""
    return 2.0 if batch_size == 1 and rule in ("linear", "small_batch") else 1.0


def symmetric_divergence(logits: Tensor, target: Tensor) -> Tensor:
    """``KL(q || p) + KL(p || q)`` for p = softmax(logits) and q = softmax(target).

    Args:
        logits: (B, C).
        target: (B, C) logits; gradients flow into them too.

    Returns:
        (B,), at least 0 but for rounding.

    Example:
        >>> import torch
        >>> z, q = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 0.0]])
        >>> round(float(symmetric_divergence(z, q)), 4)  # (0.7311 - 0.5) * 1
        0.2311
    """
    one, other = logits.float().log_softmax(1), target.float().log_softmax(1)
    return ((one.exp() - other.exp()) * (one - other)).sum(1)


def _preset(rule: str, lr: float, predictor_lr: float) -> dict[str, Any]:
    scaling = {"lr_scaling": rule, "predictor_lr_scaling": rule}
    return {"lr": lr, "predictor_lr": predictor_lr} | scaling


@register("zerosiam")
class Zerosiam(PredictorUpdate):
    """Entropy of a branch with a predictor, held near the plain branch."""

    Config = ZerosiamConfig
    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "imagenet": _preset("small_batch", 10 * 2.5e-4, 100 * 2.5e-4),
        "imagenet_vit": _preset("linear", 5 * 1e-3, 5 * 1e-3),
        "imagenet_vit_small": _preset("linear", 10 * 1e-4, 100 * 1e-4),
        "imagenet_convnext": _preset("linear", 10 * 2.5e-5, 100 * 2.5e-5),
        "imagenet_swin": _preset("linear", 10 * 5e-5, 50 * 5e-5),
    }

    def adapt(self, x: Tensor) -> Prediction:
        """Predict, then one step on entropy and alignment of the predictor's branch."""
        prediction = self.network(x)
        branch = self._branch(prediction)
        nats = entropy(branch).mean()
        alignment = symmetric_divergence(branch, prediction.logits.detach()).mean()
        loss = nats + self.config.alignment_weight * alignment
        self.report = Report(selected=len(x), entropy=nats.detach(), alignment=alignment.detach())
        self.report |= {"loss": loss.detach(), "stepped": self.step(loss)}
        return prediction

    def _branch(self, prediction: Prediction) -> Tensor:
        """Logits (B, C) of the features behind the predictor; the linear layer is a constant."""
        assert prediction.features is not None
        head: Any = self.context.classifier
        features = self.predictor(prediction.features.to(self.predictor.weight.dtype))
        bias = None if head.bias is None else head.bias.detach()
        return F.linear(features.to(head.weight.dtype), head.weight.detach().flatten(1), bias)
