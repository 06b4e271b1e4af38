"""Health: what can be seen of an adapter without labels, batch by batch and on average.

All figures come from tensors that a batch has made anyway, but for the agreement with the source,
which needs a pass of the source model and is asked for on every ``EVERY``-th batch alone. They are
read off the device in one go, once a batch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from tta.core.component import Component
from tta.core.foreach import foreach

__all__ = [
    "AVERAGED",
    "EVERY",
    "FIGURES",
    "Monitor",
    "as_numbers",
    "concentration",
    "effective_rank",
]

EVERY = 20  # batches; on one of these the source predicts too, so 5 % more forward passes
JOINED = 1 << 18  # parameters up to which they are put into one tensor to be measured
HORIZON = 512  # images over which averages reach back
FIGURES = (
    "entropy",
    "concentration",
    "agreement",
    "estimated_accuracy",
    "effective_rank",
    "run_length",
    "distance",
    "passes",
)
# Those of "paired" and "source" concentration are of the same batches, where the source was asked.
AVERAGED = (
    *FIGURES,
    "paired_concentration",
    "source_concentration",
    "source_estimated_accuracy",
)


class Monitor(Component):
    """Measures batches, and remembers averages.

    Args:
        classes: Number of classes C.
    """

    batches: Tensor  # 0-dimensional, seen since wrap or reset
    averages: Tensor  # (figures,), moving averages in the order of ``AVERAGED``
    weights: Tensor  # (figures,), share of the horizon that each average has seen
    label: Tensor  # 0-dimensional, predicted for the last image; -1 before the first
    run: Tensor  # 0-dimensional, images in a row for which it was predicted

    def __init__(self, classes: int) -> None:
        super().__init__(None)
        self.classes = classes
        whole = torch.int64
        self.register_buffer("batches", torch.zeros((), dtype=whole))
        self.register_buffer("averages", torch.zeros(len(AVERAGED)))
        self.register_buffer("weights", torch.zeros(len(AVERAGED)))
        self.register_buffer("label", torch.full((), -1, dtype=whole))
        self.register_buffer("run", torch.zeros((), dtype=whole))

    def integer_ranges(self) -> dict[str, tuple[int, int]]:
        """A label, or -1."""
        return {"label": (-1, self.classes - 1)}

    @torch.no_grad()
    def measure(
        self, logits: Tensor, features: Tensor | None, scores: Tensor, learning: bool
    ) -> dict[str, Any]:
        """Figures of a batch.

        Args:
            logits: (B, C), before the output slot.
            features: (B, D), if they were read.
            scores: (B, C), what is to be returned.
            learning: Whether the run of labels goes on, which it does not while frozen.
        """
        probs = logits.float().softmax(1)
        return {
            "entropy": torch.special.entr(probs).sum(1).mean(),
            "concentration": concentration(probs=probs),
            "effective_rank": math.nan if features is None else effective_rank(features),
            "run_length": self._run_length(scores.argmax(1).tolist(), learning),
        }

    @torch.no_grad()
    def distance(self, parameters: Sequence[Tensor], source: Sequence[Tensor]) -> Tensor | float:
        """Length of the way from the source's parameters to these, as a share of the source's."""
        if not parameters:
            return 0.0
        if sum(p.numel() for p in parameters) <= JOINED:  # one operation is faster than many
            now, start = (torch.cat([t.flatten() for t in ts]) for ts in (parameters, source))
            gone, whole = torch.linalg.vector_norm(now - start), torch.linalg.vector_norm(start)
        else:
            offsets = foreach._foreach_sub(list(parameters), list(source))
            lengths = [torch.stack(foreach._foreach_norm(t)) for t in (offsets, list(source))]
            gone, whole = (torch.linalg.vector_norm(length) for length in lengths)
        return gone / whole.clamp_min(torch.finfo(whole.dtype).tiny)

    @torch.no_grad()
    def move_averages(self, figures: Mapping[str, Any], images: int) -> None:
        """Move the averages of the figures that are there and finite.

        An average is that of all images so far until these are ``HORIZON``; it then reaches back
        about as far, whatever the batch size.
        """
        share = 1 - (1 - 1 / HORIZON) ** images
        averages, weights = self.averages.tolist(), self.weights.tolist()
        for i, name in enumerate(AVERAGED):
            value = figures.get(name, math.nan)
            if math.isfinite(value):  # no average would come back from an infinite one
                weights[i] += share * (1 - weights[i])
                averages[i] += (value - averages[i]) * share / weights[i]
        self.averages.copy_(torch.tensor(averages))
        self.weights.copy_(torch.tensor(weights))

    def averaged(self) -> dict[str, float]:
        """The averages by the names of the figures; NaN before the first value."""
        values, weights = self.averages.tolist(), self.weights.tolist()
        return {
            name: value if weight > 0 else math.nan
            for name, value, weight in zip(AVERAGED, values, weights, strict=True)
        }

    def _run_length(self, labels: list[int], learning: bool) -> float:
        """Mean length of the runs of equal labels that the batch touches.

        The first one counts from where it began, which may be batches ago.
        """
        runs = [len(list(run)) for _, run in groupby(labels)]
        if labels[0] == int(self.label):
            runs[0] += int(self.run)
        if learning:
            self.label.fill_(labels[-1])
            self.run.fill_(runs[-1])
        return sum(runs) / len(runs)


def as_numbers(figures: Mapping[str, Any]) -> dict[str, Any]:
    """Figures with numbers in place of tensors without axes, which are read all at once."""
    names = [n for n, v in figures.items() if isinstance(v, Tensor) and v.ndim == 0]
    if not names:
        return dict(figures)
    values = torch.stack([figures[name].float() for name in names]).tolist()
    return {**figures, **dict(zip(names, values, strict=True))}


def concentration(logits: Tensor | None = None, *, probs: Tensor | None = None) -> Tensor:
    """Negative entropy of the mean prediction, in nats: 0 where all is one class, else below.

    Args:
        logits: (B, C), or
        probs: (B, C), their softmax.
    """
    if probs is None:
        assert logits is not None
        probs = logits.float().softmax(1)
    return -torch.special.entr(probs.mean(0)).sum()


def effective_rank(features: Tensor) -> Tensor:
    """How many directions the features of a batch spread over.

    It is the participation ratio of the eigenvalues of their covariance, ``(sum l)^2 / sum l^2``:
    n where n directions have equal variance and the others none.

    Args:
        features: (B, D).

    Returns:
        From 1 to min(B - 1, D); NaN where no two rows differ.

    Example:
        >>> float(effective_rank(torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])))
        2.0
    """
    if len(features) < 2:
        return features.new_full((), float("nan"), dtype=torch.float32)
    centred = features.float() - features.float().mean(0)
    few = len(centred) <= centred.shape[1]
    gram = centred @ centred.T if few else centred.T @ centred
    return gram.diagonal().sum().square() / gram.square().sum()
