"""A small network that turns class shares into changes of the linear layer, and how it is fitted.

It belongs to the label shift adapter (`tta.methods.lsa`). G takes a code of the class shares and
gives changes of the features and of the layer,

    G(s) = A2 relu(A1 s + c1) + c2 = (gamma - 1, beta, dW, db),
    z = (W + dW)(gamma * h + beta) + b + db.

Neither the code of the shares nor the size of G is published; both are our definition.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tta.core.draws import Draws
from tta.core.tracing import is_tracing

__all__ = [
    "CODES",
    "DELTAS",
    "NAMES",
    "HeadChange",
    "change",
    "encode",
    "fit",
    "outputs",
    "rank_of",
]

CODES = ("scalar", "vector")
DELTAS = ("full", "bias", "low_rank")
NAMES = ("A1", "c1", "A2", "c2")
RATIOS = (1.0, 10.0, 100.0)  # largest share to smallest, of the shares that a vector code learns
SMALLEST = 1e-6  # squared length of the source's code below which its shares are all the same


@dataclass(frozen=True)
class HeadChange:
    """How the linear layer is changed.

    Args:
        gamma: Factor of the features (D,).
        beta: Added to them (D,).
        weight: Added to the weight (C, D); None where it stays.
        bias: Added to the bias (C,).
    """

    gamma: Tensor
    beta: Tensor
    weight: Tensor | None
    bias: Tensor

    def logits(self, features: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Logits (..., C) of features (..., D) by a layer of this weight (C, D) and bias (C,)."""
        weight = weight if self.weight is None else weight + self.weight
        bias = self.bias if bias is None else bias + self.bias
        return F.linear(self.gamma * features + self.beta, weight, bias)


def encode(shares: Tensor, prior: Tensor, code: str, floor: float = 1e-6) -> Tensor:
    """The code of class shares, for a source with shares ``prior``.

    "scalar" is 1 for the source's shares, 0 for equal ones and -1 for the source's inverted, linear
    in the logarithms between them, and cut to [-1, 1]. "vector" is the difference of the centred
    logarithms, without a cut.

    Args:
        shares: (C,), which sum to 1.
        prior: (C,), of the source.
        code: "scalar" or "vector".
        floor: Shares below it count as this much.

    Returns:
        (1,) or (C,).

    Raises:
        ValueError: For a scalar of a source whose classes are alike, where it is not defined.

    Example:
        >>> prior = torch.tensor([0.6, 0.3, 0.1])
        >>> encode(torch.tensor([0.2, 0.3, 0.5]), prior, "scalar")
        tensor([-0.5072])
    """
    own, source = (_centred(p.float().clamp_min(floor).log()) for p in (shares, prior))
    if code == "vector":
        return own - source
    length = source @ source
    if not is_tracing() and float(length) < SMALLEST:
        raise ValueError(
            "`code` must be 'vector' for a source whose classes are equally frequent, since a "
            "degree of its imbalance is not defined, got 'scalar': leave it out, or pass that."
        )
    return ((own @ source) / length).clamp(-1, 1)[None]


def _centred(values: Tensor) -> Tensor:
    return values - values.mean()


def outputs(classes: int, width: int, delta: str, rank: int) -> int:
    """How many numbers G gives for C classes and D features."""
    weights = {"full": classes * width, "bias": 0, "low_rank": rank * (classes + width)}
    return 2 * width + weights[delta] + classes


def rank_of(count: int, classes: int, width: int, delta: str) -> int | None:
    """The rank for which G gives ``count`` numbers, 0 where there is none; None if no rank fits."""
    rank, rest = divmod(count - 2 * width - classes, classes + width)
    rank, rest = (rank, rest) if delta == "low_rank" else (0, 0)
    fits = rest == 0 and count == outputs(classes, width, delta, rank) and rank >= 0
    return rank if fits and (delta != "low_rank" or rank > 0) else None


def change(net: Mapping[str, Tensor], code: Tensor, classes: int, width: int, delta: str) -> Any:
    """What G says for a code.

    Args:
        net: A1 (Hd, 1 or C), c1 (Hd,), A2 (O, Hd), c2 (O,).
        code: (1,) or (C,).
        classes: C.
        width: D.
        delta: How the weight changes: "full", "bias" (not at all) or "low_rank".

    Returns:
        A :class:`HeadChange`.
    """
    hidden = F.linear(code, net["A1"], net["c1"]).relu()
    found = F.linear(hidden, net["A2"], net["c2"])
    rest = len(found) - 2 * width - classes
    gamma, beta, middle, bias = found.split([width, width, rest, classes])
    weight = None
    if delta == "full":
        weight = middle.view(classes, width)
    elif delta == "low_rank":
        rank = len(middle) // (classes + width)
        left, right = middle.split([classes * rank, rank * width])
        weight = left.view(classes, rank) @ right.view(rank, width)
    return HeadChange(1 + gamma, beta, weight, bias)


def fit(
    features: Tensor,
    labels: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    prior: Tensor,
    *,
    code: str = "scalar",
    start: Mapping[str, Tensor] | None = None,
    lr: float = 1e-3,
    floor: float = 1e-6,
    steps: int = 1000,
    batch_size: int = 128,
    draws: Callable[[str, torch.Size, int], Any] | None = None,
    delta: str = "full",
    hidden: int = 64,
    rank: int = 4,
    generator: torch.Generator | None = None,
) -> tuple[dict[str, Tensor], Tensor]:
    """Fit G on features of labelled source images, by Adam.

    In each step shares pi are drawn, and G learns to make z the logits of a source with these:
    the loss is the cross-entropy of z + ln prior - ln pi on a batch of the source.

    Args:
        features: (N, D), as the linear layer takes them.
        labels: (N,), class numbers.
        weight: Of the layer, (C, D); it stays.
        bias: Of the layer, (C,), or None.
        prior: Class shares of the source (C,).
        code: "scalar", for shares of the source, equal and inverted ones; "vector", for shares that
            fall geometrically over classes in any order.
        start: A1, c1, A2 and c2 to begin with; None for random A1 and c1 and zeros.
        lr: Learning rate.
        floor: Shares below it count as this much.
        steps: Number of steps.
        batch_size: Features in a step, drawn with replacement.
        draws: Name, shape and step -> tensor, or None to draw as usual: ``batch_index``
            (batch_size,) int64 and ``target_priors`` (C,), each once a step.
        delta: How the weight changes: "full", "bias" (not at all) or "low_rank".
        hidden: Width Hd of G, without ``start``.
        rank: Of the change with "low_rank", without ``start``.
        generator: Makes the draws; None for one with seed 0.

    Returns:
        A1, c1, A2 and c2, and the loss of every step (steps,).

    Raises:
        ValueError: For a scalar code of a source whose classes are equally frequent.
    """
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    asked, device = Draws(draws), features.device
    classes, width = weight.shape
    features, weight, prior = (t.detach().float() for t in (features, weight, prior))
    bias = None if bias is None else bias.detach().float()
    if start is None:
        inputs = 1 if code == "scalar" else classes
        start = _start(inputs, hidden, classes, width, delta, rank, generator)
    net = {n: start[n].detach().to(device).float().clone().requires_grad_() for n in NAMES}
    optimizer = torch.optim.Adam(list(net.values()), lr=lr)
    log_prior, losses = prior.clamp_min(floor).log(), []
    for step in range(steps):
        asked.call = step
        size = torch.Size([batch_size])
        rows = asked.ask("batch_index", size, torch.int64, device)
        if rows is None:
            rows = torch.randint(len(features), size, generator=generator).to(device)
        shares = asked.ask("target_priors", prior.shape, torch.float32, device)
        if shares is None:
            shares = _shares(prior, code, floor, generator)
        with torch.enable_grad():
            found = change(net, encode(shares, prior, code, floor), classes, width, delta)
            logits = found.logits(features[rows], weight, bias)
            logits = logits + log_prior - shares.clamp_min(floor).log()
            loss = F.cross_entropy(logits, labels[rows])
            optimizer.zero_grad()
            loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return {n: p.detach() for n, p in net.items()}, torch.stack(losses)


def _start(
    inputs: int,
    hidden: int,
    classes: int,
    width: int,
    delta: str,
    rank: int,
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """A G that leaves the layer as it is, whatever the code."""

    def uniform(*shape: int) -> Tensor:
        return (
            torch.rand(*shape, generator=generator, dtype=torch.float32).mul(2).sub(1)
            * inputs**-0.5
        )

    count = outputs(classes, width, delta, rank)
    net = {"A1": uniform(hidden, inputs), "c1": uniform(hidden)}
    zeros = torch.zeros(count, hidden + 1, dtype=torch.float32)
    net |= {"A2": zeros[:, :-1].clone(), "c2": zeros[:, -1].clone()}
    if delta == "low_rank":  # two factors of zero would have gradients of zero
        first = 2 * width + classes * rank
        normal = torch.randn(rank * width, generator=generator, dtype=torch.float32)
        net["c2"][first : first + rank * width] = normal * width**-0.5
    return net


def _shares(prior: Tensor, code: str, floor: float, generator: torch.Generator) -> Tensor:
    """Class shares to learn, drawn at random."""
    which = int(torch.randint(3, (), generator=generator))
    if code == "scalar":
        shares = prior.clamp_min(floor) ** (1 - which)
    else:
        rank = torch.randperm(len(prior), generator=generator).to(prior)
        shares = RATIOS[which] ** (-rank / max(1, len(prior) - 1))
    return shares / shares.sum()
