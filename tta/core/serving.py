"""One call of an adapter: predict, learn, and leave out the images that cannot be used."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tta.core.autocast import forget_casts
from tta.core.backbone import Backbone
from tta.core.guard import Guard, no_figures
from tta.core.input_rule import Inputs
from tta.core.logit_checks import RowsOverflowError
from tta.core.norm_layers import AdaptiveNorm
from tta.core.output_rule import Output
from tta.core.outputs import last_rows
from tta.core.oversight import Oversight
from tta.core.prediction import Prediction, Report
from tta.core.setting import Setting
from tta.core.state import AdapterState
from tta.core.transaction import Transaction
from tta.core.update import Update
from tta.core.window import Window

__all__ = ["Serving"]

OVERFLOW = "features that overflow"
LARGE = 1e15  # pixel values above this may make the variance of features overflow


class Serving:
    """Serves batches.

    Args:
        network: The wrapped model.
        state: Everything that moves.
        wrappers: The wrapped norm layers, by their names in the caller's model.
        update: If there is one.
        output: If there is one.
        transaction: In which every call runs.
        guard: If there is one.
        shadow: Whether the source answers; only with a guard.
    """

    def __init__(
        self,
        network: Backbone,
        state: AdapterState,
        wrappers: Mapping[str, AdaptiveNorm],
        update: Update | None,
        output: Output | None,
        transaction: Transaction,
        guard: Guard | None = None,
        shadow: bool = False,
    ) -> None:
        self.network = network
        self.transaction = transaction
        self.state = state
        self.wrappers = wrappers
        self.update = update
        self.output = output
        self.guard = guard
        self.oversight = guard and Oversight(
            network, state, transaction, wrappers, update, output, guard, shadow
        )
        self.inputs: Inputs | None = None  # if there is an input rule
        self.window: Window | None = None  # if the model sees the last images too
        self.setting: Setting | None = None  # how passes run, if not as they come
        self.seen = 0  # images of the last batch that was answered
        self.rejected = 0  # of these, images that nothing was learned from
        self._whole = 0  # images that the model was last run on, with those of the window
        self.taken = 0  # frames of its stream that a pipeline has used up
        self._bad = 0  # images of the present batch that nothing is learned from

    def serve(self, x: Tensor, follow: bool) -> Any:
        """Answer a batch, and learn from it unless learning is off.

        Args:
            x: Checked images (B, ...).
            follow: Whether gradients flow to the images; only where learning is off.

        Returns:
            What the model returned, with the adapter's logits.
        """
        self._bad = 0
        answer = self._checked(x, follow)
        self.seen, self.rejected = len(x), self._bad
        return answer

    def traced(self, x: Tensor) -> tuple[Prediction, Any]:
        """Answer images in a graph that is being recorded, and learn by the norm and output rules.

        Returns:
            The prediction before the output rule, and what is returned.
        """
        prediction = self.network(x) if self.update is None else self.update.predict(x)
        scores = prediction.logits if self.output is None else self.output.correct(prediction)
        if self.guard is not None and self.output is not None:
            held = self.guard.holds_back(prediction.logits, scores)
            if held is not None:
                scores = torch.where(held, prediction.logits, scores)
        return prediction, self._answer(scores.detach().to(prediction.logits.dtype), None)

    def learned(self, x: Tensor) -> Any:
        """Answer images and learn from them, all of them, where no value can be looked at."""
        return self._answer(self._answered(x, False, True, None)[1], None)

    @property
    def learning(self) -> bool:
        """Whether the adapter is not frozen."""
        return self.network.session.learning

    def _checked(self, x: Tensor, follow: bool) -> Any:
        """Predict and learn, without the rows whose pixels cannot be used."""
        # One cheap reduction shows whether any pixel is bad; only then is every row checked.
        floating = x.is_floating_point()
        peak = float(torch.linalg.vector_norm(x.detach(), torch.inf)) if floating else 0.0
        if not math.isfinite(peak):
            good = torch.isfinite(x).flatten(1).all(1)
            return self._serve_some(x, good, "NaN or infinite pixels", follow)
        if peak > LARGE and self.wrappers:  # kernels for batch statistics hide an overflow
            rows = self.network.overflowing(x)
            if not bool(rows.all()):
                return self._serve_some(x, ~rows, OVERFLOW, follow)
        return self._serve(x, follow)

    def take_events(self) -> list[dict[str, Any]]:
        """Return what the guard did in the last call, once."""
        if self.oversight is None:
            return []
        events, self.oversight.new_events = self.oversight.new_events, []
        return events

    def _serve(self, x: Tensor, follow: bool) -> Any:
        """Predict and learn, without the rows whose features turn out to overflow."""
        try:
            return self._answer(self._attempt(x, follow), None)
        except RowsOverflowError as error:
            return self._serve_some(x, ~error.rows, OVERFLOW, follow)

    def _attempt(self, x: Tensor, follow: bool) -> Tensor:
        """Predict and learn; nothing has changed when it raises that the features overflow."""
        network = self.network
        own = {} if self.learning else network.buffers.tensors()
        own = {name: b.clone() for name, b in own.items()}
        try:
            with self._weights_at_rest() if follow else nullcontext():
                logits = self._serve_beside(x, follow)
        except RowsOverflowError:
            self._take_back()
            raise
        except Exception as error:
            if (refusal := network.images.refusal(error, x)) is None:
                raise
            raise refusal from error
        if self.learning:
            self.state.notice_model_buffers()
        else:
            self._forget(own)
        network.masters.write_to_model()
        return logits if self.setting is None else self.setting.logits(logits, x)

    def _serve_beside(self, x: Tensor, follow: bool) -> Tensor:
        """Predict and learn from the last images and ``x``, and return the logits of ``x``."""
        if self.window is None:
            return self._serve_inputs(x, follow)
        held = self.window.beside(x)
        self._whole = len(held) + len(x)
        try:
            logits = self._serve_inputs(torch.cat([held, x]), follow)
        except RowsOverflowError as error:
            if len(held) == 0 or bool(error.rows[len(held) :].any()):
                raise RowsOverflowError(error.rows[len(held) :]) from error
            # The weights have moved so that images overflow which had not: go on without these.
            self._take_back()
            self._whole = len(x)
            logits = self._serve_inputs(x, follow)
        if self.update is not None and "kept" in self.update.report:
            self.update.report["kept"] = self.update.report["kept"][-len(x) :]
        if self.learning:
            self.window.push(x)
        return logits[-len(x) :]

    def _take_back(self) -> None:
        self.transaction.take_back()
        self.network.session.refuse()

    def _serve_inputs(self, x: Tensor, follow: bool) -> Tensor:
        """Predict and learn from what the input rule makes of the images."""
        images, joined = x, None
        if self.inputs is not None:
            images, joined = self.inputs(x, follow, self.learning)
        predict = partial(self._answered, joined=joined)
        if self.oversight is None:
            return predict(images, follow, self.learning)[1]
        original = None if self.inputs is None else x
        return self.oversight.serve(images, self.learning, follow, predict, original)

    def _answered(
        self, x: Tensor, follow: bool, learning: bool, joined: Tensor | None
    ) -> tuple[Prediction, Tensor]:
        with self.network.session.answering(x):
            return self._predict(x, follow, learning, joined)

    def _forget(self, before: Mapping[str, Tensor]) -> None:
        """Put the model's own buffers back, including those that moved for the first time."""
        found = self.state.notice_model_buffers()
        starts = {name: self.network.buffers.start_of(name) for name in found}
        self.network.buffers.put_back({**before, **starts})

    def _predict(
        self, x: Tensor, follow: bool, learning: bool, joined: Tensor | None = None
    ) -> tuple[Prediction, Tensor]:
        """Predict a batch, and learn from it or not: the prediction, and what is returned of it."""
        forget_casts(x.device.type)  # the cache may have been filled under no_grad
        if self.update is not None and learning:
            with torch.enable_grad():
                prediction = self.update.learn(x)
        else:
            if self.update is not None:
                self.update.report = Report()  # nothing is learned from this batch
            predict: Any = self.network if self.update is None else self.update.predict
            with self._weights_at_rest() if follow else torch.no_grad():
                prediction = predict(x)
        if not isinstance(prediction, Prediction):
            raise TypeError(
                f"`{getattr(self.update, 'name', 'model')}` must give a tta.Prediction, got "
                f"{type(prediction).__name__}: correct the component."
            )
        if self.inputs is not None:
            with torch.set_grad_enabled(follow):
                prediction = self.inputs.join(joined, prediction)
        if self.output is None:
            return prediction, prediction.logits if follow else prediction.logits.detach()
        with torch.set_grad_enabled(follow):
            if not follow:
                features = prediction.features
                prediction = Prediction(
                    prediction.logits.detach(), None if features is None else features.detach()
                )
            scores = self.output.answer(x, prediction)
        expected = tuple(prediction.logits.shape)
        if not isinstance(scores, Tensor) or tuple(scores.shape) != expected:
            got = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
            raise TypeError(
                f"`{self.output.name}` must return scores of shape {expected} from correct(), got "
                f"{got}: correct the component."
            )
        return prediction, scores.to(prediction.logits.dtype)

    @contextmanager
    def _weights_at_rest(self) -> Iterator[None]:
        """Switch off gradients of weights, so that the caller's backward pass leaves none."""
        own = [] if self.update is None else self.update.parameters()
        parts = (*self.network.model.parameters(), *own, *self.network.masters.trained.values())
        trained = [p for p in parts if p.requires_grad]
        for p in trained:
            p.requires_grad_(False)
        before, self.network.session.following = self.network.session.following, True
        try:
            with torch.enable_grad():
                yield
        finally:
            self.network.session.following = before
            for p in trained:
                p.requires_grad_(True)

    def _answer(self, logits: Tensor, rows: Tensor | None) -> Any:
        """Return what the model returned for the images, with these logits in it."""
        result = self.network.result
        if result is None:
            return logits
        if self.window is not None:
            own = len(logits) if rows is None else int(rows.sum())
            result = last_rows(result, self._whole, own)
        return self.network.reader.replace(result, logits, rows)

    def _serve_some(self, x: Tensor, good: Tensor, problem: str, follow: bool) -> Any:
        count = int((~good).sum())
        self.network.session.warn_once(
            problem,
            f"`images` must be finite, got {count} of {len(x)} with {problem}: these rows are "
            "returned as NaN and nothing is learned from them.",
        )
        self._bad += count
        if count == len(x):
            for part in (self.update, self.output, self.guard):
                if part is not None:
                    part.report = Report()
            if self.guard is not None:
                self.guard.figures = no_figures("skip", f"all images have {problem}")
            like = x if x.is_floating_point() else torch.empty(0, dtype=torch.float32)
            logits = like.new_full(
                (len(x), self.network.num_classes), float("nan"), device=x.device
            )
            return self._answer(logits, None)
        try:
            some = self._attempt(x[good], follow)
        except RowsOverflowError as error:
            rest = good.clone()
            rest[good] = ~error.rows
            return self._serve_some(x, rest, OVERFLOW, follow)
        logits = some.new_full((len(x), self.network.num_classes), float("nan"))
        logits[good] = some
        self._spread_figures(good)
        return self._answer(logits, good)

    def _spread_figures(self, good: Tensor) -> None:
        """Make figures of single images, of the ``good`` ones so far, such of all images (B,)."""
        if self.update is not None and "kept" in self.update.report:
            rows = torch.zeros_like(good)
            rows[good] = self.update.report["kept"]
            self.update.report["kept"] = rows
