"""The page ``docs/reliability.md``: every number in it from the results."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from experiments.records import markdown
from experiments.report.report import about_lines
from experiments.studies import reliability_guarded as guarded
from experiments.studies import reliability_recipe as recipe
from experiments.studies.reliability_figures import (
    Aim,
    Lines,
    Row,
    actions,
    by,
    count,
    estimator_errors,
    plain_method,
)
from experiments.studies.reliability_grid import PARTS, TUNED
from tta.core.files import replacing

__all__ = ["render", "write_page"]

NOTE = Path(__file__).parents[2] / "docs" / "notes" / "reliability.md"
COST = 1.05  # a ratio
STREAMED = {1, 2, 3, 5}  # parts whose estimates of accuracy are of whole streams


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
    """The page as text; a part without results is left out."""
    refused = [row for row in rows if "refused" in row]
    kept = [row for row in rows if "refused" not in row]
    aims: list[Aim] = []
    sections: list[str] = []
    for part, (write, reached) in _SECTIONS.items():
        own = [row for row in kept if part in _parts_of(row)]
        if own:
            aims += reached(own)
            title = f"{part}. {PARTS[part][0].upper()}{PARTS[part][1:]}"
            sections += ["", markdown.heading(title, 2), "", *write(own)]
    lines = [
        markdown.heading("Reliability"),
        "",
        "Written by `python -m experiments reliability` from "
        "`experiments/results/reliability.jsonl`; do not edit (the words of the first sections are "
        "those of `docs/notes/reliability.md`). The command goes on where it stopped.",
        "",
        NOTE.read_text().strip(),
        "",
        *_reached(aims),
        *_setup(rows, refused),
        *sections,
        *_estimators([row for row in kept if row.get("estimates") and row["part"] in STREAMED]),
    ]
    return markdown.document(lines)


def _parts_of(row: Row) -> set[int]:
    """Where a line is shown: one of part 2 on domains that come back in part 1 too."""
    comes_back = row["part"] == 2 and row["visits"] > 1
    return {row["part"], 1} if comes_back else {row["part"]}


def _reached(aims: Sequence[Aim]) -> Lines:
    yield markdown.heading("What is reached", 2)
    yield ""
    yield (
        "Errors in points against the model without adaptation (source) on the same images in the "
        "same order. Above a limit means above it by more than twice the standard error of the "
        "difference, paired image by image; with several seeds, of their mean. What is not "
        "reached is bold, here and below."
    )
    yield ""
    header = ["aim", "without guards", "with guards"]
    yield from markdown.table(header, [aim.cells() for aim in aims])
    yield ""


def _setup(rows: Sequence[Row], refused: Sequence[Row]) -> Lines:
    @dataclass
    class Run:
        about: dict[str, Any]
        seed: int

    yield markdown.heading("What was run", 2)
    yield ""
    counts = Counter(row["part"] for row in rows)
    parts = ", ".join(f"{counts[part]} in part {part}" for part in PARTS if counts[part])
    hours = sum(row["seconds"] for row in rows) / 3600
    yield f"{len(rows)} runs ({parts}), {hours:.1f} hours."
    yield ""
    images: dict[tuple[int, str], set[int]] = {}
    for row in rows:
        images.setdefault((row["part"], plain_method(row)), set()).add(row["images"])
    few: dict[tuple[int, tuple[int, ...]], list[str]] = {}
    for (part, method), found in images.items():
        few.setdefault((part, tuple(sorted(found))), []).append(method)
    seeds = by(rows, lambda row: (row["part"], plain_method(row)))
    many = sorted({m for (_, m), own in seeds.items() if len({r["seed"] for r in own}) > 1})
    yield from markdown.bullets(
        [
            *(
                f"part {part}, {', '.join(sorted(methods))}: {' or '.join(map(str, numbers))} "
                + ("rounds" if part == 6 else "photographs" if part == 5 else "images")
                + (" of each domain and visit" if part == 1 else " of each domain" * (part < 5))
                for (part, numbers), methods in sorted(few.items())
            ),
            f"several seeds: {', '.join(many) or 'none'}; all others one",
            f"guards and recipes were designed on the streams {', '.join(TUNED['streams'])} and "
            f"the models {', '.join(TUNED['models'])}; all other streams and models were kept out "
            "of it",
            *(
                f"refused, since the model has no BatchNorm: {method}"
                for method in sorted({plain_method(row) for row in refused})
            ),
            *about_lines(
                cast(Any, [Run({"started": r["date"], **r["about"]}, r["seed"]) for r in rows])
            ),
        ]
    )
    yield ""


def _cost(rows: Sequence[Row]) -> Lines:
    yield (
        "Time of the guarded recipe to that of the plain one, as the median over rounds in one "
        "process in which each has its turn; a second plain one says how far such ratios can be "
        "trusted."
    )
    yield ""
    table = []
    for row in rows:
        ratio = f"{row['ratio']:.3f}"
        table.append(
            [
                row["model"],
                row["method"],
                markdown.strong(ratio) if row["ratio"] > COST else ratio,
                f"{row['twin']:.3f}",
                f"{row['milliseconds']:.1f}",
                actions([row]),
            ]
        )
    header = ["model", "recipe", "ratio", "second plain one", "plain (ms a batch)", "done"]
    yield from markdown.table(header, table, "llrrrl")


def _cost_aims(rows: Sequence[Row]) -> list[Aim]:
    found = [row["ratio"] <= COST for row in rows]
    return [Aim(f"a guard that does nothing costs at most {COST:g}", None, count(found))]


def _estimators(rows: Sequence[Row]) -> Lines:
    if not rows:
        return
    yield ""
    yield markdown.heading("Estimates of accuracy", 2)
    yield ""
    yield (
        "What `health` estimates without labels against the truth, over windows of 500 images of "
        "parts 1, 2, 3 and 5: mean absolute error and mean error (above 0: too hopeful), in points."
    )
    yield ""
    header = ["estimator", "methods", "runs", "windows", "mean absolute error", "mean error"]
    yield from markdown.table(header, estimator_errors(rows), "llrrrr")


_SECTIONS: dict[
    int, tuple[Callable[[Sequence[Row]], Lines], Callable[[Sequence[Row]], list[Aim]]]
] = {
    1: (guarded.recurring, guarded.recurring_aims),
    2: (guarded.recorded, guarded.stream_aims("streams of the record")),
    3: (recipe.unknown, recipe.unknown_aims),
    4: (recipe.after, recipe.after_aims),
    5: (guarded.photos, guarded.photo_aims),
    6: (_cost, _cost_aims),
}
