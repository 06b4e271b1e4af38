"""Checks of what users pass: each names the argument, what is expected and what came."""

from __future__ import annotations

import difflib
import math
import numbers
from collections.abc import Iterable
from typing import Any

__all__ = ["flag", "fraction", "nearest", "number", "one_of", "whole"]


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of a sentence about a name that is not in `known`: the closest, then all.

    >>> nearest("dirichlett", ["dirichlet", "mixed"])
    "did you mean 'dirichlet'? Known: dirichlet, mixed."
    """
    known = list(known)
    close = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}Known: {', '.join(known)}."


def whole(name: str, value: Any, low: int) -> int:
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
    """Return `value` as a finite float in [low, high]; without low if `above`, high if `below`."""
    expected = f"a number greater than {low:g}" if above else f"a number of at least {low:g}"
    if high < math.inf:
        expected += f" and {'below' if below else 'at most'} {high:g}"
    advice = f"; {advice}" if advice else ""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"`{name}` must be {expected}, got {value!r}{advice}")
    result = float(value)
    outside = result < low or result > high or (above and result == low)
    if not math.isfinite(result) or outside or (below and result == high):
        raise ValueError(f"`{name}` must be {expected}, got {value!r}{advice}")
    return result


def fraction(name: str, value: Any) -> float:
    """Return `value` as a float in [0, 1]."""
    return number(name, value, 0.0, 1.0)


def flag(name: str, value: Any) -> bool:
    """Return `value`, which must be True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"`{name}` must be True or False, got {value!r}")
    return value


def one_of(name: str, value: Any, allowed: Iterable[str]) -> str:
    """Return `value`, which must be one of the words in `allowed`."""
    allowed = list(allowed)
    if value not in allowed:
        words = ", ".join(f'"{item}"' for item in allowed)
        hint = nearest(value, allowed) if isinstance(value, str) else "pass one of these words"
        raise ValueError(f"`{name}` must be one of {words}, got {value!r}; {hint}")
    return value
