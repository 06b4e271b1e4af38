"""Auto: a recipe for streams of which nothing is known.

Ours; its parts go back to RoTTA (arXiv 2303.13899) and NEO (arXiv 2510.05635).

``tta.wrap(model, "auto")`` trains no parameter, so nothing can diverge, and makes one forward pass
an image. Each of its parts acts as far as the stream shows that it should:

* ``adaptive_bn`` in networks with BatchNorm: statistics of the batch where classes are mixed, slow
  averages where they come in runs, the source's where images look like the source's;
* ``drift`` in the output slot: features move back to the source's mean, where ``source=`` says what
  that is, and labels that come in runs sharpen each other;
* this guard, which compares with the source model. Where predictions show fewer classes than the
  source's do on the same images, by ``margin`` ln C, everything goes back to the start, and the
  source answers for ``pause`` batches, twice as many every time.

What was left out and why: in the benchmark of record every update of parameters is above the source
on some stream, and with ``adaptive_bn`` and ``drift`` below it the best ones add half a point on
networks with BatchNorm.

Statistics of one class make its images look mixed, so that what the adapted model predicts does not
show the runs. So the source's predictions are watched too, and where they come in runs the norm
rule is told.

Where they are nearly all of one class they show no runs. There the rule is told where the source is
the surer model of the two (Guillory et al., ICCV 2021, arXiv 2107.03315, on what confidence says of
accuracy).

The source is asked on the first batches and on every ``every``-th, which makes ``1 + 1 / every``
forward passes an image; a ``budget`` below that leaves the comparison out. In a network without
BatchNorm nothing that the guard compares can move, and it makes no passes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tta.core.backbone import Backbone
from tta.core.checks import LARGE, LARGEST, number, whole_number
from tta.core.component import Context
from tta.core.config import ComponentConfig
from tta.core.guard import LEARN, Batch, Guard, Verdict
from tta.core.prediction import Prediction
from tta.core.registry import register
from tta.parts.confidence_gap import ConfidenceGap
from tta.parts.estimates import ConfidenceEstimate, confidence_accuracy
from tta.parts.label_runs import LabelRuns, ranges_of
from tta.parts.spread import SpreadGap

__all__ = ["Auto", "AutoConfig"]

EARLY = (0, 1, 2, 4, 8, 16)  # batches on which the source is asked too
LONGEST = 4096  # batches of a pause
ROW = 8  # images in a row of which the source is asked, if batches are smaller
RUNS = 0.05  # persistence of labels from which they count as coming in runs
ENOUGH = 192  # images without runs after which they have ended
CALM_DOUBT = 1.0  # standard errors by which repeats may then exceed chance
LAST = 64  # images by which one class is told
SEEN = 24  # of them, at least, counted as averages do
PAUSE = "a pause after a failure"
ONE = "one class is seen, of which the source is surer"
LESS_SURE = 0.05  # by how much the adapted model is less sure of one class than the source
ONE_CLASS = 0.2  # concentration of the source's labels from which it may be one class


@dataclass(frozen=True, kw_only=True)
class AutoConfig(ComponentConfig):
    """Fields of ``auto``."""

    budget: float = 2.5  # forward passes an image, 1 to 4
    margin: float = 0.1  # of ln C, by which the mean prediction may fall behind the source's
    every: int = 20  # batches between comparisons
    pause: int = 32  # batches that the source answers after the first failure

    def __post_init__(self) -> None:
        super().__post_init__()
        number("budget", self.budget, 1, 4)
        number("margin", self.margin, 0, LARGE)
        whole_number("every", self.every, 1, LARGEST)
        whole_number("pause", self.pause, 1, LARGEST)


class AnswerConfidence(ConfidenceEstimate):
    """From the confidence of the answers, which cannot collapse as nothing is trained."""

    def estimate(self, batch: Batch, prediction: Prediction) -> Tensor:
        """Compare the confidence of the answer, or of another prediction, with the source's."""
        own = prediction is batch.prediction and batch.scores is not None
        logits = batch.scores if own else prediction.logits
        assert logits is not None
        return confidence_accuracy(logits.detach(), self.accuracy, self.confidence, 1.0)


@register("auto")
class Auto(Guard):
    """Hands over to the source where statistics that moved have made predictions poorer."""

    Config = AutoConfig
    counts_images: ClassVar[bool] = True
    companions: ClassVar[dict[str, str]] = {"norm": "adaptive_bn", "output": "drift"}
    cost = 0.1

    age: Tensor  # 0-dimensional, batches since the start or the last pause
    hold: Tensor  # 0-dimensional, batches left of the pause
    pause: Tensor  # 0-dimensional, length of the next pause
    runs_seen: Tensor  # 0-dimensional bool: the source's labels come in runs

    def __init__(self, config: AutoConfig, network: Backbone, context: Context) -> None:
        super().__init__(config, network, context)
        for name, value in (("age", 0), ("hold", 0), ("pause", config.pause)):
            self.register_buffer(name, torch.tensor(value))
        self.register_buffer("runs_seen", torch.zeros((), dtype=torch.bool))
        self.last = LabelRuns(context.num_classes, horizon=LAST, early=True)
        self.surer = ConfidenceGap(LAST)  # the adapted model, than the source
        self.runs = LabelRuns(context.num_classes)
        self.signs = context.signs
        context.signs.source = self
        self.gap = SpreadGap(context.num_classes)
        self.estimator = AnswerConfidence()
        self.compares = bool(network.wrappers) and config.budget >= 1 + 1 / config.every

    def integer_ranges(self) -> dict[str, tuple[int, int]]:
        """Range of the last label that the source predicted."""
        return super().integer_ranges() | ranges_of({"runs": self.runs, "last": self.last})

    def admit(self, batch: Batch) -> Verdict:
        """Let the source answer in a pause."""
        if int(self.hold) > 0:
            return Verdict(action="source", reason=PAUSE)
        return LEARN

    def hands_over(self) -> str | None:
        """Why the source goes on to answer where the adapter was frozen in a pause."""
        return PAUSE if int(self.hold) > 0 else None

    def judge(self, batch: Batch) -> Verdict:
        """Compare with the source, if it is time."""
        if not batch.learning:
            reason = self.hands_over()
            return LEARN if reason is None else Verdict(action="source", reason=reason)
        if int(self.hold) > 0:
            self.hold -= 1
            return LEARN
        age = int(self.age)
        self.age += 1
        if not self._due(age, len(batch.images)):
            return LEARN
        assert batch.prediction is not None
        if (verdict := self._runs(batch)) is not None:
            return verdict
        self.gap.see(batch.prediction.logits, batch.source().logits)
        behind = -self.gap.mean()
        if behind <= self.config.margin * math.log(self.context.num_classes):
            return LEARN
        self.hold.copy_(self.pause)
        self.pause.mul_(2).clamp_(max=LONGEST)
        self.age.zero_()
        self.gap.forget()
        reason = f"{behind:.2f} nats fewer classes than the source"
        return Verdict(action="reset", reason=reason, answer=batch.source().logits)

    def _one_class(self) -> bool:
        """Whether the source's labels are nearly all of one class, and it is the surer model.

        Statistics of one class spread its images over all classes, of which none is sure. Where the
        source has collapsed, which looks the same in its labels, the adapted model is the surer.
        """
        known = self.last.images() >= SEEN and self.last.concentration() > ONE_CLASS
        return known and self.surer.mean() < -LESS_SURE

    def _due(self, age: int, count: int) -> bool:
        """Whether the source is asked; of small batches a few in a row, to compare their labels."""
        block = -(-ROW // count)
        place = age // block
        if not self.compares or (place not in EARLY and place % self.config.every):
            return False
        if age % block == 0:
            self.runs.pause()
        return True

    def _runs(self, batch: Batch) -> Verdict | None:
        """Tell the norm rule when the source's labels come in runs, and when they do no longer.

        Statistics of one class make its images look mixed, so that their own predictions would not
        show it. Under slow averages they do.
        """
        assert batch.prediction is not None
        source = batch.source().logits
        self.runs.watch(source.argmax(1))
        self.last.watch(source.argmax(1))
        self.surer.see(batch.prediction.logits, source)
        own = self.signs.runs
        if own is None:
            return None
        if not bool(self.runs_seen):
            if own.persistence() > RUNS:  # the norm rule knows
                return None
            if self._one_class():
                reason = ONE
            elif self.runs.persistence() > RUNS:
                reason = "labels of the source come in runs"
            else:
                return None
            self.runs_seen.fill_(True)
            return Verdict(action="reset", reason=reason, answer=source)
        if own.images() > ENOUGH and own.persistence(CALM_DOUBT) == 0:
            self.runs_seen.fill_(False)
            self.age.zero_()  # one class may go on, and shows as little of runs
            for average in (self.runs, self.last, self.surer):
                average.forget()
        return None
