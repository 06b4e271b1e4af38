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

    def ask_order(self, name: str, shape: torch.Size, device: torch.device) -> Tensor | None:
        """As :meth:`ask`, for rows (..., N) int64 that are permutations of ``range(N)``.

        Raises:
            ValueError: When a number is missing in a row.
        """
        found = self.ask(name, shape, torch.int64, device)
        expected = torch.arange(shape[-1], device=device)
        if found is not None and not bool((found.sort(-1).values == expected).all()):
            raise ValueError(
                f"`draws` must return permutations of 0 to {shape[-1] - 1} for {shown(name)}, got "
                "rows in which a number is missing: correct the function."
            )
        return found
