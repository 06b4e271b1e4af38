"""The long description of the package: the README as a package index can show it.

An index shows the README by itself, where links to other files of the repository lead nowhere. They
become addresses below ``Repository`` in ``[project.urls]`` of pyproject.toml, which `tools.release`
fills in, and plain text as long as there is none.
"""

from __future__ import annotations

import re
from pathlib import Path

__all__ = ["long_description", "read_repository", "read_version", "relative_links"]

CODE = re.compile(r"(^```.*?^```[^\n]*$|`[^`\n]*`)", re.MULTILINE | re.DOTALL)
COMMENT = re.compile(r"<!--.*?-->\n?", re.DOTALL)
OUTSIDE = r"https?://|mailto:"  # how an absolute address begins
LINK = re.compile(rf"(!?)\[((?:[^\[\]]|!?\[[^\[\]]*\])*)\]\((?!{OUTSIDE})([^()\s]+)\)")
ANY_LINK = re.compile(rf"\]\((?!{OUTSIDE})[^()]*\)|(?:src|href)=\"(?!{OUTSIDE})[^\"]*\"")


def long_description(readme: str, repository: str, version: str) -> str:
    """The README for a reader who has nothing but this page.

    Args:
        readme: In Markdown.
        repository: Its public address, or an empty text.
        version: Of the package; links lead to the files at the tag ``v<version>``.

    Returns:
        Markdown without relative links: they lead to `repository`, or are plain text where that
        is empty; pictures are left out then. Code is as it was, comments are gone.
    """

    def lead_out(link: re.Match[str]) -> str:
        picture, text, path = link.groups()
        text = LINK.sub(lead_out, text)  # of a picture that is itself a link
        if not repository or path.startswith("#"):
            return "" if picture else text
        kind = "raw" if picture else "blob"
        return f"{picture}[{text}]({repository}/{kind}/v{version}/{path})"

    code: list[str] = []

    def put_aside(found: re.Match[str]) -> str:
        code.append(found[0])
        return f"\0{len(code) - 1}\0"

    text = CODE.sub(put_aside, readme)
    text = LINK.sub(lead_out, COMMENT.sub("", text))
    return re.sub("\0(\\d+)\0", lambda found: code[int(found[1])], text)


def relative_links(text: str) -> list[str]:
    """Links of Markdown or HTML, outside of code, that are no absolute addresses."""
    return ANY_LINK.findall(CODE.sub("", text))


def read_version(root: Path) -> str:
    """The version of the package in the repository `root`, without importing it."""
    found = re.search(r'__version__ = "(.+)"', (root / "tta" / "version.py").read_text())
    assert found is not None
    return found[1]


def read_repository(root: Path) -> str:
    """The public address in pyproject.toml, or an empty text."""
    text = (root / "pyproject.toml").read_text()
    found = re.search(r'^Repository = "(.+)"$', text, re.MULTILINE)
    return "" if found is None else found[1]
