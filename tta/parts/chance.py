"""Random decisions of a method, which the caller may make in its place."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tta.core.checks import shown
from tta.core.component import Context
from tta.core.random import CountedDraws, fork

__all__ = ["Chance"]


class Chance:
    """Asks the caller's ``draws`` for each decision, and decides itself where there is no answer.

    The adapter's generator advances by one draw when the first decision is its own.

    Args:
        context: What is known at wrap.
    """

    def __init__(self, context: Context) -> None:
        self.context = context
        self._own: CountedDraws | None = None

    def uniform(self, name: str) -> float:
        """A number in [0, 1).

        Args:
            name: Of the draw.

        Raises:
            ValueError: When the caller's is outside [0, 1].
        """
        given = self._ask(name)
        if given is None:
            return self._numbers().numbers(1)[0]
        if not 0 <= given <= 1:
            raise ValueError(
                f"`draws` must return a number from 0 to 1 for {shown(name)}, got {given}: correct "
                "the function."
            )
        return given

    def pick(self, name: str, options: Sequence[int], open_end: bool = False) -> int:
        """One of several whole numbers.

        Args:
            name: Of the draw.
            options: The numbers in ascending order, at least one.
            open_end: Whether the caller's may be higher than all of them.

        Raises:
            ValueError: When the caller's is none of them.
        """
        given = self._ask(name)
        if given is None:
            return options[int(self._numbers().numbers(1)[0] * len(options))]
        higher = open_end and given > options[-1] and given.is_integer()
        if given not in options and not higher:
            raise ValueError(
                f"`draws` must return one of {shown(list(options), 60)} for {shown(name)}, got "
                f"{given}: correct the function."
            )
        return int(given)

    def order(self, name: str, count: int, device: torch.device) -> Tensor:
        """A permutation of ``range(count)``, int64.

        Args:
            name: Of the draw.
            count: How many.
            device: Of the tensor.
        """
        given = self.context.draws.ask_order(name, torch.Size((count,)), device)
        return self._numbers().words(count).argsort().to(device) if given is None else given

    def _ask(self, name: str) -> float | None:
        shape, cpu = torch.Size(()), torch.device("cpu")
        given = self.context.draws.ask(name, shape, torch.float64, cpu)
        return None if given is None else float(given)

    def _numbers(self) -> CountedDraws:
        if self._own is None:
            self._own = fork(self.context.generator, torch.device("cpu"))
        return self._own
