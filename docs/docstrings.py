"""What mkdocstrings asks of docstrings: doctests as code, no Sphinx roles, no `<name>` as a tag.

The comment of a class's field or attribute is taken for its docstring.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

__all__ = ["Docstrings"]


class Docstrings(griffe.Extension):
    """Rewrites docstrings before they are parsed, and makes some of comments."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite the docstring of one object."""
        if obj.docstring is None and obj.is_attribute and (text := comment(obj)):
            obj.docstring = griffe.Docstring(text, parent=obj)
        if obj.docstring is not None:
            obj.docstring.value = rewrite(obj.docstring.value)


def comment(obj: griffe.Object) -> str:
    """The comment behind an attribute of a class, or else the one above it."""
    if obj.parent is None or not obj.parent.is_class or not obj.lineno or not obj.endlineno:
        return ""
    lines = obj.lines_collection[obj.filepath]
    behind = lines[obj.endlineno - 1].partition("  # ")[2]
    above: list[str] = []
    for line in reversed(lines[: obj.lineno - 1]):
        if not line.strip().startswith("# "):
            break
        above.insert(0, line.strip()[2:])
    text = behind or " ".join(above)
    return text[:1].upper() + text[1:]


def rewrite(text: str) -> str:
    """Put doctests outside of a section into one, and escape what Markdown would swallow."""
    text = re.sub(r":\w+:`~?([^`]+)`", r"`\1`", text)
    text = re.sub(r"^Example:$", "Examples:", text, flags=re.M)
    lines = text.split("\n")
    first = next((i for i, line in enumerate(lines) if line.startswith(">>>")), len(lines))
    # What follows a doctest at the margin belongs to the examples as well.
    shown = [f"    {line}".rstrip() for line in lines[first:]]
    lines = [*lines[:first], *(["Examples:", *shown] if shown else [])]
    return "\n".join(map(_escaped, lines))


def _escaped(line: str) -> str:
    if line.lstrip().startswith((">>>", "...")):
        return line
    parts = re.split(r"(`+[^`]*`+)", line)
    parts[::2] = [re.sub(r"<(?=\w)", "&lt;", part) for part in parts[::2]]
    return "".join(parts)
