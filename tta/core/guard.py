"""The guard slot: what is kept of what a batch has taught, and who answers it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tta.core.backbone import Backbone
from tta.core.component import Component, Context
from tta.core.health import FIGURES, Monitor
from tta.core.prediction import Prediction, Report
from tta.core.random import CountedDraws
from tta.core.source import SourceStatistics

__all__ = [
    "ACTIONS",
    "DEFAULT_GUARD",
    "LEARN",
    "PLAIN_GUARD",
    "Batch",
    "Estimator",
    "Guard",
    "Verdict",
    "no_figures",
]

ACTIONS = ("learn", "skip", "restore", "reset", "source", "freeze")
DEFAULT_GUARD = "steady"  # where neither the caller nor the update names one
PLAIN_GUARD = "watch"  # where health is asked for and no guard
EVENTS = 1000  # that are kept
HEALTHY = "healthy."  # begins the names of buffers that hold a snapshot


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What a guard wants done about a batch.

    Args:
        action: "learn": nothing is held back. "skip": nothing is learned from the batch, or what
            was learned is undone. "restore": what moves goes to the last healthy snapshot, or
            partly to the source. "reset": it goes to the reset point. "source": the source answers
            the batch. "freeze": nothing is learned from the next batch on, until the guard or
            ``reset`` releases it.
        reason: Why, in a few words, for ``health`` and ``events``.
        undo: Whether what was learned from this batch is undone before the action; "skip" does so.
        towards: Where "restore" goes to, "healthy" or "source".
        share: How far "restore" goes. Below 1, parameters, norm statistics and teachers alone move.
        only: Says of each key of a state whether "restore" and "reset" may touch it; None for all.
        answer: Scores (B, C) to return in place of the adapter's own. Without them "source" returns
            the source's.
    """

    action: str = "learn"
    reason: str = ""
    undo: bool = False
    towards: str = "healthy"
    share: float = 1.0
    only: Callable[[str], bool] | None = None
    answer: Tensor | None = None


LEARN = Verdict()


def no_figures(action: str, reason: str) -> dict[str, Any]:
    """Figures of no batch: NaN, with an action and a reason."""
    blank = dict.fromkeys(FIGURES, float("nan"))
    return blank | {"estimator": "none", "action": action, "reason": reason}


@dataclass
class Batch:
    """What a guard sees of a batch.

    Args:
        images: (B, ...), without gradient.
        step: Batches before this one since wrap or reset.
        learning: Whether the adapter may learn; False while it is frozen.
        predictor: Runs the model, and counts how often.
        monitor: Remembers averages of the figures.
        figures: Figures of this batch for ``health``, to which a guard may add.
        prediction: Logits and features before the output slot; None before the model has run.
        scores: (B, C) that are to be returned; None before the model has run.
        report: The update's.
        learned: Whether the adapter has learned from the batch.
        original: The images as they came, where an input rule has changed them.
    """

    images: Tensor
    step: int
    learning: bool
    predictor: Any
    monitor: Monitor
    figures: dict[str, Any] = field(default_factory=dict)
    prediction: Prediction | None = None
    scores: Tensor | None = None
    report: Report = field(default_factory=Report)
    learned: bool = False
    original: Tensor | None = None
    passes: int = 0
    _source: Prediction | None = None

    def source(self) -> Prediction:
        """Predict with the source model: one forward pass when first asked for."""
        if self._source is None:
            images = self.images if self.original is None else self.original
            self._source = self._counted(self.predictor.source, images)
        return self._source

    def source_of_input(self) -> Prediction:
        """Predict with the source model what an input rule has made of the images.

        One forward pass; without an input rule it is that of :meth:`source`.
        """
        if self.original is None:
            return self.source()
        return self._counted(self.predictor.source, self.images)

    @property
    def has_source(self) -> bool:
        """Whether the source has predicted this batch already."""
        return self._source is not None

    def anchor(self, statistics: Any = None, batches: int = 0) -> Prediction:
        """Predict with the source's parameters under the present norm rule: one forward pass.

        Args:
            statistics: State of the norm rules that these parameters have moved, as
                :class:`tta.parts.teachers.OtherStatistics`; None for that of the adapted model.
            batches: How many this one stands for by which that state moves; 0 for none.
        """
        predict = partial(self.predictor.anchor, statistics=statistics, batches=batches)
        return self._counted(predict, self.images)

    def anchor_in_halves(self) -> Tensor:
        """Logits (B, C) of the same, from each half of the batch by itself: two passes of half."""
        halves = self.images.split(-(-len(self.images) // 2))
        self.passes += 1
        return torch.cat([self.predictor.anchor(half).logits for half in halves])

    def predict(self) -> Prediction:
        """Predict with the model as it is now, statistics at rest: one forward pass."""
        return self._counted(self.predictor.present, self.images)

    @property
    def averages(self) -> dict[str, float]:
        """Moving averages of the figures, with those of this batch in ``judge``; NaN for none."""
        return self.monitor.averaged()

    def draws(self, context: Context) -> CountedDraws:
        """Return random numbers of this batch, which leave those of the update as they are."""
        seed = context.generator.initial_seed()
        return CountedDraws(seed + (self.step << 32), self.images.device)

    def _counted(self, predict: Callable[[Tensor], Prediction], images: Tensor) -> Prediction:
        self.passes += 1
        return predict(images)


class Estimator(nn.Module):
    """Estimates the accuracy of predictions without labels; what it takes at wrap is constant."""

    name: ClassVar[str] = ""

    def fit(self, source: SourceStatistics, network: Backbone) -> str | None:
        """Take what there is in ``source``; return in words what it was."""
        return None

    def estimate(self, batch: Batch, prediction: Prediction) -> Tensor:
        """Return the estimated share of correct predictions, 0 to 1, without axes.

        Args:
            batch: The batch, with the averages up to the one before.
            prediction: The adapter's, or the source's while it answers beside.
        """
        raise NotImplementedError  # pragma: no cover


class Guard(Component):
    """Watches an adapter, holds learning back, undoes it, or answers with the source.

    A subclass defines :meth:`judge`, and :meth:`admit` where it decides before the model runs.
    Whatever it remembers is a buffer, and moves in these two methods only, and only while
    ``batch.learning``. ``learning`` says the same, as for an output rule.

    Args:
        config: The component's config.
        network: The wrapped model.
        context: What is known at wrap.
    """

    slot = "guard"
    must_define = ("judge",)
    host: ClassVar[str | None] = None  # update of the recipe that has the guard's name
    host_fields: ClassVar[dict[str, Any]] = {}  # fields of that update
    # Components in other slots of that recipe, where they suit the model.
    companions: ClassVar[dict[str, str]] = {}
    keeps_healthy: ClassVar[bool] = False  # has a snapshot, see ``remember``
    # Buffers of the update that its "reset" clears though they survive ``adapter.reset()``.
    clears: ClassVar[tuple[str, ...]] = ()
    wants_features: ClassVar[bool] = False  # reads features where the model has any

    frozen: Tensor  # 0-dimensional bool: nothing is learned
    resets: Tensor  # 0-dimensional: by the guard, since wrap or the user's last reset

    def __init__(self, config: Any, network: Backbone, context: Context) -> None:
        super().__init__(config)
        self.network = network
        self.context = context
        self.learning = True
        self.report = Report()
        self.figures = no_figures("learn", "")  # of the last batch
        self.events: deque[dict[str, Any]] = deque(maxlen=EVENTS)
        self.estimator: Estimator | None = None  # fills ``estimated_accuracy``
        self.register_buffer("frozen", torch.zeros((), dtype=torch.bool))
        self.register_buffer("resets", torch.zeros((), dtype=torch.int64))
        self.monitor = Monitor(context.num_classes)
        self._kept: Any = None  # what a snapshot is of

    def fit(self, source: SourceStatistics, network: Backbone) -> None:
        """Take what the guard needs from ``source``, or raise ``ValueError`` if it is not there."""
        if self.estimator is not None:
            self.source_used = self.estimator.fit(source, network)

    def admit(self, batch: Batch) -> Verdict:
        """Decide before the model runs.

        "skip" predicts without learning, "source" does not run the adapted model at all, "restore"
        and "reset" come before the batch, which is then learned from.
        """
        return LEARN

    def judge(self, batch: Batch) -> Verdict:
        """Decide after the model has predicted, and has learned unless it was held back."""
        raise NotImplementedError  # pragma: no cover

    def after_return(self) -> None:
        """Called when "restore" or "reset" has been carried out."""

    def hands_over(self) -> str | None:
        """Why :meth:`judge` lets the source answer whatever comes while the adapter is frozen.

        None where it does not. It must go by what the guard remembers.
        """
        return None

    def resets_after(self, batches: Tensor) -> Tensor | None:
        """Whether everything goes back to the reset point after a batch, if that is all it does.

        Args:
            batches: 0-dimensional, number of batches before this one.

        Returns:
            0-dimensional bool; None for a guard that looks at more, which no graph can hold.
        """
        return None

    def holds_back(self, before: Tensor, after: Tensor) -> Tensor | None:
        """Whether a graph that does not learn answers without the output rule.

        It must say what :meth:`judge` says of a batch while the adapter is frozen, by tensors.

        Args:
            before: Logits (B, C) before the output rule.
            after: Scores (B, C) after it.

        Returns:
            0-dimensional bool; None for a guard that never does.
        """
        return None

    def see_gradients(self, gradients: Mapping[str, Tensor]) -> None:
        """Look at the gradients of the update's loss, by parameter, before each of its steps."""

    def penalty(self) -> Tensor | None:
        """Return a scalar to add to the update's loss, or None; asked before each of its steps."""
        return None

    def hold_snapshot(self, kept: Any) -> None:
        """Make room for the healthy snapshot; called once, at wrap.

        Args:
            kept: The adapter's state, which says what it holds and of what kind that is.
        """
        self._kept = kept
        for key, value in kept.moving().items():
            # Not by register_buffer, which refuses names with dots; nothing else does.
            self._buffers[HEALTHY + key] = value.detach().clone()

    def remember(self) -> None:
        """Make the present state the healthy snapshot, to which "restore" goes back."""
        for key, value in self._kept.moving().items():
            held = self._buffers.get(HEALTHY + key)
            if held is not None and (held.shape, held.dtype) == (value.shape, value.dtype):
                held.copy_(value)
            elif held is not None:
                self._buffers[HEALTHY + key] = value.detach().clone()

    def healthy(self) -> dict[str, Tensor]:
        """The healthy snapshot, by the keys of a state."""
        return {
            name.removeprefix(HEALTHY): value
            for name, value in self._buffers.items()
            if name.startswith(HEALTHY) and value is not None
        }

    def undefined_as_nan(self) -> tuple[str, ...]:
        """What may be NaN in what a snapshot is of."""
        return self._as_kept("undefined_as_nan")

    def integer_ranges(self) -> dict[str, tuple[int, int]]:
        """As in what a snapshot is of, and those of the health figures."""
        ranges = {f"monitor.{n}": r for n, r in self.monitor.integer_ranges().items()}
        if self._kept is None:
            return ranges
        return ranges | {HEALTHY + key: r for key, r in self._kept.ranges().items()}

    def resizable_buffers(self) -> tuple[str, ...]:
        """As in what a snapshot is of."""
        return self._as_kept("resizable_buffers")

    def lazy_buffers(self) -> tuple[str, ...]:
        """As in what a snapshot is of."""
        return () if self._kept is None else tuple(HEALTHY + k for k in self._kept.lazy_keys())

    def image_buffers(self) -> tuple[str, ...]:
        """As in what a snapshot is of."""
        return self._as_kept("image_buffers")

    def _as_kept(self, trait: str) -> tuple[str, ...]:
        """The buffers of the snapshot for which a component declares this trait."""
        return () if self._kept is None else tuple(HEALTHY + k for k in self._kept.keys_of(trait))
