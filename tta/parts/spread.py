"""How many classes a batch shows by one prediction, less how many by another of the same images."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

__all__ = ["ENOUGH", "SpreadGap", "spread"]

SPAN = 192  # images over which the difference is averaged
ENOUGH = 48  # images that a mean prediction is of


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

    The mean prediction of a few images has less entropy, the surer each of them is, however many
    classes there are. So small batches are put together, until there are ``ENOUGH`` images.

    Args:
        classes: C.
        span: Images that the average goes back over.
        most: By which batches count as ahead, in nats.
    """

    gap: Tensor  # 0-dimensional, in nats
    latest: Tensor  # 0-dimensional, of the last images that were put together
    images: Tensor  # 0-dimensional, that it is the average of, at most ``span``
    sums: Tensor  # (2, C), of the probabilities of both predictions, of images that wait
    waiting: Tensor  # 0-dimensional, how many wait

    def __init__(self, classes: int, span: int = SPAN, most: float = math.inf) -> None:
        super().__init__()
        self.span, self.most = span, most
        for name in ("gap", "images", "latest", "waiting"):
            self.register_buffer(name, torch.zeros(()))
        self.register_buffer("sums", torch.zeros(2, classes))

    @torch.no_grad()
    def see(self, logits: Tensor, other: Tensor) -> None:
        """Take in a batch by its two predictions, both (B, C)."""
        self.sums += torch.stack([z.float().softmax(1).sum(0) for z in (logits, other)])
        self.waiting += len(logits)
        if (count := float(self.waiting)) < ENOUGH:
            return
        mine, its = torch.special.entr(self.sums / count).sum(1)
        self.images.copy_((self.images + count).clamp_max(self.span))
        self.latest.copy_(mine - its)
        share = count / self.images.clamp_min(count)
        self.gap += share * (self.latest.clamp_max(self.most) - self.gap)
        self.sums.zero_()
        self.waiting.zero_()

    def mean(self) -> float:
        """The average; 0 as long as there are few images."""
        return float(self.gap)

    def last(self) -> float:
        """The difference in the last images that were put together; 0 before there are enough."""
        return float(self.latest)

    def forget(self) -> None:
        """Begin anew."""
        for buffer in self.buffers():
            buffer.zero_()
