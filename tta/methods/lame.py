"""LAME: correct the predictions of a batch so that neighbours agree, leave the network alone.

Boudiaf, Mueller, Ben Ayed, Bertinetto: Parameter-free Online Test-time Adaptation, CVPR 2022,
arXiv 2201.05718.

The softmax outputs of a batch are pulled towards those of its neighbours in feature space by
Laplacian-regularised maximum likelihood, solved by a few fixed-point iterations. It is made for
streams whose neighbouring images share a label; on class-balanced i.i.d. batches it hurts.

    U = -log(P + 1e-10),   Y <- softmax(-U + W Y)   until the energy stops falling      (eq. 6-8)

W is the affinity of L2-normalised features: "rbf" (bandwidth from the ``neighbours``-th smallest
distance, the zero distance to oneself counted), "knn" (directed, without oneself) or "linear". What
is returned is log Y (B, C), whose softmax gives the paper's probabilities; the official code
returns Y. An image that is alone in its batch, and identical features under rbf (zero bandwidth),
get the source prediction; ``official=True`` gives what the official code does: NaN under rbf, and
for a lone image under "linear" a prediction pulled towards itself.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from tta.core.checks import LARGEST, boolean, one_of, whole_number
from tta.core.config import ComponentConfig
from tta.core.output_rule import Output
from tta.core.prediction import Prediction
from tta.core.registry import register
from tta.core.tracing import is_tracing, rows_of, while_loop

__all__ = ["Lame", "LameConfig"]

MAX_ITERATIONS = 100
RELATIVE_ENERGY_CHANGE = 1e-8


@dataclass(frozen=True, kw_only=True)
class LameConfig(ComponentConfig):
    """Fields of ``lame``."""

    affinity: str = "rbf"  # W: "rbf", "knn" or "linear"
    neighbours: int = 5  # k of rbf's bandwidth and of knn
    symmetric: bool = False  # use (W + W^T) / 2
    official: bool = False  # NaN where the bandwidth is 0; lone images pull at themselves

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("affinity", self.affinity, ("rbf", "knn", "linear"))
        whole_number("neighbours", self.neighbours, 1, LARGEST)
        boolean("symmetric", self.symmetric)
        boolean("official", self.official)


def affinity(features: Tensor, kind: str, neighbours: int, symmetric: bool) -> Tensor:
    """Affinity matrix of a batch.

    Args:
        features: (B, D), not normalised.
        kind: "rbf", "knn" or "linear".
        neighbours: k.
        symmetric: Whether to average the matrix with its transpose.

    Returns:
        (B, B) float32; NaN for "rbf" when all features coincide.
    """
    unit = F.normalize(features.float(), dim=1)
    if is_tracing():
        weights = _affinity_in_graph(unit, kind, neighbours)
        return (weights + weights.t()) / 2 if symmetric else weights
    if kind == "linear":
        weights = unit @ unit.t()
    else:
        # Differences, not the matrix-product shortcut: an image must be at distance 0 of itself.
        distance = torch.cdist(unit, unit, compute_mode="donot_use_mm_for_euclid_dist")
        if kind == "rbf":
            nearest = distance.topk(min(neighbours, len(unit)), largest=False).values
            sigma = nearest[:, -1].mean()
            weights = torch.exp(-distance.square() / (2 * sigma.square()))
        else:
            index = distance.topk(min(neighbours + 1, len(unit)), largest=False).indices[:, 1:]
            weights = torch.zeros_like(distance).scatter_(1, index, 1.0)
    return (weights + weights.t()) / 2 if symmetric else weights


def _affinity_in_graph(unit: Tensor, kind: str, neighbours: int) -> Tensor:
    """As :func:`affinity` for features of length 1, for any number of images."""
    if kind == "linear":
        return unit @ unit.t()
    distance = (unit[:, None] - unit[None]).square().sum(2).sqrt()
    ordered, order = distance.sort(dim=1, stable=True)
    if kind == "rbf":
        last = rows_of(unit).clamp_max(neighbours) - 1
        sigma = ordered.index_select(1, last[None]).mean()
        return torch.exp(-distance.square() / (2 * sigma.square()))
    place = torch.ones_like(order).cumsum(1) - 1
    near = ((place >= 1) & (place <= neighbours)).to(unit.dtype)
    return torch.zeros_like(distance).scatter(1, order, near)


def assign(unary: Tensor, weights: Tensor) -> Tensor:
    """Find the assignment Y by fixed-point iterations.

    Args:
        unary: (B, C), -log of the predicted probabilities.
        weights: (B, B) affinity.

    Returns:
        (B, C), the logarithm of the assignment Y.
    """
    if is_tracing():
        return _assign_in_graph(unary, weights)
    log_y = (-unary).log_softmax(1)
    before = torch.tensor(float("inf"))
    for i in range(MAX_ITERATIONS):
        pull = weights @ log_y.exp()
        log_y = (pull - unary).log_softmax(1)
        y = log_y.exp()
        energy = (unary * y - pull * y + y * y.clamp_min(1e-20).log()).sum()
        if i > 1 and (energy - before).abs() <= RELATIVE_ENERGY_CHANGE * before.abs():
            break
        before = energy
    return log_y


def _assign_in_graph(unary: Tensor, weights: Tensor) -> Tensor:
    """As :func:`assign`, by a loop that a graph can hold."""

    def going_on(i: Tensor, change: Tensor, before: Tensor, _: Tensor) -> Tensor:
        still = (i < 3) | ~(change <= RELATIVE_ENERGY_CHANGE * before.abs())
        return still & (i < MAX_ITERATIONS)

    def iterate(i: Tensor, _: Tensor, before: Tensor, log_y: Tensor) -> tuple[Tensor, ...]:
        pull = weights @ log_y.exp()
        log_y = (pull - unary).log_softmax(1)
        y = log_y.exp()
        energy = (unary * y - pull * y + y * y.clamp_min(1e-20).log()).sum()
        return i + 1, (energy - before).abs(), energy, log_y

    zero = torch.zeros((), dtype=torch.int64, device=unary.device)
    energy = unary.new_zeros(())
    start = (zero, energy, energy.clone(), (-unary).log_softmax(1))
    return while_loop(going_on, iterate, start)[3]


@register("lame")
class Lame(Output):
    """Laplacian-adjusted maximum-likelihood estimation."""

    Config = LameConfig
    harm: ClassVar[str] = "runs"
    needs_features = True

    def correct(self, prediction: Prediction) -> Tensor:
        """Return the log of the assignment (B, C)."""
        c = self.config
        assert prediction.features is not None
        logits = prediction.logits.float()
        weights = affinity(prediction.features, c.affinity, c.neighbours, c.symmetric)
        if is_tracing():
            return self._traced(logits, weights)
        if not c.official and (len(weights) == 1 or bool(weights.isnan().any())):
            return logits.log_softmax(1)
        return assign(-torch.log(logits.softmax(1) + 1e-10), weights)

    def _traced(self, logits: Tensor, weights: Tensor) -> Tensor:
        """The same in a graph: the assignment, or the prediction where there is none."""
        # log(p + 1e-10) by logarithms: exporters take so small a summand for zero.
        shares = logits.log_softmax(1)
        least = torch.full_like(shares, math.log(1e-10))
        found = assign(-torch.stack([shares, least]).logsumexp(0), weights)
        if self.config.official:
            return found
        without = (rows_of(logits) == 1) | weights.isnan().any()
        return torch.where(without, shares, found)
