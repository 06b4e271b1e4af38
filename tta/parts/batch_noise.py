"""Whether statistics of a batch are of too few images, or of images too unlike each other."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["BatchNoise"]

SPAN = 256  # images that the averages go back over
KEPT = 0.7  # share of labels that halves of a batch leave, above which the noise is small
NOISE = 0.7  # of the labels that the norm rule changes in all, from which noise is the larger harm
UNLIKE = 0.68  # of the source's confidence, below which that without noise says harm


class BatchNoise(nn.Module):
    """Compares what half the images do to a batch's labels with what the norm rule does to them.

    Statistics of few images are noisy, and with many classes the noise alone turns labels over: a
    network of 1,000 classes errs on 27 % of clean photographs under statistics of 16, and on 12 %
    under its own. How many labels change when statistics are of half the batch says how many the
    noise turns over; how many differ from the source's, what the norm rule changes in all. Where
    the one is nearly as much as the other, there is little that the rule has put right:

        1 - kept > NOISE (1 - agreed),   kept < KEPT

    Three networks of ImageNet (EfficientNet-lite0 to 2) were shown clean photographs, and some
    with five corruptions of two severities, in batches of 16. In 16 of these 30 cases this held,
    and predictions were far less sure than the source's (``ConfidenceGap``): there they erred by 4
    to 20 points more than the source in 14, and by one less in two. In the other 14 they erred by 8
    points more to 40 less. The thresholds were chosen on these.

    The confidence c too says what half the images do to it, and so what it would be without noise,
    under statistics of very many such images: about c / c' of what it is, c' that of the halves.
    On these networks this came out the same from batches of 16 and 48, and at 0.73 to 1.1 of the
    source's confidence in streams of one corruption after the other. Where images of a batch had
    one of five corruptions, which no statistics suit, it was 0.37 to 0.73, and the networks erred
    by 6 to 19 points more than the source whatever the size of the batch:

        c^2 / c' < UNLIKE c'',   kept < KEPT,   c'' the source's confidence
    """

    kept: Tensor  # 0-dimensional, share of images whose label half of the batch leaves
    agreed: Tensor  # 0-dimensional, share of images of which the source says the same
    sure: Tensor  # (3,), mean confidence of the whole, of the halves, and of the source
    images: Tensor  # 0-dimensional, that all are averages of, at most ``SPAN``

    def __init__(self) -> None:
        super().__init__()
        for name in ("kept", "agreed", "images"):
            self.register_buffer(name, torch.zeros(()))
        self.register_buffer("sure", torch.zeros(3))

    @torch.no_grad()
    def see(self, whole: Tensor, halves: Tensor, source: Tensor) -> None:
        """Take in the logits (B, C) of a batch, under the norm rule as a whole and in halves."""
        self.images.copy_((self.images + len(whole)).clamp_max(SPAN))
        share = len(whole) / self.images.clamp_min(len(whole))
        label, half, its = (z.argmax(1) for z in (whole, halves, source))
        for average, other in ((self.kept, half), (self.agreed, its)):
            average += share * ((label == other).float().mean() - average)
        found = [z.float().softmax(1).amax(1).mean() for z in (whole, halves, source)]
        self.sure += share * torch.nan_to_num(torch.stack(found) - self.sure)

    def harmful(self, least: int) -> bool:
        """Whether noise makes the source err less, by at least ``least`` images."""
        return self._noisy(least) and self._noise() > NOISE * (1 - float(self.agreed))

    def unlike(self, least: int) -> bool:
        """Whether images of a batch are so unlike each other that the source errs less."""
        whole, halves, source = self.sure.tolist()
        return self._noisy(least) and whole * whole < UNLIKE * source * halves

    def _noise(self) -> float:
        """Share of images whose label half of the batch changes."""
        return 1 - float(self.kept)

    def _noisy(self, least: int) -> bool:
        return float(self.images) >= least and self._noise() > 1 - KEPT
