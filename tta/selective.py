"""What EATA, ETA and RDumb share: which samples they learn from, and the loss on these."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tta.checks import number
from tta.config import UpdateConfig
from tta.losses import entropy
from tta.selection import non_redundant

__all__ = ["Selection", "SelectiveConfig", "select", "weighted_entropy"]


@dataclass(frozen=True, kw_only=True)
class SelectiveConfig(UpdateConfig):
    """Fields of the two filters."""

    entropy_margin: float = 0.4  # E0 as a share of ln C, eq. 3
    redundancy_margin: float = 0.05  # d, largest cosine similarity with q, eq. 5

    def __post_init__(self) -> None:
        super().__post_init__()
        number("entropy_margin", self.entropy_margin, 0, above=True)
        number("redundancy_margin", self.redundancy_margin, 0, above=True)


@dataclass
class Selection:
    """The outcome of both filters on one batch."""

    reliable: Tensor  # 0-dimensional: how many passed the entropy filter
    chosen: Tensor  # (B,) bool: passed both
    count: int  # how many of these
    probs: Tensor  # (B, C), without gradient

    @property
    def mean_probs(self) -> Tensor:
        """Mean prediction (C,) over the chosen samples; ask only when there are any."""
        return self.probs[self.chosen].mean(0)


def select(logits: Tensor, average: Tensor, margin: float, redundancy_margin: float) -> Selection:
    """Reliable samples that differ enough from the average of earlier ones (EATA, eq. 3 and 5).

    Args:
        logits: (B, C).
        average: (C,), q; all NaN while there is none.
        margin: Largest entropy in nats, strict.
        redundancy_margin: Largest cosine similarity with the average, strict.
    """
    logits = logits.detach()
    probs = logits.float().softmax(1)
    reliable = entropy(logits) < margin
    chosen = reliable & non_redundant(probs, average, redundancy_margin)
    return Selection(reliable.sum(), chosen, int(chosen.sum()), probs)


def weighted_entropy(logits: Tensor, margin: float) -> Tensor:
    """Mean of exp(margin - H) H, with weights that carry no gradient (EATA, eq. 4 and 6).

    Args:
        logits: (N, C) of the selected samples; the mean is over these, not over the batch.
        margin: E0 in nats.
    """
    entropies = entropy(logits)
    return (entropies * torch.exp(margin - entropies.detach())).mean()
