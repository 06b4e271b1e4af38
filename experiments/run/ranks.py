"""``torchrun -m experiments run``: one stream on several processes, each with a share of a batch.

Every rank reads the stream and knows all figures, see `tta.runtime.split_batches`. The first rank
writes and prints. Each of the others works in a folder of its own, which begins as a copy of the
run's folder and is thrown away. So all ranks continue a run where the first one left it.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import tta
from experiments.records.file import RESULTS
from experiments.run.snapshot import FILE
from tta.core.checks import shown
from tta.runtime.parallel import split_batches

__all__ = ["first", "following", "join", "lead", "leave", "many", "share"]


def many() -> bool:
    """Whether torchrun started several processes."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ


def first() -> bool:
    """Whether this process is the one that writes and prints."""
    return not many() or os.environ["RANK"] == "0"


def join(device: str) -> None:
    """Join the group of processes, if there are several; for cuda each takes the GPU of its rank.

    Raises:
        ValueError: For a device with a number, which all ranks would take, and for more ranks than
            GPUs.
    """
    if not many():
        return
    if device not in ("cpu", "cuda"):
        raise ValueError(
            f"`device` must be cpu or cuda under torchrun, got {shown(device)}: each process "
            "takes the "
            "GPU of its local rank"
        )
    gpu, place = device == "cuda", int(os.environ.get("LOCAL_RANK", "0"))
    if gpu and place >= torch.cuda.device_count():
        raise ValueError(
            f"`nproc-per-node` must be at most the {torch.cuda.device_count()} GPUs that are here, "
            f"got a process with local rank {place}"
        )
    if gpu:
        torch.cuda.set_device(place)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if gpu else "gloo")


def leave() -> None:
    """Leave the group of processes."""
    if many() and dist.is_initialized():
        dist.destroy_process_group()


def share(adapter: tta.Adapter) -> tta.Adapter:
    """Split an adapter's batches over the processes, if there are several."""
    return split_batches(adapter) if many() else adapter


def lead(folder: Path) -> None:
    """Send the files of the run in `folder`, which say how far it is, to the other processes."""
    if many():
        files = {n: (folder / n).read_bytes() for n in (RESULTS, FILE) if (folder / n).is_file()}
        dist.broadcast_object_list([files])


@contextmanager
def following() -> Iterator[Path]:
    """A folder with the files that `lead` sent, which is removed after the ``with`` block."""
    folder = Path(tempfile.mkdtemp(prefix="tta-rank-"))
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # torchrun's way to end it
    try:
        received: list[Any] = [None]
        dist.broadcast_object_list(received)
        for name, data in received[0].items():
            (folder / name).write_bytes(data)
        yield folder
    finally:
        signal.signal(signal.SIGTERM, before)
        shutil.rmtree(folder, ignore_errors=True)
