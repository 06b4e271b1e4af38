"""The batches that a stream yields."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

__all__ = ["MIXED", "Batch"]

MIXED = "mixed"


@dataclass(frozen=True, kw_only=True, eq=False)
class Batch:
    """One batch of a stream.

    Args:
        images: (B, 3, H, W) float32 in [0, 1].
        labels: (B,) int64. For scoring only: an adapter never sees them.
        domain: The rows' domain, or "mixed" if there are several; a walk's two are joined: "a+b".
        severity: The rows' severity, NaN if there are several; a walk's two as a pair.
        index: (B,) int64 positions in the dataset (in the domain's own, where it has one).
        step: Number of the batch in the whole stream.
        domains: Domain of each row.
        severities: Severity of each row.
        reset: Reset the model before this batch: the scenario says so.
        late: The clock says that the method was busy when this batch came.
        adapt: Whether to learn from this batch. False when late, when the clock's time for learning
            is used up, and between the steps of a windowed stream: predict then with the latest
            model, without adapting.
        visit: Number of the visit to a domain that the first row belongs to.
        window: (W, 3, H, W) the last images up to this one, newest last; fewer than W at the
            start and after a reset; None unless the stream was built with `window`.
        latency: Time from arrival to answer by a clock with a declared ratio, in plain forwards;
            None without one, and with a measured one, whose `Stopwatch.latency` knows afterwards.
    """

    images: Tensor
    labels: Tensor
    domain: str
    severity: float | tuple[float, ...]
    index: Tensor
    step: int
    domains: tuple[str, ...]
    severities: tuple[float | tuple[float, ...], ...]
    reset: bool
    late: bool
    adapt: bool
    visit: int
    window: Tensor | None = None
    latency: float | None = None

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.labels)
