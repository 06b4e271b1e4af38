"""Lines of a results file: JSON objects, each with a check of its number and of every byte.

A line is ``{"check": "17-9a0b1c2d", "kind": ..., ...}``: its number, so that no two lines of a file
are alike, and the CRC-32 of the number and of the object without the check. Lines of the first
version have no check and begin with ``{"kind": ``; they are read as they are. A line that begins
otherwise, is not what its check says, is there a second time or has no end is not whole.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Iterable, Iterator
from typing import Any

from tta.core.checks import parsed_json

__all__ = ["decode", "encode", "mend", "next_number", "split"]

CHECK = re.compile(rb'\{"check": "(\d+)-([0-9a-f]{8})", ')
UNCHECKED = b'{"kind": '  # begins a line of the first version


def encode(rows: Iterable[dict[str, Any]], number: int) -> bytes:
    """Lines of some objects, of which the first one has that number; each has a ``kind``."""
    lines = []
    for place, row in enumerate(rows, number):
        text = json.dumps(row, allow_nan=False)
        lines.append(f'{{"check": "{place}-{_crc(place, text.encode())}", {text[1:]}\n')
    return "".join(lines).encode()


def decode(line: bytes) -> dict[str, Any] | None:
    """The object of a line, without its check; None for a line that is not whole."""
    check = CHECK.match(line)
    if check is not None:
        line = b"{" + line[check.end() :]
        if check[2].decode() != _crc(int(check[1]), line):
            return None
    elif not line.startswith(UNCHECKED):
        return None
    try:
        row = parsed_json(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and "kind" in row else None


def split(data: bytes) -> Iterator[tuple[bytes, dict[str, Any] | None]]:
    """Each line of a file, without its end, and its object; None where it is not whole."""
    *lines, cut = data.split(b"\n")
    seen: set[bytes] = set()
    for line in lines:
        yield line, None if line in seen else decode(line)
        seen.add(line)
    if cut:  # the last line has no end
        yield cut, None


def next_number(data: bytes) -> int:
    """A number that no line of a file has."""
    checks = (CHECK.match(line) for line in data.split(b"\n"))
    return 1 + max((int(check[1]) for check in checks if check is not None), default=-1)


def mend(data: bytes) -> tuple[bytes, int]:
    """Leave out the lines that are not whole, and quote them in ``repaired`` lines at the end.

    There they are the last ones, so that a run does not count as finished before it was gone on
    with and has written again what was lost.

    Returns:
        The mended file, and how many lines were not whole.
    """
    kept: list[bytes] = []
    quotes: list[dict[str, Any]] = []
    for number, (line, row) in enumerate(split(data)):
        if row is None:
            text = line.decode(errors="replace")
            quotes.append({"kind": "repaired", "step": number, "text": text})
        else:
            kept.append(line + b"\n")
    whole = b"".join(kept)
    return whole + encode(quotes, next_number(data)), len(quotes)


def _crc(number: int, text: bytes) -> str:
    return f"{zlib.crc32(b'%d ' % number + text):08x}"
