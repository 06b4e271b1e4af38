"""Style of a batch: how much the channels of early maps vary; clusters of such vectors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tta.core.classifier import CONVOLUTIONS
from tta.core.tracing import is_tracing
from tta.parts.teachers import quantile

__all__ = [
    "assignments",
    "cluster_loss",
    "early_layers",
    "early_maps",
    "style_of",
    "style_threshold",
]

EARLY = 3  # layers
EPS = 1e-8
SMALLEST = 1e-12  # variance of a channel


def style_of(maps: Sequence[Tensor]) -> Tensor:
    """Log of the unbiased variance of each channel, over the batch and all places.

    Args:
        maps: (B, C_i, ...) each.

    Returns:
        (sum of C_i,) float32; NaN for channels with a single value, which has no variance.

    Example:
        >>> style_of([torch.tensor([[[0.0, 2.0]]])]).round(decimals=4)
        tensor([0.6931])
    """
    flat = [m.detach().float().transpose(0, 1).flatten(1) for m in maps]
    largest = torch.finfo(torch.float32).max
    return torch.cat(
        [
            f.var(1).nan_to_num(0.0).clamp(SMALLEST, largest).log()
            if f.shape[1] > 1
            else f.new_full((len(f),), float("nan"))
            for f in flat
        ]
    )


def style_threshold(styles: Tensor, share: float) -> Tensor:
    """A quantile of the distances between vectors (N, S) that differ; NaN where none do."""
    distances = torch.cdist(styles, styles, compute_mode="donot_use_mm_for_euclid_dist")
    apart = distances[distances > 0]
    return quantile(apart, share) if len(apart) else distances.new_full((), float("nan"))


def assignments(vectors: Tensor, centroids: Tensor) -> Tensor:
    """Softmax over the centroids (K, S) of the negative distance of vectors (N, S): (N, K)."""
    away = torch.linalg.vector_norm(vectors[:, None] - centroids, dim=2)
    if is_tracing():  # centroids that there are not yet are NaN
        away = away.nan_to_num(torch.inf)
    return (-away).softmax(1)


def cluster_loss(shares: Tensor) -> Tensor:
    """The mean entropy of (N, K), less the entropy of the mean, in nats.

    It is small where every row is sure, and not all are of the same.

    Args:
        shares: Each row sums to 1.

    Example:
        >>> round(float(cluster_loss(torch.eye(2))), 4)
        -0.6931
    """
    mean = shares.mean(0)
    entropies = -(shares * torch.log(shares + EPS)).sum(1)
    return entropies.mean() + (mean * torch.log(mean + EPS)).sum()


@contextmanager
def early_maps(model: nn.Module, layers: Sequence[tuple[str, bool]]) -> Iterator[list[Tensor]]:
    """Within the block, collect what layers give out: (B, C, ...) each.

    Args:
        model: Has the layers.
        layers: Names, and whether channels come last, as in a linear layer.
    """
    found: list[Tensor] = []

    def hook(last: bool) -> Callable[..., None]:
        def see(module: nn.Module, args: Any, output: Tensor) -> None:
            found.append(output.movedim(-1, 1) if last and output.ndim > 2 else output)

        return see

    handles = [model.get_submodule(name).register_forward_hook(hook(last)) for name, last in layers]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def early_layers(model: nn.Module) -> list[tuple[str, bool]]:
    """The first convolutions and linear layers, for :func:`early_maps`."""
    kinds = (*CONVOLUTIONS, nn.Linear)
    layers = [
        (name, isinstance(module, nn.Linear))
        for name, module in model.named_modules()
        if isinstance(module, kinds)
    ]
    return layers[:EARLY]
