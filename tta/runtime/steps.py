"""What becomes of one batch: predicted and learned from in turn, by stream, or side by side."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tta.core.adapter import Adapter
from tta.core.component import log_probabilities
from tta.core.twins import copy_adapter
from tta.runtime.capturing import Captured, Graph, NotCapturedError
from tta.runtime.lanes import Lanes
from tta.runtime.pool import StreamPool

__all__ = ["Direct", "Lagging", "Pooled", "Replaying", "Server", "Step", "step", "taken"]

log = logging.getLogger("tta.runtime")

# What a state holds that can learn; the rest counts calls, or watches.
LEARNS = ("param/", "norm/", "update/", "output/", "input/", "model/")


@dataclass
class Step:
    """What a batch gave.

    Args:
        probabilities: (B, C) float32 on the CPU; NaN for rows without a prediction.
        learned: Whether something that moves has learned from it.
    """

    probabilities: Tensor
    learned: bool


def step(adapter: Adapter, images: Tensor, learn: bool, used: int) -> Step:
    """Serve a batch; the caller has the turn.

    Args:
        adapter: Frozen or not.
        images: (B, ...), as the model takes them.
        learn: Whether it may be learned from.
        used: Frames of the stream that are used up with this batch.
    """
    learned = learn and adapter.session.learning and can_learn(adapter)
    with nullcontext() if learn else adapter.frozen():
        answer = adapter(images)
    adapter._serving.taken = used
    scores = answer if isinstance(answer, Tensor) else adapter.network.reader.read(answer)
    action = "learn" if adapter.guard is None else adapter.guard.figures.get("action", "learn")
    return Step(_probabilities(adapter, scores), learned and action == "learn")


def taken(adapter: Adapter) -> int:
    """Frames of its stream that are used up; see :func:`step`."""
    return adapter._serving.taken


def can_learn(adapter: Adapter) -> bool:
    """Whether anything moves that learns."""
    return any(key.startswith(LEARNS) for key in adapter._state.tensors())


def _probabilities(adapter: Adapter, scores: Tensor) -> Tensor:
    if adapter.config.activation == "sigmoid":
        return scores.detach().float().sigmoid().cpu()
    return log_probabilities(adapter, scores).detach().exp().cpu()


class Server:
    """Serves batches, in the thread that asks for results."""

    def serve(self, stream: str, images: Tensor, learn: bool, used: int) -> Step:
        """Serve a batch of one stream; arguments as of :func:`step`."""
        raise NotImplementedError

    def close(self) -> None:
        """End what goes on beside."""


class Direct(Server):
    """One adapter, which predicts and learns in turn."""

    def __init__(self, adapter: Adapter) -> None:
        self.adapter = adapter

    def serve(self, stream: str, images: Tensor, learn: bool, used: int) -> Step:
        """Serve a batch; all streams are one."""
        with self.adapter.turns.lock:
            return step(self.adapter, images, learn, used)


class Replaying(Direct):
    """One adapter, whose step on full batches is captured once, and then replayed.

    The adapter itself serves the first full batch, by which it gets to know the model, and all that
    does not fit: batches of other shapes, of which nothing is learned, with values that are no
    numbers, or while the caller uses autocast.

    Args:
        adapter: Which goes on as it would without.
        batch_size: Images in a full batch.
        graph: Makes a graph.
    """

    def __init__(self, adapter: Adapter, batch_size: int, graph: Callable[[], Graph]) -> None:
        super().__init__(adapter)
        self.batch_size, self.graph = batch_size, graph
        self.outcome = "no full batch has come twice yet"
        self.replayed = 0  # batches
        self._met, self._tried = False, False
        self._captured: Captured | None = None

    def serve(self, stream: str, images: Tensor, learn: bool, used: int) -> Step:
        """Serve a batch; all streams are one."""
        with self.adapter.turns.lock:
            captured = self._captured_for(images) if learn else None
            logits = None if captured is None else captured.serve(images)
            if logits is None:
                return step(self.adapter, images, learn, used)
            self.replayed += 1
            self.adapter._serving.taken = used
            return Step(_probabilities(self.adapter, logits), self._learns)

    def close(self) -> None:
        """Let go of what was captured."""
        self._captured = None

    def _captured_for(self, images: Tensor) -> Captured | None:
        """What may be replayed for these images, which is captured when they come twice."""
        adapter, kind = self.adapter, images.device.type
        learning = adapter.session.learning and not adapter.turns.reserved
        if len(images) != self.batch_size or not learning or torch.is_autocast_enabled(kind):
            return None
        if self._met and not self._tried:
            self._tried = True
            self._capture(images)
        self._met = True
        fits = self._captured is not None and self._captured.fits(images)
        return self._captured if fits else None

    def _capture(self, images: Tensor) -> None:
        try:
            self._captured = Captured(self.adapter, images, self.graph())
        except NotCapturedError as error:
            self.outcome = f"steps are not captured: {error}"
            log.warning("%s", self.outcome)
            return
        self._learns = can_learn(self.adapter)
        self.outcome = f"steps of images {tuple(images.shape)} are captured"
        log.info("%s", self.outcome)


class Pooled(Server):
    """A stream of a pool for each stream."""

    def __init__(self, pool: StreamPool) -> None:
        self.pool = pool

    def serve(self, stream: str, images: Tensor, learn: bool, used: int) -> Step:
        """Serve a batch by its stream, which is made if it is not there."""
        with self.pool.stream(stream, create=True) as view:
            return view.run(lambda adapter: step(adapter, images, learn, used))

    def serve_each(self, batches: Mapping[str, tuple[Tensor, bool, int]]) -> list[Step]:
        """Serve a batch of each of several streams, in one pass where the pool can.

        Args:
            batches: Images, and the other arguments of :func:`step`, by stream.
        """
        return self.pool.run_each(
            batches, lambda adapter, name: step(adapter, *batches[name]), create=True
        )


class Lagging(Server):
    """A copy predicts, and the adapter learns in a thread, behind by a bounded number of batches.

    Args:
        adapter: Nobody else may call it meanwhile.
        staleness: How many batches may be predicted whose predecessors are not learned from.
        lanes: Of the device.
    """

    @torch.inference_mode(False)  # in which no tensor is made that can be changed
    def __init__(self, adapter: Adapter, staleness: int, lanes: Lanes) -> None:
        self.adapter, self.staleness, self.lanes = adapter, staleness, lanes
        self.learns, self.session = can_learn(adapter), adapter.session
        # What is no learning moves all the same, and the copy goes by it.
        self.remembers = adapter.guard is not None or adapter.window is not None
        self.copy = copy_adapter(adapter)
        self.copy.freeze()
        self._learner = ThreadPoolExecutor(1, thread_name_prefix="tta-learn")
        self._behind: list[Future[None]] = []
        self._lock = threading.Lock()
        self._new: Any = None  # state that is given to the copy
        self._lent: Any = lanes.give(self._tensors())

    @torch.inference_mode(False)
    def serve(self, stream: str, images: Tensor, learn: bool, used: int) -> Step:
        """Predict a batch at once, as soon as learning is not too far behind."""
        while self._behind and (self._behind[0].done() or len(self._behind) > self.staleness):
            self._behind.pop(0).result()  # raises what went wrong there
        with self._lock:
            new, self._new = self._new, None
        if new is not None:
            self.copy.load_state(self.lanes.take(new), allow_nonfinite=True)
        given = self.lanes.give(images)  # before the pass, for which learning need not wait
        found = step(self.copy, images, True, used)
        learn = learn and self.session.learning
        if learn and (self.learns or self.remembers):
            self._behind.append(self._learner.submit(self._learn, given, used))
        return Step(found.probabilities, learn and self.learns)

    @torch.inference_mode(False)
    def close(self) -> None:
        """Wait for what is still to be learned."""
        self._learner.shutdown()
        with self.lanes.learning():
            back = self.lanes.give(self._tensors())
        self.lanes.take(back)
        for future in self._behind:
            error = future.exception()
            if error is not None:
                raise error
        self._behind.clear()

    @torch.inference_mode(False)
    def _learn(self, images: Any, used: int) -> None:
        with self.adapter.turns.lock, self.lanes.learning():
            if self._lent is not None:
                self.lanes.take(self._lent)
                self._lent = None
            step(self.adapter, self.lanes.take(images), True, used)
            new = self.lanes.give(self.adapter.state())
        with self._lock:
            self._new = new

    def _tensors(self) -> list[Tensor]:
        """All that the adapter holds."""
        own = [*self.adapter.parameters(), *self.adapter.buffers()]
        gradients = [p.grad for p in own if p.grad is not None]
        return [*own, *gradients, *self.adapter._state.tensors().values()]
