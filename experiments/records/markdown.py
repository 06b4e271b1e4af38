"""Markdown: the one place that knows how tables, links and generated parts of pages are written."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from tta.core.files import replacing

__all__ = [
    "bullets",
    "check_marks",
    "code",
    "document",
    "escape",
    "heading",
    "image",
    "link",
    "note",
    "put_between",
    "strong",
    "table",
    "write_between",
]

_RULES = {"l": "---", "r": "---:", "c": ":-:"}


def heading(text: str, level: int = 1) -> str:
    """A heading; level 1 is a page's title."""
    return f"{'#' * level} {text}"


def strong(text: str) -> str:
    """Text in bold."""
    return f"**{text}**"


def code(text: str) -> str:
    """Text as code."""
    return f"`{text}`"


def link(text: str, target: str) -> str:
    """A link to a page, relative to the page that holds it."""
    return f"[{text}]({target})"


def image(text: str, target: str) -> str:
    """A picture with the words that stand for it."""
    return f"![{text}]({target})"


def bullets(items: Iterable[str]) -> list[str]:
    """One line of a list for each item."""
    return [f"* {item}" for item in items]


def note(text: str) -> str:
    """A comment, which readers of the rendered page do not see."""
    return f"<!-- {text} -->"


def escape(cell: str) -> str:
    """A table's cell whose text may hold the bar that ends cells."""
    return cell.replace("|", "\\|")


def table(
    header: Sequence[str], rows: Iterable[Sequence[str]], align: str | None = None
) -> list[str]:
    """A table, line by line.

    Args:
        header: One text for each column.
        rows: As many cells each; whoever writes text of others escapes it, see `escape`.
        align: "l", "r" or "c" for each column; by default the first is on the left and the others,
            which hold numbers, on the right.

    Raises:
        ValueError: When a row or `align` has another number of columns than the header.

    >>> table(["model", "error"], [["a", "1.0"]])
    ['| model | error |', '|---|---:|', '| a | 1.0 |']
    """
    align = "l" + "r" * (len(header) - 1) if align is None else align
    lines = []
    for number, cells in enumerate([header, *rows]):
        if len(cells) != len(header) or len(align) != len(header):
            raise ValueError(
                f"`rows` and `align` must have the {len(header)} columns of the header, got "
                f"{len(cells)} cells in line {number} and {len(align)} letters in `align`: give "
                "each column one"
            )
        lines.append(f"| {' | '.join(cells)} |")
    lines.insert(1, "|" + "|".join(_RULES[letter] for letter in align) + "|")
    return lines


def document(lines: Iterable[str]) -> str:
    """Lines as the text of a file, which ends with one line feed."""
    return "\n".join(lines).rstrip("\n") + "\n"


def check_marks(page: Path, mark: str) -> None:
    """Refuse a page without a generated part of that name.

    Raises:
        ValueError: When the page is missing or lacks one of the two comments.
    """
    start, end = _comments(mark)
    if not page.is_file() or not all(comment in page.read_text() for comment in (start, end)):
        raise ValueError(
            f"`page` must be a file with the comments {start} and {end}, got {page}: add them "
            "where the generated part is to stand"
        )


def put_between(text: str, mark: str, content: str) -> str:
    r"""Replace the generated part of a page, which lies between two comments of one name.

    Args:
        text: The page.
        mark: The name, as in ``<!-- name -->`` and ``<!-- /name -->``.
        content: The new part.

    >>> put_between("a\n<!-- x -->\nold\n<!-- /x -->\nb\n", "x", "new\n")
    'a\n<!-- x -->\nnew\n<!-- /x -->\nb\n'
    """
    start, end = _comments(mark)
    before, _, rest = text.partition(start)
    _, _, after = rest.partition(end)
    return f"{before}{start}\n{content}{end}{after}"


def write_between(page: Path, mark: str, content: str) -> None:
    """Replace the generated part of a page on disk, see `put_between`."""
    check_marks(page, mark)
    text = put_between(page.read_text(), mark, content)
    with replacing(page) as part:
        part.write_text(text)


def _comments(mark: str) -> tuple[str, str]:
    return note(mark), note(f"/{mark}")
