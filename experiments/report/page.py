"""One HTML page with everything in it, to open or to send."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

__all__ = ["Page", "Section"]

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1a1a1a; max-width: 1180px;
       margin: 2em auto; padding: 0 1.2em; box-sizing: border-box; }
h1 { font-size: 1.7em; margin-bottom: .2em; }
h2 { font-size: 1.3em; margin-top: 2.2em; border-bottom: 1px solid #ccc; padding-bottom: .2em; }
h3 { font-size: 1.05em; margin: 1.6em 0 .4em; }
p.about, figcaption, dl { color: #555; font-size: .9em; }
div.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .88em; font-variant-numeric: tabular-nums; }
table + table { margin-top: 1em; }
th, td { padding: .25em .55em; text-align: right; white-space: nowrap; }
td:first-child { white-space: normal; min-width: 9em; max-width: 15em; }
th { border-bottom: 2px solid #888; } td { border-bottom: 1px solid #e4e4e4; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: #fff; }
figure { margin: 1.2em 0; } img { width: 100%; }
nav li { margin: .1em 0; } dt { float: left; clear: left; min-width: 6em; font-weight: 600; }
dd { margin-left: 7em; }
"""


@dataclass
class Section:
    """A part of the page.

    Args:
        title: Its heading.
        text: Paragraphs, plain text.
        tables: HTML.
        figures: (PNG, caption).
        level: 2 or 3, of the heading.
    """

    title: str
    text: list[str] = field(default_factory=list)
    tables: list[str] = field(default_factory=list)
    figures: list[tuple[Path, str]] = field(default_factory=list)
    level: int = 2


@dataclass
class Page:
    """What the page says.

    Args:
        title: Its heading.
        about: Lines below it.
        sections: In order.
        notes: What columns mean.
    """

    title: str
    about: Sequence[str]
    sections: Sequence[Section]
    notes: dict[str, str]

    def html(self) -> str:
        """The whole page; pictures are inside."""
        parts = [
            "<!doctype html>",
            '<html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width">',
            f"<title>{html.escape(self.title)}</title><style>{STYLE}</style></head><body>",
            f"<h1>{html.escape(self.title)}</h1>",
            *(f'<p class="about">{html.escape(line)}</p>' for line in self.about),
            "<nav><ul>",
            *(
                f'<li><a href="#s{i}">{html.escape(section.title)}</a></li>'
                for i, section in enumerate(self.sections)
            ),
            "</ul></nav>",
        ]
        for i, section in enumerate(self.sections):
            tag = f"h{section.level}"
            parts.append(f'<{tag} id="s{i}">{html.escape(section.title)}</{tag}>')
            parts += [f"<p>{html.escape(text)}</p>" for text in section.text]
            parts += [f'<div class="wide">{table}</div>' for table in section.tables]
            parts += [_figure(path, caption) for path, caption in section.figures]
        parts.append("<h2>What the columns mean</h2><dl>")
        parts += [
            f"<dt>{html.escape(name)}</dt><dd>{html.escape(meaning)}</dd>"
            for name, meaning in self.notes.items()
        ]
        parts.append("</dl></body></html>")
        return "\n".join(parts) + "\n"


def _figure(path: Path, caption: str) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    text = html.escape(caption)
    return (
        f'<figure><img alt="{text}" src="data:image/png;base64,{data}">'
        f"<figcaption>{text}</figcaption></figure>"
    )
