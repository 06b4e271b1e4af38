"""Where statistics of batches do harm, so that the source should answer: a part of ``steady``.

They make every batch look mixed where classes come in runs, make nonsense of images beside others
that are far off, and are noise where they are of few images of many classes. The source model,
which is asked from time to time, shows each of these. See :mod:`tta.methods.steady`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tta.core.backbone import Backbone
from tta.core.component import Context
from tta.core.guard import Batch, Guard
from tta.parts.batch_noise import BatchNoise
from tta.parts.confidence_gap import ConfidenceGap
from tta.parts.label_runs import LabelRuns, persistence_in
from tta.parts.spread import ENOUGH
from tta.parts.teachers import OtherStatistics

__all__ = [
    "ALERT",
    "IN_RUNS",
    "NOT_ONE",
    "NO_RUNS",
    "ROUND",
    "STILL_SURE",
    "SURE",
    "SURER",
    "TREND",
    "TRIED",
    "StatisticsWatch",
    "rows_of",
]
RUNS, NO_RUNS = 0.05, 0.01  # persistence of labels from which, and below which, there are (no) runs
# Standard errors by which the source must show more, and go on to; the latter also on large batches
SURE, STILL_SURE = 4.0, 2.0
LEFT, LEFT_LATER = 0.9, 0.6  # of the source's persistence, that the adapted model must show
SURER, LEFT_SURER = 0.02, 0.4  # the same where the norm rule makes predictions so much surer
UNSURE, APART = -0.1, 0.4  # d, and agreement with the source over its confidence, if spoilt
SURE_OF = 0.4  # confidence of the source, from which agreement with it tells anything
LESS_SURE = -0.3  # d, below which noise of statistics is taken for harm
# Images of a batch whose halves have statistics of their own: one image alone has the source's.
HALVED = 4
ONE_CLASS, NOT_ONE = 0.25, 0.125  # concentration of labels, in [0, 1], that hides runs, and not
SHOWN = 0.4  # of the persistence of labels, in the predictions of a fair model
TRIED, ROUND = 6, 32  # of so many rows of images, in how many the adapted model is tried
FAR = 0.3  # of the persistence, that the source must show more by the shares of many batches
SHORT = 0.1  # of the persistence, that an update may lack where no batch statistics are taken
ALERT, LONG = 16, 1024  # batches on alert; images over which runs are seen without a pass
SOON = 4  # rows until then, where one class hides runs of labels, or statistics are noise
SEEN = 56  # images, counted as averages do; runs of labels are seen among so many
LONGER = 192  # images, of several domains, before those of a batch are taken for too unlike
IN_RUNS = "labels come in runs"
ONE = "one class is seen, of which the source is surer"
SPOILT = "the norm rule makes nonsense of the images"
HARM = "statistics of batches did harm a moment ago"
NOISY = "statistics are of too few images, or of images that are unlike"
ROW = ENOUGH  # images in a row of which the source is asked
TREND = 768  # images over which an update is behind, or ahead again, or has gone well


class StatisticsWatch(Guard):
    """A guard that knows where the source errs less than what normalises by other images.

    And, on networks where nothing does, where an update hides runs of labels by itself.
    """

    age: Tensor  # 0-dimensional, batches that were judged since learning began
    alert: Tensor  # 0-dimensional, batches left on which the source is asked for runs
    runs_seen: Tensor  # 0-dimensional bool: the source answers, as statistics of batches do harm
    wary: Tensor  # 0-dimensional bool: the source has answered for such a reason before
    unseen: Tensor  # 0-dimensional, batches by which the adapted model's averages are further on

    def __init__(self, config: Any, network: Backbone, context: Context) -> None:
        super().__init__(config, network, context)
        for name in ("age", "alert"):
            self.register_buffer(name, torch.zeros((), dtype=torch.int64))
        for name in ("runs_seen", "wary"):
            self.register_buffer(name, torch.zeros((), dtype=torch.bool))
        classes = context.num_classes
        self.runs = LabelRuns(classes, early=True)  # as the source predicts
        self.own = LabelRuns(classes, early=True)  # as the adapted model does, of the same images
        self.shown = LabelRuns(classes, LONG, LONG // 2, early=True)  # as it does, of all images
        self.surer = ConfidenceGap()  # the source's parameters under the norm rule, than the source
        self.noise = BatchNoise()
        self.rules = tuple(w.rule for w in network.wrappers[:1])  # not a module of the guard
        self.trains = bool(context.parameters)
        self.mixes = bool(network.wrappers)  # images are normalised by what was seen of others
        # Averages over batches belong to the weights that moved them: the source's have their own.
        own = any(rule.state_dict() and not rule.learns_apart for rule in self.rules)
        self.averages = OtherStatistics(network) if self.trains and own else None
        if self.averages is not None:
            self.register_buffer("unseen", torch.zeros((), dtype=torch.int64))

    def after_return(self) -> None:
        """Begin with the same averages over batches as the adapted model."""
        if self.averages is not None:
            self.averages.follow()
            self.unseen.zero_()

    def _anchor(self, batch: Batch) -> Tensor:
        """Logits (B, C) of the source's parameters under the norm rule, with their own averages.

        Of the source model, on networks where no norm rule acts; the answer as it is, where nothing
        is trained.
        """
        if not self.mixes:
            return batch.source_of_input().logits
        if not self.trains:
            assert batch.prediction is not None
            return batch.prediction.logits
        if self.averages is None or not batch.learning:
            return batch.anchor(self.averages).logits
        batches = int(self.unseen)
        self.unseen.zero_()
        return batch.anchor(self.averages, batches).logits

    def _see(self, batch: Batch, anchor: Tensor, source: Tensor) -> None:
        """Take in what the source's parameters say under the norm rule, and the source model."""
        self.surer.see(anchor, source)
        count = len(batch.images)
        alone = count == self.rules[0].mixed_images(count)  # statistics are of this batch alone
        args, kwargs = self.network.arguments  # a tensor may have a row for each image of the batch
        whole = any(isinstance(a, Tensor) for a in (*args, *kwargs.values()))
        if alone and not whole and count >= HALVED:
            halves = batch.anchor_in_halves()
            self.noise.see(anchor, halves, source)

    def _is_alert(self, own: Tensor) -> bool:
        """Whether the source is asked on this batch, whose labels ``own`` (B,) may come in runs."""
        self.shown.watch(own)
        before = int(self.alert)
        left = ALERT if self.shown.persistence() > 0 else max(before - 1, 0)
        self.alert.fill_(left)
        if before == 0:  # the source's last labels were not those of the batch before this one
            self.runs.pause()
            self.own.pause()
        return max(before, left) > 0

    def _shows_less(self, own: Tensor, source: Tensor) -> bool:
        """Whether there are runs, and the source's labels (B,) of this very batch show more."""
        if max(self.shown.persistence(), self.runs.persistence(STILL_SURE)) <= RUNS:
            return False
        self.alert.fill_(ALERT)
        short = 0.0 if self.mixes else SHORT
        classes = self.context.num_classes
        mine, its = (persistence_in(y, classes) for y in (own, source))
        if mine + short < its:
            return True
        # By its own shares a batch of one class shows no run; by those of many batches it does.
        mine = persistence_in(own, classes, self.own.shares)
        return mine + FAR < persistence_in(source, classes, self.runs.shares)

    def _too_early(self, count: int) -> bool:
        """Whether runs of labels would do harm, and too few images were seen to know of any."""
        return self.rules[0].mixed_images(count) < ROW and self.runs.images() < SEEN

    def _one_class(self) -> bool:
        """Whether nearly all images are of one class, as far as the source can tell."""
        return self.runs.concentration() > ONE_CLASS

    def _spoilt(self) -> bool:
        """Whether the norm rule makes nonsense of the images, as beside frames of a broken camera.

        A network of 1,000 classes may be less sure under batch statistics, but it says the same as
        often as the source's confidence lets one expect.
        """
        agreed, expected = self.surer.agreement(), self.surer.expected()
        far_apart = self.surer.mean() < UNSURE and agreed < APART * expected
        # Of a source that is sure of nothing, few labels agree by whatever norm rule.
        return far_apart and expected > SURE_OF and self.runs.images() >= SEEN

    def _noisy(self) -> bool:
        """Whether statistics are of too few images, or of images too unlike, to do good."""
        few = self.surer.mean() < LESS_SURE and self.noise.harmful(SEEN)
        return few or self.noise.unlike(LONGER)

    def _why(self) -> str:
        """Why the source answers until there is less doubt."""
        if self.runs.persistence() > RUNS:
            return IN_RUNS
        if self._one_class():
            return ONE
        if self._noisy():
            return NOISY
        return SPOILT if self._spoilt() else HARM

    def _in_doubt(self) -> bool:
        """Whether batch statistics may do harm on this stream."""
        in_runs = self.runs.persistence() > RUNS
        return in_runs or self._one_class() or self._spoilt() or self._noisy()

    def _harmful(self, count: int, doubt: float) -> bool:
        """Whether the adapted model shows less of the runs of labels than the source.

        Where one class hides them, whether the norm rule makes predictions less sure. Nonsense and
        noise are harm without any runs.
        """
        alone = self._one_class() and self.runs.images() >= SEEN and self.surer.mean() < 0
        if alone or self._spoilt() or self._noisy():
            return True
        if rows_of(count) == 1 and not bool(self.runs_seen):  # the better of both answers each
            return False
        mixed = self.rules[0].mixed_images(count)
        lost = min(SHOWN / (mixed - 1), RUNS) if mixed > 1 else 0.0
        later = bool(self.runs_seen) or int(self.age) * count >= TREND
        left = LEFT_LATER if later else LEFT
        if self.surer.mean() > SURER:
            left = LEFT_SURER
        return self.own.persistence(0.0) + lost < left * self.runs.persistence(doubt)

    def _hidden(self, count: int) -> bool:
        """Whether an update hides runs by itself, in small batches without batch statistics."""
        its = self.runs.persistence(SURE)
        return rows_of(count) > 1 and its > RUNS and self.own.persistence(0.0) + SHORT < its

    def _wait_to_try(self, block: int) -> None:
        """Begin to count rows of images until the adapted model is tried."""
        sooner = self._one_class() or self._noisy()
        self.age.fill_((ROUND - TRIED - SOON) * block if sooner else 0)

    def _tries(self, count: int) -> bool:
        """Whether the adapted model is tried on this batch while the source answers."""
        return int(self.age) // rows_of(count) % ROUND >= ROUND - TRIED


def rows_of(count: int) -> int:
    """How many batches of so many images have a row."""
    return -(-ROW // count)
