"""Random batches of images, and the source data that any component may ask for."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["BATCH", "images", "source_batches", "surroundings"]

BATCH = 8


def images(seed: int, count: int = BATCH) -> Tensor:
    """Random images (count, 3, 32, 32) in [0, 1]."""
    return torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def source_batches() -> list[tuple[Tensor, Tensor]]:
    """Two batches of source images with labels."""
    generator = torch.Generator().manual_seed(7)
    return [(images(100 + i), torch.randint(0, 10, (BATCH,), generator=generator)) for i in (0, 1)]


def surroundings() -> dict[str, Any]:
    """What any component may ask for beside a model: source batches, and that it takes pixels."""
    return {"source": source_batches(), "mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
