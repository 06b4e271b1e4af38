"""Tables of results as Markdown, LaTeX, HTML and CSV."""

from __future__ import annotations

import csv
import html
import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from experiments.records import markdown
from experiments.records.config import BASELINE
from experiments.report.collect import Result, Setting, by_setting
from experiments.report.statistics import Estimate, difference, over_seeds

__all__ = ["HEALTH_NOTES", "NOTES", "TIME_NOTES", "Table", "csv_rows", "overview", "setting_table"]

NOTES = {
    "error": "share of errors in %, mean over the domains; of a walk, over its images",
    "vs source": "paired difference to source with the same seed, in points; negative is better",
    "worst": "error in the domain with most errors, in %",
    "clean": "error on clean images with the adapter frozen, before and after the stream, in %",
    "NLL": "negative log-likelihood in nats",
    "Brier": "Brier score, from 0 to 2",
    "ECE": "expected calibration error over 15 bins, in %",
    "conc.": "concentration, negative entropy of the softmax of a batch's mean logits; 0 is a "
    "collapse",
    "used": "share of samples in a loss, in %",
    "resets": "times the model went back to its start",
    "late": "share of images that came while the method was busy, in %",
    "fwd, bwd": "passes of an image through the model, forward and backward",
    "img/s": "images per second of the adapter alone",
    "MB": "peak memory: resident on a CPU, allocated on a GPU",
    "seeds": "number of seeds; with three or more, ± gives 95 % intervals of means (Student's t), "
    "with two, both values are given",
}

HEALTH_NOTES = {
    "estimate off": "mean absolute error of estimates of accuracy without labels, in points, over "
    "windows of 500 images",
}

LOWEST = ("error", "worst", "NLL", "Brier", "ECE")  # columns in which the lowest is the best

# Of streams with a clock, see `experiments.run.utilities`.
TIME_NOTES = {
    "discrete": "share of images answered rightly and in time, in %; late ones are wrong",
    "continuous": "right answers, each worth 1 / (1 + latency / half-life), as a share in %",
    "amortised": "share of right answers when learning ends with its extra time, in %",
}

NOTHING = "-"  # a cell without a figure
# Widths in characters: of a page of 1,180 pixels, of the space between columns, and of names.
PAGE, GAP, FIRST = 160, 3, 28


@dataclass
class Table:
    """Cells as text; the first column names rows.

    Args:
        header: One per column.
        rows: One list of cells per row.
        best: (row, column) of cells to stress.
    """

    header: list[str]
    rows: list[list[str]]
    best: set[tuple[int, int]] = field(default_factory=set)

    def without_empty_columns(self) -> Table:
        """The same table, less the columns (but the first) that say nothing in any row."""
        kept = [
            j
            for j in range(len(self.header))
            if j == 0 or any(row[j] not in ("", NOTHING) for row in self.rows)
        ]
        return self._columns(kept)

    def _columns(self, kept: Sequence[int]) -> Table:
        places = {old: new for new, old in enumerate(kept)}
        return Table(
            [self.header[j] for j in kept],
            [[row[j] for j in kept] for row in self.rows],
            {(i, places[j]) for i, j in self.best if j in places},
        )

    def blocks(self, width: int) -> list[Table]:
        """The table in parts that each have at most `width` characters in a row, if possible.

        Every part begins with the first column.
        """
        sizes = [
            max(map(len, [self.header[j], *(row[j] for row in self.rows)])) + GAP
            for j in range(len(self.header))
        ]
        sizes[0] = min(sizes[0], FIRST + GAP)  # longer names are broken
        parts = [[0]]
        for j in range(1, len(sizes)):
            if sum(sizes[k] for k in parts[-1]) + sizes[j] > width and len(parts[-1]) > 1:
                parts.append([0])
            parts[-1].append(j)
        return [self._columns(kept) for kept in parts]

    def markdown(self) -> str:
        """As Markdown."""
        return markdown.document(markdown.table(self.header, self._stressed(markdown.strong, str)))

    def latex(self) -> str:
        """As a LaTeX tabular; it needs the package booktabs."""
        rows = self._stressed(lambda text: rf"\textbf{{{text}}}", _escape_latex)
        lines = [r"\begin{tabular}{l" + "r" * (len(self.header) - 1) + "}", r"\toprule"]
        lines += [" & ".join(_escape_latex(text) for text in self.header) + r" \\", r"\midrule"]
        lines += [" & ".join(row) + r" \\" for row in rows]
        return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"]) + "\n"

    def html(self) -> str:
        """As HTML tables, one below the other where one would be wider than the page."""
        return "".join(block._html() for block in self.blocks(PAGE))

    def _html(self) -> str:
        head = "".join(f"<th>{html.escape(text)}</th>" for text in self.header)
        rows = self._stressed(lambda text: f"<b>{text}</b>", html.escape)
        for row in rows:  # a long name may be broken after these
            row[0] = re.sub(r"([,+\[])", r"\1<wbr>", row[0])
        body = "".join(
            "<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>\n" for row in rows
        )
        return f"<table><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table>\n"

    def _stressed(
        self, stress: Callable[[str], str], escape: Callable[[str], str]
    ) -> list[list[str]]:
        return [
            [
                stress(escape(cell)) if (i, j) in self.best else escape(cell)
                for j, cell in enumerate(row)
            ]
            for i, row in enumerate(self.rows)
        ]


def setting_table(methods: Mapping[str, Sequence[Result]]) -> Table:
    """All figures of the methods in one setting.

    Args:
        methods: Results by method, see `by_setting`.
    """
    columns: dict[str, list[Estimate | str | None]] = {}

    def add(header: str, cell: Callable[[Sequence[Result]], Estimate | str | None]) -> None:
        columns[header] = [cell(results) for results in methods.values()]

    def figure(name: str) -> Callable[[Sequence[Result]], Estimate | None]:
        return lambda results: over_seeds(results, _figure(name))

    add("error", figure("mean_error"))
    if BASELINE in methods:
        source = methods[BASELINE]
        add("vs source", lambda r: "" if r is source else _difference(r, source))
    for header, name in (("worst", "worst_error"), ("NLL", "nll"), ("Brier", "brier")):
        add(header, figure(name))
    add("ECE", figure("ece"))
    add("clean", _clean)
    add("conc.", figure("concentration"))
    add("estimate off", lambda r: over_seeds(r, lambda x: x.estimate_error))
    add("used", figure("used"))
    add("resets", figure("resets"))
    add("late", lambda r: over_seeds(r, lambda x: x.summary["late"] / x.summary["images"]))
    for name in TIME_NOTES:  # of streams with a clock that asks for them
        add(name, lambda results, name=name: over_seeds(results, lambda r: r.summary.get(name)))
    add("fwd, bwd", _passes)
    add("img/s", figure("images_per_second"))
    add("MB", lambda r: over_seeds(r, lambda x: x.summary["peak_memory"] / 2**20))
    add("seeds", lambda results: str(len(results)))
    if all(isinstance(cell, Estimate) and cell.mean == 0 for cell in columns["late"]):
        del columns["late"]  # no clock
    table = Table(["method", *columns], [[method] for method in methods])
    for number, (header, cells) in enumerate(columns.items(), 1):
        for row, cell in zip(table.rows, cells, strict=True):
            row.append(_show(header, cell))
        if header in (*LOWEST, *TIME_NOTES) and len(cells) > 1:
            means = {i: c.mean for i, c in enumerate(cells) if isinstance(c, Estimate)}
            best = (min if header in LOWEST else max)(means.values(), default=0.0)
            table.best |= {(i, number) for i in means if means[i] == best}
    return table.without_empty_columns()


def overview(results: Sequence[Result]) -> dict[str, Table]:
    """For each model, the mean error of every method in every setting, in %."""
    tables = {}
    settings = by_setting(results)
    for model in dict.fromkeys(setting.model for setting in settings):
        own = {s: methods for s, methods in settings.items() if s.model == model}
        names = list(dict.fromkeys(method for methods in own.values() for method in methods))
        table = Table(["method", *_short_titles(list(own))], [[name] for name in names])
        for column, methods in enumerate(own.values(), 1):
            means = {}
            for number, name in enumerate(names):
                cell = over_seeds(methods.get(name, []), _figure("mean_error"))
                table.rows[number].append("" if cell is None else cell.text(100))
                if cell is not None:
                    means[number] = cell.mean
            table.best |= {(i, column) for i in means if means[i] == min(means.values())}
        tables[model] = table.without_empty_columns()
    return tables


def csv_rows(results: Sequence[Result]) -> str:
    """One line per method, stream and seed, with all figures; errors as shares."""
    names = dict.fromkeys(
        key
        for result in results
        for key, value in result.summary.items()
        if key not in ("kind", "stream", "method") and not isinstance(value, (dict, list))
    )
    domains = list(dict.fromkeys(d for r in results for d in r.summary["domain_errors"]))
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    where = [*vars(results[0].setting)]
    writer.writerow([*where, "method", "seed", *names, *(f"error:{name}" for name in domains)])
    for result in results:
        errors = result.summary["domain_errors"]
        writer.writerow(
            [
                *vars(result.setting).values(),
                result.method,
                result.seed,
                *(result.summary.get(name) for name in names),
                *(errors.get(name) for name in domains),
            ]
        )
    return out.getvalue()


def _figure(name: str) -> Callable[[Result], float | None]:
    return lambda result: result.summary[name]


def _difference(results: Sequence[Result], source: Sequence[Result]) -> Estimate | None:
    return difference(results, source, _figure("mean_error"))


def _clean(results: Sequence[Result]) -> str:
    before = over_seeds(results, _figure("clean_error_before"))
    after = over_seeds(results, _figure("clean_error"))
    return "" if before is None or after is None else f"{before.text(100)} → {after.text(100)}"


def _passes(results: Sequence[Result]) -> str:
    counts = [over_seeds(results, _figure(name)) for name in ("forwards", "backwards")]
    return ", ".join(f"{count.mean:.2f}" for count in counts if count is not None)


_PERCENT = {"error", "vs source", "worst", "ECE", "used", "late", "estimate off", *TIME_NOTES}
_DIGITS = {"NLL": 2, "Brier": 3, "conc.": 2, "resets": 0, "img/s": 0, "MB": 0}


def _show(header: str, cell: Any) -> str:
    if cell is None or isinstance(cell, str):
        return cell or NOTHING
    if header in ("img/s", "MB"):  # depends on the machine: an interval would say nothing
        cell = Estimate(cell.mean, None, (cell.mean,))
    scale = 100.0 if header in _PERCENT else 1.0
    return cell.text(scale, _DIGITS.get(header, 1), sign=header == "vs source")


def _short_titles(settings: list[Setting]) -> list[str]:
    """Only what tells the settings apart, besides the stream's name."""
    parts = {
        "severity": lambda s: f"s{s.severity:g}",
        "batch_size": lambda s: f"b{s.batch_size}",
        "images": lambda s: f"{s.images} images",
        "options": lambda s: s.options,
    }
    titles = [setting.stream for setting in settings]
    for name, show in parts.items():
        groups: dict[str, set[Any]] = {}
        for setting in settings:
            groups.setdefault(setting.stream, set()).add(getattr(setting, name))
        if any(len(values) > 1 for values in groups.values()):
            shown = [show(setting) for setting in settings]
            titles = [f"{t}, {x}" if x else t for t, x in zip(titles, shown, strict=True)]
    return titles


def _escape_latex(text: str) -> str:
    for character in "&%$#_{}":
        text = text.replace(character, "\\" + character)
    return text.replace("±", r"$\pm$").replace("→", r"$\to$")
