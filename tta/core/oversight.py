"""How a guard's verdicts are carried out, and what they are made from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tta.core.backbone import Backbone
from tta.core.guard import ACTIONS, LEARN, Batch, Guard, Verdict
from tta.core.health import EVERY, as_numbers, concentration
from tta.core.norm_layers import (
    AdaptiveNorm,
    frozen_statistics,
    normalize_by_source,
    part_of_batch,
    with_statistics,
)
from tta.core.output_rule import Output
from tta.core.prediction import Prediction, Report
from tta.core.state import AdapterState
from tta.core.transaction import Transaction
from tta.core.update import Update

__all__ = ["Oversight", "Passes", "without_trace"]

# Figures that `judge` may still change.
LATE = ("passes", "agreement", "paired_concentration", "source_concentration")
COUNTS = ("update/resets",)  # what the methods report since wrap, whatever a guard resets
PARTLY = ("param/", "norm/", "update/teacher.")  # what moves on a part of the way back

Predict = Callable[[Tensor, bool, bool], tuple[Prediction, Tensor]]


@contextmanager
def without_trace(network: Backbone, moving: bool = False) -> Iterator[None]:
    """Let neither statistics nor the model's own buffers move, nor what it returned last.

    Args:
        network: The wrapped model.
        moving: Whether statistics move after all, which are then of the pass alone.
    """
    own = {name: b.clone() for name, b in network.buffers.tensors().items()}
    result = network.result
    try:
        frozen = frozen_statistics([] if moving else network.wrappers)
        with torch.set_grad_enabled(network.session.following), frozen:
            yield
    finally:
        if own:
            network.buffers.put_back(own)
        network.result = result


class Passes:
    """Forward passes that leave no trace: of the source, and of the model as it is.

    Args:
        network: The wrapped model.
        update: If there is one.
        original: The trained parameters at wrap, by name.
    """

    def __init__(
        self, network: Backbone, update: Update | None, original: Mapping[str, Tensor]
    ) -> None:
        self.network = network
        self.update = update
        self.trained = [] if update is None else list(update.context.parameters.values())
        self.places = network.names(self.trained)
        self.start = list(original.values())
        self.result: Any = None  # what the model returned in the source's last pass

    def source(self, x: Tensor) -> Prediction:
        """Predict with the source's parameters and statistics."""
        network = self.network
        plain = network.session.plain_head()
        statistics = with_statistics(network.wrappers, normalize_by_source)
        with without_trace(network), plain, statistics:
            starts = {n: network.buffers.start_of(n) for n in network.buffers.moving}
            if starts:
                network.buffers.put_back(starts)
            found = network(x, self._weights())
            self.result = network.result
        return found

    def anchor(self, x: Tensor, statistics: Any = None, batches: int = 0) -> Prediction:
        """Predict with the source's parameters under the present norm rule.

        Args:
            x: Images (B, ...).
            statistics: State of the norm rules that is the source's own; None for the present one.
            batches: As if so many had passed, the state of its own moves.
        """
        network = self.network
        if statistics is None:
            with without_trace(network):
                return network(x, self._weights())
        places, values = self._weights() or ([], [])
        weights = [*places, *statistics.places], [*values, *statistics.tensors()]
        with (
            without_trace(network, moving=batches > 0),
            part_of_batch(network.wrappers, max(batches, 1)),
        ):
            return network(x, weights)

    def present(self, x: Tensor) -> Prediction:
        """Predict as a frozen adapter does."""
        with without_trace(self.network):
            return self.network(x) if self.update is None else self.update.predict(x)

    def distance_parts(self) -> tuple[list[Tensor], list[Tensor]]:
        """The trained parameters, and their values at wrap."""
        return [p.detach() for p in self.trained], self._start()

    def _start(self) -> list[Tensor]:
        self.start = [a.to(p.device) for a, p in zip(self.start, self.trained, strict=True)]
        return [a.to(p.dtype) for a, p in zip(self.start, self.trained, strict=True)]

    def _weights(self) -> Any:
        return (self.places, self._start()) if self.trained else None


class Oversight:
    """Serves batches under a guard.

    Args:
        network: The wrapped model.
        state: Everything that moves.
        transaction: In which every call runs.
        wrappers: The wrapped norm layers, by their names in the caller's model.
        update: If there is one.
        output: If there is one.
        guard: The guard.
        shadow: Whether the source answers, whatever the guard says.
    """

    def __init__(
        self,
        network: Backbone,
        state: AdapterState,
        transaction: Transaction,
        wrappers: Mapping[str, AdaptiveNorm],
        update: Update | None,
        output: Output | None,
        guard: Guard,
        shadow: bool,
    ) -> None:
        self.network = network
        self.state = state
        self.transaction = transaction
        self.rules = [wrapper.rule for wrapper in wrappers.values()]
        self.update = update
        self.output = output
        self.guard = guard
        self.shadow = shadow
        self.passes = Passes(network, update, state.original)
        self.new_events: list[dict[str, Any]] = []  # of this call

    def serve(
        self,
        x: Tensor,
        learning: bool,
        follow: bool,
        predict: Predict,
        original: Tensor | None = None,
    ) -> Tensor:
        """Predict a batch, learn what the guard lets through, and return what it answers.

        Args:
            x: Images (B, ...) that the model is given.
            learning: Whether the adapter may learn.
            follow: Whether gradients flow to the images.
            predict: Images, whether to follow and whether to learn -> prediction and scores.
            original: The images as they came, if an input rule has changed them.
        """
        guard, monitor = self.guard, self.guard.monitor
        self.new_events = []
        batch = Batch(
            images=x.detach() if not follow else x,
            step=int(monitor.batches),
            learning=learning,
            predictor=self.passes,
            monitor=monitor,
            original=original,
        )
        guard.report = Report()
        held = bool(guard.frozen)
        with torch.no_grad():
            first = guard.admit(batch) if learning and not held else LEARN
        self._check(first)
        if learning:
            self._put_back(first)
        batch.learned = learning and not held and first.action not in ("skip", "source", "freeze")
        if first.action == "source" and first.answer is None:
            batch.prediction = batch.source()
            batch.scores, self.network.result = batch.prediction.logits, self.passes.result
            for part in (self.update, self.output):
                if part is not None:
                    part.report = Report()
        else:
            with self._learning(batch.learned):
                batch.prediction, batch.scores = predict(x, follow, batch.learned)
        if self.update is not None and batch.learned:
            batch.report = self.update.report
        with torch.no_grad():
            self._measure(batch)
            second = guard.judge(batch)
        self._check(second)
        if learning:
            if batch.learned and (second.undo or second.action == "skip"):
                self.transaction.undo(guard)
            self._put_back(second)
            if resets := (first.action, second.action).count("reset"):
                guard.resets += resets
            if "freeze" in (first.action, second.action):
                guard.frozen.fill_(True)
        verdict = first if second.action == "learn" else second
        if first.action in ("learn", "skip") and second.answer is not None:
            verdict = replace(verdict, answer=second.answer, reason=verdict.reason or second.reason)
        answer = self._answer(batch, verdict)
        self._note(batch, verdict, held)
        if learning:
            monitor.batches += 1
        return answer

    def _measure(self, batch: Batch) -> None:
        """Fill in the figures of health that the guard has not, and move the averages."""
        guard, figures = self.guard, batch.figures
        prediction, scores = batch.prediction, batch.scores
        assert prediction is not None and scores is not None
        logits = prediction.logits.detach()
        found: dict[str, Any] = guard.monitor.measure(
            logits, prediction.features, scores, batch.learning
        )
        found["distance"] = guard.monitor.distance(*self.passes.distance_parts())
        if self.shadow or (batch.learning and batch.step % EVERY == EVERY - 1):
            batch.source()
        batch.figures = found | figures
        self._complete(batch)
        if guard.estimator is not None and "estimated_accuracy" not in figures:
            found = {"estimator": guard.estimator.name}
            found["estimated_accuracy"] = guard.estimator.estimate(batch, prediction)
            if self.shadow:
                estimate = guard.estimator.estimate(batch, batch.source())
                found["source_estimated_accuracy"] = estimate
            batch.figures |= found
        batch.figures = as_numbers(batch.figures)
        if batch.learning:
            early = {key: v for key, v in batch.figures.items() if key not in LATE}
            guard.monitor.move_averages(early, len(batch.images))

    def _complete(self, batch: Batch) -> None:
        """Add what depends on passes of the source, if there was one."""
        assert batch.prediction is not None and batch.scores is not None
        batch.figures["passes"] = batch.passes
        if not batch.has_source:
            batch.figures["agreement"] = float("nan")
        elif "source_concentration" not in batch.figures:
            logits = batch.source().logits.detach()
            same = batch.scores.argmax(1) == logits.argmax(1)
            batch.figures |= {
                "agreement": same.float().mean(),
                "paired_concentration": concentration(batch.prediction.logits.detach()),
                "source_concentration": concentration(logits),
            }

    def _note(self, batch: Batch, verdict: Verdict, held: bool) -> None:
        """Make the figures public, and an event of what the guard did."""
        self._complete(batch)  # there may have been passes since
        figures = as_numbers(batch.figures)
        if batch.learning:
            late = {key: figures[key] for key in LATE if key in figures}
            self.guard.monitor.move_averages(late, len(batch.images))
        figures = {"estimated_accuracy": float("nan"), "estimator": "none"} | figures
        if verdict.action == "learn" and not batch.learned:
            reason = "nothing is learned while the guard holds" if held else "the adapter is frozen"
            self.guard.figures = figures | {"action": "freeze", "reason": reason}
            return
        self.guard.figures = figures | {"action": verdict.action, "reason": verdict.reason}
        if verdict.action != "learn" and batch.learning:
            event = {"step": batch.step, "action": verdict.action, "reason": verdict.reason}
            self.new_events.append(event | {"figures": figures})

    def _answer(self, batch: Batch, verdict: Verdict) -> Tensor:
        own = batch.scores
        assert own is not None
        if not self.shadow and verdict.answer is not None:
            scores = verdict.answer
        elif self.shadow or verdict.action == "source":
            scores = batch.source().logits
            self.network.result = self.passes.result
        else:
            return own
        if not isinstance(scores, Tensor) or scores.shape != own.shape:
            got = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
            raise TypeError(
                f"`{self.guard.name}` must answer with scores of shape {tuple(own.shape)}, got "
                f"{got}: correct the component."
            )
        return scores.to(own.dtype)

    def _check(self, verdict: Any) -> None:
        name = self.guard.name
        if not isinstance(verdict, Verdict) or verdict.action not in ACTIONS:
            got = verdict.action if isinstance(verdict, Verdict) else type(verdict).__name__
            raise TypeError(
                f"`{name}` must return a tta.Verdict with one of the actions {', '.join(ACTIONS)}, "
                f"got {got}: correct the component."
            )
        to_healthy = verdict.action == "restore" and verdict.towards == "healthy"
        if to_healthy and not self.guard.keeps_healthy:
            raise TypeError(
                f"`{name}` must declare keeps_healthy = True to go back to a healthy snapshot, "
                "got False: correct the component."
            )

    @contextmanager
    def _learning(self, learning: bool) -> Iterator[None]:
        """Let no slot learn, if it must not."""
        parts = [part for part in (*self.rules, self.output) if part is not None]
        before = [part.learning for part in parts]
        for part in parts:
            part.learning = part.learning and learning
        try:
            yield
        finally:
            for part, was in zip(parts, before, strict=True):
                part.learning = was

    def _put_back(self, verdict: Verdict) -> None:
        """Carry out "restore" and "reset"."""
        if verdict.action not in ("restore", "reset"):
            return
        healthy = verdict.action == "restore" and verdict.towards == "healthy"
        held = self.guard.healthy() if healthy else self.network.session.reset_point
        now = self.state.moving()
        cleared = {f"update/{name}" for name in self.guard.clears}
        kept = {*COUNTS, *(self.state.surviving() - cleared)}
        targets = {k: v for k, v in held.items() if k in now and k not in kept}
        if verdict.only is not None:
            targets = {key: value for key, value in targets.items() if verdict.only(key)}
        share = verdict.share if verdict.action == "restore" else 1.0
        if share < 1:
            targets = {
                key: now[key].lerp(value.to(now[key]), share)
                for key, value in targets.items()
                if key.startswith(PARTLY) and now[key].is_floating_point()
            }
        self.state.copy_in(targets)
        self.guard.after_return()
