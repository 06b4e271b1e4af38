"""Whether an output rule does harm, seen without labels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tta.core.tracing import count_rows, is_tracing
from tta.parts.label_runs import LabelRuns, persistence_in, ranges_of, repeats_in
from tta.parts.spread import ENOUGH

__all__ = ["OutputWatch"]

# Images over which shares of labels, and their repeats, are averaged: where every batch is mixed
# little of runs is left, and elsewhere a domain that makes one class of many must not look like one
MIXED, APART = (1024, 256), (256, 96)
LEAST = 0.05  # persistence of the labels before the rule, above which there are runs
ALIKE = 0.8  # of the repeats in a batch, that images of one label must have had in common before
WHOLE = ENOUGH  # images of a batch that is judged by itself


class OutputWatch(nn.Module):
    """Compares the labels of a batch before and after an output rule.

    A rule that errs more than what it corrects gives fewer classes: on the bundled networks this
    held in 75 of 80 domains in which `adanpc` or `t3a` were a point behind, and in 4 of 36 in which
    they were ahead. So a rule is held back where the entropy of the labels after it is below that
    before.

    A rule for labels that come in runs (`lame`, `prior_correction`) has to give fewer classes. It
    takes whatever a batch shows more of for more frequent; where labels come in random order it
    corrects nothing but the model's own errors, towards the classes that these fall on. So it is
    held back unless labels repeat more often than chance explains, and where it has made one class
    of several. Then it leaves less of the runs than there was, or two images to which it gives one
    label had one label before less often than two neighbours have, which are of one class nearly
    always.

    Args:
        classes: C.
        skew: Whether the rule is for labels that come in runs.
        mixes: Whether statistics of batches hide most of the runs.
    """

    def __init__(self, classes: int, skew: bool, mixes: bool) -> None:
        super().__init__()
        self.classes, self.skew = classes, skew
        self.least = 0.0 if mixes else LEAST
        spans = MIXED if skew and mixes else APART
        self.before = LabelRuns(classes, *spans, early=True)
        self.after = LabelRuns(classes, *spans, early=True)

    def integer_ranges(self) -> dict[str, tuple[int, int]]:
        """Ranges of the last labels."""
        return ranges_of({"before": self.before, "after": self.after})

    @torch.no_grad()
    def holds_back(self, before: Tensor, after: Tensor, learning: bool) -> Any:
        """Whether the labels (B,) before the rule are the better ones; a tensor in a graph.

        Args:
            before: Labels that the model predicts.
            after: Those that the rule makes of them.
            learning: Whether the batch is to be remembered.
        """
        if learning:
            self.before.watch(before)
            self.after.watch(after)
        if not self.skew:
            fewer = _entropy(self.after.shares) < _entropy(self.before.shares)
            return fewer if is_tracing() else bool(fewer)
        if is_tracing():
            return self._in_graph(before, after)
        if self.before.persistence() <= self.least or bool(_merges(before, after)):
            return True
        if len(before) < WHOLE:
            return self.after.persistence(0.0) < self.before.persistence(0.0)
        return persistence_in(after, self.classes) < persistence_in(before, self.classes)

    def _in_graph(self, before: Tensor, after: Tensor) -> Tensor:
        """The same of a rule for labels in runs, by tensors alone."""
        small: Any = count_rows(before[:, None]) < WHOLE
        on_average = self.after.persistence(0.0) < self.before.persistence(0.0)
        here = persistence_in(after, self.classes) < persistence_in(before, self.classes)
        no_runs = self.before.persistence() <= self.least
        # Not by `where`, which onnxruntime does not have for bool.
        return no_runs | _merges(before, after) | (small & on_average) | (~small & here)


def _entropy(shares: Tensor) -> Tensor:
    """Entropy of shares (C,) of labels, in nats."""
    return torch.special.entr(shares).sum()


def _merges(before: Tensor, after: Tensor) -> Tensor:
    """Whether images of one label after a rule had one label before less often than neighbours."""
    rows: Any = count_rows(before[:, None])
    one = after[:, None] == after
    pairs = one.sum() - rows  # an image and itself are none
    same = (one & (before[:, None] == before)).sum() - rows
    # same / pairs < ALIKE * repeats / (rows - 1), where there are any
    return same * (rows - 1) < ALIKE * repeats_in(before) * pairs
