"""Checkpoints of training: where a further stage begins, and what is kept after each epoch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from models.bundled import give_weights
from tta.core.files import replacing

__all__ = ["begin_with", "keep"]


def begin_with(model: nn.Module, name: str, work: Path) -> None:
    """Give a network the weights of ``work/<name>.pt``, or the stored ones where there is none."""
    finished = work / f"{name}.pt"
    if finished.exists():
        model.load_state_dict(torch.load(finished, weights_only=True)["model"])
    else:
        print(f"{name}: from the weights that it comes with", flush=True)
        give_weights(model, name)


def keep(checkpoint: Path, log: dict[str, Any], row: dict[str, Any], **state: Any) -> None:
    """Add a row to the history of a log, say it, and write the log with what training moves."""
    log["history"].append(row)
    print(log["name"], row, f"{log['seconds']:.0f}s", flush=True)
    with replacing(checkpoint) as part:
        torch.save(state | {"log": json.dumps(log)}, part)
