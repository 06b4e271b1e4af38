"""Time-budgeted evaluation: a stream that does not wait for the method.

Source: Alfarra et al., "Evaluation of Test-Time Adaptation Under Computational Time Constraints",
ICML 2024, arXiv 2304.04795. Batches are revealed at a fixed pace. After adapting on one, the
method is busy for ceil(ratio * eta) - 1 further batches, which arrive "late": the caller predicts
them with the latest adapted weights and does not adapt.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import torch

from tta.core.checks import LARGE, boolean, fraction, nearest, number, shown, told

__all__ = ["Clock", "Stopwatch", "as_clock"]

Out = TypeVar("Out")


@dataclass(frozen=True, kw_only=True)
class Clock:
    """How fast the stream runs, against how slow the method is.

    Args:
        ratio: C(g), the time of an adaptive forward over that of a plain one, declared
            beforehand, so that the stream is reproducible. None with `measured`.
        eta: Pace of the stream: 1 = as fast as plain forwards, 0 = waits (offline).
        measured: Time the ratio while running, on this machine (see `Stopwatch`).

    >>> [Clock(ratio=3.0).is_late(step) for step in range(4)]
    [False, True, True, False]
    """

    ratio: float | None = None
    eta: float = 1.0
    measured: bool = False

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

    def delay(self, ratio: float) -> int:
        """Return how many batches go by while an adaptation of that relative cost runs."""
        # 3 * 0.1 * 10 must count as 3, not as the next whole number above 3.0000000000000004.
        return max(0, math.ceil(ratio * self.eta - 1e-9) - 1)

    def is_late(self, step: int) -> bool:
        """Tell whether the batch of that step is late, for a declared ratio."""
        return self.ratio is not None and step % (self.delay(self.ratio) + 1) != 0


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

    >>> watch = Stopwatch(Clock(measured=True))
    >>> watch.report(adaptive=3.0, plain=1.0)
    >>> watch.tick(), watch.tick(), watch.tick()
    (True, True, False)
    """

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.delay = 0
        self.ratio: float | None = None

    def restart(self) -> None:
        """Forget a pending delay, as at the start of a stream."""
        self.delay = 0

    def tick(self) -> bool:
        """Count the next batch and tell whether it is late."""
        late = self.delay > 0
        self.delay -= int(late)
        return late

    def report(self, *, adaptive: float, plain: float) -> None:
        """Set the delay from two times in seconds."""
        number("adaptive", adaptive, 0.0, 1e9)
        number("plain", plain, 0.0, 1e9, above=True)
        self.ratio = adaptive / plain
        self.delay = self.clock.delay(self.ratio)

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
