"""The pass by which a method chooses samples, and the logits of those that it has chosen.

A method that learns from some samples of a batch writes three lines::

    selection = self.selection_pass(x)
    count = selection.keep(entropy(selection.logits) < margin)
    loss = entropy(selection.kept_logits()).mean()

How this is computed is decided here. A backward pass costs the same for every row, whether it is in
the loss or not. Where no row depends on another and few are kept, these alone go through the model
again: the same gradient, up to rounding, for less. This depends on the batch at hand and on nothing
else. What depends on the batch before is only whether the first pass records a graph, which costs a
fifth of a pass and is not needed when few rows are kept. Where none was recorded and many rows are
kept, the whole batch goes through the model again, so that no result depends on the guess.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tta.core.backbone import Backbone
from tta.core.compiled import is_compiled
from tta.core.component import Remembers
from tta.core.prediction import Prediction

__all__ = ["RowSelector", "SelectionPass"]

# A kept row costs a forward and a backward of its own, about 2.3 forwards; the backward of the
# whole batch, about 1.3, whether one row or all of them are in the loss.
FEW = 0.55  # share of kept rows below which these go through the model again

# Modules whose results differ in the last digits where no gradient is asked for.
DIFFERENT_WITHOUT_GRAPH = (nn.MultiheadAttention, nn.TransformerEncoderLayer)


class RowSelector(Remembers):
    """Makes the selection passes of one update.

    Args:
        network: The wrapped model.
        rows_independent: Whether no image affects the logits of another.
    """

    def __init__(self, network: Backbone, rows_independent: bool) -> None:
        self.network = network
        self._rows_independent = rows_independent
        self.may_guess = rows_independent and not any(
            isinstance(m, DIFFERENT_WITHOUT_GRAPH) or is_compiled(m)
            for m in network.model.modules()
        )
        self.expect_few = False  # whether few rows were kept in the batch before

    @property
    def rows_independent(self) -> bool:
        """Whether rows may go through the model alone."""
        return self._rows_independent and not self.network.buffers.moving

    def __call__(self, x: Tensor) -> SelectionPass:
        """Run one forward pass of ``x`` (B, ...)."""
        graph = torch.is_grad_enabled() and not (self.may_guess and self.expect_few)
        with torch.set_grad_enabled(graph):
            return SelectionPass(self, x, self.network(x))


class SelectionPass:
    """A batch that has gone through the model, and which of its rows are learned from.

    Args:
        selector: The selector that made it.
        x: The batch (B, ...).
        prediction: Prediction for the whole batch, with or without a graph.
    """

    def __init__(self, selector: RowSelector, x: Tensor, prediction: Prediction) -> None:
        self.selector = selector
        self.x = x
        self.prediction = prediction
        self.rows = torch.ones(len(x), dtype=torch.bool, device=x.device)
        self.count = len(x)

    @property
    def logits(self) -> Tensor:
        """Logits (B, C) of the whole batch, without gradient."""
        return self.prediction.logits.detach()

    def keep(self, rows: Tensor) -> int:
        """Keep the rows in the mask (B,), and return how many these are."""
        self.rows, self.count = rows, int(rows.sum())
        self.selector.expect_few = self._few
        return self.count

    def kept_logits(self) -> Tensor:
        """Logits (N, C) of the kept rows, with a graph."""
        if self._few and self.selector.rows_independent:
            return self.again()
        if self.prediction.logits.requires_grad:
            return self.prediction.logits[self.rows]
        return self.selector.network(self.x).logits[self.rows]

    def again(self) -> Tensor:
        """Logits (N, C) of the kept rows in a new pass, with the weights as they are now.

        Where rows depend on each other (batch statistics), the whole batch goes through the model.
        """
        if self.selector.rows_independent:
            return self.selector.network(self.x[self.rows]).logits
        return self.selector.network(self.x).logits[self.rows]

    @property
    def _few(self) -> bool:
        return self.count < FEW * len(self.x)
