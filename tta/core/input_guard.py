"""Images as they came, for every pass, also of a model that writes to its input."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["InputGuard"]


class InputGuard:
    """Lends images to a model, and copies where the model is seen to write to them.

    Whether it writes is seen by lending it a copy, once for every shape of image and with and
    without a graph. Later passes get the images themselves, and a counter that torch keeps tells
    whether the model has written to them after all.
    """

    def __init__(self) -> None:
        self.writes = False
        self._tried: set[tuple[Any, ...]] = set()

    def lend(self, x: Tensor) -> tuple[Tensor, int]:
        """What the model is given for ``x`` (B, ...), and its version."""
        if self.writes or _kind(x) not in self._tried:
            x = x.clone()
        return x, x._version

    def take_back(self, x: Tensor, lent: tuple[Tensor, int]) -> None:
        """See what a pass has done to what :meth:`lend` gave for ``x``.

        Raises:
            RuntimeError: When the images themselves were changed.
        """
        given, version = lent
        if self.writes:
            return
        if given is not x:
            self._tried.add(_kind(x))
            # Bits, since what is compared may hold NaN; and not the version alone, since `.data`
            # and numpy write past it.
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
