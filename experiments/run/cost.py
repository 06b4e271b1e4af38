"""What a method costs: passes through the model, time, and memory."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import register_multi_grad_hook

from tta.core.batch_split import current_split

__all__ = ["Passes", "PeakMemory", "Timer"]


class Passes:
    """Counts the images that go through a model forward and backward, until it is closed.

    A batch of 64 that is seen as it is and in 32 augmented views counts 33 * 64 forward. A backward
    pass counts all images of its forward pass, whether they are in the loss or not. Where a pass is
    split over processes, the images of all processes count.

    Args:
        model: It may return a tensor, or tensors in mappings, sequences or objects.
    """

    def __init__(self, model: nn.Module) -> None:
        self.restart()
        self._handle = model.register_forward_hook(self._count)

    def restart(self) -> None:
        """Count from 0 again."""
        self.forward = self.backward = 0

    @contextmanager
    def uncounted(self) -> Iterator[None]:
        """Leave out what happens in a ``with`` block."""
        kept = self.forward, self.backward
        try:
            yield
        finally:
            self.forward, self.backward = kept

    def _count(self, module: nn.Module, arguments: Any, output: Any) -> None:
        split = current_split()
        images = len(next(_tensors([arguments, output]))) if split is None else split.rows
        self.forward += images
        # Whatever the loss is made of has its gradient pass through some of these tensors.
        trained = [tensor for tensor in _tensors(output) if tensor.requires_grad]
        if trained:
            register_multi_grad_hook(trained, lambda _: self._count_backward(images), mode="any")

    def _count_backward(self, images: int) -> None:
        self.backward += images

    def close(self) -> None:
        """Take the hook off the model."""
        self._handle.remove()


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in what a model takes or returns, in their order."""
    if isinstance(value, Tensor):
        yield value
        return
    if isinstance(value, Mapping):
        held: Iterable[Any] = value.values()
    elif isinstance(value, (tuple, list)):
        held = value
    else:
        held = getattr(value, "__dict__", {}).values()
    for item in held:
        yield from _tensors(item)


class PeakMemory:
    """The largest use of memory since this was made.

    On CUDA that is what torch allocated, elsewhere the resident memory of the process.

    Args:
        device: Where the model is.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            return
        with suppress(OSError):  # elsewhere than on Linux: the peak of the whole process
            Path("/proc/self/clear_refs").write_text("5")  # forget the former peak

    def read(self) -> int:
        """Bytes."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        with suppress(OSError):
            for line in Path("/proc/self/status").read_text().splitlines():
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


class Timer:
    """Measures the time of work on a device, from when it is made on.

    Nothing waits for a GPU before `seconds` is called.

    Args:
        device: Where the work is done; on CUDA, in the current stream.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
        self._first = self._last = self._mark()

    def stop(self) -> Timer:
        """End the measured time here."""
        self._last = self._mark()
        return self

    def seconds(self) -> float:
        """Seconds from when the timer was made to `stop`."""
        if self._stream is None:
            return self._last - self._first
        self._last.synchronize()
        return self._first.elapsed_time(self._last) / 1000

    def _mark(self) -> Any:
        if self._stream is None:
            return time.perf_counter()
        return self._stream.record_event(torch.cuda.Event(enable_timing=True))
