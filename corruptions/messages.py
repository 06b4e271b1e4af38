"""What a message repeats of what came: in one line, and cut where it is long."""

from __future__ import annotations

import reprlib
from typing import Any

__all__ = ["LONGEST", "sentence", "shown", "told"]

LONGEST = 300  # characters of a message
SHOWN = 90  # of a value in it

_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = _REPR.maxlong = 10 * SHOWN
_REPR.maxtuple = _REPR.maxlist = _REPR.maxdict = 20


def shown(value: Any, most: int = SHOWN) -> str:
    """`value` as code would write it, in one line of at most `most` characters.

    >>> shown("a" * 1000, most=10)
    "'aaaaaa..."
    """
    try:
        if isinstance(value, str):
            return told(repr(value[:most]) if len(value) > most else repr(value), most)
        return told(_REPR.repr(value), most)
    except Exception:  # an object may raise whatever it likes
        return f"a {type(value).__name__}"


def sentence(error: BaseException) -> str:
    """The message of an error in one line, for people at a command line."""
    line = " ".join(str(error).split())
    return line if len(line) <= LONGEST else told(line, LONGEST)


def told(text: Any, most: int = SHOWN) -> str:
    r"""A text, such as that of an exception, in one line of at most `most` characters.

    >>> told(ValueError("no such  file\nor folder."))
    'no such file or folder'
    """
    line = " ".join(str(text)[: 10 * most].split()).rstrip(".")
    line = line.encode("utf-8", "backslashreplace").decode()  # half of a pair of surrogates
    line = "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in line)
    return line if len(line) <= most else f"{line[: most - 3]}..."
