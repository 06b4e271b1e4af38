"""Checks of what users pass: each names the argument, what is expected and what came.

A message is one sentence of at most 300 characters. What it repeats of what came goes through
:func:`shown` or :func:`told`, which cut it.
"""

from __future__ import annotations

import difflib
import itertools
import json
import math
import numbers
import os
import reprlib
import sys
from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Any, TypeGuard

__all__ = [
    "LARGE",
    "LARGEST",
    "LONGEST",
    "boolean",
    "channels",
    "dense",
    "folder_like",
    "fraction",
    "is_final",
    "is_iterable",
    "is_out_of_memory",
    "mapping",
    "nearest",
    "new_file",
    "number",
    "one_of",
    "parsed_json",
    "path_like",
    "real",
    "seed",
    "sentence",
    "shown",
    "string",
    "told",
    "whole_number",
]

LARGE = 1e6  # rates, weights, thresholds, temperatures: ten times more than any that makes sense
LARGEST = 2**31 - 1  # numbers of images, rows or batches
LONGEST_NAME = 255  # characters of a file's name
MOST_CHANNELS = 2**16
LONGEST = 300  # characters of a message
SHOWN = 90  # of a value in it
ROOM = 150  # characters of a list of names


class _Repr(reprlib.Repr):
    """Texts of values that never hold many parts of them, nor many levels."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel = 4
        self.maxstring = self.maxother = self.maxlong = SHOWN
        self.maxtuple = self.maxlist = self.maxset = self.maxfrozenset = self.maxdict = 20

    def repr_str(self, x: str, level: int) -> str:
        return repr(x[: self.maxstring])

    def repr_int(self, x: int, level: int) -> str:
        few = x.bit_length() < 1000  # Python refuses to write out very many digits
        return repr(x) if few else f"a whole number of {x.bit_length()} bits"

    def repr_instance(self, x: Any, level: int) -> str:
        torch: Any = sys.modules.get("torch")  # which nothing here needs before there is a tensor
        if torch is not None and isinstance(
            x, torch.Tensor
        ):  # its text may take for ever, if it is an expanded one
            shape = "" if x.is_nested else f" of shape {tuple(x.shape)}"
            return f"a {type(x).__name__}{shape}"
        return repr(x)

    repr_Tensor = repr_Parameter = repr_instance


_REPR = _Repr()


def shown(value: Any, most: int = SHOWN) -> str:
    """`value` as code would write it, in one line of at most `most` characters.

    >>> shown("a" * 1000, most=10)
    "'aaaaaa..."
    >>> shown([1.5, None])
    '[1.5, None]'
    """
    try:
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


def is_final(error: BaseException) -> bool:
    """Whether an error is a sentence of ours, which names an argument, and can stay as it is.

    Not so what is found wrong with the figures of channels: where images have another number of
    channels, that is the reason.
    """
    return str(error).startswith("`") and not str(error).startswith("`mean`")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory has run out, on whatever device."""
    torch: Any = sys.modules.get("torch")
    of_torch = torch is not None and isinstance(error, torch.OutOfMemoryError)
    on_cpu = isinstance(error, RuntimeError) and "allocate memory" in str(error)  # has no class
    return isinstance(error, MemoryError) or of_torch or on_cpu


def nearest(name: str, known: Iterable[str], limit: int = 40, room: int = ROOM) -> str:
    """End a sentence about a name that is not in `known`: the closest name, then all.

    Args:
        name: The unknown name.
        known: The known names, in the order to list them; a set is sorted.
        limit: Largest number of names to list; of more names the closest are listed.
        room: Largest number of characters of that list.

    >>> nearest("dirichlett", ["dirichlet", "mixed"])
    "did you mean 'dirichlet'? Known: dirichlet, mixed."
    >>> nearest("vgg", ["vgg11", "vgg13", "alexnet"], limit=2)
    "did you mean 'vgg13'? Known: vgg11, vgg13 and 1 more."
    """
    name = name[:100] if isinstance(name, str) else shown(name)
    known = sorted(known) if isinstance(known, AbstractSet) else list(known)
    hint = f"{found} " if (found := _did_you_mean(name, known, room)) else ""
    fit = min(limit, _how_many_fit(known, room))
    if len(known) <= fit:
        return f"{hint}Known: {', '.join(known) or 'none'}."
    ranked = difflib.get_close_matches(name, known, n=limit, cutoff=0.0)
    ranked = ranked[: max(1, _how_many_fit(ranked, room))]
    listed = ", ".join(name for name in known if name in ranked)
    return f"{hint}Known: {told(listed, room)} and {len(known) - len(ranked)} more."


def _did_you_mean(name: str, known: Sequence[str], room: int = ROOM) -> str:
    """A question for the known name that is closest; empty where none is close."""
    close = difflib.get_close_matches(name[:100], known, n=1, cutoff=0.5)
    return f"did you mean {shown(close[0], room)}?" if close else ""


def _how_many_fit(names: list[str], room: int) -> int:
    """How many of the first names fit into a list of that many characters."""
    ends = itertools.accumulate(len(name) + 2 for name in names)
    return sum(end - 2 <= room for end in ends)


def whole_number(name: str, value: Any, low: int, high: int = LARGEST) -> int:
    """Return `value` as an int in [low, high]."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(
            f"`{name}` must be a whole number of at least {low}, got {shown(value)}; pass an int"
        )
    if int(value) < low:
        raise ValueError(f"`{name}` must be a whole number of at least {low}, got {shown(value)}")
    if int(value) > high:
        raise ValueError(
            f"`{name}` must be a whole number from {low} to {high}, got {shown(value)}"
        )
    return int(value)


def number(
    name: str,
    value: Any,
    low: float,
    high: float = LARGE,
    *,
    above: bool = False,
    below: bool = False,
    advice: str = "",
) -> float:
    """Return `value` as a finite float in [low, high]; `above` excludes low, `below` high."""
    expected = f"a number greater than {low:g}" if above else f"a number of at least {low:g}"
    expected += f" and {'below' if below else 'at most'} {high:g}"
    advice = f"; {advice}" if advice else ""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        advice = advice or "; pass an int or a float"
        raise TypeError(f"`{name}` must be {expected}, got {shown(value)}{advice}")
    try:
        result = float(value)
    except OverflowError:  # an int beyond the largest float
        result = math.inf
    outside = result < low or result > high or (above and result == low)
    if not math.isfinite(result) or outside or (below and result == high):
        raise ValueError(f"`{name}` must be {expected}, got {shown(value)}{advice}")
    return result


def fraction(name: str, value: Any) -> float:
    """Return `value` as a float in [0, 1]."""
    return number(name, value, 0.0, 1.0)


def boolean(name: str, value: Any) -> bool:
    """Return `value`, which must be True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"`{name}` must be True or False, got {shown(value)}")
    return value


def string(name: str, value: Any) -> str:
    """Return `value`, which must be a string."""
    if not isinstance(value, str):
        raise TypeError(f"`{name}` must be a string, got {shown(value)}; put it in quotes")
    return value


def one_of(name: str, value: Any, allowed: Iterable[str]) -> str:
    """Return `value`, which must be one of the words in `allowed`."""
    allowed = list(allowed)
    words = ", ".join(f'"{item}"' for item in allowed)
    if not isinstance(value, str):
        raise TypeError(
            f"`{name}` must be one of {words}, got {shown(value)}; pass one of these words"
        )
    if value not in allowed:
        do = _did_you_mean(value, allowed) or "pass one of these words."
        raise ValueError(f"`{name}` must be one of {words}, got {shown(value)}; {do}")
    return value


def seed(name: str, value: Any) -> int:
    """Return `value` as an int that a `torch.Generator` takes."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(
            f"`{name}` must be a whole number, got {shown(value)}; pass an int such as 0"
        )
    if not -(2**63) <= int(value) < 2**64:
        raise ValueError(
            f"`{name}` must be a whole number of at most 64 bits, got {shown(value)}; pass a "
            "smaller one such as 0"
        )
    return int(value)


def channels(
    name: str, value: Any, *, low: float = -LARGE, high: float = LARGE, above: bool = False
) -> tuple[float, ...]:
    """Return `value` as a tuple of floats in [low, high], one for each channel or for all."""
    if getattr(value, "ndim", None) == 0 and not getattr(value, "is_meta", False):
        value = value.item()  # the number in an array or a tensor
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        value = (value,)
    expected = "a list of numbers, one for each channel, or one for all"
    expected += f", above {low:g} and at most {high:g}" if above else f", from {low:g} to {high:g}"
    if isinstance(value, (str, bytes, dict, AbstractSet)) or not is_iterable(value):
        raise TypeError(
            f"`{name}` must be {expected}, got {shown(value)}; pass a tuple such as (0.5,)"
        )
    try:
        given = tuple(float(item) for item in itertools.islice(value, MOST_CHANNELS + 1))
    except (TypeError, ValueError, OverflowError, RuntimeError):
        raise TypeError(
            f"`{name}` must be {expected}, got {shown(value)}; pass a tuple such as (0.5,)"
        ) from None
    if not 0 < len(given) <= MOST_CHANNELS or not all(
        low <= item <= high and not (above and item == low) for item in given
    ):
        raise ValueError(
            f"`{name}` must be {expected}, got {shown(given)}; pass what the model was trained with"
        )
    return given


def is_iterable(value: Any) -> TypeGuard[Iterable[Any]]:
    """Whether there are items in it; arrays and tensors of one number have none to go through."""
    return isinstance(value, Iterable) and getattr(value, "ndim", None) != 0


def path_like(name: str, value: Any) -> Path:
    """Return `value` as a path, which need not be there."""
    if not isinstance(value, (str, os.PathLike)) or not isinstance(os.fspath(value), str):
        raise TypeError(
            f"`{name}` must be a path, got {shown(value)}; pass a string or a pathlib.Path"
        )
    text = os.fspath(value)
    if any(len(part) > LONGEST_NAME for part in text.split(os.sep)):
        raise OSError(
            f"`{name}` must be a path that can be reached, got a name of more than {LONGEST_NAME} "
            "characters in it; choose another"
        )
    if text == "":
        raise ValueError(f"`{name}` must be a path, got an empty one; pass '.' for this folder")
    try:
        written = os.fsencode(text)
    except UnicodeError:
        written = b"\0"
    if b"\0" in written:
        raise ValueError(
            f"`{name}` must be a path, got {shown(text)}, which no file can be called; choose "
            "another"
        )
    try:
        os.stat(text)
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:  # too long, a link to itself, or nothing to be seen by this user
        raise type(error)(
            f"`{name}` must be a path that can be reached, got {shown(text)} ({error.strerror}); "
            "choose another"
        ) from None
    return Path(text)


def folder_like(name: str, value: Any) -> Path:
    """Return `value` as the path of a folder, which need not be there."""
    folder = path_like(name, value)
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(
            f"`{name}` must be a folder, got the file {told(folder)}: pass another."
        )
    return folder


def new_file(name: str, value: Any) -> Path:
    """Return `value` as the path of a file in a folder that is there."""
    file = path_like(name, value)
    if not file.absolute().parent.is_dir():
        raise FileNotFoundError(
            f"`{name}` must lie in a folder that is there, but {told(file.parent)} is not: make it "
            "first."
        )
    if file.is_dir():
        raise IsADirectoryError(
            f"`{name}` must be a file, got the folder {told(file)}: name a file in it."
        )
    if file.exists() and not file.is_file():  # a device, whose place a file would take
        raise FileExistsError(
            f"`{name}` must be a file, got {told(file)}, which is none: choose another."
        )
    return file


def dense(name: str, value: Any) -> None:
    """Refuse a tensor that is sparse, quantised, nested, on the meta device or endless."""
    import torch

    # The order matters, since a nested tensor says nothing of itself.
    if value.is_nested or value.layout != torch.strided or value.is_quantized or value.is_meta:
        kind = "nested" if value.is_nested else "meta" if value.is_meta else str(value.layout)
        kind = "quantised" if value.is_quantized else kind
        raise ValueError(
            f"`{name}` must be a dense tensor with values, got a {kind} one; convert it, such as "
            "by .to_dense()"
        )
    held = value.untyped_storage().nbytes() // value.element_size()
    if value.numel() > max(held, LARGEST):
        raise ValueError(
            f"`{name}` must be a tensor that memory can hold, got one value that was expanded to "
            f"{value.numel():.0e}; pass values of its own"
        )


def real(name: str, value: Any) -> None:
    """Refuse a tensor that is not of real floating-point numbers."""
    if not value.is_floating_point():
        raise TypeError(
            f"`{name}` must be a tensor of real floating-point numbers, got {value.dtype}; convert "
            "it, such as by .float()"
        )


def parsed_json(text: str | bytes) -> Any:
    """What a JSON text says.

    Raises:
        ValueError: When it is not JSON, or lies too deep in itself; in one line, to be quoted.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except UnicodeDecodeError:
        raise ValueError("it is no text") from None
    except ValueError as error:
        raise ValueError(told(error)) from None


def mapping(name: str, what: str, value: Any) -> Mapping[Any, Any]:
    """Return `value`, which must be a dict of `what`, as ``to_dict`` gives it."""
    if not isinstance(value, Mapping):
        raise TypeError(
            f"`{name}` must be a dict of {what}, got {type(value).__name__}: pass what to_dict() "
            "gave."
        )
    return value
