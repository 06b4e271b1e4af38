"""How long labels stay: what tells a stream in random order from one whose classes come in runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tta.core.tracing import count_rows, is_tracing, rows_before

__all__ = ["LabelRuns", "persistence", "persistence_in", "ranges_of", "repeats_in", "shares_in"]

HORIZON, RECENT, DOUBT = 256, 96, 3.0
NOBODY = -1  # the label before the first image
ONE_CLASS = 0.999  # chance of a repeat from which a stream of one class cannot be told apart


def persistence(repeats: Any, shares: Tensor, images: Any, doubt: float, same: Any = 0.0) -> Any:
    """How much more often labels repeat than their shares explain.

    A label stays with this probability and is else drawn from the shares, if the stream is made so:

        lambda = max(0, (q - s - k sqrt(s (1 - s) / n)) / (1 - s))
        s = (sum_c m_c^2 - d) / (1 - d)

    Args:
        repeats: q, share of images with the label of the one before.
        shares: m (C,), of each label.
        images: n, over how many both were averaged.
        doubt: k, standard errors that are taken off, so that chance is not taken for persistence.
        same: d, sum of the squared weights of images in their shares. Two draws from the shares are
            one image with this chance, which is 1 / n for n images of equal weight; of few images,
            it hides runs.

    Returns:
        lambda, in [0, 1); a tensor in a graph.

    Example:
        >>> round(persistence(0.55, torch.full((10,), 0.1), 1e9, 0.0), 3)
        0.5
    """
    if is_tracing():
        chance = shares.square().sum()
        if isinstance(same, Tensor):
            other = (chance - same).clamp_min(0.0) / (1 - same)
            chance = torch.where(same < 1, other, torch.ones_like(chance))
        error = (chance * (1 - chance) / images.clamp_min(1.0)).sqrt()
        found = (repeats - chance - doubt * error) / (1 - chance)
        return torch.where(chance > ONE_CLASS, torch.zeros_like(found), found.clamp_min(0.0))
    chance = max(0.0, (float(shares.square().sum()) - same) / (1 - same)) if same < 1 else 1.0
    if chance > ONE_CLASS:
        return 0.0
    error = (chance * (1 - chance) / max(images, 1.0)) ** 0.5
    return max(0.0, (repeats - chance - doubt * error) / (1 - chance))


def persistence_in(labels: Tensor, classes: int, shares: Tensor | None = None) -> Any:
    """Lambda of :func:`persistence` in the labels (B,) of one batch, in the order of the stream.

    Args:
        labels: (B,), of the batch.
        classes: C.
        shares: (C,), of the labels of many batches; None for those of this one, by which a batch of
            one class shows no run.
    """
    rows: Any = count_rows(labels[:, None])
    if not is_tracing() and rows < 2:
        return 0.0
    repeats, same = repeats_in(labels).double(), 0.0
    if shares is None:
        shares, same = shares_in(labels, classes), 1 / (rows.double() if is_tracing() else rows)
    if is_tracing():
        pairs = (rows - 1).clamp_min(1).double()
        return persistence(repeats / pairs, shares, pairs, 0.0, same)
    return persistence(float(repeats) / (rows - 1), shares, rows - 1, 0.0, same)


def repeats_in(labels: Tensor) -> Tensor:
    """How many images of a batch have the label (B,) of the one before; 0-dimensional."""
    return (rows_before(labels.new_full((), NOBODY), labels) == labels).sum()


def shares_in(labels: Tensor, classes: int) -> Tensor:
    """Shares (C,) of the labels (B,) of a batch; in a graph too, which has no ``bincount``."""
    every = torch.arange(classes, device=labels.device)
    return (labels[:, None] == every).double().mean(0)


def ranges_of(parts: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """The ``integer_ranges`` of several parts, by the names that they have in a component."""
    return {
        f"{key}.{name}": bounds
        for key, part in parts.items()
        for name, bounds in part.integer_ranges().items()
    }


class LabelRuns(nn.Module):
    """Averages of predicted labels and of their repeats, from which their persistence follows.

    Repeats are averaged over two spans, and the smaller average counts: where a stream has changed,
    the long one is too large for a while.

    Args:
        classes: C.
        horizon: Images over which shares and repeats are averaged.
        recent: Images over which repeats are averaged a second time.
        doubt: Standard errors by which repeats must exceed chance.
        early: Whether few images are enough to see runs of: what an image has in common with itself
            is left out of the chance of a repeat then.
    """

    shares: Tensor  # (C,) of predicted labels
    repeats: Tensor  # (2,), over the horizon and over recent images
    seen: Tensor  # (2,), share of each span that has been seen
    last: Tensor  # 0-dimensional, label predicted for the last image; -1 before the first

    def __init__(
        self,
        classes: int,
        horizon: int = HORIZON,
        recent: int = RECENT,
        doubt: float = DOUBT,
        early: bool = False,
    ) -> None:
        super().__init__()
        self.early = early
        self.classes, self.spans, self.doubt = classes, (horizon, recent), doubt
        wide = torch.float64
        self.register_buffer("shares", torch.full((classes,), 1 / classes, dtype=wide))
        self.register_buffer("repeats", torch.zeros(2, dtype=wide))
        self.register_buffer("seen", torch.zeros(2, dtype=wide))
        self.register_buffer("last", torch.tensor(NOBODY))

    def integer_ranges(self) -> dict[str, tuple[int, int]]:
        """Range of the last label."""
        return {"last": (NOBODY, self.classes - 1)}

    @torch.no_grad()
    def watch(self, labels: Tensor) -> None:
        """Take in the labels (B,) that were predicted for a batch, in the order of the stream."""
        device = self.shares.device
        spans = torch.stack([self.seen.new_full((), span) for span in self.spans])
        share = 1 - (1 - 1 / spans) ** count_rows(labels[:, None])
        self.seen += share * (1 - self.seen)
        share = share / self.seen  # an average of few images gives each of them more weight
        found = shares_in(labels, self.classes).to(device)
        self.shares += share[0] * (found - self.shares)
        before = rows_before(self.last, labels)
        known = before != NOBODY
        equal = (known & (before == labels)).sum().double() / known.sum().clamp_min(1)
        moved = share * (equal.to(device) - self.repeats)
        self.repeats += torch.where(known.any().to(device), moved, 0.0)
        self.last.copy_(labels[-1])

    @torch.no_grad()
    def pause(self) -> None:
        """The next labels are not those after the last ones."""
        self.last.fill_(NOBODY)

    @torch.no_grad()
    def forget(self) -> None:
        """Begin anew."""
        self.shares.fill_(1 / self.classes)
        self.repeats.zero_()
        self.seen.zero_()
        self.pause()

    def images(self) -> Any:
        """How many images the averages are of, at most the horizon; a tensor in a graph."""
        seen = self.seen[0]
        return (seen if is_tracing() else float(seen)) * self.spans[0]

    def persistence(self, doubt: float | None = None) -> Any:
        """Lambda in [0, 1), see :func:`persistence`; a tensor in a graph.

        Args:
            doubt: In place of that of all questions.
        """
        doubt = self.doubt if doubt is None else doubt
        repeats = self.repeats.min()
        repeats = repeats if is_tracing() else float(repeats)
        same = self._same() if self.early else 0.0
        return persistence(repeats, self.shares, self.images(), doubt, same)

    def concentration(self) -> float:
        """How far the labels are of one class: 0 where all are as frequent, 1 where they are equal.

        Labels that hardly ever change hide how long they stay.
        """
        together = float(self.shares.square().sum())
        return (together * self.classes - 1) / max(self.classes - 1, 1)

    def _same(self) -> Any:
        """Sum of the squared weights of images in their shares; 1 before the first."""
        if is_tracing():
            part = self.seen[0]
            found = (2 - part) / part / (2 * self.spans[0] - 1)  # infinite before the first
            return found.clamp_max(1.0)
        seen = float(self.seen[0])
        return min(1.0, (2 - seen) / seen / (2 * self.spans[0] - 1)) if seen else 1.0
