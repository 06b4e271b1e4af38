"""Hooks on models that hold graphs of ``torch.compile``.

A graph that was made before a hook was set, or for another network of the same class, is used
again without calling the hook: torch guards graphs against most changes of a module, but by
default not against its hooks. Passes whose hooks matter therefore run without graphs.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any
from weakref import WeakSet

import torch
from torch import nn

from tta.core.turns import Turns

__all__ = ["COMPILED", "end_visit", "has_graphs", "is_compiled", "without_graphs"]

COMPILED = "_compiled_call_impl"  # what `compile` of a module sets on it


class _Visit:
    """A pass that runs without graphs now."""


_turns = Turns()
# In whatever thread. An exception that a signal raises may skip the line that takes a visit out.
# A call that has failed so makes up for it by `end_visit`; outside of calls, a weak reference ends
# with the frame that holds the visit.
_inside: WeakSet[_Visit] = WeakSet()
_stance: Any = None


if hasattr(os, "register_at_fork"):  # other threads, which would leave, are not in the child
    os.register_at_fork(after_in_child=_inside.clear)


@contextmanager
def without_graphs(needed: bool = True) -> Iterator[None]:
    """Run compiled code without its graphs, in all threads until the last of them leaves.

    Within a compiled function that calls the adapter, nothing can be switched, so nothing is.
    """
    global _stance
    if not needed or "torch._dynamo" not in sys.modules:  # then nothing has been compiled
        yield
        return
    visit = _Visit()
    with _turns.lock:
        if _stance is None:
            with suppress(RuntimeError):
                _stance = torch.compiler.set_stance("force_eager")
        _inside.add(visit)
    try:
        yield
    finally:
        _leave(visit)


def end_visit(frame: FrameType) -> None:
    """Take out a visit of :func:`without_graphs` that a signal has ended, by a frame of its error.

    The error holds the frame, and often itself in a circle, until Python looks for such circles.
    """
    if frame.f_code is _CODE and (visit := frame.f_locals.get("visit")) is not None:
        _leave(visit)


_CODE = without_graphs.__wrapped__.__code__  # type: ignore[attr-defined]


def _leave(visit: _Visit) -> None:
    """Take a visit out, and let graphs run again after the last one."""
    global _stance
    with _turns.lock:
        _inside.discard(visit)
        if not _inside and _stance is not None:
            _stance.__exit__(None, None, None)
            _stance = None


def has_graphs(model: nn.Module) -> bool:
    """Whether modules of a model are compiled or scripted, which copies of them would not be."""
    return any(is_compiled(m) or isinstance(m, torch.jit.ScriptModule) for m in model.modules())


def is_compiled(module: nn.Module) -> bool:
    """Whether ``torch.compile`` was applied to a module."""
    compiled = getattr(module, COMPILED, None) is not None
    return compiled or hasattr(module, "_orig_mod")
