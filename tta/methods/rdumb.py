"""RDumb: ETA, reset to the source model after every N batches.

Press, Schneider, Kuemmerer, Bethge: RDumb: A simple approach that questions our progress in
continual test-time adaptation, NeurIPS 2023, arXiv 2306.05401.

On streams of millions of images most adaptation methods end up worse than the model they started
from. Forgetting everything at fixed intervals bounds how far anything can drift, and ETA restarted
every 1,000 batches beats methods made for long streams. The price is a new transient after every
reset and, on a stream that did not change, the loss of what was learned.

    ETA's step on S(b) = [H_b < E0] [|cos(q, p_b)| < d];   theta <- theta_0 before batch N, 2N, ...

Before batch t with t mod ``reset_every`` = 0, parameters, optimiser and q go back to the start.
Every batch counts, even one from which nothing was selected. The official code does so at t = 0 as
well, where it changes nothing and is not counted in ``resets`` here. Everything else is ETA's: see
``eta``.

Differences: the official code trains BatchNorm2d only, this code all norm layers; its margins are
those for 1,000 classes, here they are a share of ln C. The CIFAR presets are those of the
mariodoebler repository (Adam, batches of 200); a whole continual CIFAR-C run there has 750 batches,
so with N = 1,000 it never resets and is ETA: set ``reset_every`` for your stream.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from tta.core.backbone import Backbone
from tta.core.checks import LARGEST, whole_number
from tta.core.component import Context
from tta.core.config import CIFAR_ADAM
from tta.core.prediction import Prediction
from tta.core.registry import register
from tta.methods._selective import SelectiveConfig, SelectiveUpdate

__all__ = ["Rdumb", "RdumbConfig"]


@dataclass(frozen=True, kw_only=True)
class RdumbConfig(SelectiveConfig):
    """Fields of ``rdumb``."""

    reset_every: int = 1000  # N, batches between resets

    def __post_init__(self) -> None:
        super().__post_init__()
        whole_number("reset_every", self.reset_every, 1, LARGEST)


_CIFAR = CIFAR_ADAM | {"redundancy_margin": 0.4}


@register("rdumb")
class Rdumb(SelectiveUpdate):
    """ETA with a full reset every N batches."""

    Config = RdumbConfig
    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "imagenet": {"lr": 2.5e-4, "lr_scaling": "small_batch"},
        "cifar10": _CIFAR,
        "cifar100": _CIFAR,
    }

    batches: Tensor  # 0-dimensional, t: batches learned from

    def __init__(self, config: RdumbConfig, network: Backbone, context: Context) -> None:
        super().__init__(config, network, context)
        self.register_buffer("batches", torch.zeros((), dtype=torch.int64))

    def learn(self, x: Tensor) -> Prediction:
        """Reset if it is time, then ETA's cycles on the batch."""
        count = int(self.batches)
        due = count > 0 and count % self.config.reset_every == 0
        if due:
            self.recover()
            self.ema_probs.fill_(float("nan"))
        prediction = super().learn(x)
        self.batches += 1  # afterwards: a batch that the model refuses does not count
        self.resets += due
        return prediction
