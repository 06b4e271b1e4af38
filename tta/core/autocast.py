"""The cache of ``torch.autocast``, which keeps weights that have changed since."""

from __future__ import annotations

import torch

__all__ = ["forget_casts"]


def forget_casts(device: str) -> None:
    """Clear autocast's cache of half-precision weights, which knows nothing of a change in place.

    Within one ``torch.autocast`` block a second batch would be predicted with the weights of the
    first, and back-propagate through its graph.
    """
    if torch.is_autocast_enabled(device):
        torch.clear_autocast_cache()
