"""How much memory tensors take at the peak of some work."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["PeakBytes", "held_bytes"]


def held_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes that tensors take together; what they share counts once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


class PeakBytes:
    """The most memory that tensors made within the block take at one time.

    On CUDA this is what torch allocates there. Elsewhere the tensors that operations return are
    counted, which is the same on every machine; what a kernel takes for itself is not seen.

    Args:
        device: Where the work is done.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._mode = None if device.type == "cuda" else _Count()
        self._start = 0

    def __enter__(self) -> PeakBytes:
        if self._mode is None:
            torch.cuda.synchronize(self.device)
            self._start = torch.cuda.memory_allocated(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            self._mode.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        if self._mode is not None:
            self._mode.__exit__(*error)

    def forget(self) -> None:
        """Go on from what is held now."""
        if self._mode is None:
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            self._mode.peak = self._mode.now

    def read(self) -> int:
        """Bytes."""
        if self._mode is not None:
            return self._mode.peak
        return torch.cuda.max_memory_allocated(self.device) - self._start


class _Count(TorchDispatchMode):
    """Adds up the storages that operations return, while they live."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        before = {
            id(t.untyped_storage()) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)
        }
        for value in tree_leaves(result):
            if isinstance(value, Tensor) and not value.is_meta:
                storage = value.untyped_storage()
                if id(storage) not in before and storage not in self._seen:
                    self._add(storage)
        return result

    def _add(self, storage: Any) -> None:
        size = storage.nbytes()
        self._seen.add(storage)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._take_off, size).atexit = False

    def _take_off(self, size: int) -> None:
        self.now -= size
