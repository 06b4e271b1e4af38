"""Models that hold graphs of ``torch.compile``, and hooks.

A graph that was made before a hook was set, or for another network of the same class, is used
again without calling the hook: torch guards graphs against most changes of a module, but by
default not against its hooks. Passes whose hooks matter therefore run without graphs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock
from typing import Any

import torch
from torch import nn

__all__ = ["is_compiled", "without_graphs"]

_lock = Lock()
_inside = 0  # passes that run without graphs now, in whatever thread
_stance: Any = None


def is_compiled(model: nn.Module) -> bool:
    """Tell whether a model, or part of it, is compiled, by ``torch.compile`` or its own method."""
    return any(
        hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None
        for module in model.modules()
    )


@contextmanager
def without_graphs(needed: bool = True) -> Iterator[None]:
    """Run what is compiled as if it were not, in all threads until the last of them leaves."""
    global _inside, _stance
    if not needed:
        yield
        return
    with _lock:
        if _inside == 0:
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
