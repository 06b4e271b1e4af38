"""Optimisers whose moments exist from the start, so that an adapter's state has fixed keys."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from tta.core.foreach import foreach

__all__ = ["UnseenSteps", "make_optimizer"]

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


class UnseenSteps:
    """Steps of an optimiser where no value can be looked at, as on a GPU while it is captured.

    Torch's Adam reads its step counts, which are on the CPU; a count on the device stands in.

    Args:
        taken: Steps so far, 0-dimensional float64; counted on.
    """

    def __init__(self, taken: Tensor) -> None:
        self.taken = taken
        # Torch's own counts, on the CPU, which the caller has to raise: once for each time in here.
        self.counts: list[Tensor] = []
        self.moved: list[Tensor] = []  # whether each step has moved anything, 0-dimensional bool

    @torch.no_grad()
    def step(self, optimizer: torch.optim.Optimizer, moved: Tensor) -> None:
        """Take a step, by the gradients that the parameters hold.

        Args:
            optimizer: As :func:`make_optimizer` makes it.
            moved: Whether the step is to be taken; where not, all that follows is to be taken back.
        """
        self.moved.append(moved)
        if isinstance(optimizer, torch.optim.SGD):
            optimizer.step()
            return
        self.taken += 1
        for group in optimizer.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                self._adam(optimizer, group, params, isinstance(optimizer, torch.optim.AdamW))

    def _adam(self, optimizer: Any, group: Any, params: list[Tensor], decoupled: bool) -> None:
        """Adam (Kingma and Ba, 2015, algorithm 1), or AdamW (Loshchilov and Hutter, 2019)."""
        (one, two), lr, decay = group["betas"], group["lr"], group["weight_decay"]
        slots, gradients = [optimizer.state[p] for p in params], [p.grad for p in params]
        means, squares = ([slot[key] for slot in slots] for key in ("exp_avg", "exp_avg_sq"))
        self.counts += [slot["step"] for slot in slots]
        if decay and decoupled:
            foreach._foreach_mul_(params, 1 - lr * decay)
        elif decay:
            gradients = foreach._foreach_add(gradients, params, alpha=decay)
        foreach._foreach_lerp_(means, gradients, 1 - one)
        foreach._foreach_mul_(squares, two)
        foreach._foreach_addcmul_(squares, gradients, gradients, 1 - two)
        size, spread = lr / (1 - one**self.taken), (1 - two**self.taken).sqrt()
        roots = foreach._foreach_sqrt(squares)
        foreach._foreach_div_(roots, spread.to(roots[0].dtype))
        foreach._foreach_add_(roots, group["eps"])
        changes = foreach._foreach_div(means, roots)
        foreach._foreach_mul_(changes, size.to(changes[0].dtype))
        foreach._foreach_sub_(params, changes)
