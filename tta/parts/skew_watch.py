"""Whether an output rule that supposes skewed labels does what it is for, seen without labels."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tta.parts.label_runs import LabelRuns, persistence_in

__all__ = ["SkewWatch"]

LONG, RECENT = 1024, 256  # images over which shares of labels, and their repeats, are averaged
WHOLE = 48  # images of a batch that is judged by itself
ONE_CLASS = 0.5  # sum of squared shares in a batch from which one class hides runs


class SkewWatch(nn.Module):
    """Compares labels before and after a correction that suits classes which come in runs.

    Such a rule takes whatever a batch shows more of for more frequent. Where labels come in random
    order it corrects nothing but the model's own errors, towards the classes that these fall on. So
    it is held back unless labels repeat more often than chance explains, and where it leaves less
    of the runs than there was: then it has made one class of several.

    Args:
        classes: C.
        least: Persistence of the labels before the correction, above which there are runs.
    """

    def __init__(self, classes: int, least: float) -> None:
        super().__init__()
        self.classes, self.least = classes, least
        self.before = LabelRuns(classes, LONG, RECENT, early=True)
        self.after = LabelRuns(classes, LONG, RECENT, early=True)

    def integer_ranges(self) -> dict[str, tuple[int, int]]:
        """Ranges of the last labels."""
        both = {"before": self.before, "after": self.after}
        return {f"{key}.{n}": r for key, v in both.items() for n, r in v.integer_ranges().items()}

    @torch.no_grad()
    def holds_back(self, before: Tensor, after: Tensor, learning: bool) -> bool:
        """Whether the labels (B,) before the correction are the better ones.

        Args:
            before: Labels that the model predicts.
            after: Those that the correction makes of them.
            learning: Whether the batch is to be remembered.
        """
        if learning:
            self.before.watch(before)
            self.after.watch(after)
        if self.before.persistence() <= self.least:
            return True
        shares = torch.bincount(before, minlength=self.classes).double() / len(before)
        if len(before) < WHOLE or float(shares.square().sum()) > ONE_CLASS:
            return self.after.persistence(0.0) < self.before.persistence(0.0)
        return persistence_in(after, self.classes) < persistence_in(before, self.classes)
