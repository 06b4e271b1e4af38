"""Checks of what users pass: each names the argument, what is expected and what came."""

from __future__ import annotations

import difflib
import math
import numbers
import os
from collections.abc import Iterable, Mapping
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Any

__all__ = [
    "boolean",
    "channels",
    "fraction",
    "mapping",
    "nearest",
    "number",
    "one_of",
    "path_like",
    "seed",
    "string",
    "whole_number",
]


def nearest(name: str, known: Iterable[str], limit: int = 40) -> str:
    """End a sentence about a name that is not in `known`: the closest name, then all.

    Args:
        name: The unknown name.
        known: The known names, in the order to list them; a set is sorted.
        limit: Largest number of names to list; of more names the closest are listed.

    >>> nearest("dirichlett", ["dirichlet", "mixed"])
    "did you mean 'dirichlet'? Known: dirichlet, mixed."
    >>> nearest("vgg", ["vgg11", "vgg13", "alexnet"], limit=2)
    "did you mean 'vgg13'? Known: vgg13, vgg11 and 1 more."
    """
    known = sorted(known) if isinstance(known, AbstractSet) else list(known)
    close = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}? " if close else ""
    if len(known) <= limit:
        return f"{hint}Known: {', '.join(known)}."
    shown = difflib.get_close_matches(str(name), known, n=limit, cutoff=0.0)
    return f"{hint}Known: {', '.join(shown)} and {len(known) - len(shown)} more."


def whole_number(name: str, value: Any, low: int) -> int:
    """Return `value` as an int of at least `low`."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(
            f"`{name}` must be a whole number of at least {low}, got {value!r}; pass an int"
        )
    if int(value) < low:
        raise ValueError(f"`{name}` must be a whole number of at least {low}, got {value!r}")
    return int(value)


def number(
    name: str,
    value: Any,
    low: float,
    high: float = math.inf,
    *,
    above: bool = False,
    below: bool = False,
    advice: str = "",
) -> float:
    """Return `value` as a finite float in [low, high]; `above` excludes low, `below` high."""
    expected = f"a number greater than {low:g}" if above else f"a number of at least {low:g}"
    if high < math.inf:
        expected += f" and {'below' if below else 'at most'} {high:g}"
    advice = f"; {advice}" if advice else ""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        advice = advice or "; pass an int or a float"
        raise TypeError(f"`{name}` must be {expected}, got {value!r}{advice}")
    try:
        result = float(value)
    except OverflowError:  # an int beyond the largest float
        result = math.inf
    outside = result < low or result > high or (above and result == low)
    if not math.isfinite(result) or outside or (below and result == high):
        raise ValueError(f"`{name}` must be {expected}, got {value!r}{advice}")
    return result


def fraction(name: str, value: Any) -> float:
    """Return `value` as a float in [0, 1]."""
    return number(name, value, 0.0, 1.0)


def boolean(name: str, value: Any) -> bool:
    """Return `value`, which must be True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"`{name}` must be True or False, got {value!r}")
    return value


def string(name: str, value: Any) -> str:
    """Return `value`, which must be a string."""
    if not isinstance(value, str):
        raise TypeError(f"`{name}` must be a string, got {value!r}; put it in quotes")
    return value


def one_of(name: str, value: Any, allowed: Iterable[str]) -> str:
    """Return `value`, which must be one of the words in `allowed`."""
    allowed = list(allowed)
    words = ", ".join(f'"{item}"' for item in allowed)
    if not isinstance(value, str):
        raise TypeError(f"`{name}` must be one of {words}, got {value!r}; pass one of these words")
    if value not in allowed:
        raise ValueError(
            f"`{name}` must be one of {words}, got {value!r}; {nearest(value, allowed)}"
        )
    return value


def seed(name: str, value: Any) -> int:
    """Return `value` as an int that a `torch.Generator` takes."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"`{name}` must be a whole number, got {value!r}; pass an int such as 0")
    if not -(2**63) <= int(value) < 2**64:
        raise ValueError(
            f"`{name}` must be a whole number of at most 64 bits, got {value!r}; pass a smaller "
            "one such as 0"
        )
    return int(value)


def channels(name: str, value: Any, *, above: float = -math.inf) -> tuple[float, ...]:
    """Return `value` as a tuple of finite floats above `above`, one for each channel or for all."""
    if getattr(value, "ndim", None) == 0 and not getattr(value, "is_meta", False):
        value = value.item()  # the number in an array or a tensor
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        value = (value,)
    expected = "a list of numbers, one for each channel, or one for all"
    if above > -math.inf:
        expected += f", above {above:g}"
    if isinstance(value, (str, bytes, dict, AbstractSet)) or not isinstance(value, Iterable):
        raise TypeError(f"`{name}` must be {expected}, got {value!r}; pass a tuple such as (0.5,)")
    try:
        given = tuple(float(item) for item in value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        raise TypeError(
            f"`{name}` must be {expected}, got {value!r}; pass a tuple such as (0.5,)"
        ) from None
    if not given or not all(math.isfinite(item) and item > above for item in given):
        raise ValueError(
            f"`{name}` must be {expected}, got {given}; pass what the model was trained with"
        )
    return given


def path_like(name: str, value: Any) -> Path:
    """Return `value` as a path."""
    if not isinstance(value, (str, os.PathLike)):
        raise TypeError(f"`{name}` must be a path, got {value!r}; pass a string or a pathlib.Path")
    if os.fspath(value) == "":
        raise ValueError(f"`{name}` must be a path, got an empty one; pass '.' for this folder")
    return Path(value)


def mapping(name: str, what: str, value: Any) -> Mapping[Any, Any]:
    """Return `value`, which must be a dict of `what`, as ``to_dict`` gives it."""
    if not isinstance(value, Mapping):
        raise TypeError(
            f"`{name}` must be a dict of {what}, got {type(value).__name__}: pass what to_dict() "
            "gave."
        )
    return value
