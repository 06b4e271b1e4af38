"""Tables that tests of single methods declare for tests of all of them.

A literal at the top of ``tests/test_<method>.py`` is read without importing the file, so that a new
method needs no line in a table that others change too.
"""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

__all__ = ["declared"]

TESTS = Path(__file__).parents[1]


def declared(name: str) -> dict[str, Any]:
    """The values that files of tests give a name, by file."""
    found = {}
    for path in sorted(TESTS.glob("test_*.py")):
        text = path.read_text()
        if f"\n{name} = " not in text:
            continue
        for node in ast.parse(text).body:
            match node:
                case ast.Assign(targets=[ast.Name(id=target)], value=value) if target == name:
                    found[path.name] = ast.literal_eval(value)
    return found
