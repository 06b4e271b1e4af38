"""The page ``docs/estimators.md``: every number in it from the results."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from experiments.records import markdown
from experiments.report.report import about_lines
from experiments.studies.estimators_observer import ESTIMATORS
from experiments.studies.reliability_figures import Row, by, estimator_errors
from tta.core.files import replacing

__all__ = ["render", "write_page"]

AIM, COST = 7.0, 0.1  # points, forward passes
HALVES = {1: "as chosen on", 2: "kept out"}
Lines = Iterator[str]


def write_page(rows: Sequence[Row], path: Path) -> None:
    """Write the page.

    Args:
        rows: Lines of results.
        path: Of the Markdown file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as part:
        part.write_text(render(rows))


def render(rows: Sequence[Row]) -> str:
    """The page as text."""
    kept = [row for row in rows if "refused" not in row]
    lines = [
        markdown.heading("Estimates of accuracy"),
        "",
        "How far estimates of accuracy without labels are from the truth. Written by `python -m "
        "experiments estimators` from `experiments/results/estimators.jsonl`; do not edit. The "
        "command goes on where it stopped; `--grid full` runs more.",
        "",
        *_reached(kept),
        *_split(kept),
        *_half(kept),
        *_setup(rows),
    ]
    return markdown.document(lines)


def _errors(rows: Sequence[Row]) -> dict[tuple[str, str], list[str]]:
    """(runs, windows, mean absolute error, mean error) by estimator and case."""
    return {(name, case): figures for name, case, *figures in estimator_errors(rows)}


def _cost(rows: Sequence[Row], name: str, figure: str) -> float:
    found = [row["costs"][name][figure] for row in rows if name in row["costs"]]
    return sum(found) / len(found)


def _there(rows: Sequence[Row]) -> list[str]:
    """The estimators that have estimates in these results."""
    return [name for name in ESTIMATORS if any(name in row["estimates"] for row in rows)]


def _reached(rows: Sequence[Row]) -> Lines:
    yield markdown.heading("What is reached", 2)
    yield ""
    yield (
        f"Aim: a mean absolute error of at most {AIM:g} points at the cost of at most {COST:g} "
        "forward passes. Truth and estimate are means over windows of 500 images, by which a "
        "perfect estimate of the chance of being right would still be off by about 1.5 points. "
        "All estimators are asked about the same predictions. The first half has the kinds of "
        "streams and methods on which constants of the estimators were chosen, the second half "
        "streams, methods and corruptions that were kept out of it."
    )
    yield ""
    halves = by(rows, lambda row: row["part"])
    errors = {part: _errors(own) for part, own in halves.items()}
    for part, own in halves.items():
        good, cheap = [], []
        for name in _there(own):
            if _cost(own, name, "forwards") <= COST:
                value = float(errors[part][name, "all"][2])
                cheap.append((value, name))
                good += [name] if value <= AIM else []
        if not cheap:
            continue
        value, best = min(cheap)
        text = f"{HALVES[part]}: the best of those that cost so little is `{best}`, {value:.1f} "
        reached = "The aim is reached." if good else "The aim is not reached."
        yield f"* {text}points. {reached}"
    yield ""
    columns = [HALVES[part] for part in halves]
    header = ["estimator", "what", *columns, "collapsed", "forwards", "time"]
    everything = _errors(rows)
    table = []
    for name in _there(rows):
        cells = [errors[part].get((name, "all"), ["", "", ""])[2] for part in halves]
        bad = next(
            (f[2] for (n, case), f in everything.items() if n == name and "above" in case), ""
        )
        table.append(
            [
                markdown.code(name),
                ESTIMATORS[name],
                *(markdown.strong(c) if c and float(c) <= AIM else c for c in cells),
                markdown.strong(bad) if bad and float(bad) <= AIM else bad,
                f"{_cost(rows, name, 'forwards'):.2f}",
                f"{_cost(rows, name, 'time'):.2f}",
            ]
        )
    yield from markdown.table(header, table, "ll" + "r" * (len(header) - 2))
    yield ""
    yield (
        "Mean absolute errors in points; bold where the aim is reached. Collapsed: runs that err "
        "at least 10 points more often than the source, of both halves. Forwards: passes of the "
        "model for each image; `confidence` and `agreement` compare with the source, which "
        "predicts one batch in twenty wherever there are health figures. Time: the processor time "
        "of the estimator alone, in forward passes of the plain model with batches as small as "
        "here (without the source's passes on one batch in twenty)."
    )
    yield ""


def _split(rows: Sequence[Row]) -> Lines:
    yield markdown.heading("By model, stream and method", 2)
    yield ""
    names = _there(rows)
    for title, key in (
        ("model", lambda row: row["model"]),
        ("stream", lambda row: f"{row['stream']} ({HALVES[row['part']]})"),
        ("method", lambda row: f"{row['method']} ({HALVES[row['part']]})"),
        ("batches of", lambda row: str(row["batch_size"])),
    ):
        table = []
        for value, own in by(rows, key).items():
            found = _errors(own)
            cells = [found.get((name, "all"), ["", "", ""])[2] for name in names]
            table.append([value, str(len(own)), *cells])
        yield from markdown.table([title, "runs", *map(markdown.code, names)], table)
        yield ""


def _half(rows: Sequence[Row]) -> Lines:
    yield markdown.heading("Every run", 2)
    yield ""
    yield "Accuracy in %, truth and then the mean estimates."
    yield ""
    names = _there(rows)
    header = ["model", "stream", "batch", "method", "source", "truth", *map(markdown.code, names)]
    table = []
    for row in rows:
        found = row["visits_found"]
        shares = [1 - sum(found[k]) / sum(found["images"]) for k in ("source", "errors")]
        told = [row["estimates"].get(name, {}).get("estimate") for name in names]
        table.append(
            [row["model"], row["stream"], str(row["batch_size"]), row["method"]]
            + ["" if value is None else f"{100 * value:.1f}" for value in (*shares, *told)]
        )
    yield from markdown.table(header, table, "llrl" + "r" * (2 + len(names)))
    yield ""


def _setup(rows: Sequence[Row]) -> Lines:
    @dataclass
    class Run:
        about: Mapping[str, Any]
        seed: int

    yield markdown.heading("What was run", 2)
    yield ""
    listed = []
    for part, own in by(rows, lambda row: row["part"]).items():
        parts = [
            f"{key}s {', '.join(dict.fromkeys(str(row[key]) for row in own))}"
            for key in ("model", "stream", "method")
        ]
        domains = dict.fromkeys(name for row in own for name in row["domains"])
        corruptions = ", ".join(domains) or "the 15 corruptions"
        images = " or ".join(map(str, sorted({row["images"] for row in own})))
        sizes = " or ".join(map(str, sorted({row["batch_size"] for row in own})))
        listed.append(
            f"{HALVES[part]}: {'; '.join(parts)}; {corruptions}; {images} images of each domain "
            f"and visit; batches of {sizes}"
        )
    listed.append(
        "a first version of `confidence` compared its spread with the source's on other batches, "
        "which this study showed to be wrong for small batches; that was mended after both halves "
        "had been seen, without a new constant"
    )
    refused = sorted({f"{row['method']} on {row['model']}" for row in rows if "refused" in row})
    listed += [f"refused, since the model has no BatchNorm: {', '.join(refused)}"] * bool(refused)
    listed.append(
        "the constants of `confidence`, which `agreement` shares, were chosen on the three bundled "
        "networks, on eight of the fifteen corruptions, shuffled and sorted, with `tent` and "
        "without an update; those of AETTA are its authors'. Streams, methods and corruptions of "
        "the second half were kept out of it; the networks were not. Which eight corruptions is "
        "not on record, so that the four beyond the fifteen stand for what is new"
    )
    listed += about_lines(
        cast(Any, [Run({"started": r["date"], **r["about"]}, r["seed"]) for r in rows])
    )
    yield from markdown.bullets(listed)
