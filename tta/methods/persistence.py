"""Persistence: labels that stay for a while, as a camera shows them, sharpen each other.

Ours, from textbook parts: the forward-backward algorithm (Rabiner, 1989) for a hidden Markov model
whose label stays with probability lambda and else is drawn anew.

Many deployed streams show one class for a while, which breaks methods that take a batch for a fair
sample. Here it helps: how often the same label is predicted twice in a row, beyond what its share
in the stream explains, says how persistent labels are, and each prediction then leans on its
neighbours as far as that. On a stream in random order lambda is 0 and logits stay as they are, bit
for bit. No source data and no further forward pass are needed.

    q = share of y_t = y_{t-1},   s = sum_c m_c^2 for the shares m of predicted labels
    lambda = max(0, (q - s - k sqrt(s (1 - s) / n)) / (1 - s))
    p_t = lambda a_{t-1} + (1 - lambda) / C,   a_t = e_t p_t,   e_t = softmax(z_t / T)
    b_{t-1} = lambda e_t b_t + (1 - lambda) <e_t b_t>;   return log(e_t p_t b_t)

q, m are averages over about ``horizon`` images, n how many of these were seen, and k =
``doubt`` standard errors are taken off, so that chance is not taken for persistence. q is the
smaller one of two averages, over ``horizon`` and over ``recent`` images, since a change of the stream
makes the long one too large for a while. <.> is the mean over classes. The backward pass b covers
the batch; of earlier batches a is remembered. Images must come in the order of the stream, also
within a batch. T > 1 holds back predictions that are too sure of themselves.

It suits streams whose classes come in runs. It does nothing for a stream that shows one class for
longer than the horizon, which looks like a model that has collapsed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tta.core.checks import LARGE, LARGEST, number, whole_number
from tta.core.component import Context
from tta.core.config import ComponentConfig
from tta.core.output_rule import Output
from tta.core.prediction import Prediction, Report
from tta.core.registry import register
from tta.parts.label_runs import LabelRuns

__all__ = ["Persistence", "PersistenceConfig", "filtered"]


@dataclass(frozen=True, kw_only=True)
class PersistenceConfig(ComponentConfig):
    """Fields of ``persistence``."""

    temperature: float = 2.0  # T; above 1, a prediction leans on its neighbours more
    horizon: int = 256  # images over which the shares of labels are averaged
    recent: int = 96  # images over which repeats of labels are averaged a second time
    doubt: float = 3.0  # k, standard errors by which repeats must exceed chance

    def __post_init__(self) -> None:
        super().__post_init__()
        number("temperature", self.temperature, 0, LARGE, above=True)
        whole_number("horizon", self.horizon, 1, LARGEST)
        whole_number("recent", self.recent, 1, LARGEST)
        number("doubt", self.doubt, 0, LARGE)


def filtered(probs: Any, before: Any, stay: float) -> tuple[Any, Any]:
    """The forward-backward algorithm for labels that stay or are drawn anew.

    Args:
        probs: Array (B, C), e.
        before: Array (C,), what was believed after the image before.
        stay: lambda.

    Returns:
        What the other images say of each, (B, C), and the belief after the last image (C,).
    """
    count, classes = probs.shape
    jump = (1 - stay) / classes
    messages, belief = np.empty_like(probs), before
    for t in range(count):
        messages[t] = stay * belief + jump
        belief = probs[t] * messages[t]
        belief = belief / belief.sum()
    later = np.ones(classes)
    for t in range(count - 2, -1, -1):
        seen = probs[t + 1] * later
        later = stay * seen + jump * seen.sum()
        later = later / later.sum()
        messages[t] *= later
    return messages, belief


@register("persistence")
class Persistence(Output):
    """Predictions that lean on their neighbours, as far as labels are seen to stay."""

    Config = PersistenceConfig

    belief: Tensor  # (C,), a after the last image

    def __init__(self, config: PersistenceConfig, context: Context) -> None:
        super().__init__(config, context)
        classes = context.num_classes
        self.runs = LabelRuns(classes, config.horizon, config.recent, config.doubt)
        even = torch.full((classes,), 1 / classes, dtype=torch.float64)
        self.register_buffer("belief", even)
        context.signs.runs = self.runs

    def integer_ranges(self) -> dict[str, tuple[int, int]]:
        """Range of the last label."""
        return {f"runs.{name}": r for name, r in self.runs.integer_ranges().items()}

    def correct(self, prediction: Prediction) -> Tensor:
        """Return the logits (B, C), or what the images say together where labels stay."""
        logits = prediction.logits
        if self.learning:
            self.runs.watch(logits.detach().argmax(1))
        stay = self.runs.persistence()
        self.report = Report(persistence=stay)
        if stay == 0:
            if self.learning:
                self.belief.fill_(1 / len(self.belief))
            return logits
        scaled = logits.float() / self.config.temperature
        probs = scaled.detach().double().softmax(1).cpu().numpy()
        messages, belief = filtered(probs, self.belief.double().cpu().numpy(), stay)
        if self.learning:
            self.belief.copy_(torch.from_numpy(belief))
        return scaled + torch.from_numpy(messages).log().to(scaled)
