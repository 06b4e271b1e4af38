"""What is told of a prediction: probabilities, and whether its batch was learned from."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tta.core.adapter import Adapter
from tta.core.prediction import Report

__all__ = ["has_learned", "moves", "probabilities"]

STILL = ("rng", "guard/")  # begin the names of what moves in a state without anything being learned


def probabilities(adapter: Adapter, output: Tensor) -> Tensor:
    """What an adapter's scores say of the classes.

    Args:
        adapter: That returned them. The component that made them says how they are read.
        output: (B, C).

    Returns:
        (B, C) float32 on the CPU: rows that sum to 1, or with ``activation="sigmoid"`` each class's
        own probability. Rows without a prediction are NaN.
    """
    if adapter.config.activation == "sigmoid":
        return output.float().sigmoid().cpu()
    last = adapter.update if adapter.output is None else adapter.output
    logs = output.float().log_softmax(1) if last is None else last.log_probabilities(output)
    return logs.exp().cpu()


def moves(adapter: Any) -> bool:
    """Whether there is anything that an adapter, or a stream's view, can learn."""
    return any(not key.startswith(STILL) for key in adapter.state())


def has_learned(health: Report, report: Report, learning: bool) -> bool:
    """Whether something was learned from the last batch, of an adapter that can.

    Args:
        health: Of the batch; may be empty.
        report: Of the batch.
        learning: Whether the adapter is not frozen.
    """
    held = health.get("action", "learn") != "learn"
    return learning and not held and report.rejected < report.seen
