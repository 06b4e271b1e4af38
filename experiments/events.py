"""TensorBoard events of a run: ``tensorboard --logdir runs`` shows all of them side by side."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

__all__ = ["Events"]


class Events:
    """Scalars of one method on one stream, by step.

    Args:
        folder: The run's folder.
        stream: Name of the stream.
        method: Name of the method; both become parts of the path.
        config: Shown as text.
    """

    def __init__(self, folder: Path, stream: str, method: str, config: dict[str, Any]) -> None:
        self._writer = SummaryWriter(str(folder / "tensorboard" / stream / method))
        text = json.dumps(config, indent=2, default=str)
        self._writer.add_text("config", "\n".join("    " + line for line in text.splitlines()))

    def add(self, row: dict[str, Any], running_error: float) -> None:
        """Add the figures of one batch; `row` is its line in the results file."""
        step = row["step"]
        self._writer.add_scalar("error/batch", row["errors"] / row["images"], step)
        self._writer.add_scalar("error/running", running_error, step)
        self._writer.add_scalar("entropy", row["entropy"], step)
        self._writer.add_scalar("selected", row["selected"], step)

    def close(self) -> None:
        """Write what is still in memory."""
        self._writer.close()
