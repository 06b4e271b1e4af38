"""Dropout at test time, for how far predictions hold: masks, and where they are applied."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tta.core.checks import shown
from tta.core.random import CountedDraws

__all__ = ["dropped", "dropping", "keep_mask"]

LEVELS = 1 << 16  # of a random number, four of which are made from one word


def keep_mask(shape: torch.Size, rate: float, draws: CountedDraws) -> Tensor:
    """Draw a mask whose elements are True independently with probability 1 - ``rate``.

    Args:
        shape: Any.
        rate: In [0, 1), rounded to multiples of 2^-16.
        draws: Random numbers, on the device of the mask.
    """
    count = torch.Size(shape).numel()
    numbers = draws.words((count + 3) // 4).view(torch.int16)[:count]
    return (numbers >= round(rate * LEVELS) - LEVELS // 2).view(shape)


def dropped(x: Tensor, kept: Tensor, rate: float) -> Tensor:
    """Dropout of ``x`` with a mask of its shape: 0 where it is False, else ``x / (1 - rate)``."""
    return x * kept.to(x.dtype) / (1 - rate)


@contextmanager
def dropping(
    model: nn.Module, places: tuple[str, ...], rate: float, mask: Callable[[str, Tensor], Tensor]
) -> Iterator[None]:
    """Within the block, drop elements of what modules give out.

    Args:
        model: The model.
        places: Names of modules that give out a tensor.
        rate: Share of the elements to drop.
        mask: Place and activation -> mask of its shape, True = kept.

    Raises:
        ValueError: When a module gives out something else, or was not called.
    """
    left = dict.fromkeys(places)

    def hook(place: str) -> Callable[..., Tensor]:
        def drop(module: nn.Module, args: Any, output: Any) -> Tensor:
            if not isinstance(output, Tensor):
                raise ValueError(
                    f"`places` must name modules that give a tensor, but {shown(place)} gives "
                    f"{type(output).__name__}: name others."
                )
            left.pop(place, None)
            return dropped(output, mask(place, output), rate)

        return drop

    handles = [model.get_submodule(place).register_forward_hook(hook(place)) for place in places]
    try:
        yield
        if left:
            raise ValueError(
                f"`places` must name modules that the model calls, got {shown(next(iter(left)))}, "
                "which it does not: name others."
            )
    finally:
        for handle in handles:
            handle.remove()
