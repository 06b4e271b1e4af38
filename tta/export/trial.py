"""A graph is tried before it is kept: it must answer a few batches as the adapter does."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tta.core.checks import told

__all__ = ["check_same", "make_batches"]

TOLERANCE = 1e-3  # of logits, as a share of the largest of the batch where that is above 1
SIZES = (3, 1, 2)  # of the batches that are tried


def make_batches(example: Tensor) -> list[Tensor]:
    """A few small batches like an example (B, ...), none of whose images are equal.

    Equal images have equal distances, between which a method may choose either way.
    """
    found, draws = [], torch.Generator().manual_seed(0)
    for size in SIZES:
        rows = torch.arange(size) % len(example)
        images = example[rows.to(example.device)]
        if images.is_floating_point():
            noise = torch.randn(images.shape, generator=draws).to(images)
            images = images + 0.1 * images.std().clamp_min(1.0) * noise
        found.append(images)
    return found


def check_same(
    model: Path, start: Sequence[Tensor], batches: Sequence[Tensor], expected: Sequence[Tensor]
) -> None:
    """Compare the answers of a graph with those of the adapter.

    Args:
        model: The graph's file.
        start: The state to start with.
        batches: Images.
        expected: The adapter's answers (B, C), one batch after the other.

    Raises:
        ValueError: When they differ, as where a model decides by values in Python, or the runtime
            refuses the graph.
    """
    import onnxruntime

    try:
        session: Any = onnxruntime.InferenceSession(str(model))
    except Exception as error:  # the runtime's own kinds
        raise _refused(error) from error
    state: list[Any] = [torch.full_like(value, 7).cpu().numpy() for value in start]
    for i, (images, wanted) in enumerate(zip(batches, expected, strict=True)):
        feeds = {f"state_in_{n}": value for n, value in enumerate(state)}
        feeds |= {"images": images.cpu().numpy(), "reset": np.array([i == 0])}
        try:
            logits, *state = session.run(None, feeds)
        except Exception as error:
            raise _refused(error) from error
        limit = TOLERANCE * max(1.0, float(wanted.nan_to_num().abs().max()))
        if not np.allclose(logits, wanted.float().cpu().numpy(), 0.0, limit, equal_nan=True):
            far = np.abs(logits - wanted.float().cpu().numpy()).max()
            raise ValueError(
                "`adapter` must predict by the graph as it does in Python to be exported, got "
                f"logits that differ by {far:.2g}: its model decides by values in Python, or draws "
                "random numbers; use tensors in its forward instead."
            )


def _refused(error: Exception) -> ValueError:
    reason = str(error).rpartition("Type Error:")[2].rpartition("Status Message:")[2]
    return ValueError(
        "`adapter` must hold a model whose graph onnxruntime runs to be exported, got one that it "
        f"refuses ({told(reason, 110)}): use float32, and operators for any number of images."
    )
