"""The page of the benchmark of record, ``docs/record.md``: every number in it from the results."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import tta.streams
from experiments.records import markdown
from experiments.records.config import BASELINE
from experiments.report.collect import Result, Setting, by_setting
from experiments.report.report import about_lines
from experiments.report.statistics import Estimate, difference, over_seeds
from experiments.report.tables import NOTES, Table, setting_table
from tta.core.files import replacing

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
        markdown.heading("Benchmark of record"),
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
    with replacing(path) as part:
        part.write_text(markdown.document(text))


def _setup(results: Sequence[Result], settings: Mapping[Setting, Methods]) -> Iterator[str]:
    hours = sum(result.summary["seconds"] for result in results) / 3600
    yield markdown.heading("Setup", 2)
    yield ""
    yield (
        f"{len(results)} runs of {len({r.method for r in results})} methods on "
        f"{len({s.model for s in settings})} models, {hours:.1f} hours of adapters at work. "
        "Methods have the fields they are published with, or those in brackets; nothing was tuned "
        "on these streams. All methods see the same images in the same order."
    )
    yield ""
    yield from markdown.bullets(about_lines(results))
    yield ""
    seen: dict[str, list[str]] = {}
    for setting in settings:
        what = tta.streams.SCENARIOS[setting.scenario].text
        counts = [f"{setting.images:,}", str(setting.domains), str(setting.batch_size)]
        seen[setting.stream] = [setting.stream, what, *counts]
    yield from markdown.table(
        ["stream", "what", "images", "domains", "batch"], seen.values(), "llrrr"
    )
    yield ""


def _main(settings: Mapping[Setting, Methods]) -> Iterator[str]:
    yield markdown.heading("Main results", 2)
    yield ""
    yield (
        "Mean error over the domains in % (of a walk: over its images), with 95 % intervals over "
        "seeds (Student's t) where there are three or more, and the number of seeds in brackets; "
        "images are those of the table above. The lowest of each column is bold. An empty cell was "
        "not run, or cannot be: "
        "rules for BatchNorm on a model without it."
    )
    for model in dict.fromkeys(setting.model for setting in settings):
        own = {s: methods for s, methods in settings.items() if s.model == model}
        names = list(dict.fromkeys(method for methods in own.values() for method in methods))
        names.sort(key=lambda name: name != BASELINE)
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
        table = table.without_empty_columns()
        yield from ("", markdown.strong(model), "", table.markdown())


def _findings(settings: Mapping[Setting, Methods]) -> Iterator[str]:
    yield markdown.heading("What they say", 2)
    yield ""
    for setting, methods in settings.items():
        gaps = _gaps(methods)
        if not gaps:
            continue
        best = min(gaps, key=lambda name: gaps[name].mean)
        source = over_seeds(methods[BASELINE], _error)
        assert source is not None
        worse = sorted((n for n in gaps if gaps[n].mean > GAP), key=lambda n: -gaps[n].mean)
        where = markdown.strong(f"{setting.stream}, {setting.model}")
        text = f"{where}: source {source.text(100)} %. "
        if gaps[best].mean < -GAP:
            text += f"Furthest below it is {best} ({gaps[best].text(100, sign=True)} points). "
        else:
            text += "No method is below it by half a point. "
        if worse:
            named = ", ".join(f"{n} ({gaps[n].text(100, sign=True)})" for n in worse[:5])
            more = f" and {len(worse) - 5} more" if len(worse) > 5 else ""
            text += f"Worse than no adaptation: {named}{more}."
        yield from markdown.bullets([text.rstrip()])
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
    yield markdown.heading("Collapses", 3)
    yield ""
    yield (
        "More than ten points above the source model. Concentration is the negative entropy of the "
        "softmax of a batch's mean logits: -2.3 for ten classes alike, 0 for one alone."
    )
    yield ""
    shown = []
    for gap, setting, method in sorted(rows, key=lambda row: -row[0].mean):
        found = over_seeds(settings[setting][method], lambda r: r.summary["concentration"])
        figures = [gap.text(100, sign=True), "" if found is None else found.text(1, 2)]
        shown.append([method, setting.stream, setting.model, *figures, str(gap.count)])
    header = ["method", "stream", "model", "above source", "concentration", "seeds"]
    yield from markdown.table(header, shown, "lllrrr")
    yield ""


def _extremes(settings: Mapping[Setting, Methods]) -> Iterator[str]:
    """Forgetting, calibration and cost on the first setting, usually continual."""
    setting, methods = next(iter(settings.items()))
    where = f"on {setting.stream} with {setting.model}"
    yield markdown.heading("Forgetting, calibration, cost", 3)
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
            f"The time per image (one process of several on {machine}, some beside other work; "
            "[costs](cost.md) are compared elsewhere)",
            same,
            lambda r: 1000 / r.summary["images_per_second"],
            " ms",
            1,
        ),
    ]
    for lead, among, figure, unit, scale in figures:
        found = {name: over_seeds(results, figure) for name, results in among.items()}
        known = {name: value.mean for name, value in found.items() if value is not None}
        if BASELINE not in known:
            continue
        low, high = min(known, key=lambda n: known[n]), max(known, key=lambda n: known[n])
        yield from markdown.bullets(
            [
                f"{lead} {where} is {_digits(scale * known[BASELINE])}{unit} for source, and from "
                f"{_digits(scale * known[low])}{unit} ({low}) to "
                f"{_digits(scale * known[high])}{unit} ({high})."
            ]
        )
    yield ""


def _pictures(settings: Mapping[Setting, Methods], path: Path, images: Path) -> Iterator[str]:
    from experiments.report.figures import (  # slow to import
        plot_cost,
        plot_domains,
        plot_reliability,
        plot_stream,
    )
    from experiments.report.style import looks_of

    looks = looks_of(name for methods in settings.values() for name in methods)
    yield markdown.heading("Over the streams", 2)
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
            compared = _on_one_machine(methods) if draw is plot_cost else methods
            draw(compared, file, title, looks)
            yield markdown.image(title, os.path.relpath(file, path.parent))
            yield ""


def _details(settings: Mapping[Setting, Methods]) -> Iterator[str]:
    yield markdown.heading("All figures", 2)
    yield ""
    yield from markdown.bullets(f"*{name}*: {meaning}" for name, meaning in NOTES.items())
    for setting, methods in settings.items():
        yield from ("", markdown.heading(f"{setting.stream}, {setting.model}", 3), "")
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
    if BASELINE not in methods:
        return {}
    found = {
        name: difference(results, methods[BASELINE], _error)
        for name, results in methods.items()
        if name != BASELINE
    }
    return {name: gap for name, gap in found.items() if gap is not None}


def _error(result: Result) -> float:
    return result.summary["mean_error"]
