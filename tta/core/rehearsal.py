"""What an adapter would do, without a trace of it."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tta.core.adapter import Adapter
from tta.core.tracing import recording

__all__ = ["rehearse", "undone"]


class _Over(Exception):
    """Ends a rehearsal, so that the adapter's transaction takes everything back."""


def rehearse(
    adapter: Adapter, batches: Sequence[Tensor], after: Callable[[], None] | None = None
) -> list[Tensor]:
    """What the adapter would return for each batch, (B, C); it is as before afterwards.

    Args:
        adapter: What :func:`tta.wrap` returned.
        batches: Images (B, ...) each.
        after: Looks at the adapter after the last one.
    """
    found: list[Tensor] = []

    def run() -> None:
        for images in batches:
            found.append(adapter.network.reader.read(adapter(images)))
        if after is not None:
            after()

    undone(adapter, run)
    return found


def undone(adapter: Adapter, action: Callable[[], None]) -> None:
    """Do something by an adapter that leaves it as it is, without warnings and events.

    Without its setting, as a precision or a memory format of torch's passes is none of a graph's.

    Args:
        adapter: What :func:`tta.wrap` returned.
        action: Calls it, or what it is made of.
    """
    session, guard, draws = adapter.session, adapter.guard, adapter._context.draws
    warned, call = set(session.warned), draws.call
    events = [] if guard is None else list(guard.events)

    def run() -> None:
        action()
        raise _Over

    try:
        with warnings.catch_warnings(), recording(adapter), torch.no_grad():
            warnings.simplefilter("ignore")
            adapter._on_event = None
            adapter.config = dataclasses.replace(adapter.config, setting=None)
            adapter._transaction.run(run)
    except _Over:
        pass
    finally:
        session.warned, draws.call = warned, call
        if guard is not None:
            guard.events.clear()
            guard.events.extend(events)
