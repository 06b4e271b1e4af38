"""The result table of a stream: for a terminal of any width, and as Markdown.

Both take the ``summary`` objects of a results file, one per method, in row order.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from experiments.records import markdown
from experiments.records.config import BASELINE
from experiments.report.statistics import estimate, verdict

__all__ = ["describe", "render_markdown", "render_text", "short_names"]

Summary = Mapping[str, Any]
NOTHING = "-"  # a cell without a figure

# Header of each figure after the domains, and what it means.
LEGEND = {
    "mean": "mean error over the domains; of a walk, over its images",
    "clean": "error on clean images after the stream, adapter frozen",
    "img/s": "images per second of the adapter alone",
    "used": "share of samples in the loss of an update, in %",
    "resets": "times the model went back to its start",
}


@dataclass(frozen=True)
class _Column:
    header: str
    cells: list[str]
    best: frozenset[int] = frozenset()  # rows to stress, where lower is better

    @property
    def width(self) -> int:
        return max(map(len, [self.header, *self.cells]))


def short_names(names: Sequence[str], length: int = 5) -> dict[str, str]:
    """A distinct abbreviation of each name, of at most `length` letters where that is possible."""
    short: dict[str, str] = {}
    for name in names:
        words = name.split("_")
        candidates = [words[0][:length], name[:length], (words[0][0] + words[-1])[:length]]
        candidates += [f"{name[: length - 1]}{i}" for i in range(1, 10)]
        free = [c for c in candidates if c not in short.values()]
        short[name] = free[0] if free else name
    return short


def render_text(summaries: Sequence[Summary], width: int = 140) -> str:
    """The table as text, its columns wrapped into as many blocks as `width` makes necessary.

    Args:
        summaries: One per method.
        width: Columns of the terminal.
    """
    methods, columns = _columns(summaries)
    blocks: list[list[_Column]] = [[methods]]
    used = methods.width
    for column in columns:
        if used + 1 + column.width > width and len(blocks[-1]) > 1:
            blocks.append([methods])
            used = methods.width
        blocks[-1].append(column)
        used += 1 + column.width
    lines = []
    for block in blocks:
        rule = "-" * (sum(c.width + 1 for c in block) - 1)
        lines += [_line([c.header for c in block], block), rule]
        lines += [_line([c.cells[i] for c in block], block) for i in range(len(summaries))]
        lines.append("")
    lines += textwrap.wrap(_legend(summaries), width, subsequent_indent="  ")
    return "\n".join(lines)


def render_markdown(summaries: Sequence[Summary], legend: bool = True) -> str:
    """The table as Markdown, the lowest error of each column in bold.

    Args:
        summaries: One per method.
        legend: Whether a line explaining the columns follows.
    """
    methods, columns = _columns(summaries)
    columns = [methods, *columns]
    rows = [
        [markdown.strong(c.cells[row]) if row in c.best else c.cells[row] for c in columns]
        for row in range(len(summaries))
    ]
    lines = markdown.table([c.header for c in columns], rows)
    if legend:
        lines += ["", _legend(summaries)]
    return markdown.document(lines)


def describe(summaries: Sequence[Summary]) -> str:
    """What one sees in the table, in words made from its figures."""
    errors = {s["method"]: s["mean_error"] for s in summaries}
    best = min(errors, key=lambda m: errors[m])
    if BASELINE not in errors or len(errors) == 1:
        return f"Lowest mean error: {best} with {_percent(errors[best])}%."
    source = errors[BASELINE]
    others = {m: e for m, e in errors.items() if m != BASELINE}
    parts = [f"Without adaptation (source) the model errs on {_percent(source)}% of the images."]
    said = {m: _verdict(others[m], source) for m in others}
    lower = sorted((m for m in others if said[m] == "better"), key=lambda m: others[m])
    higher = sorted((m for m in others if said[m] == "worse"), key=lambda m: -others[m])
    same = [m for m in others if said[m] == "same"]
    if lower:
        gain = 100 * (source - others[lower[0]])
        first = f"{lower[0]} brings that down most, to {_percent(others[lower[0]])}% "
        then = f", then {_with_errors(lower[1:], others)}" if lower[1:] else ""
        parts.append(f"{first}({gain:.1f} points){then}.")
    if same:
        parts.append(f"{_join(same)} {'makes' if len(same) == 1 else 'make'} no difference.")
    if higher:
        verb = "does" if len(higher) == 1 else "do"
        parts.append(f"{_with_errors(higher, others)} {verb} worse than doing nothing.")
    clean = {s["method"]: s["clean_error"] for s in summaries if s["clean_error"] is not None}
    moved = {m: clean[m] - clean[BASELINE] for m in others if m in clean and BASELINE in clean}
    if moved:
        worst = max(moved, key=lambda m: moved[m])
        before = f"On clean images source errs on {_percent(clean[BASELINE])}%"
        if _verdict(clean[worst], clean[BASELINE]) == "worse":
            parts.append(
                f"{before}; after the stream {worst} is furthest from that with "
                f"{_percent(clean[worst])}%."
            )
        else:
            parts.append(f"{before}, and no method errs on more after the stream.")
    return " ".join(parts)


def _columns(summaries: Sequence[Summary]) -> tuple[_Column, list[_Column]]:
    if not summaries:
        raise ValueError("`summaries` must hold at least one method, got none")
    names = list(summaries[0]["domain_errors"])
    short = short_names(names)
    columns = [
        _error_column(short[name], [s["domain_errors"].get(name) for s in summaries])
        for name in names
    ]
    columns.append(_error_column("mean", [s["mean_error"] for s in summaries]))
    columns.append(_error_column("clean", [s["clean_error"] for s in summaries]))
    columns += [
        _Column("img/s", [f"{s['images_per_second']:.0f}" for s in summaries]),
        _Column("used", [_percent(s["used"]) for s in summaries]),
        _Column("resets", [str(s["resets"]) for s in summaries]),
    ]
    shown = [column for column in columns if set(column.cells) != {NOTHING}]
    return _Column("method", [s["method"] for s in summaries]), shown


def _error_column(header: str, errors: Sequence[float | None]) -> _Column:
    cells = [_percent(e) for e in errors]
    values = {row: float(cell) for row, cell in enumerate(cells) if cell != NOTHING}
    best = {row for row, value in values.items() if value == min(values.values())}
    return _Column(header, cells, frozenset(best if len(values) > 1 else ()))


def _line(texts: Sequence[str], columns: Sequence[_Column]) -> str:
    first = texts[0].ljust(columns[0].width)
    rest = [t.rjust(c.width) for t, c in zip(texts[1:], columns[1:], strict=True)]
    return " ".join([first, *rest])


def _legend(summaries: Sequence[Summary]) -> str:
    short = short_names(list(summaries[0]["domain_errors"]))
    domains = [f"{s} = {name}" for name, s in short.items() if s != name]
    shown = {column.header for column in _columns(summaries)[1]}
    meanings = [f"{header} = {meaning}" for header, meaning in LEGEND.items() if header in shown]
    return "Errors in %. " + "; ".join(domains + meanings) + "."


def _verdict(error: float, source: float) -> str:
    gap = estimate([error - source])
    assert gap is not None
    return verdict(gap)


def _with_errors(methods: Sequence[str], errors: Mapping[str, float]) -> str:
    return _join([f"{m} ({_percent(errors[m])}%)" for m in methods])


def _join(words: Sequence[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def _percent(share: float | None) -> str:
    return NOTHING if share is None else f"{100 * share:.1f}"
