"""Persistence: labels that stay for a while, as a camera shows them, sharpen each other.

Ours, as the order of a stream is prior knowledge (RoTTA's correlated streams, arXiv 2303.13899),
from textbook parts: the forward-backward algorithm (Rabiner, 1989) for a hidden Markov model whose
label stays with probability lambda and else is drawn anew.

Many deployed streams show one class for a while, which breaks methods that take a batch for a fair
sample. Here it helps: how often the same label is predicted twice in a row, beyond what its share
in the stream explains, says how persistent labels are, and each prediction then leans on its
neighbours as far as that. On a stream in random order lambda is 0 and logits stay as they are, bit
for bit. No source data and no further forward pass are needed.

    q = share of y_t = y_{t-1},   s = sum_c m_c^2 for the shares m of predicted labels
    lambda = max(0, (q - s - k sqrt(s (1 - s) / n)) / (1 - s))
    p_t = lambda a_{t-1} + (1 - lambda) / C,   a_t = e_t p_t,   e_t = softmax(z_t / T)
    b_{t-1} = lambda e_t b_t + (1 - lambda) <e_t b_t>;   return log(e_t p_t b_t)

q, m are averages over about ``horizon`` images, n how many of these were seen, and k = ``doubt``
standard errors are taken off, so that chance is not taken for persistence. q is the smaller one of
two averages, over ``horizon`` and over ``recent`` images, since a change of the stream makes the
long one too large for a while. <.> is the mean over classes. The backward pass b covers the batch;
of earlier batches a is remembered. Images must come in the order of the stream, also within a
batch. T > 1 holds back predictions that are too sure of themselves.

It suits streams whose classes come in runs. It does nothing for a stream that shows one class for
longer than the horizon, which looks like a model that has collapsed.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from tta.core.prediction import Prediction
from tta.core.registry import register
from tta.methods._label_filter import LabelFilter, LabelFilterConfig

__all__ = ["Persistence", "PersistenceConfig"]


@dataclass(frozen=True, kw_only=True)
class PersistenceConfig(LabelFilterConfig):
    """Fields of ``persistence``."""


@register("persistence")
class Persistence(LabelFilter):
    """Predictions that lean on their neighbours, as far as labels are seen to stay."""

    Config = PersistenceConfig

    def correct(self, prediction: Prediction) -> Tensor:
        """Return the logits (B, C), or what the images say together where labels stay."""
        return self.filter(prediction.logits)
