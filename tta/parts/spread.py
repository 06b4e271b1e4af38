"""How many classes a batch shows by one prediction, less how many by another of the same images."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["SpreadGap", "spread"]

SPAN = 192  # images over which the difference is averaged
ENOUGH = 24  # images from which it counts


def spread(logits: Tensor) -> Tensor:
    """Entropy of the mean prediction of (B, C), in nats.

    Example:
        >>> round(float(spread(torch.tensor([[100.0, 0.0], [0.0, 100.0]]))), 3)
        0.693
    """
    mean = logits.detach().float().softmax(1).mean(0)
    return torch.special.entr(mean).sum()


class SpreadGap(nn.Module):
    """The difference between the spreads of two predictions, averaged over batches.

    Args:
        span: Images that the average goes back over.
    """

    gap: Tensor  # 0-dimensional, in nats
    latest: Tensor  # 0-dimensional, of the last batch
    images: Tensor  # 0-dimensional, that it is the average of, at most ``span``

    def __init__(self, span: int = SPAN) -> None:
        super().__init__()
        self.span = span
        self.register_buffer("gap", torch.zeros(()))
        self.register_buffer("images", torch.zeros(()))
        self.register_buffer("latest", torch.zeros(()))

    @torch.no_grad()
    def see(self, logits: Tensor, other: Tensor) -> None:
        """Take in a batch by its two predictions, both (B, C)."""
        count = len(logits)
        self.images.copy_((self.images + count).clamp_max(self.span))
        gap = spread(logits) - spread(other)
        self.latest.copy_(gap if count >= ENOUGH else torch.zeros_like(gap))
        self.gap += count / self.images.clamp_min(count) * (gap - self.gap)

    def mean(self) -> float:
        """The average; 0 as long as it is one of few images."""
        return float(self.gap) if float(self.images) >= ENOUGH else 0.0

    def last(self) -> float:
        """The difference in the last batch; 0 if that was one of few images."""
        return float(self.latest)

    def forget(self) -> None:
        """Begin anew."""
        self.gap.zero_()
        self.images.zero_()
        self.latest.zero_()
