"""How much surer one prediction is than another of the same images, and how often they agree."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["ConfidenceGap"]

SPAN = 256  # images that the average goes back over


class ConfidenceGap(nn.Module):
    """The mean difference between the largest probabilities of two predictions.

    Of two models that have not learned from a stream, the surer one errs less: the difference of
    confidences follows that of accuracies (Guillory et al., ICCV 2021, arXiv 2107.03315). It does
    not for one that has learned by entropy, which grows surer whether it errs or not.

    Args:
        span: Images that the average goes back over.
    """

    gap: Tensor  # 0-dimensional, in [-1, 1]
    agreed: Tensor  # 0-dimensional, share of images of which both say the same; 1 before the first
    other: Tensor  # 0-dimensional, mean confidence of the second, in [0, 1]
    images: Tensor  # 0-dimensional, that both are averages of, at most ``span``

    def __init__(self, span: int = SPAN) -> None:
        super().__init__()
        self.span = span
        self.register_buffer("gap", torch.zeros(()))
        self.register_buffer("agreed", torch.ones(()))
        self.register_buffer("other", torch.zeros(()))
        self.register_buffer("images", torch.zeros(()))

    @torch.no_grad()
    def see(self, logits: Tensor, other: Tensor) -> None:
        """Take in a batch by its two predictions, both (B, C)."""
        mine, its = (z.float().softmax(1).amax(1).mean() for z in (logits, other))
        moved = torch.nan_to_num(mine - its - self.gap)  # of logits that overflow nothing is known
        self.images.copy_((self.images + len(logits)).clamp_max(self.span))
        share = len(logits) / self.images.clamp_min(len(logits))
        self.gap += share * moved
        same = (logits.argmax(1) == other.argmax(1)).float().mean()
        self.agreed += share * (same - self.agreed)
        self.other += share * torch.nan_to_num(its - self.other)

    def mean(self) -> float:
        """The average, by how much the first is surer; 0 before the first batch."""
        return float(self.gap)

    def agreement(self) -> float:
        """Share of images of which both say the same; 1 before the first batch."""
        return float(self.agreed)

    def expected(self) -> float:
        """Share of images of which both should say the same: the second's mean confidence.

        About as many are what the second gets right, and the first too if it is as good.
        """
        return float(self.other)

    def forget(self) -> None:
        """Begin anew."""
        self.gap.zero_()
        self.agreed.fill_(1.0)
        self.other.zero_()
        self.images.zero_()
