"""Time-budgeted evaluation: a stream that does not wait for the method.

Source: Alfarra et al., "Evaluation of Test-Time Adaptation Under Computational Time Constraints",
ICML 2024, arXiv 2304.04795. Batches are revealed at a fixed pace. After adapting on one, the
method is busy for ceil(ratio * eta) - 1 further batches, which arrive "late": the caller predicts
them with the latest adapted weights and does not adapt.

Tempora (ICML 2026) reads the same clock in three ways, which `experiments.run.utilities` turns into
figures. Discrete: some batches may wait while the method is busy (`queue`), the oldest is evicted
when one more comes, and what was evicted is late and counts as wrong. Continuous: an answer is
worth less the longer it took (`half_life`). Amortised: the method learns until its extra time is
used up (`overhead`) and is frozen from then on. Only what they are was known when this was written,
not the authors' constants, so all of them are fields.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import count, islice
from typing import Any, NamedTuple, TypeVar

import torch

from tta.core.checks import (
    LARGE,
    LARGEST,
    boolean,
    fraction,
    nearest,
    number,
    shown,
    told,
    whole_number,
)

__all__ = ["Clock", "Stopwatch", "Turn", "as_clock"]

Out = TypeVar("Out")
NEARLY = 1e-9  # 3 * 0.1 * 10 must count as 3, not as the next number above 3.0000000000000004


class Turn(NamedTuple):
    """What the clock says of one batch.

    Args:
        late: The method was busy when it came, and for too long for it to wait.
        learns: Whether there is time to learn from it.
        latency: Time from its arrival to its answer, in plain forwards; 1 for a late one, which is
            predicted beside. None where only a `Stopwatch` will know.
    """

    late: bool
    learns: bool
    latency: float | None


@dataclass(frozen=True, kw_only=True)
class Clock:
    """How fast the stream runs, against how slow the method is.

    Args:
        ratio: C(g), the time of an adaptive forward over that of a plain one, declared
            beforehand, so that the stream is reproducible. None with `measured`.
        eta: Pace of the stream: 1 = as fast as plain forwards, 0 = waits (offline).
        measured: Time the ratio while running, on this machine (see `Stopwatch`).
        queue: Batches that wait while the method is busy; when one more comes, the one that has
            waited longest is evicted, which makes it late. 0 = a batch that cannot be served when
            it comes is late.
        overhead: Extra time for learning, in plain forwards of a batch: an adaptive forward uses
            ratio - 1. Once it is used up, no batch is learned from. None = no end.
        half_life: Latency in plain forwards at which an answer is worth half of one that took no
            time, for the figure "continuous" of a run; None = no such figure.

    >>> [Clock(ratio=3.0).is_late(step) for step in range(4)]
    [False, True, True, False]
    >>> [turn.late for turn in islice(Clock(ratio=2.0, queue=1).turns(), 6)]
    [False, False, True, False, True, False]
    """

    ratio: float | None = None
    eta: float = 1.0
    measured: bool = False
    queue: int = 0
    overhead: float | None = None
    half_life: float | None = None

    def __post_init__(self) -> None:
        """Check the fields against each other."""
        boolean("measured", self.measured)
        fraction("eta", self.eta)
        if self.measured == (self.ratio is not None):
            raise ValueError(
                f"`ratio` must be given unless `measured` is True, and only then, got "
                f"ratio={self.ratio} and measured={self.measured}; declare the method's cost, for "
                "example ratio=3.0, or ask for measured=True"
            )
        if self.ratio is not None:
            number("ratio", self.ratio, 0.0, LARGE, above=True)
        whole_number("queue", self.queue, 0, LARGEST)
        if self.overhead is not None:
            number("overhead", self.overhead, 0.0, LARGE)
        if self.half_life is not None:
            number("half_life", self.half_life, 0.0, LARGE, above=True)

    def delay(self, ratio: float) -> int:
        """Return how many batches go by while an adaptation of that relative cost runs."""
        return max(0, math.ceil(ratio * self.eta - NEARLY) - 1)

    def turns(
        self, start: int = 0, wants: Callable[[int], bool] = lambda step: True
    ) -> Iterator[Turn]:
        """Say of each batch from step `start` on what a declared ratio makes of it, without end.

        Args:
            start: The first step that is told of.
            wants: Whether the batch of a step is to be learned from, if there is time; others take
                a plain forward.
        """
        return islice(self._turns(wants), start, None)

    def is_late(self, step: int) -> bool:
        """Tell whether the batch of that step is late, for a declared ratio."""
        return next(self.turns(step)).late

    def _turns(self, wants: Callable[[int], bool]) -> Iterator[Turn]:
        ratio, server = self.ratio, _Server(self)
        for step in count():
            late, learns = server.arrive(), server.learns and wants(step)
            if late or ratio is None:
                yield Turn(late, learns and not late, 1.0)
            else:
                yield Turn(False, learns, server.serve(ratio if learns else 1.0))


class _Server:
    """One method that answers batches in order of arrival, one at a time.

    Times are in units of the time between two arrivals: batch k comes at k.
    """

    def __init__(self, clock: Clock, spent: float = 0.0) -> None:
        self.clock, self.spent = clock, spent
        self.step = -1  # that came last
        self.due = 0  # the batch that is answered next
        self.free = -math.inf  # when it can be begun

    def arrive(self) -> bool:
        """Count the next batch and tell whether it is late."""
        self.step += 1
        return self.step < self.due

    @property
    def learns(self) -> bool:
        """Whether there is time left to learn."""
        return self.clock.overhead is None or self.spent < self.clock.overhead - NEARLY

    def serve(self, took: float) -> float:
        """Answer the batch that came last; returns its latency.

        Args:
            took: The time for it, in plain forwards.
        """
        eta = self.clock.eta
        begin = max(self.free, float(self.step))
        self.free = begin + took * eta
        # Of those that came before the end, the last `queue` are there still.
        waiting = math.ceil(self.free - NEARLY) - self.clock.queue
        self.due = max(self.step + 1, waiting)
        self.spent += max(took - 1.0, 0.0)
        return took + ((begin - self.step) / eta if eta else 0.0)


def as_clock(value: Clock | Mapping[str, Any] | None) -> Clock | None:
    """Accept a Clock, its fields as a mapping, or None."""
    if value is None or isinstance(value, Clock):
        return value
    if not isinstance(value, Mapping):
        raise TypeError(
            f"`clock` must be a Clock, a mapping of its fields or None, got {shown(value)}; "
            'pass for example {"ratio": 3.0, "eta": 1.0}'
        )
    known = list(asdict(Clock(ratio=1.0)))
    for name in value:
        if name not in known:
            raise ValueError(f"`clock` has no field `{told(name)}`; {nearest(name, known)}")
    return Clock(**value)


class Stopwatch:
    """Real-time mode: measures both forwards and counts down the batches that are late.

    A stream with `Clock(measured=True)` owns one, as `stream.stopwatch`; the caller runs every
    batch that is not late through `run`. Such a stream depends on the machine's speed.

    Args:
        clock: The pace.
        spent: Extra time that was used before, in plain forwards, see `Clock.overhead`.

    >>> watch = Stopwatch(Clock(measured=True))
    >>> watch.report(adaptive=3.0, plain=1.0)
    >>> watch.tick(), watch.tick(), watch.tick()
    (True, True, False)
    """

    def __init__(self, clock: Clock, spent: float = 0.0) -> None:
        self.clock = clock
        self.ratio: float | None = None
        self._begin = spent
        self.restart()

    def restart(self) -> None:
        """Forget a pending delay, as at the start of a stream."""
        self._server = _Server(self.clock, self._begin)
        self.latency = 1.0

    @property
    def spent(self) -> float:
        """Extra time used so far, in plain forwards."""
        return self._server.spent

    @property
    def learns(self) -> bool:
        """Whether there is time left to learn."""
        return self._server.learns

    def tick(self, wanted: bool = True) -> bool:
        """Count the next batch and tell whether it is late.

        Args:
            wanted: Whether it is to be learned from, if there is time; otherwise it takes a plain
                forward, and is not run through `run`.
        """
        late, self.latency = self._server.arrive(), 1.0
        if not late and not (self.learns and wanted):
            self.latency = self._server.serve(1.0)
        return late

    def report(self, *, adaptive: float, plain: float) -> None:
        """Set the delay from two times in seconds."""
        number("adaptive", adaptive, 0.0, 1e9)
        number("plain", plain, 0.0, 1e9, above=True)
        self.ratio = adaptive / plain
        self.latency = self._server.serve(self.ratio)

    def run(self, adaptive: Callable[[], Out], plain: Callable[[], Any]) -> Out:
        """Time an adaptive and a plain forward, set the delay, return the adaptive result.

        Args:
            adaptive: Runs the adaptive forward and returns its prediction.
            plain: Runs a plain forward of the same model on the same batch.
        """
        start = _now()
        result = adaptive()
        middle = _now()
        plain()
        self.report(adaptive=middle - start, plain=max(_now() - middle, 1e-9))
        return result


def _now() -> float:
    """Read the time after the device has finished all queued work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
