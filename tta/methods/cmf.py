"""CMF: ROID drawn back to a hidden model, which follows the adapted one and leaks to the source.

Lee, Chang: Continual Momentum Filtering on Parameter Space for Online Test-time Adaptation,
ICLR 2024; built on ROID, arXiv 2306.00650.

Samples, losses and the correction of what is returned are those of ROID (see ``roid``). ROID draws
the weights back to the source's after every step. Here they are drawn to a hidden model, which is
the estimate of a Kalman filter that takes the adapted weights for noisy observations. The hidden
model follows them by a gain that depends on the noise, and leaks to the source before every
observation.

    h <- a h + (1 - a) theta_0,   v <- a^2 v + q
    g = (1 - q) / (v + 1 - q), at least 0.89, and 1 from 0.9999 on;   v <- g v
    h <- g h + (1 - g) theta,   theta <- c theta + (1 - c) h

h starts at the source's weights and v at 0. Only trained parameters differ from the source, so h
holds these alone. h and v move after every step that moves the weights, and at no other time.

q is the process noise itself. The authors give Q and take q = Q n / 38,400 with n the number of
trained values, 38,400 being those of a ViT-B's norm layers; the presets hold q for the networks of
their scripts, Q = 0.005 on a ViT-B and Q = 0.00025 on a ResNet-50 (n = 53,120). On a network of a
few thousand such values that rule rounds g to 1, and h stays at the source.

With ``official=True``, ``reset`` leaves v and the average of predictions as they are, as the
authors' code does; the default puts both back. Their code computes in float16, this one in the
model's own precision. The CIFAR presets are ours: ROID's optimiser there with q = 0.005. The
authors' switch between the predicted and the updated hidden model is left out, since both are one
object in their code. Equation numbers are not given: this follows the authors' code.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from tta.core.backbone import Backbone
from tta.core.checks import fraction
from tta.core.component import Context
from tta.core.config import CIFAR_ADAM
from tta.core.prediction import Prediction
from tta.core.registry import register
from tta.methods._certain_diverse import CertainDiverseConfig, CertainDiverseUpdate
from tta.parts.teachers import NamedTensors, ensemble

__all__ = ["Cmf", "CmfConfig", "gain"]

SMALLEST_GAIN, ROUNDED_TO_ONE = 0.89, 0.9999


@dataclass(frozen=True, kw_only=True)
class CmfConfig(CertainDiverseConfig):
    """Fields of ``cmf``."""

    hidden_momentum: float = 0.99  # alpha, share of h that stays when it leaks to the source
    ensemble_momentum: float = 0.99  # gamma, share of the weights that stays
    process_noise: float = 0.005  # q itself, in [0, 1]

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("hidden_momentum", "ensemble_momentum", "process_noise"):
            fraction(name, getattr(self, name))


def gain(variance: Tensor, process_noise: float) -> Tensor:
    """The share g of the hidden model that an observation leaves.

    Args:
        variance: v of the predicted hidden model, without axes.
        process_noise: q.

    Example:
        >>> round(float(gain(torch.tensor(0.1), 0.02)), 4)
        0.9074
        >>> float(gain(torch.tensor(1.0), 0.5)), float(gain(torch.tensor(1e-5), 0.0))
        (0.8899999856948853, 1.0)
    """
    share = (1 - process_noise) / (variance + 1 - process_noise)
    share = share.clamp_min(SMALLEST_GAIN)
    return torch.where(share >= ROUNDED_TO_ONE, 1.0, share)


@register("cmf")
class Cmf(CertainDiverseUpdate):
    """ROID's samples and losses, with weights kept near a filtered hidden model."""

    Config = CmfConfig
    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "imagenet": {
            "lr": 2e-4,
            "lr_scaling": "linear_below",
            "process_noise": 0.00025 * 53_120 / 38_400,
        },
        "imagenet_vit": {"lr": 2.5e-4, "lr_scaling": "linear_below", "process_noise": 0.005},
        "cifar10": CIFAR_ADAM | {"nesterov": False},
        "cifar100": CIFAR_ADAM | {"nesterov": False},
    }

    hidden_variance: Tensor  # v, without axes

    def __init__(self, config: CmfConfig, network: Backbone, context: Context) -> None:
        super().__init__(config, network, context)
        self.hidden = NamedTensors(self.anchor.named(), constant=False)
        device = self.ema_probs.device
        self.register_buffer("hidden_variance", torch.zeros((), device=device))

    def adapt(self, x: Tensor) -> Prediction:
        """As ROID; ``report.gain`` is NaN where no weight moved."""
        prediction = super().adapt(x)
        self.report.setdefault("gain", math.nan)
        return prediction

    def draw_back(self) -> None:
        """Predict and update the hidden model, and pull the weights towards it."""
        config, hidden = self.config, self.hidden.tensors()
        ensemble(hidden, self.anchor.tensors(), 1 - config.hidden_momentum)
        variance = config.hidden_momentum**2 * self.hidden_variance + config.process_noise
        share = gain(variance, config.process_noise)
        self.hidden_variance.copy_(share * variance)
        weights = [p.detach() for p in self.parameters_adapted.values()]
        ensemble(hidden, weights, float(1 - share))
        ensemble(weights, hidden, 1 - config.ensemble_momentum)
        self.report["gain"] = share

    def survives_reset(self) -> tuple[str, ...]:
        """Return v and q under ``official=True``, whose reset leaves them in place."""
        return ("hidden_variance", "ema_probs") if self.config.official else ()
