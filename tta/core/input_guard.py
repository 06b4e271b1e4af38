"""Keep images as they came for every pass, even of a model that writes to its input."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

__all__ = ["ArgumentGuard", "InputGuard", "copies", "rows_refusal"]

ENDLESS = 1 << 32  # bytes


class InputGuard:
    """Gives a model its images, or copies of them if the model writes to its input.

    To find out whether it does, it gets a copy once for every shape of image, with and without a
    graph. Later passes get the images themselves, and torch's version counter of a tensor shows
    whether the model has written to them after all.

    Args:
        name: What the tensor is called.
    """

    def __init__(self, name: str = "images") -> None:
        self.name = name
        self.writes = False
        self._tried: set[tuple[Any, ...]] = set()

    def lend(self, x: Tensor) -> tuple[Tensor, int]:
        """Return the tensor to give the model for ``x`` (B, ...), and that tensor's version."""
        if self.writes or _kind(x) not in self._tried:
            x = _copy(x)
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
                f"`{self.name}` were changed by the model in place, which had left earlier ones as "
                f"they were: call again with fresh {self.name}; from now on the model is given "
                "copies."
            )


class ArgumentGuard:
    """As :class:`InputGuard`, for what a model gets besides the images: tensors by their place."""

    def __init__(self) -> None:
        self._guards: dict[int | str, InputGuard] = {}

    def lend(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any], list[tuple[int | str, Tensor, Any]]]:
        """Return the arguments to give the model, and what :meth:`take_back` takes."""
        lent: dict[int | str, Tensor] = {}
        taken: list[tuple[int | str, Tensor, Any]] = []
        for place, value in (*enumerate(args), *kwargs.items()):
            if isinstance(value, Tensor):
                name = place if isinstance(place, str) else "args"
                guard = self._guards.setdefault(place, InputGuard(name))
                taken.append((place, value, guard.lend(value)))
                lent[place] = taken[-1][2][0]
        given = tuple(lent.get(place, value) for place, value in enumerate(args))
        return given, {key: lent.get(key, value) for key, value in kwargs.items()}, taken

    def take_back(self, taken: list[tuple[int | str, Tensor, Any]]) -> None:
        """Check what a pass has done to the tensors that were lent."""
        for place, value, lent in taken:
            self._guards[place].take_back(value, lent)


def copies(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of a model with copies of the tensors."""
    own = [_copy(value) if isinstance(value, Tensor) else value for value in args]
    named = {k: _copy(value) if isinstance(value, Tensor) else value for k, value in kwargs.items()}
    return tuple(own), named


def rows_refusal(
    error: Exception, rows: int, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> ValueError | None:
    """What to say where a model fails on ``rows`` images with arguments for other images.

    Methods with passes of views, of a memory, or of some rows meet this; None for other failures.
    """
    if not isinstance(error, (RuntimeError, IndexError)):
        return None
    said = re.findall(r"\d+", str(error))
    for place, value in (*enumerate(args), *kwargs.items()):
        if not isinstance(value, Tensor) or value.ndim == 0 or len(value) == rows:
            continue
        if str(rows) in said and str(len(value)) in said:
            name = place if isinstance(place, str) else "args"
            return ValueError(
                f"`{name}` must fit every pass of the model, got {len(value)} rows in a pass of "
                f"{rows} images: where it has a row for each image, take a method whose passes are "
                "all of the whole batch, such as 'tent', or put it into the images."
            )
    return None


def _kind(x: Tensor) -> tuple[Any, ...]:
    return (x.shape[1:], x.dtype, x.device, torch.is_grad_enabled())


def _bits(x: Tensor) -> Tensor:
    return _once(x).detach().contiguous().view(torch.uint8)


def _copy(x: Tensor) -> Tensor:
    """A clone, in which values that are repeated beyond any memory are repeated likewise."""
    return _once(x).expand_as(x) if _is_endless(x) else x.clone()


def _once(x: Tensor) -> Tensor:
    """A copy with what is repeated beyond any memory once; other tensors as they are."""
    if not _is_endless(x):
        return x
    once = x[tuple(slice(None) if stride else slice(1) for stride in x.stride())]
    return once.clone(memory_format=torch.contiguous_format)


def _is_endless(x: Tensor) -> bool:
    """Whether a tensor would take gigabytes, and repeats values by strides of 0."""
    large = x.layout == torch.strided and x.numel() * x.element_size() > ENDLESS
    return large and 0 in x.stride()
