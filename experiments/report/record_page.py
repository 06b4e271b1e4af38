"""The page of the benchmark of record, ``docs/record.md``: every number in it from the results."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import tta.streams
from experiments.report.collect import Result, Setting, by_setting
from experiments.report.report import about_lines
from experiments.report.statistics import Estimate, difference, over_seeds
from experiments.report.tables import NOTES, Table, setting_table

__all__ = ["write_page"]

Methods = Mapping[str, Sequence[Result]]
GAP = 0.005  # half a point: smaller differences to source are not worth a sentence


def write_page(results: Sequence[Result], path: Path, images: Path) -> None:
    """Write the page and its pictures.

    Args:
        results: Of the benchmark.
        path: Of the Markdown file.
        images: Folder of the pictures.
    """
    # The model that most was run on comes first, and is the one in the pictures.
    runs = Counter(result.setting.model for result in results)
    found = by_setting(results).items()
    settings = dict(sorted(found, key=lambda item: -runs[item[0].model]))
    images.mkdir(parents=True, exist_ok=True)
    text = [
        "# Benchmark of record",
        "",
        "Written by `python -m experiments record` from `experiments/results/record.jsonl`; do not "
        "edit. The command goes on where it stopped; what the results hold is not run again.",
        "",
        *_setup(results, settings),
        *_main(settings),
        *_findings(settings),
        *_pictures(settings, path, images),
        *_details(settings),
    ]
    part = path.with_name(path.name + ".part")
    part.write_text("\n".join(text).rstrip() + "\n")
    os.replace(part, path)


def _setup(results: Sequence[Result], settings: Mapping[Setting, Methods]) -> Iterator[str]:
    hours = sum(result.summary["seconds"] for result in results) / 3600
    yield "## Setup"
    yield ""
    yield (
        f"{len(results)} runs of {len({r.method for r in results})} methods on "
        f"{len({s.model for s in settings})} models, {hours:.1f} hours of adapters at work. "
        "Methods have the fields they are published with, or those in brackets; nothing was tuned "
        "on these streams. All methods see the same images in the same order."
    )
    yield ""
    yield from (f"* {line}" for line in about_lines(results))
    yield ""
    yield "| stream | what | images | domains | batch |"
    yield "|---|---|---:|---:|---:|"
    seen: dict[str, str] = {}
    for setting in settings:
        what = tta.streams.SCENARIOS[setting.scenario].text
        seen[setting.stream] = (
            f"| {setting.stream} | {what} | {setting.images:,} | {setting.domains} | "
            f"{setting.batch_size} |"
        )
    yield from seen.values()
    yield ""


def _main(settings: Mapping[Setting, Methods]) -> Iterator[str]:
    yield "## Main results"
    yield ""
    yield (
        "Mean error over the domains in %, with 95 % intervals over seeds (Student's t) where "
        "there are several, and the number of seeds in brackets; images are those of the table "
        "above. The lowest of each column is bold. An empty cell was not run, or cannot be: rules "
        "for BatchNorm on a model without it."
    )
    for model in dict.fromkeys(setting.model for setting in settings):
        own = {s: methods for s, methods in settings.items() if s.model == model}
        names = list(dict.fromkeys(method for methods in own.values() for method in methods))
        names.sort(key=lambda name: name != "source")
        table = Table(["method", *(s.stream for s in own)], [[name] for name in names])
        for column, methods in enumerate(own.values(), 1):
            means = {}
            for number, name in enumerate(names):
                cell = over_seeds(methods.get(name, []), _error)
                table.rows[number].append(
                    "" if cell is None else f"{cell.text(100)} ({cell.count})"
                )
                if cell is not None:
                    means[number] = cell.mean
            table.best |= {(i, column) for i in means if means[i] == min(means.values())}
        yield from ("", f"**{model}**", "", table.markdown())


def _findings(settings: Mapping[Setting, Methods]) -> Iterator[str]:
    yield "## What they say"
    yield ""
    for setting, methods in settings.items():
        gaps = _gaps(methods)
        if not gaps:
            continue
        best = min(gaps, key=lambda name: gaps[name].mean)
        source = over_seeds(methods["source"], _error)
        assert source is not None
        worse = sorted((n for n in gaps if gaps[n].mean > GAP), key=lambda n: -gaps[n].mean)
        text = f"* **{setting.stream}, {setting.model}**: source {source.text(100)} %. "
        if gaps[best].mean < -GAP:
            text += f"Furthest below it is {best} ({gaps[best].text(100, sign=True)} points). "
        else:
            text += "No method is below it by half a point. "
        if worse:
            named = ", ".join(f"{n} ({gaps[n].text(100, sign=True)})" for n in worse[:5])
            more = f" and {len(worse) - 5} more" if len(worse) > 5 else ""
            text += f"Worse than no adaptation: {named}{more}."
        yield text.rstrip()
    yield ""
    yield from _collapses(settings)
    yield from _extremes(settings)


def _collapses(settings: Mapping[Setting, Methods]) -> Iterator[str]:
    """Methods that end far above source, with how concentrated their predictions are."""
    rows = [
        (gap, setting, method)
        for setting, methods in settings.items()
        for method, gap in _gaps(methods).items()
        if gap.mean > 0.1
    ]
    if not rows:
        return
    yield "### Collapses"
    yield ""
    yield (
        "More than ten points above the source model. Concentration is the negative entropy of a "
        "batch's mean prediction: -2.3 for ten classes alike, 0 for one alone."
    )
    yield ""
    yield "| method | stream | model | above source | concentration | seeds |"
    yield "|---|---|---|---:|---:|---:|"
    for gap, setting, method in sorted(rows, key=lambda row: -row[0].mean):
        found = over_seeds(settings[setting][method], lambda r: r.summary["concentration"])
        yield (
            f"| {method} | {setting.stream} | {setting.model} | {gap.text(100, sign=True)} | "
            f"{'' if found is None else found.text(1, 2)} | {gap.count} |"
        )
    yield ""


def _extremes(settings: Mapping[Setting, Methods]) -> Iterator[str]:
    """Forgetting, calibration and cost on the first setting, usually continual."""
    setting, methods = next(iter(settings.items()))
    where = f"on {setting.stream} with {setting.model}"
    yield "### Forgetting, calibration, cost"
    yield ""
    same = _on_one_machine(methods)
    machine = next(iter(same.values()))[0].machine
    figures: list[tuple[str, Methods, Callable[[Result], float | None], str, float]] = [
        (
            "The error on clean images after the stream",
            methods,
            lambda r: r.summary["clean_error"],
            " %",
            100,
        ),
        ("The expected calibration error", methods, lambda r: r.summary["ece"], " %", 100),
        (
            f"The time per image (one process of several on {machine})",
            same,
            lambda r: 1000 / r.summary["images_per_second"],
            " ms",
            1,
        ),
    ]
    for lead, among, figure, unit, scale in figures:
        found = {name: over_seeds(results, figure) for name, results in among.items()}
        known = {name: value.mean for name, value in found.items() if value is not None}
        if "source" not in known:
            continue
        low, high = min(known, key=lambda n: known[n]), max(known, key=lambda n: known[n])
        yield (
            f"* {lead} {where} is {_digits(scale * known['source'])}{unit} for source, and from "
            f"{_digits(scale * known[low])}{unit} ({low}) to {_digits(scale * known[high])}{unit} "
            f"({high})."
        )
    yield ""


def _pictures(settings: Mapping[Setting, Methods], path: Path, images: Path) -> Iterator[str]:
    from experiments.report.figures import (  # slow to import
        plot_cost,
        plot_domains,
        plot_reliability,
        plot_stream,
    )

    yield "## Over the streams"
    yield ""
    model = next(iter(settings)).model
    first = True
    for setting, methods in settings.items():
        if setting.model != model:
            continue
        drawn = [("stream", plot_stream, "Error over the stream")]
        if first:
            drawn += [
                ("domains", plot_domains, "Error by domain"),
                ("cost", plot_cost, "Accuracy against cost"),
                ("reliability", plot_reliability, "Accuracy by confidence"),
            ]
            first = False
        for name, draw, caption in drawn:
            file = images / f"{setting.stream}-{name}.png"
            title = f"{caption}: {setting.stream}, {model}"
            draw(_on_one_machine(methods) if name == "cost" else methods, file, title)
            yield f"![{title}]({os.path.relpath(file, path.parent)})"
            yield ""


def _details(settings: Mapping[Setting, Methods]) -> Iterator[str]:
    yield "## All figures"
    yield ""
    for name, meaning in NOTES.items():
        yield f"* *{name}*: {meaning}"
    for setting, methods in settings.items():
        yield from ("", f"### {setting.stream}, {setting.model}", "")
        yield f"{setting.images:,} images, batches of {setting.batch_size}."
        yield from ("", setting_table(methods).markdown().rstrip())


def _digits(value: float) -> str:
    return f"{value:.1f}" if value >= 1 else f"{value:.2g}"


def _on_one_machine(methods: Methods) -> dict[str, list[Result]]:
    """The results from the machine that has most methods, the first of several: times compare."""
    machines = Counter(
        machine
        for results in methods.values()
        for machine in dict.fromkeys(r.machine for r in results)
    )
    most = max(machines, key=lambda machine: machines[machine])
    kept = {name: [r for r in results if r.machine == most] for name, results in methods.items()}
    return {name: results for name, results in kept.items() if results}


def _gaps(methods: Methods) -> dict[str, Estimate]:
    """Difference of each method's error to source's, over the seeds that both have."""
    if "source" not in methods:
        return {}
    found = {
        name: difference(results, methods["source"], _error)
        for name, results in methods.items()
        if name != "source"
    }
    return {name: gap for name, gap in found.items() if gap is not None}


def _error(result: Result) -> float:
    return result.summary["mean_error"]
