"""What ``persistence`` and ``drift`` share: a filter of labels that stay for a while."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from tta.core.checks import LARGE, LARGEST, number, whole_number
from tta.core.component import Context
from tta.core.config import ComponentConfig
from tta.core.output_rule import Output
from tta.core.prediction import Report
from tta.core.tracing import is_tracing, scan
from tta.parts.label_runs import DOUBT, HORIZON, RECENT, LabelRuns

__all__ = ["LabelFilter", "LabelFilterConfig", "filtered"]


@dataclass(frozen=True, kw_only=True)
class LabelFilterConfig(ComponentConfig):
    """Fields of the filter."""

    temperature: float = 2.0  # T; above 1, a prediction leans on its neighbours more
    horizon: int = HORIZON  # images over which the shares of labels are averaged
    recent: int = RECENT  # images over which repeats of labels are averaged a second time
    doubt: float = DOUBT  # k, standard errors by which repeats must exceed chance

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


def filtered_in_graph(probs: Tensor, before: Tensor, stay: Tensor) -> tuple[Tensor, Tensor]:
    """As :func:`filtered`, by loops that a graph can hold."""
    jump = (1 - stay) / probs.shape[1]

    def forward(belief: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
        message = stay * belief + jump
        joint = seen * message
        return joint / joint.sum(), message

    def backward(later: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
        joint = seen * later
        joint = stay * joint + jump * joint.sum()
        return joint / joint.sum(), later.clone()

    belief, messages = scan(forward, before, probs)
    _, later = scan(backward, torch.ones_like(before), probs, reverse=True)
    return messages * later, belief


class LabelFilter(Output):
    """Filters predictions over the order of a stream; see :mod:`tta.methods.persistence`.

    Args:
        config: The component's config.
        context: What is known at wrap.
    """

    counts_images: ClassVar[bool] = True
    harm: ClassVar[str] = ""

    belief: Tensor  # (C,), a after the last image

    def __init__(self, config: Any, context: Context) -> None:
        super().__init__(config, context)
        classes = context.num_classes
        self.runs = LabelRuns(classes, config.horizon, config.recent, config.doubt)
        even = torch.full((classes,), 1 / classes, dtype=torch.float64)
        self.register_buffer("belief", even)
        context.signs.runs = self.runs

    def integer_ranges(self) -> dict[str, tuple[int, int]]:
        """Range of the last label."""
        return {f"runs.{name}": r for name, r in self.runs.integer_ranges().items()}

    def filter(self, logits: Tensor) -> Tensor:
        """Return the logits (B, C), or what the images say together where labels stay."""
        if self.learning:
            self.runs.watch(logits.detach().argmax(1))
        stay = self.runs.persistence()
        if is_tracing():
            return self._traced(logits, stay)
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

    def _traced(self, logits: Tensor, stay: Tensor) -> Tensor:
        """As :meth:`filter`, in a graph."""
        scaled = logits.float() / self.config.temperature
        messages, belief = filtered_in_graph(scaled.double().softmax(1), self.belief.double(), stay)
        if self.learning:
            self.belief.copy_(torch.where(stay == 0, 1 / len(self.belief), belief))
        together = scaled + messages.log().to(scaled.dtype)
        return torch.where(stay == 0, logits.float(), together)
