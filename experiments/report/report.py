"""The report of a set of runs: files of tables and plots, and one page."""

from __future__ import annotations

import argparse
import html
from collections.abc import Callable, Sequence, Sized
from pathlib import Path
from typing import Any

from experiments.records.config import BASELINE
from experiments.report.collect import Result, Setting, by_setting, collect, file_name, short_hash
from experiments.report.page import Page, Section
from experiments.report.statistics import LEVEL, difference, verdict
from experiments.report.tables import (
    HEALTH_NOTES,
    NOTES,
    TIME_NOTES,
    Table,
    csv_rows,
    overview,
    setting_table,
)
from tta.core.files import replacing

__all__ = ["Report", "about_lines", "add_flags", "describe"]


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Say what ``report`` does and takes."""
    parser.description = (
        "Put the results of any runs together: tables as Markdown, CSV and LaTeX, "
        "plots, and one HTML page with everything in it."
    )
    add = parser.add_argument
    add("runs", nargs="+", type=Path, help="folders of runs or sweeps, or compact result files")
    add("--output", type=Path, help="where to (default: 'report' in the first of RUNS)")
    add("--title", default="Test-time adaptation", help="of the page (default: %(default)s)")
    parser.set_defaults(prepare=_prepare)


def _prepare(args: argparse.Namespace) -> Report:
    first = args.runs[0]
    folder = args.output or (first if first.is_dir() else first.parent) / "report"
    return Report(collect(args.runs), folder, args.title)


class Report:
    """What a set of results says.

    Args:
        results: From `collect`.
        folder: Where the files go; what is there is replaced.
        title: Of the page.
    """

    def __init__(self, results: Sequence[Result], folder: str | Path, title: str) -> None:
        self.results = results
        self.settings = by_setting(results)
        self.methods = list(dict.fromkeys(result.method for result in results))
        self.folder = Path(folder)
        self.title = title

    def execute(self) -> Path:
        """Write everything; returns the page."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._write("results.csv", csv_rows(self.results))
        sections = [self._overview(), *(self._setting(s) for s in self.settings), *self._heat()]
        health = any(result.expected is not None for result in self.results)
        notes = {**NOTES, **(HEALTH_NOTES if health else {})}
        found = {
            name for result in self.results for name, v in result.summary.items() if v is not None
        }
        notes |= {name: words for name, words in TIME_NOTES.items() if name in found}
        page = Page(self.title, about_lines(self.results), sections, notes)
        path = self._write("index.html", page.html())
        results, settings = _count(self.results, "result"), _count(self.settings, "setting")
        print(f"{results} in {settings}: {path}", flush=True)
        return path

    def figures(self, setting: Setting) -> list[tuple[Path, str]]:
        """Draw the plots of a setting; returns files and captions."""
        from experiments.report.figures import (  # slow to import
            plot_cost,
            plot_domains,
            plot_estimates,
            plot_reliability,
            plot_stream,
            plot_visits,
        )
        from experiments.report.style import looks_of

        looks = looks_of(self.methods)
        methods = self.settings[setting]
        about = f"{setting.model}, {setting.title}"
        drawn = []
        kinds: list[tuple[str, Callable[..., bool | None], str]] = [
            ("stream", plot_stream, "Error over the stream"),
            ("domains", plot_domains, "Error by domain; lines are intervals, or join two seeds"),
            ("visits", plot_visits, "Error by visit, of all domains"),
            ("cost", plot_cost, "Accuracy against cost"),
            ("reliability", plot_reliability, "Accuracy by confidence; dots are bins' means"),
            ("estimates", plot_estimates, "Accuracy, true and as estimated without labels"),
        ]
        for name, draw, caption in kinds:
            path = self.folder / f"{setting.slug}-{name}.png"
            if draw(methods, path, f"{caption.partition(';')[0]}: {about}", looks) is not False:
                drawn.append((path, f"{caption}."))
        return drawn

    def heat_maps(self) -> list[tuple[str, Path]]:
        """Draw error by corruption and severity, where there are several; titles and files."""
        from experiments.report.figures import plot_heat  # slow to import

        groups: dict[tuple[str, str, str], dict[str, list[Result]]] = {}
        for setting, methods in self.settings.items():
            title = f"{setting.model}, {setting.stream}, batches of {setting.batch_size}"
            key = title, setting.data, setting.options
            for method, results in methods.items():
                groups.setdefault(key, {}).setdefault(method, []).extend(results)
        drawn = []
        titles = [title for title, _, _ in groups]
        for (title, data, options), methods in groups.items():
            first = next(iter(methods.values()))[0].setting
            name = file_name(f"{first.model}-{first.stream}-b{first.batch_size}")
            if titles.count(title) > 1:
                name += f"-{short_hash(f'{data} {options}')}"
                title = f"{title}, {options or data}"
            path = self.folder / f"{name}-heat.png"
            if plot_heat(methods, path, f"Error by corruption and severity: {title}"):
                drawn.append((title, path))
        return drawn

    def _overview(self) -> Section:
        tables = []
        for model, table in overview(self.results).items():
            self._write_table(f"overview-{file_name(model)}", table)
            tables.append(f"<h3>{html.escape(model)}</h3>" + table.html())
        text = "Mean error over the domains in % (of a walk: over its images), lowest in bold."
        return Section("All streams", [text], tables)

    def _setting(self, setting: Setting) -> Section:
        methods = self.settings[setting]
        table = setting_table(methods)
        self._write_table(setting.slug, table)
        domains = f"{setting.domains} domain{'s' * (setting.domains != 1)}"
        lengths = sorted({r.summary["images"] for rows in methods.values() for r in rows})
        images = " to ".join(map(str, dict.fromkeys((lengths[0], lengths[-1]))))
        text = f"{images} images of {domains}. {describe(methods)}"
        cards = [r.about["card"] for rows in methods.values() for r in rows if r.about.get("card")]
        if cards:
            text += f" Source: {'; '.join(dict.fromkeys(cards))}."
        title = f"{setting.model}: {setting.title}"
        return Section(title, [text], [table.html()], self.figures(setting))

    def _heat(self) -> list[Section]:
        return [
            Section(f"By severity: {title}", figures=[(path, "Error by corruption and severity.")])
            for title, path in self.heat_maps()
        ]

    def _write_table(self, name: str, table: Table) -> None:
        self._write(f"{name}.md", table.markdown())
        self._write(f"{name}.tex", table.latex())

    def _write(self, name: str, text: str) -> Path:
        path = self.folder / name
        with replacing(path) as part:
            part.write_text(text)
        return path


def about_lines(results: Sequence[Result]) -> list[str]:
    """Where the numbers come from: data, hardware, versions, commits, dates."""
    lines = []
    for key, show in (
        ("origin", str),
        ("card", lambda card: f"source: {card}"),
        ("hardware", _hardware),
        ("versions", lambda v: ", ".join(f"{n} {x}" for n, x in v.items())),
        ("git", lambda g: f"commit {g['commit'][:12]}" + (" with changes" * g["changed"])),
    ):
        values = [result.about[key] for result in results if result.about.get(key)]
        lines.append("; ".join(dict.fromkeys(show(value) for value in values)))
    tuned = {method for result in results for method in result.about.get("tuned") or []}
    if tuned:
        lines.append(f"fields chosen on held-out corruptions: {', '.join(sorted(tuned))}")
    dates = sorted(str(result.about["started"])[:10] for result in results)
    seeds = sorted({result.seed for result in results})
    lines.append(f"{dates[0]} to {dates[-1]}; seeds {', '.join(map(str, seeds))}")
    return [line for line in lines if line]


def describe(methods: dict[str, list[Result]]) -> str:
    """Which methods differ from source, in words made from the paired differences."""
    if BASELINE not in methods or len(methods) == 1:
        return ""
    found: dict[str, list[tuple[float, str]]] = {}
    for method, results in methods.items():
        gap = difference(results, methods[BASELINE], lambda r: r.summary["mean_error"])
        if method != BASELINE and gap is not None:
            text = f"{method} ({gap.text(100, sign=True)})"
            found.setdefault(verdict(gap), []).append((gap.mean, text))
    two = any(len(results) == 2 for results in methods.values())
    means = f"{LEVEL:.0%} intervals" + (" or the signs of two seeds" if two else "")
    parts = []
    for said, lead in (
        ("better", "Better than source"),
        ("worse", "Worse"),
        ("same", "No difference"),
        ("open", f"Not told apart from it by {means}"),
    ):
        if said in found:
            listed = sorted(found[said], reverse=said == "worse")
            parts.append(f"{lead}: {', '.join(text for _, text in listed)}.")
    if all(len(results) == 1 for results in methods.values()):
        parts.append("One seed: no interval, and small differences mean nothing.")
    return " ".join(parts)


def _hardware(found: dict[str, Any]) -> str:
    count = found["torch_threads"]
    threads = f"{count} thread{'s' * (count > 1)} a run"
    return ", ".join([found["cpu"], threads, *found["gpus"]])


def _count(things: Sized, word: str) -> str:
    return f"{len(things)} {word}{'s' * (len(things) != 1)}"
