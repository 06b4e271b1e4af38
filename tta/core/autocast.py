"""The modes of ``torch.autocast``, and its cache, which keeps weights that have changed since."""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["forget_casts", "modes", "restore"]


def forget_casts(device: str) -> None:
    """Clear autocast's cache of half-precision weights, which knows nothing of a change in place.

    Within one ``torch.autocast`` block a second batch would be predicted with the weights of the
    first, and back-propagate through its graph.
    """
    if torch.is_autocast_enabled(device):
        torch.clear_autocast_cache()


def modes() -> tuple[Any, ...]:
    """What :func:`restore` takes: which devices are cast, and how deep the blocks are nested."""
    torch.autocast_increment_nesting()
    return (
        torch.autocast_decrement_nesting(),
        torch.is_autocast_cache_enabled(),
        [(d, torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in ("cpu", "cuda")],
    )


def restore(before: tuple[Any, ...]) -> None:
    """Go back to former modes, which an exception between two lines of torch's may have left."""
    depth, cached, devices = before
    while torch.autocast_increment_nesting() > depth + 1:
        torch.autocast_decrement_nesting()
        torch.autocast_decrement_nesting()
    torch.autocast_decrement_nesting()
    torch.set_autocast_cache_enabled(cached)
    for device, enabled, dtype in devices:
        torch.set_autocast_enabled(device, enabled)
        torch.set_autocast_dtype(device, dtype)
