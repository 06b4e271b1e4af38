"""What differs while an adapter is recorded as a graph.

A graph of ``torch.export`` holds no branch on values and none on the number of images, which may be
any. Where components decide in Python, they decide here by tensors instead; what is computed is the
same. A CUDA graph holds no branch on values either, but its shapes are known: there components may
go on as on a GPU, as long as they look at no value.
"""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

__all__ = [
    "NoLoopError",
    "Refusal",
    "all_finite",
    "capturing",
    "count_rows",
    "is_recorded",
    "is_tracing",
    "look",
    "look_after_refusal",
    "recording",
    "refusal",
    "rows_before",
    "rows_of",
    "rule_refused",
    "scan",
    "source_if",
    "source_if_refused",
    "tracing_step",
    "while_loop",
]


class Refusal(threading.local):
    """Whether the graph refuses a batch or its state, and norm rules use the source's statistics.

    ``used`` tells whether a rule has looked, so that the others are looked after from outside.
    """

    condition: Tensor | None = None  # 0-dimensional bool
    used = False


class Capture(threading.local):
    """Whether a step is captured, and whether components decide by tensors there."""

    on = False
    by_tensors = False


class NoLoopError(ValueError):
    """A loop that ends by a value was to be captured."""


_now = Refusal()
_capture = Capture()


def is_tracing() -> bool:
    """Whether this runs to be recorded as a graph, and components must decide by tensors."""
    return torch.compiler.is_exporting() or _capture.by_tensors


def is_recorded() -> bool:
    """Whether no value is known here, as this runs to be recorded by whatever."""
    return _capture.on or is_tracing()


@contextmanager
def capturing(by_tensors: bool) -> Iterator[None]:
    """Within the block, in this thread, a step is captured.

    Args:
        by_tensors: Whether components decide as in a graph of ``torch.export``, or as on a GPU.
    """
    before = _capture.on, _capture.by_tensors
    _capture.on, _capture.by_tensors = True, by_tensors
    try:
        yield
    finally:
        _capture.on, _capture.by_tensors = before


@contextmanager
def recording(adapter: nn.Module) -> Iterator[None]:
    """Let nothing stay behind in modules of what they remember of the pass, such as a report."""
    held = [(vars(module), dict(vars(module))) for module in adapter.modules()]
    try:
        yield
    finally:
        for attributes, before in held:
            for key in attributes.keys() - before.keys():
                del attributes[key]
            attributes.update(before)


@contextmanager
def tracing_step(refused: Tensor) -> Iterator[None]:
    """Within the block norm rules normalise as the source does where ``refused`` (a scalar)."""
    _now.condition = refused
    try:
        yield
    finally:
        _now.condition = None


def rows_of(x: Tensor) -> Tensor:
    """Number of rows of ``x``, as a 0-dimensional int64 that the graph computes."""
    return torch.ones_like(x[:, :1].flatten(1)[:, 0], dtype=torch.int64).sum()


def rows_before(first: Tensor, rows: Tensor) -> Tensor:
    """The row before each of ``rows`` (B, ...), which is ``first`` for the first one.

    Written as ``rows[:-1]``, a graph would hold for 3 rows or more, since a slice of 0 or of 1 is
    not like others to ``torch.export``.
    """
    return torch.cat([first.to(rows)[None], rows])[:-1]


def count_rows(x: Tensor) -> Any:
    """``len(x)``: a number, or in a graph a tensor."""
    return rows_of(x) if is_tracing() else len(x)


def source_if(
    condition: Tensor, mean: Tensor, var: Tensor, base: Any, eps: float | None = None
) -> tuple[Tensor, Tensor]:
    """The running statistics of a BatchNorm layer where a condition holds, else those given.

    Args:
        condition: 0-dimensional bool.
        mean: (C,) or (B, C).
        var: Like ``mean``.
        base: The layer.
        eps: That will be added to the variance; None for the layer's own.
    """
    running = base.running_var.to(var.dtype)
    if eps is not None and eps != base.eps:
        running = running + (base.eps - eps)
    mean = torch.where(condition, base.running_mean.to(mean.dtype), mean)
    return mean, torch.where(condition, running, var)


def source_if_refused(mean: Tensor, var: Tensor, base: Any, eps: float) -> tuple[Tensor, Tensor]:
    """Statistics to normalise with, of the source where the graph refuses the batch."""
    if is_tracing():
        # A program with a loop in it forgets that it was recorded without gradients, which the
        # kernel does not have for statistics.
        mean, var = mean.detach(), var.detach()
    if _now.condition is None or getattr(base, "running_mean", None) is None:
        return mean, var
    _now.used = True
    return source_if(_now.condition, mean, var, base, eps)


def refusal() -> Tensor | None:
    """Whether the graph refuses the batch (0-dimensional bool); None where nothing is refused."""
    return _now.condition


def look_after_refusal() -> None:
    """Say that the rule that runs has taken :func:`refusal` into account."""
    _now.used = True


@contextmanager
def rule_refused() -> Iterator[Refusal]:
    """Find out whether a norm rule that runs in the block looks after the refusal itself."""
    _now.used = _now.condition is None
    yield _now


def scan(step: Any, start: Tensor, rows: Tensor, reverse: bool = False) -> tuple[Tensor, Tensor]:
    """In a graph: a loop over rows.

    Args:
        step: Takes what is carried and a row; returns what to carry on, and a row of the result.
        start: What is carried to the first row.
        rows: (B, ...).
        reverse: Whether the last row comes first.

    Returns:
        What is carried in the end, and the result (B, ...).
    """
    if _capture.on:  # the number of rows is known
        found = []
        for row in reversed(rows) if reverse else rows:
            start, result = step(start, row)
            found.append(result)
        return start, torch.stack(found[::-1] if reverse else found)
    from torch._higher_order_ops.scan import scan as loop

    looped: Any = loop(step, start, rows, reverse=reverse)
    return looped


def while_loop(condition: Any, body: Any, carried: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """In a graph: ``while condition(*carried): carried = body(*carried)``.

    Raises:
        NoLoopError: When a step is captured.
    """
    if _capture.on:
        raise NoLoopError("it repeats something until a value says that it is enough")
    from torch._higher_order_ops.while_loop import while_loop as loop

    found: Any = loop(condition, body, carried)
    return found


def look(condition: Tensor) -> bool | None:
    """A 0-dimensional bool's value where it is there at once: not on a GPU, and in no graph.

    What is true of nearly every batch is then looked at, in place of operations for the others.
    """
    known = condition.device.type == "cpu" and not is_recorded()
    return bool(condition) if known else None


def all_finite(*values: Tensor) -> bool | None:
    """Whether all of some tensors are finite, of one shape are finite, where :func:`look` can say.

    Those whose sum is too large for their dtype count as infinite.
    """
    if values[0].device.type != "cpu" or is_recorded():
        return None
    return math.isfinite(float(functools.reduce(torch.add, values).detach().sum()))
