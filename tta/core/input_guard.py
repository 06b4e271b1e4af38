"""Keep images as they came for every pass, even of a model that writes to its input."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["InputGuard"]


class InputGuard:
    """Gives a model its images, or copies of them if the model writes to its input.

    To find out whether it does, it gets a copy once for every shape of image, with and without a
    graph. Later passes get the images themselves, and torch's version counter of a tensor shows
    whether the model has written to them after all.
    """

    def __init__(self) -> None:
        self.writes = False
        self._tried: set[tuple[Any, ...]] = set()

    def lend(self, x: Tensor) -> tuple[Tensor, int]:
        """Return the tensor to give the model for ``x`` (B, ...), and that tensor's version."""
        if self.writes or _kind(x) not in self._tried:
            x = x.clone()
        return x, x._version

    def take_back(self, x: Tensor, lent: tuple[Tensor, int]) -> None:
        """Check what a pass has done to the tensor that :meth:`lend` returned for ``x``.

        Raises:
            RuntimeError: When the images themselves were changed.
        """
        given, version = lent
        if self.writes:
            return
        if given is not x:
            self._tried.add(_kind(x))
            # Bits are compared, since the images may hold NaN, and not the version alone, since a
            # write through `.data` or numpy does not raise it.
            self.writes = given._version != version or not torch.equal(_bits(given), _bits(x))
        elif given._version != version:
            self.writes = True
            raise RuntimeError(
                "`images` were changed by the model in place, which had left earlier ones as they "
                "were: call again with fresh images; from now on the model is given copies."
            )


def _kind(x: Tensor) -> tuple[Any, ...]:
    return (x.shape[1:], x.dtype, x.device, torch.is_grad_enabled())


def _bits(x: Tensor) -> Tensor:
    return x.detach().contiguous().view(torch.uint8)
