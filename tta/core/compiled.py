"""Hooks on models that hold graphs of ``torch.compile``.

A graph that was made before a hook was set, or for another network of the same class, is used
again without calling the hook: torch guards graphs against most changes of a module, but by
default not against its hooks. Passes whose hooks matter therefore run without graphs.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from threading import Lock
from typing import Any

import torch

__all__ = ["without_graphs"]

_lock = Lock()
_inside = 0  # passes that run without graphs now, in whatever thread
_stance: Any = None


@contextmanager
def without_graphs(needed: bool = True) -> Iterator[None]:
    """Run compiled code without its graphs, in all threads until the last of them leaves.

    Within a compiled function that calls the adapter, nothing can be switched, so nothing is.
    """
    global _inside, _stance
    if not needed or "torch._dynamo" not in sys.modules:  # then nothing has been compiled
        yield
        return
    with _lock:
        if _inside == 0:
            with suppress(RuntimeError):
                _stance = torch.compiler.set_stance("force_eager")
        _inside += 1
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if _inside == 0 and _stance is not None:
                _stance.__exit__(None, None, None)
                _stance = None
