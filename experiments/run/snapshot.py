"""The place of a method in a stream, in one file that is replaced in one step.

A snapshot holds the adapter's state, the totals and the state of torch's generator of one moment.
Whenever a run is killed, the last snapshot is whole.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from experiments.records.file import plain
from experiments.run.totals import Totals
from tta import Adapter
from tta.core.checks import told
from tta.core.files import leftovers_of, replacing
from tta.core.state_dict import checksum

__all__ = ["Snapshots"]

FILE = "snapshot.safetensors"
SECONDS = 5.0  # of work that a kill may cost
SHARE = 0.01  # of the time that may go into saving


class Snapshots:
    """Saves a run's place in a stream now and then, and finds it again.

    Args:
        folder: The run's folder.
        every: Batches between two snapshots; None for as many as take `SECONDS`, or more where
            saving is slow.
    """

    def __init__(self, folder: Path, every: int | None = None) -> None:
        self.path = folder / FILE
        self.every = every
        self._last = time.monotonic()
        self._pause = SECONDS

    def due(self, batches: int) -> bool:
        """Tell whether to save after that many batches."""
        if self.every is not None:
            return batches % self.every == 0
        return time.monotonic() - self._last >= self._pause

    def save(self, key: list[str], adapter: Adapter, totals: Totals) -> None:
        """Replace the snapshot.

        Args:
            key: What is running, such as stream and method.
            adapter: Its state is saved.
            totals: Its `batches` says how far the stream is.
        """
        start = time.monotonic()
        figures, tensors = totals.state()
        tensors = {f"totals/{name}": value for name, value in tensors.items()}
        tensors |= {f"state/{name}": value for name, value in adapter.state().items()}
        tensors["torch_rng"] = torch.get_rng_state()
        tensors = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
        about = json.dumps({"key": key, "totals": figures, "checksum": _checksum(tensors)})
        with replacing(self.path) as part, part.open("wb") as file:
            file.write(save(tensors, {"about": about}))
            file.flush()
            os.fsync(file.fileno())  # a machine that goes down must not leave the name alone
        self._last = time.monotonic()
        self._pause = max(SECONDS, (self._last - start) / SHARE)

    def load(self, key: list[str], adapter: Adapter) -> Totals | None:
        """Put `adapter` back to where it was saved.

        Returns:
            The totals; None where there is no snapshot of `key`.

        Raises:
            ValueError: The file is damaged or was written by another version; nothing is loaded.
        """
        if not self.path.is_file():
            return None
        try:
            with safe_open(str(self.path), "pt") as file:
                about: dict[str, Any] = json.loads(file.metadata()["about"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            if about["checksum"] != _checksum(tensors):
                raise ValueError("its checksum is another")
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"`{self.path}` must be a snapshot, but it cannot be read ({told(error)}): it is "
                "left "
                "out and the method starts again"
            ) from error
        if about["key"] != plain(key):
            return None
        parts: dict[str, dict[str, Tensor]] = {"totals": {}, "state": {}}
        for name, value in tensors.items():
            part, _, rest = name.partition("/")
            parts.setdefault(part, {})[rest] = value
        try:
            totals = Totals.from_state(about["totals"], parts["totals"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"`{self.path}` must be a snapshot of this version, but it does not fit "
                f"({told(error)}): "
                "it is left out and the method starts again"
            ) from error
        adapter.load_state(parts["state"])
        torch.set_rng_state(tensors["torch_rng"])
        return totals

    def remove(self) -> None:
        """Delete the snapshot, and what a kill while saving left."""
        for path in (self.path, *leftovers_of(self.path)):
            path.unlink(missing_ok=True)


def _checksum(tensors: dict[str, Tensor]) -> int:
    return checksum(tensors[name] for name in sorted(tensors))
