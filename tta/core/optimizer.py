"""Optimisers whose moments exist from the start, so that an adapter's state has fixed keys."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

__all__ = ["make_optimizer"]

ADAM_EPS = 1e-8


def make_optimizer(
    config: Any, parameters: list[torch.nn.Parameter], rates: Iterable[float] | None = None
) -> torch.optim.Optimizer:
    """Make SGD, Adam or AdamW, with moments of zeros.

    A momentum buffer of zeros gives the same first step as the one that torch makes later, because
    dampening is 0.

    Args:
        config: An ``UpdateConfig``.
        parameters: The parameters to train.
        rates: Their learning rates; None for that of the config.
    """
    groups: dict[float, list[torch.nn.Parameter]] = {}
    own = [config.lr] * len(parameters) if rates is None else rates
    for p, rate in zip(parameters, own, strict=True):
        groups.setdefault(rate, []).append(p)
    given = [{"params": some, "lr": rate} for rate, some in groups.items()]
    if config.optimizer == "sgd":
        optimizer: torch.optim.Optimizer = torch.optim.SGD(
            given,
            lr=config.lr,
            momentum=config.momentum,
            nesterov=config.nesterov,
            weight_decay=config.weight_decay,
            foreach=True,
        )
        if config.momentum > 0:
            for p in parameters:
                optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
        return optimizer
    kind = torch.optim.AdamW if config.optimizer == "adamw" else torch.optim.Adam
    optimizer = kind(
        given,
        lr=config.lr,
        betas=config.betas,
        eps=ADAM_EPS,
        weight_decay=config.weight_decay,
        foreach=True,
    )
    for p in parameters:
        optimizer.state[p].update(
            step=torch.zeros((), dtype=torch.float32),
            exp_avg=torch.zeros_like(p),
            exp_avg_sq=torch.zeros_like(p),
        )
    return optimizer
