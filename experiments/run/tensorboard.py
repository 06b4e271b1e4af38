"""TensorBoard events of a run: ``tensorboard --logdir runs`` shows all of them side by side."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tensorboard.compat.proto import summary_pb2
from torch.utils.tensorboard import SummaryWriter

from experiments.run.scoring import Step

__all__ = ["Events"]

SCALARS = ("concentration", "selected", "resets")  # besides the metrics of a batch
QUEUE = 1000  # events that may wait for the writer's thread before we wait for it


class Events:
    """Events of one method on one stream: scalars by step, errors and entropies by domain.

    Args:
        folder: The run's folder.
        stream: Name of the stream.
        method: Name of the method; both become parts of the path.
        config: Shown as text.
        start: First step; events of later steps that a killed run left are overwritten.
        samples: Show some images of each domain, which is enough for one method of a stream.
    """

    def __init__(
        self,
        folder: Path,
        stream: str,
        method: str,
        config: dict[str, Any],
        start: int = 0,
        samples: bool = False,
    ) -> None:
        path = str(folder / "tensorboard" / stream / method)
        self._writer = SummaryWriter(path, max_queue=QUEUE, purge_step=start or None)
        text = json.dumps(config, indent=2, default=str)
        self._writer.add_text("config", "\n".join("    " + line for line in text.splitlines()))
        self._samples = samples
        self._shown: set[str] = set()
        self._domain: str | None = None
        self._domain_error: float | None = None
        self._entropies: list[np.ndarray] = []

    def add(self, steps: Sequence[Step]) -> None:
        """Add the figures of some batches."""
        for step in steps:
            row, number = step.row, step.row["step"]
            if row["domain"] != self._domain:
                self._end_domain(number)
                self._domain = row["domain"]
            self._entropies.append(step.scores.values["entropy"])
            self._domain_error = step.domain_error
            values = {"error/batch": row["errors"] / row["images"], "error/running": step.error}
            values |= step.scores.means("batch") | {name: row[name] for name in SCALARS}
            self._add_scalars(values, number)
            if self._samples and step.images is not None and row["domain"] not in self._shown:
                self._shown.add(row["domain"])
                self._writer.add_images(f"images/{row['domain']}", step.images.cpu(), number)

    def finish(self, batches: int) -> None:
        """Add the figures of the last domain, after so many batches."""
        self._end_domain(batches)

    def close(self) -> None:
        """Write what is still in memory, and end the writer's thread."""
        self._writer.close()

    def _add_scalars(self, values: dict[str, float], step: int) -> None:
        """Add scalars in one event; `add_scalar` for each of them takes as long as a layer."""
        proto: Any = summary_pb2  # made by protobuf, without types
        points = [proto.Summary.Value(tag=name, simple_value=v) for name, v in values.items()]
        writer = self._writer.file_writer
        assert writer is not None  # it is there until the writer is closed
        writer.add_summary(proto.Summary(value=points), step)

    def _end_domain(self, step: int) -> None:
        """Add the figures of the domain that the stream leaves."""
        if not self._entropies:
            return
        self._writer.add_histogram(f"entropy/{self._domain}", np.concatenate(self._entropies), step)
        self._entropies = []
        if self._domain_error is not None:  # None where batches are mixed
            self._writer.add_scalar(f"domain/{self._domain}", self._domain_error, step)
