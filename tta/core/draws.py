"""Random draws that a caller injects in place of a component's own, for replay and tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tta.core.checks import shown

__all__ = ["Draws", "GivenDraws"]

GivenDraws = Callable[[str, torch.Size, int], Any]


class Draws:
    """Asks the caller for a draw, if there is anybody to ask.

    Args:
        given: Name, shape and call -> tensor, or None to draw as usual; None for nobody.
    """

    def __init__(self, given: GivenDraws | None = None) -> None:
        self.given = given
        self.call = 0  # batches since wrap

    def ask(
        self, name: str, shape: torch.Size, dtype: torch.dtype, device: torch.device
    ) -> Tensor | None:
        """Return the caller's draw, moved and cast; None where the component is to draw itself.

        Raises:
            TypeError: When the answer is no tensor.
            ValueError: When it has another shape.
        """
        found = None if self.given is None else self.given(name, shape, self.call)
        if found is None:
            return None
        if not isinstance(found, Tensor):
            raise TypeError(
                f"`draws` must return a tensor or None for {shown(name)}, got "
                f"{type(found).__name__}: "
                "correct the function."
            )
        if found.shape != shape:
            raise ValueError(
                f"`draws` must return shape {tuple(shape)} for {shown(name)}, got "
                f"{tuple(found.shape)}: "
                "correct the function."
            )
        return found.to(device=device, dtype=dtype)
