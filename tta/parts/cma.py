"""CMA-ES: a search without gradients, by a normal distribution that learns its covariance.

Hansen: The CMA Evolution Strategy: A Tutorial, arXiv 1604.00772, with its default constants:
weighted recombination of the better half, cumulative step sizes, and rank-one and rank-mu updates
of the covariance with negative weights for the worse half.

Solutions from outside may be told too. They count as far as their rank goes, without a negative
weight, and are first shortened to a distance from the mean that samples rarely exceed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["Constants", "ask", "start", "tell"]

State = dict[str, Tensor]  # tensors of :func:`start`, which :func:`tell` changes in place


@dataclass(frozen=True)
class Constants:
    """The constants of a search.

    Args:
        size: Numbers in a solution N.
        population: Solutions that are asked for at a time, lambda.
    """

    size: int
    population: int

    @property
    def raw_weights(self) -> Tensor:
        """ln((lambda + 1) / 2) - ln i for ranks i from 1."""
        ranks = torch.arange(1, self.population + 1, dtype=torch.float64)
        return math.log((self.population + 1) / 2) - ranks.log()

    @property
    def recombination(self) -> Tensor:
        """Weights of the best solutions in the new mean, which sum to 1."""
        raw = self.raw_weights
        return raw[raw > 0] / raw[raw > 0].sum()

    @property
    def mass(self) -> float:
        """How many equally weighted solutions the recombination is worth, mu_eff."""
        return 1 / float(self.recombination.square().sum())

    @property
    def rates(self) -> tuple[float, float, float, float]:
        """Learning rates: of the step size, the path, and the rank-one and rank-mu updates."""
        n, mass = self.size, self.mass
        sigma = (mass + 2) / (n + mass + 3)
        path = (4 + mass / n) / (n + 4 + 2 * mass / n)
        one = min(1.0, self.population / 6) * 2 / ((n + 1.3) ** 2 + mass)
        many = min(1 - one, 2 * (0.25 + mass - 2 + 1 / mass) / ((n + 2) ** 2 + mass))
        return sigma, path, one, many

    @property
    def damping(self) -> float:
        """By how much changes of the step size are damped."""
        more = math.sqrt((self.mass - 1) / (self.size + 1)) - 1
        return 1 + 2 * max(0.0, more) + self.rates[0]

    @property
    def length(self) -> float:
        """Mean length of a standard normal vector, nearly."""
        n = self.size
        return math.sqrt(n) * (1 - 1 / (4 * n) + 1 / (21 * n**2))

    @property
    def every(self) -> int:
        """Steps between decompositions of the covariance, which hardly changes in one."""
        _, _, one, many = self.rates
        return max(1, int(1 / ((one + many) * self.size * 10)))

    def covariance_weights(self, count: int) -> Tensor:
        """Weights of ``count`` solutions in the rank-mu update, from the best to the worst.

        Those above the population get the weight 0, behind the positive ones.
        """
        raw, n = self.raw_weights, self.size
        _, _, one, many = self.rates
        bad = raw[raw < 0]
        bad_mass = float(bad.sum().square() / bad.square().sum())
        limits = (
            1 + one / many,
            1 + 2 * bad_mass / (self.mass + 2),
            (1 - one - many) / n / many,
        )
        good, bad = self.recombination, bad * (min(limits) / -bad.sum())
        between = raw.new_zeros(count - len(good) - len(bad))
        return torch.cat([good, between, bad])


def start(size: int, sigma: float) -> State:
    """What a search remembers, at its start: mean 0, covariance ``sigma^2 I``.

    The covariance changes by so little in a step that it is kept in float64.
    """
    kind: dict[str, Any] = {"dtype": torch.float64}
    return {
        "mean": torch.zeros(size, dtype=torch.float32),
        "sigma": torch.full((), sigma, dtype=torch.float32),
        "sigma_path": torch.zeros(size, **kind),
        "path": torch.zeros(size, **kind),
        "covariance": torch.eye(size, **kind),
        "basis": torch.eye(size, **kind),  # eigenvectors of the covariance, as columns
        "scales": torch.ones(size, **kind),  # roots of its eigenvalues
        "steps": torch.zeros((), dtype=torch.int64),
    }


def ask(state: State, normals: Tensor) -> Tensor:
    """Sample solutions (lambda, N) from standard normal numbers of that shape."""
    offsets = (normals.double() * state["scales"]) @ state["basis"].T
    return state["mean"] + state["sigma"].double() * offsets


def tell(
    state: State, constants: Constants, solutions: Tensor, values: Tensor, foreign: int = 0
) -> None:
    """Move the search to solutions with small values.

    Args:
        state: That of the search, changed in place.
        constants: Those of the search.
        solutions: (K, N), K at least the population.
        values: (K,), the smaller the better.
        foreign: How many solutions, at the end, are not samples.
    """
    n, sigma = constants.size, state["sigma"].double()
    rate_sigma, rate_path, rate_one, rate_many = constants.rates
    basis, scales = state["basis"], state["scales"]
    offsets = (solutions.double() - state["mean"]) / sigma
    lengths = torch.linalg.vector_norm(offsets @ basis / scales, dim=1)
    if foreign:
        longest = math.sqrt(n) + 2 * n / (n + 2)
        shares = (longest / lengths[-foreign:].clamp_min(1e-300)).clamp_max(1)
        offsets[-foreign:] *= shares[:, None]
        lengths[-foreign:] *= shares
    order = values.argsort(stable=True)
    offsets, lengths = offsets[order], lengths[order]

    good = constants.recombination.to(offsets.device)
    move = good @ offsets[: len(good)]
    state["mean"] += sigma * move

    whitened = basis @ (basis.T @ move / scales)
    path = state["sigma_path"]
    path *= 1 - rate_sigma
    path += math.sqrt(rate_sigma * (2 - rate_sigma) * constants.mass) * whitened
    state["steps"] += 1
    settled = 1 - (1 - rate_sigma) ** (2 * float(state["steps"]))
    steady = float(path @ path) / n / settled < 2 + 4 / (n + 1)
    growth = float(torch.linalg.vector_norm(path)) / constants.length - 1
    state["sigma"] *= math.exp(min(1.0, growth * rate_sigma / constants.damping))

    path = state["path"]
    path *= 1 - rate_path
    if steady:
        path += math.sqrt(rate_path * (2 - rate_path) * constants.mass) * move
    lost = 0.0 if steady else rate_one * rate_path * (2 - rate_path)
    weights = constants.covariance_weights(len(offsets)).to(offsets.device)
    # A bad solution takes away at most what one of usual length would.
    scaled = torch.where(weights < 0, weights * n / lengths.square().clamp_min(1e-9), weights)
    covariance = state["covariance"]
    covariance *= 1 - rate_one + lost - rate_many * float(weights.sum())
    covariance += rate_one * torch.outer(path, path)
    covariance += rate_many * (scaled[:, None] * offsets).T @ offsets
    if int(state["steps"]) % constants.every == 0:
        covariance.copy_((covariance + covariance.T) / 2)
        values, vectors = torch.linalg.eigh(covariance)
        scales.copy_(values.clamp_min(1e-20).sqrt())
        basis.copy_(vectors)
