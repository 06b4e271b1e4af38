"""What goes beside predictions on a device: uploads of images, and learning.

What a GPU is given to do in one stream is done in order, and beside that of other streams. Where
tensors go from one stream to another, the other one must wait for them, and their memory must not
be used again before it is done with them. On a CPU, all is done when a call returns.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["CudaLanes", "Given", "Lanes", "lanes_on"]


@dataclass(frozen=True, eq=False)
class Given:
    """Tensors that may not be ready yet.

    Args:
        value: A tensor, or a dict or a list of tensors.
        ready: Event of the stream that makes them.
    """

    value: Any
    ready: Any

    @property
    def shape(self) -> torch.Size:
        """That of a tensor."""
        return self.value.shape

    @property
    def dtype(self) -> torch.dtype:
        """That of a tensor."""
        return self.value.dtype


class Lanes:
    """Of a CPU: one, where nothing has to wait."""

    def upload(self, image: Tensor) -> Any:
        """Begin to copy an image to the device; what :meth:`take` takes, with shape and dtype."""
        return image

    def give(self, value: Any) -> Any:
        """Hand tensors over, for whoever calls :meth:`take` on what this returns.

        Args:
            value: A tensor, or a dict or a list of tensors, made in this lane.
        """
        return value

    def take(self, given: Any) -> Any:
        """The tensors that were given, ready for what this lane does next."""
        return given

    @contextmanager
    def learning(self) -> Iterator[None]:
        """Within the block this thread is in the lane for learning."""
        yield


class CudaLanes(Lanes):
    """Of a GPU: a stream for uploads, one for learning, and the caller's own.

    Args:
        device: With its number.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._uploads, self._learner = torch.cuda.Stream(device), torch.cuda.Stream(device)

    def upload(self, image: Tensor) -> Any:
        """See :class:`Lanes`; an image stays where it is if there is no memory for it."""
        if image.device.type != "cpu":  # the stream of this thread has made it
            return self.give(image) if image.device == self.device else image
        with torch.cuda.stream(self._uploads):
            try:
                pinned = image if image.is_pinned() else image.pin_memory()
                return self.give(pinned.to(self.device, non_blocking=True))
            except RuntimeError:
                return image

    def give(self, value: Any) -> Given:
        """See :class:`Lanes`."""
        return Given(value, torch.cuda.current_stream(self.device).record_event())

    def take(self, given: Any) -> Any:
        """See :class:`Lanes`."""
        if not isinstance(given, Given):
            return given
        stream = torch.cuda.current_stream(self.device)
        stream.wait_event(given.ready)
        for tensor in _tensors(given.value):
            if tensor.device == self.device:
                tensor.record_stream(stream)
        return given.value

    @contextmanager
    def learning(self) -> Iterator[None]:
        """See :class:`Lanes`."""
        with torch.cuda.stream(self._learner):
            yield


def lanes_on(device: torch.device) -> Lanes:
    """The lanes of a device."""
    return CudaLanes(device) if device.type == "cuda" else Lanes()


def _tensors(value: Any) -> Iterable[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return value.values() if isinstance(value, dict) else value
