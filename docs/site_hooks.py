"""What mkdocs calls while it builds the site: the pages of a folder, wide pages, no other hosts."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

# Their tables need the width that the two side bars take; how the rest is made to fit is in
# assets/site.css.
WIDE = {"record.md": "wide", "networks.md": "many-columns"}
# The theme would load these for diagrams and for browsers of before 2020; the site needs neither.
FOREIGN = re.compile(r"https://unpkg\.com/[\w.@/-]+")


def on_config(config: Any) -> Any:
    """Put all pages of a folder where the navigation names the folder."""
    docs = Path(config.docs_dir)
    config.nav = [
        {title: _pages(docs, target) for title, target in entry.items()} for entry in config.nav
    ]
    return config


def _pages(docs: Path, target: Any) -> Any:
    if not isinstance(target, str) or not target.endswith("/"):
        return target
    names = sorted(path.name for path in (docs / target).glob("*.md"))
    names.sort(key=lambda name: name != "index.md")
    return [target + name for name in names]


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Give pages with wide tables the whole width."""
    if kind := WIDE.get(page.file.src_uri):
        page.meta["hide"] = ["navigation", "toc"]
        title, _, text = markdown.partition("\n")
        return f'{title}\n\n<div class="{kind}" markdown>\n\n{text}\n\n</div>\n'
    return markdown


def on_post_build(config: Any) -> None:
    """Take the addresses of other hosts out of the theme's script."""
    for script in Path(config.site_dir).rglob("bundle*.js"):
        script.write_text(FOREIGN.sub("", script.read_text()))
