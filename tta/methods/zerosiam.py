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
from torch import Tensor, nn

from tta.core.backbone import Backbone
from tta.core.checks import LARGE, number, one_of
from tta.core.component import Context
from tta.core.config import LR_SCALINGS, UpdateConfig, lr_share
from tta.core.prediction import Prediction, Report
from tta.core.registry import register
from tta.core.update import Update
from tta.parts.losses import entropy

__all__ = ["Zerosiam", "ZerosiamConfig", "symmetric_divergence"]

Self = TypeVar("Self", bound="ZerosiamConfig")


@dataclass(frozen=True, kw_only=True)
class ZerosiamConfig(UpdateConfig):
    """Fields of ``zerosiam``."""

    lr: float = 2.5e-3  # learning rate of the norm layers
    predictor_lr: float = 0.025  # learning rate of P
    predictor_lr_scaling: str = "none"  # of predictor_lr by batch_size, as lr_scaling
    alignment_weight: float = 1.0  # a of the divergence between the branches

    def __post_init__(self) -> None:
        super().__post_init__()
        number("predictor_lr", self.predictor_lr, 0, LARGE)
        one_of("predictor_lr_scaling", self.predictor_lr_scaling, LR_SCALINGS)
        number("alignment_weight", self.alignment_weight, 0, LARGE)

    def override(self: Self, **changes: Any) -> Self:
        """Replace fields; a rate that the caller names is never scaled."""
        named = {"predictor_lr_scaling": "none"} if "predictor_lr" in changes else {}
        return super().override(**named | changes)

    def for_batch_size(self: Self, batch_size: int | None) -> Self:
        """Scale both rates, each by its own rule."""
        rule = self.predictor_lr_scaling
        share = 1.0 if batch_size is None else lr_share(rule, batch_size, self.lr_batch_size)
        share *= _doubled(rule, batch_size)
        scaled = super().for_batch_size(batch_size)
        return scaled.replace(
            lr=scaled.lr * _doubled(self.lr_scaling, batch_size),
            predictor_lr=self.predictor_lr * share,
            predictor_lr_scaling="none",
        )


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
class Zerosiam(Update):
    """Entropy of a branch with a predictor, held near the plain branch."""

    Config = ZerosiamConfig
    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "imagenet": _preset("small_batch", 10 * 2.5e-4, 100 * 2.5e-4),
        "imagenet_vit": _preset("linear", 5 * 1e-3, 5 * 1e-3),
        "imagenet_vit_small": _preset("linear", 10 * 1e-4, 100 * 1e-4),
        "imagenet_convnext": _preset("linear", 10 * 2.5e-5, 100 * 2.5e-5),
        "imagenet_swin": _preset("linear", 10 * 5e-5, 50 * 5e-5),
    }
    needs_features: ClassVar[bool] = True
    needs_linear_head: ClassVar[bool] = True

    def __init__(self, config: ZerosiamConfig, network: Backbone, context: Context) -> None:
        super().__init__(config, network, context)
        size = context.feature_size
        device = next(iter(context.parameters.values())).device
        # Not by nn.Linear's own start, which would advance the global generator.
        self.predictor: Any = nn.utils.skip_init(nn.Linear, size, size, bias=False, device=device)
        nn.init.eye_(self.predictor.weight)
        self.optimizer = self._make_optimizer()  # again, now with the predictor

    def learning_rates(self) -> dict[str, float]:
        """That of the predictor."""
        return {"update.predictor.weight": self.config.predictor_lr}

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
