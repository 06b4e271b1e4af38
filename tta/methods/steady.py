"""Steady: a guard that compares an update with the source while both see the same images.

Ours. What it looks at is what resets by concentration look at (ASR, Lim, Hwang, Lee, ICLR 2026, the
successor of RDumb, arXiv 2306.05401), but as a difference between two predictions of one batch
instead of a threshold.

An update that begins to fail predicts fewer classes, on whatever stream. How many classes a batch
shows depends on the stream, so the entropy of the mean prediction says little by itself; the
difference to what the source's parameters say of the same images does. In the benchmark of record
an update was behind the source where this difference was below zero, and ahead where it was above,
on networks of all norm layers.

    g = H(mean_b p_b) - H(mean_b p_b'),   p' by the source's parameters under the same norm rule
    averaged g < -margin ln C, and below 0 over ``TREND`` images: the update has fallen behind

To the longer average g counts as ``AHEAD`` ln C at most: a loss that asks for many classes, as that
of ``shot_im``, shows far more of them than there are, and would live on this when it fails.

Some updates fall behind at first and are far ahead later, and nobody can tell these from the others
when it happens. So an update that has fallen behind goes on beside the source: it learns, and the
source's parameters answer. Once g is above 0 over ``TREND`` images its own answers are given again.
If that takes more than two pauses it goes back to the reset point, and nothing is learned for
``pause`` batches. The pause doubles with every such failure, and halves when learning has gone well
for four pauses.

The source's parameters are asked on eight of the first 16 batches after learning began and on every
``every``-th from then on: 4 % of the cost of an update that makes a forward and a backward pass. Of
batches below ``ROW`` images as many as have these are asked in a row, and count as one. Norm rules
that average over batches have averages of their own for them, since those of the learned weights
make nonsense of theirs; between two questions they move as far as the others. While the source's
parameters answer they are asked on every batch, and after a failure on every second.

Batch statistics fail in another way, where classes come in runs: they make every batch look mixed.
There the source model itself is asked from time to time, for some images in a row, and its
predictions show the runs (see ``persistence``). How much of the persistence of labels a model shows
is about the square of its accuracy. So the adapted model does harm where it shows less than the
source,

    l' + SHOWN / (n - 1) < LEFT l

in batches below ``ROW`` images, with l less ``SURE`` standard errors. The second term is what
taking the mean of n images off them takes from l', where n is how many the norm rule takes
statistics of; it is at most ``RUNS``, since more would hide any. Then the source answers and
nothing is learned, until no runs are left in ``CALM`` images, or until the adapted model, which is
tried beside it now and then, shows as much of them. Once an update has gone well for ``TREND``
images, ``LEFT_LATER`` stands for ``LEFT``, so that chance does not end it, and ``STILL_SURE`` for
``SURE`` while the source answers and ever after. Among the first 64 images runs cannot be told from
chance, so the source answers these where batches are smaller than ``ROW``, and the update learns
beside it; larger ones show by themselves what they are. In a pause all this goes on.

A batch of ``ROW`` images or more shows by itself whether it has runs. While there are any, the
source is asked on each of these, and where it shows more of the runs in the very batch (l' < l, or
much more by the shares of labels in many batches, where this one has one class), it answers, and
nothing that this batch moved is kept: which of the two is better changes with the domain. The
adapted model's own predictions say too that there are runs, and need no pass: batch statistics
leave little of runs, but over ``LONG`` images little is more than chance. In networks without
statistics of batches only an update can hide runs, and must do so by ``SHORT``; in small batches it
goes back to the start then, and a pause follows in which the source answers.

A second sign is whether the norm rule makes predictions surer. The source's parameters under it are
compared with the source model, since what has learned by entropy is sure of itself whether it errs
or not:

    d = mean_b max p_b' - mean_b max p_b''   (see ``ConfidenceGap``)

Where d > ``SURER``, ``LEFT_SURER`` stands for ``LEFT``. Where d < 0 and the source predicts nearly
one class, which hides runs, the source answers as above, and the adapted model is tried sooner.
Where d < ``UNSURE`` and the two agree on hardly any image, by what the source's confidence lets one
expect (``APART``), the norm rule makes nonsense of the images, as batch statistics do of those
beside frames of a broken camera, and the source answers too, unless its confidence is below
``SURE_OF``: then few labels agree by whatever rule. By itself d decides nothing: a network
of 1,000 classes is less sure under batch statistics of few images than it is right. Whether these
are of too few to be better than the source's is told by how many labels halves of the batch change,
whether they are of images too unlike each other by what halves do to the confidence (see
``BatchNoise``), and where they are, the source answers until they are not.

A step that was made of fewer than ``few`` images is taken back, and no other is made in the 4096
batches that follow: a gradient of one image is what breaks most updates.

It cannot see an update that turns one class into another as often as the reverse, nor one that was
worse from the first batch on with as many classes. Where the source is useless it still is what
everything is compared with.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from tta.core.backbone import Backbone
from tta.core.checks import LARGE, LARGEST, number, whole_number
from tta.core.component import Context
from tta.core.config import ComponentConfig
from tta.core.guard import LEARN, Batch, Verdict
from tta.core.registry import register
from tta.methods._statistics_watch import (
    ALERT,
    IN_RUNS,
    NO_RUNS,
    NOT_ONE,
    ROUND,
    STILL_SURE,
    SURE,
    SURER,
    TREND,
    TRIED,
    StatisticsWatch,
    rows_of,
)
from tta.parts.estimates import ConfidenceEstimate
from tta.parts.label_runs import ranges_of
from tta.parts.output_watch import OutputWatch
from tta.parts.spread import SpreadGap

__all__ = ["Steady", "SteadyConfig"]

EARLY = (1, 2, 3, 4, 6, 8, 12, 16)  # batches after learning began on which the update is compared
WARY = 2  # batches between comparisons after a failure
AHEAD = 0.1  # of ln C, by which an update may be ahead for that to count later
ALONE = 2.5  # margins by which a single batch must fall behind
LONGEST = 4096  # batches of a pause
BESIDE = 2  # pauses for which an update that fell behind may go on beside the source
# Images that must show no runs after some, and standard errors for chance: a source that errs on
# half of one class shows none either.
CALM, CALM_DOUBT = 128, 1.0
PAUSE = "a pause after a failure"
BESIDE_SOURCE = "learns beside the source, which shows more classes"
WITHOUT = "the output rule shows fewer classes, or less of their runs, or there are no runs"
FEWER = "nats fewer classes than the source"
EARLIEST = "too few images to tell whether labels come in runs"


@dataclass(frozen=True, kw_only=True)
class SteadyConfig(ComponentConfig):
    """Fields of ``steady``."""

    margin: float = 0.02  # of ln C, by which the mean prediction may fall behind
    source_margin: float = 0.1  # of ln C, the same for the source model with its own statistics
    every: int = 8  # batches between comparisons
    pause: int = 32  # batches without learning after the first failure
    few: int = 8  # images that a step must at least be made of

    def __post_init__(self) -> None:
        super().__post_init__()
        number("margin", self.margin, 0, LARGE)
        number("source_margin", self.source_margin, 0, LARGE)
        whole_number("every", self.every, 1, LARGEST)
        whole_number("pause", self.pause, 1, LONGEST)
        whole_number("few", self.few, 1, LARGEST)


@register("steady")
class Steady(StatisticsWatch):
    """Goes back to the source when an update predicts fewer classes than the source does."""

    Config = SteadyConfig
    wants_features = False
    cost = 0.1
    counts_images: ClassVar[bool] = True

    hold: Tensor  # 0-dimensional, batches left of the pause
    beside: Tensor  # 0-dimensional, batches left in which the update learns beside the source
    pause: Tensor  # 0-dimensional, length of the next pause
    images: Tensor  # 0-dimensional, since the last step
    source_ahead: Tensor  # 0-dimensional bool: the source model answers in the pause

    def __init__(self, config: SteadyConfig, network: Backbone, context: Context) -> None:
        super().__init__(config, network, context)
        self.estimator = ConfidenceEstimate()
        for name in ("hold", "beside", "pause", "images"):
            self.register_buffer(name, torch.zeros((), dtype=torch.int64))
        self.pause.fill_(config.pause)
        self.register_buffer("source_ahead", torch.zeros((), dtype=torch.bool))
        classes = context.num_classes
        self.gap = SpreadGap(classes)  # to the source's parameters
        self.trend = SpreadGap(classes, TREND, AHEAD * math.log(classes))  # over more images
        self.source_gap = SpreadGap(classes)  # to the source model, with its own statistics
        harm = context.harm
        self.output_watch = OutputWatch(classes, harm == "runs", self.mixes) if harm else None

    def integer_ranges(self) -> dict[str, tuple[int, int]]:
        """Range of the last labels that were predicted."""
        watching: dict[str, Any] = {"runs": self.runs, "own": self.own, "shown": self.shown}
        if self.output_watch is not None:
            watching["output_watch"] = self.output_watch
        return super().integer_ranges() | ranges_of(watching)

    def admit(self, batch: Batch) -> Verdict:
        """Let the source answer while labels come in runs, and hold learning back in a pause."""
        if bool(self.runs_seen) and not self._tries(len(batch.images)):
            return Verdict(action="source", reason=self._why())
        if int(self.hold) > 0:
            # What the norm rule does harm by goes on without learning.
            action = "source" if bool(self.source_ahead) else "skip"
            return Verdict(action=action, reason=PAUSE)
        return LEARN

    def judge(self, batch: Batch) -> Verdict:
        """Compare the batch's predictions with the source's, if it is time."""
        assert batch.prediction is not None and batch.scores is not None
        own = batch.prediction.logits
        if not batch.learning and (reason := self.hands_over()) is not None:
            # An update that is held back is compared with its own start, under the same statistics.
            answer = self._anchor(batch) if reason is BESIDE_SOURCE else None
            return Verdict(action="source", reason=reason, answer=answer)
        if self.output_watch is None or batch.scores is own:  # the source has answered already
            return self._judge(batch, own)
        held = self.output_watch.holds_back(own.argmax(1), batch.scores.argmax(1), batch.learning)
        verdict = self._judge(batch, own if held else batch.scores)
        if not held or verdict.answer is not None or verdict.action == "source":
            return verdict
        reason, alone = verdict.reason or WITHOUT, not (self.trains or self.mixes)
        if alone and verdict.action == "learn" and batch.original is None:
            return Verdict(action="source", reason=reason, answer=own)
        return replace(verdict, reason=reason, answer=own)

    def hands_over(self) -> str | None:
        """Why the source goes on to answer where it answered when the adapter was frozen."""
        if bool(self.runs_seen):
            return self._why()
        if int(self.hold) > 0 and bool(self.source_ahead):
            return PAUSE
        return BESIDE_SOURCE if int(self.beside) > 0 else None

    def holds_back(self, before: Tensor, after: Tensor) -> Tensor | None:
        """Whether the output rule does harm, as a frozen guard says.

        Args:
            before: Logits (B, C) before the output rule.
            after: Scores (B, C) after it.
        """
        if self.output_watch is None:
            return None
        return self.output_watch.holds_back(before.argmax(1), after.argmax(1), learning=False)

    def _judge(self, batch: Batch, answer: Tensor) -> Verdict:
        """Judge a batch to which ``answer`` (B, C) would be given."""
        if not batch.learning:
            return LEARN
        if self.averages is not None:
            self.unseen += batch.learned
        if bool(self.runs_seen):
            return self._in_runs(batch, answer)
        if held := int(self.hold) > 0:
            self.hold -= 1
            if int(self.hold) == 0:  # comparisons begin anew
                self.age.zero_()
            if bool(self.source_ahead):  # it answers, so that nothing can do harm
                return LEARN
        assert batch.prediction is not None
        age, block = int(self.age), rows_of(len(batch.images))
        self.age += 1
        if not held and (verdict := self._few(batch)) is not None:
            return verdict
        early = anchor = None
        own, labels = batch.prediction.logits, answer.argmax(1)
        watched = self.mixes or self.trains  # else nothing can hide runs of labels
        asks, wide = watched and self._asks(age, block), watched and block == 1
        alert = wide and self._is_alert(own.argmax(1))
        source = said = None
        if asks or alert:
            source = batch.source_of_input().logits
            said = source.argmax(1)
            self.runs.watch(said)
            self.own.watch(labels)
        if asks and source is not None:
            if self.mixes:
                anchor = self._anchor(batch)
                self._see(batch, anchor, source)
                self.source_gap.see(own, source)
            elif self._hidden(len(batch.images)):
                self.runs.forget()
                self.own.forget()
                return self._failed(IN_RUNS, source)
            doubt = STILL_SURE if bool(self.wary) else SURE
            if self.mixes and self._in_doubt() and self._harmful(len(batch.images), doubt):
                for seen in (self.runs_seen, self.wary):
                    seen.fill_(True)
                self._wait_to_try(block)
                return Verdict(action="source", reason=self._why(), undo=True)
            early = source if self.mixes and self._too_early(len(batch.images)) else None
        less = wide and said is not None and self._shows_less(labels, said)
        if not self.mixes:
            anchor = source
        verdict = LEARN
        if not held:
            verdict = self._compare(batch, anchor, age, block) or self._verdict(batch, block)
        if less and verdict.action != "reset":
            return Verdict(action="source", reason=IN_RUNS, undo=True)
        if early is not None and verdict is LEARN:
            return Verdict(action="source", reason=EARLIEST, answer=early)
        return verdict

    def _compare(self, batch: Batch, anchor: Tensor | None, age: int, block: int) -> Verdict | None:
        """Compare the update with the source's parameters, if it is time and there is one."""
        beside = int(self.beside) > 0
        if not self.trains or not (beside or self._due(age // block, 1)):
            return None
        assert batch.prediction is not None
        if anchor is None:
            anchor = self._anchor(batch)
        self.gap.see(batch.prediction.logits, anchor)
        self.trend.see(batch.prediction.logits, anchor)
        if beside:
            return self._beside(anchor, block)
        if self._behind(self.gap, self.config.margin) and self.trend.mean() < 0:
            self.beside.copy_(BESIDE * self.pause)
            return self._beside(anchor, block)
        return None

    def _due(self, age: int, slower: int) -> bool:
        """Whether there is a comparison; ``age`` is in batches, or in ``ROW`` of small ones."""
        if int(self.pause) > self.config.pause and slower == 1:  # it has failed before
            return age > 0 and (age <= EARLY[-1] or age % WARY == 0)
        return age in EARLY or (age > 0 and age % (slower * self.config.every) == 0)

    def _asks(self, age: int, block: int) -> bool:
        """Whether the source model is asked."""
        if age >= block and not self._due(age // block, 3):
            return False
        if age % block == 0:
            self.runs.pause()
            self.own.pause()
        return True

    def _few(self, batch: Batch) -> Verdict | None:
        """Take back a step that was made of few images."""
        self.images += len(batch.images)
        if not batch.report.raw().get("stepped", False):
            return None
        count = int(self.images)
        self.images.zero_()
        if count >= self.config.few:
            return None
        self._begin_pause(LONGEST)
        return Verdict(action="skip", reason=f"a step was made of {count} images")

    def _behind(self, gap: SpreadGap, margin: float) -> float:
        """How far the update is behind, in nats; 0 if by no more than the margin."""
        behind = max(-gap.mean(), -gap.last() / ALONE)
        return behind if behind > margin * math.log(self.context.num_classes) else 0.0

    def _beside(self, answer: Tensor, block: int) -> Verdict:
        """Let an update that has fallen behind go on, while its answers are not given."""
        if self.trend.mean() > 0:
            self.beside.zero_()
            self.gap.forget()
            self.age.fill_((EARLY[-1] + 1) * block)
            return LEARN
        self.beside -= 1
        if int(self.beside) == 0:
            return self._failed(f"{-self.trend.mean():.2f} {FEWER}")
        return Verdict(action="source", reason=BESIDE_SOURCE, answer=answer)

    def _verdict(self, batch: Batch, block: int) -> Verdict:
        if behind := self._behind(self.source_gap, self.config.source_margin):
            return self._failed(f"{behind:.2f} {FEWER}", batch.source().logits)
        if int(self.age) > 4 * int(self.pause) and int(self.pause) > self.config.pause:
            self.pause.copy_(torch.div(self.pause, 2, rounding_mode="floor"))
            self.age.fill_((EARLY[-1] + 1) * block)
        return LEARN

    def _failed(self, reason: str, source: Tensor | None = None) -> Verdict:
        """Go back to the start, and learn nothing for a while.

        Args:
            reason: Why.
            source: Logits (B, C) of the source model, where it answers in the pause.
        """
        self._begin_pause(int(self.pause))
        self.pause.mul_(2).clamp_(max=LONGEST)
        self.source_ahead.fill_(source is not None)
        return Verdict(action="reset", reason=reason, answer=source)

    def _begin_pause(self, batches: int) -> None:
        self.hold.fill_(batches)
        self.beside.zero_()
        self.age.zero_()
        self.source_ahead.zero_()
        for gap in (self.gap, self.trend, self.source_gap):
            gap.forget()

    def _in_runs(self, batch: Batch, answer: Tensor) -> Verdict:
        """Let the source answer while statistics of batches do harm, in runs of labels mostly."""
        source, count = batch.source_of_input().logits, len(batch.images)
        tried, block = self._tries(count), rows_of(count)
        if self._one_class() and int(self.age) % (ROUND * block) == (ROUND - TRIED) * block:
            self.runs.forget()  # where other classes begin, those of before look like a run
        self.runs.watch(source.argmax(1))
        if tried:
            self.own.watch(answer.argmax(1))
            anchor = self._anchor(batch)
            self._see(batch, anchor, source)
        self.age += 1
        calm = self.runs.persistence(CALM_DOUBT) <= NO_RUNS and self.runs.concentration() < NOT_ONE
        over = calm and self.runs.images() >= CALM and not self._noisy()
        reason = "there are no runs of labels, and no noise"
        if tried and not over and not self._tries(count):
            over = not self._harmful(count, STILL_SURE if self.surer.mean() > SURER else 0.0)
            reason = "the adapted model shows the runs too, and no noise"
            self._wait_to_try(block)
        if not tried or over:
            self.own.forget()
        if not over:  # else the verdict before the batch holds
            verdict = Verdict(action="source", reason=self._why(), undo=True)
            return verdict if tried else LEARN
        self.runs_seen.fill_(False)
        self.runs.forget()
        self.alert.fill_(ALERT)
        self._begin_pause(int(self.hold))
        return Verdict(action="reset", reason=reason, answer=batch.source().logits)
