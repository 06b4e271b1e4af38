"""What mkdocstrings asks of docstrings: doctests as code blocks, and no Sphinx roles."""

from __future__ import annotations

import re
from typing import Any

import griffe

__all__ = ["Docstrings"]


class Docstrings(griffe.Extension):
    """Rewrites docstrings before they are parsed."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite the docstring of one object."""
        if obj.docstring is not None:
            obj.docstring.value = rewrite(obj.docstring.value)


def rewrite(text: str) -> str:
    """Put fences around doctests, and plain code marks in place of roles."""
    text = re.sub(r":\w+:`~?([^`]+)`", r"`\1`", text)
    lines, fence = [], ""
    for line in [*text.split("\n"), ""]:
        indent = line[: len(line) - len(line.lstrip())]
        if line.lstrip().startswith(">>>") and not fence:
            fence = f"{indent}```"
            lines += ["", f"{fence}pycon"]
        elif fence and not line.strip():
            lines.append(fence)
            fence = ""
        lines.append(line)
    return "\n".join(lines).rstrip()
