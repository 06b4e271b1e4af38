"""A Gaussian posterior of the source weights: its estimate (diagonal SWAG) and its penalty."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tta.core.backbone import Backbone
from tta.core.foreach import foreach
from tta.core.norm_layers import normalize_by_source, with_statistics

__all__ = ["Moments", "diagonal_swag", "prior"]


# PETAL's schedule for CIFAR: the first rate in the first epoch, then linearly to the last over
# three epochs.
FIRST_LR, LAST_LR, RAMP = 8e-4, 0.01, 3
MOMENTUM, WEIGHT_DECAY = 0.9, 5e-4


class Moments:
    """Running mean and mean square of snapshots of tensors, in double precision."""

    def __init__(self, like: Sequence[Tensor]) -> None:
        self.count = 0
        self.mean = [torch.zeros_like(t, dtype=torch.float64) for t in like]
        self.square = [torch.zeros_like(m) for m in self.mean]

    def add(self, tensors: Iterable[Tensor]) -> None:
        """Take one snapshot."""
        values = [t.detach().double() for t in tensors]
        self.count += 1
        foreach._foreach_lerp_(self.mean, values, 1 / self.count)
        foreach._foreach_lerp_(self.square, foreach._foreach_mul(values, values), 1 / self.count)

    def variance(self) -> list[Tensor]:
        """Return mean square minus squared mean, in float32; rounding may leave it below 0."""
        squares = foreach._foreach_mul(self.mean, self.mean)
        return [v.float() for v in foreach._foreach_sub(self.square, squares)]


def diagonal_swag(
    network: Backbone,
    parameters: dict[str, nn.Parameter],
    batches: Iterable[tuple[Tensor, Tensor]],
    epochs: int,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Mean and variance of weights along a short SGD run on labelled source batches.

    The network is in eval mode and BatchNorm uses its source statistics, as in PETAL's code. One
    snapshot is taken after every epoch but the first. The weights are put back.

    Args:
        network: The wrapped model.
        parameters: The parameters that are trained and get a posterior, by name.
        batches: Source batches, read once per epoch.
        epochs: At least 2; the variance is 0 after 2.

    Returns:
        Mean and variance by parameter name, float32.

    Raises:
        ValueError: When there is no batch, or the run diverges.
    """
    params = list(parameters.values())
    before = [p.detach().clone() for p in params]
    optimizer = torch.optim.SGD(params, FIRST_LR, MOMENTUM, weight_decay=WEIGHT_DECAY, foreach=True)
    moments = Moments(before)
    try:
        with torch.enable_grad(), with_statistics(network.wrappers, normalize_by_source):
            for epoch in range(epochs):
                share = min(1.0, epoch / RAMP)
                optimizer.param_groups[0]["lr"] = FIRST_LR + (LAST_LR - FIRST_LR) * share
                steps = 0
                for images, labels in batches:
                    logits = network(images.to(before[0].device)).logits.float()
                    F.cross_entropy(logits, labels.to(logits.device)).backward()
                    optimizer.step()
                    optimizer.zero_grad()
                    steps += 1
                if steps == 0:
                    raise ValueError(
                        f"`source` must give batches in each of {epochs} passes, got none in pass "
                        f"{epoch + 1}: pass a list or a data loader of (images, labels)."
                    )
                if epoch > 0:
                    moments.add(params)
    finally:
        with torch.no_grad():
            foreach._foreach_copy_(params, before)
        optimizer.zero_grad()
    mean, variance = [m.float() for m in moments.mean], moments.variance()
    if not all(bool(v.isfinite().all()) for v in (*mean, *variance)):
        raise ValueError(
            "`source` must be what the model was trained on, but training on it diverged: check "
            "the normalisation of its images, or pass a posterior of your own."
        )
    return dict(zip(parameters, mean, strict=True)), dict(zip(parameters, variance, strict=True))


@torch.no_grad()
def prior(
    parameters: Sequence[Tensor], mean: list[Tensor], variance: list[Tensor], damping: float
) -> tuple[Tensor, list[Tensor]]:
    """``R = 0.5 sum (theta - mean)^2 / (variance + damping)`` and its gradient.

    Returns:
        R, a scalar, and dR/dtheta for each tensor.
    """
    offset = foreach._foreach_sub([p.detach() for p in parameters], mean)
    pull = foreach._foreach_div(offset, foreach._foreach_add(variance, damping))
    foreach._foreach_mul_(offset, pull)  # in place: these may be as large as the model
    terms = [t.sum() for t in offset]
    return 0.5 * torch.stack(terms).sum(), pull
