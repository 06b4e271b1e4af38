"""The page ``docs/reliability.md``: every number in it from the results."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

from experiments.records import markdown
from experiments.records.config import BASELINE
from experiments.report.collect import collect
from experiments.report.report import about_lines
from experiments.studies.reliability_figures import (
    Gap,
    Row,
    by,
    estimator_errors,
    gap_of,
    mean_gap,
    plain_method,
)
from experiments.studies.reliability_grid import PARTS, TUNED
from experiments.sweep.benchmark import RESULTS as RECORD
from experiments.sweep.benchmark import STREAMS
from tta.core.files import replacing

__all__ = ["render", "write_page"]

NOTE = Path(__file__).parents[2] / "docs" / "notes" / "reliability.md"
LIMIT, LOST, BACK, COST = 1.0, 0.5, 20, 1.05  # points, points, batches, a ratio
NEAR, FAR = 3.0, 7.0  # points from the record's lowest figure: on average, and at worst
Lines = Iterator[str]


@dataclass
class Aim:
    """An aim, and how many cells reach it.

    Args:
        text: What is aimed at.
        without: (reached, cells) without guards; None where there is nothing without them.
        guarded: The same with guards.
    """

    text: str
    without: tuple[int, int] | None
    guarded: tuple[int, int]

    def cells(self) -> list[str]:
        """A row of the table."""
        return [self.text, *map(self._share, (self.without, self.guarded))]

    @staticmethod
    def _share(found: tuple[int, int] | None) -> str:
        if found is None or not found[1]:
            return ""
        text = f"{found[0]} of {found[1]}"
        return text if found[0] == found[1] else markdown.strong(text)


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
        own = [row for row in kept if row["part"] == part]
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
        *_estimators([row for row in kept if row.get("estimates")]),
    ]
    return markdown.document(lines)


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


# Part 1


def _pairs(rows: Sequence[Row]) -> Iterator[tuple[tuple[Any, ...], list[Row], list[Row]]]:
    """(model, stream, batch size, method), the lines without a guard, and those with one."""
    cells = by(
        rows, lambda row: (row["model"], row["stream"], row["batch_size"], plain_method(row))
    )
    for key, found in cells.items():
        plain = [row for row in found if row["guard"] is None]
        for guarded in by((r for r in found if r["guard"]), lambda r: r["guard"]).values():
            yield key, plain, guarded
        if len(plain) == len(found):
            yield key, plain, []


def _gap(rows: Sequence[Row], visits: Sequence[int] | None = None, against: str = "source") -> Gap:
    return mean_gap(gap_of(row, visits, against) for row in rows)


def _visit_gaps(rows: Sequence[Row]) -> list[Gap]:
    count = len(rows[0]["visits_found"]["images"])
    return [_gap(rows, [visit]) for visit in range(count)]


def _lost(plain: Sequence[Row], guarded: Sequence[Row]) -> Gap | None:
    """What the guard costs where the method alone is below source."""
    if not plain or not guarded or _gap(plain).points >= 0:
        return None
    if any(None in row["visits_found"]["partner"] for row in guarded):
        return None
    return _gap(guarded, against="partner")


def _recurring(rows: Sequence[Row]) -> Lines:
    yield (
        "Points above source: of all visits together, of the worst visit, and in brackets how many "
        f"visits are above source + {LIMIT:g}. Lost: above the method without its guard, where "
        "that is below source. Later: the last visit less the first. Done: what the guard did "
        "other than let it learn, in batches."
    )
    for model, own in by(rows, lambda row: row["model"]).items():
        table = []
        for (_, stream, size, method), plain, guarded in _pairs(own):
            lost = _lost(plain, guarded)
            guard = "" if not guarded else f" + {guarded[0]['guard']}"
            table.append(
                [
                    f"{method}{guard}",
                    stream.replace("_", ", "),
                    str(size),
                    *_three(plain),
                    *_three(guarded),
                    "" if lost is None else lost.text(LOST),
                    _actions(guarded),
                ]
            )
        header = ["update", "stream", "batch", "alone: all", "worst visit", "later"]
        header += ["guarded: all", "worst visit", "later", "lost", "done"]
        table.sort(key=lambda cells: cells[0])
        yield from (
            "", markdown.strong(model), "", *markdown.table(header, table, "llrrrrrrrrl"),
        )  # fmt: skip


def _three(rows: Sequence[Row]) -> list[str]:
    if not rows:
        return ["", "", ""]
    gaps = _visit_gaps(rows)
    worst = max(gaps, key=lambda gap: gap.points)
    above = sum(gap.above(LIMIT) for gap in gaps)
    later = gaps[-1].less(gaps[0])
    shown = f"{worst.text()} ({above})"
    return [_gap(rows).text(), markdown.strong(shown) if above else shown, later.text(0.0)]


def _actions(rows: Sequence[Row]) -> str:
    counts: Counter[str] = Counter()
    for row in rows:
        counts.update(row.get("actions", {}))
    total = sum(counts.values())
    shown = [f"{name} {n / total:.1%}" for name, n in counts.most_common() if name != "learn"]
    return ", ".join(shown)


def _count(found: Sequence[bool]) -> tuple[int, int]:
    return sum(found), len(found)


def _recurring_aims(rows: Sequence[Row]) -> list[Aim]:
    found = list(_pairs(rows))

    def reached(side: int, test: Callable[[list[Gap]], bool]) -> tuple[int, int]:
        return _count([test(_visit_gaps(entry[side])) for entry in found if entry[side]])

    lost = [_lost(plain, guarded) for _, plain, guarded in found]
    tests: list[tuple[str, Callable[[list[Gap]], bool]]] = [
        (f"no visit above source + {LIMIT:g}", lambda gaps: not any(g.above(LIMIT) for g in gaps)),
        (
            "the last visit no worse than the first",
            lambda gaps: not gaps[-1].less(gaps[0]).above(0.0),
        ),
    ]
    aims = [
        Aim(f"domains that come back: {text}", reached(1, test), reached(2, test))
        for text, test in tests
    ]
    kept = _count([not gap.above(LOST) for gap in lost if gap is not None])
    text = f"domains that come back: at most {LOST:g} lost where the method alone is below source"
    return [*aims, Aim(text, None, kept)]


# Part 2


@lru_cache(maxsize=1)
def _record() -> dict[tuple[str, str, int], dict[str, dict[int, float]]]:
    """Mean errors of the record in %: by model, stream and batch size, then by method and seed."""
    found: dict[tuple[str, str, int], dict[str, dict[int, float]]] = {}
    for result in collect([RECORD]) if RECORD.is_file() else []:
        key = result.setting.model, result.setting.stream, result.setting.batch_size
        seeds = found.setdefault(key, {}).setdefault(_plain(result.method), {})
        seeds[result.seed] = 100 * result.summary["mean_error"]
    return found


def _plain(method: str) -> str:
    return re.sub(r"\[[^\]]*\]", "", method)


def _is_recorded(row: Row) -> bool:
    """Whether the record has the very stream of a line."""
    entry = STREAMS.get(row["stream"])
    visits = 1 if entry is None else entry.stream.options.get("visits", 1)
    return entry is not None and (row["images"], row["visits"]) == (entry.stream.images, visits)


def _recorded_gap(row: Row) -> float | None:
    """Points of the method without its guard above source, in the record."""
    if not _is_recorded(row):
        return None
    found = _record().get((row["model"], row["stream"], row["batch_size"]), {})
    own, source = found.get(plain_method(row), {}), found.get(BASELINE, {})
    seed = row["seed"]
    return own[seed] - source[seed] if seed in own and seed in source else None


def _alone(plain: Sequence[Row], guarded: Sequence[Row]) -> Gap | None:
    """The method without its guard, from the results or, without an error, from the record."""
    if plain:
        return _gap(plain)
    found = [_recorded_gap(row) for row in guarded]
    known = [Gap(value, 0.0) for value in found if value is not None]
    return mean_gap(known) if known else None


def _recorded(rows: Sequence[Row]) -> Lines:
    yield (
        "Points above source without a guard → with it. What is without one is the record's figure "
        "where the record has the same stream."
    )
    yield from _by_stream(rows, lambda row: row["stream"])


def _by_stream(rows: Sequence[Row], name: Callable[[Row], str]) -> Lines:
    """A table for each model: a row for each method, a column for each stream."""
    for model, own in by(rows, lambda row: row["model"]).items():
        streams = list(by(own, name))
        cells: dict[tuple[str, str], str] = {}
        for _, plain, guarded in _pairs(own):
            alone, row = _alone(plain, guarded), [*guarded, *plain][0]
            before = "" if alone is None else alone.text(LIMIT)
            after = f" → {_gap(guarded).text(LIMIT)}" if guarded else ""
            guard = f" + {row['guard']}" if guarded else ""
            cells[f"{plain_method(row)}{guard}", name(row)] = f"{before}{after}"
        methods = list(dict.fromkeys(method for method, _ in cells))
        table = [[m, *(cells.get((m, stream), "") for stream in streams)] for m in methods]
        yield from ("", markdown.strong(model), "", *markdown.table(["method", *streams], table))


def _stream_aims(text: str) -> Callable[[Sequence[Row]], list[Aim]]:
    def aims(rows: Sequence[Row]) -> list[Aim]:
        found = [(_alone(plain, guarded), guarded) for _, plain, guarded in _pairs(rows)]
        before = [not gap.above(LIMIT) for gap, guarded in found if gap is not None and guarded]
        after = [not _gap(guarded).above(LIMIT) for _, guarded in found if guarded]
        return [Aim(f"{text}: no cell above source + {LIMIT:g}", _count(before), _count(after))]

    return aims


# Part 3


def _lowest(row: Row) -> tuple[str, float] | None:
    """The record's lowest figure for the cell of a line, and whose it is."""
    if not _is_recorded(row):
        return None
    found = _record().get((row["model"], row["stream"], row["batch_size"]), {})
    means = {method: sum(s.values()) / len(s) for method, s in found.items()}
    best = min(means, key=lambda method: means[method], default=None)
    return None if best is None else (best, means[best])


def _distances(rows: Sequence[Row]) -> list[float]:
    """Points above the record's lowest figure, of each cell that the record has."""
    found = []
    for own in by(rows, _cell).values():
        lowest = _lowest(own[0])
        if lowest is not None:
            found.append(_mean_error(own) - lowest[1])
    return found


def _cell(row: Row) -> tuple[Any, ...]:
    return row["model"], row["stream"], row["batch_size"], row["images"], row["method"]


def _mean_error(rows: Sequence[Row]) -> float:
    return 100 * sum(row["mean_error"] for row in rows) / len(rows)


def _unknown(rows: Sequence[Row]) -> Lines:
    yield (
        "Mean error over the domains in %, points above source, and how far that is from the "
        "lowest figure that any method or composition has in the [record](record.md)."
    )
    for model, own in by(rows, lambda row: row["model"]).items():
        table = []
        for (_, stream, size, images, _), found in by(own, _cell).items():
            gap, lowest = _gap(found), _lowest(found[0])
            distance = None if lowest is None else _mean_error(found) - lowest[1]
            far = "" if distance is None else Gap(distance, 0.0).text(FAR)
            best = "" if lowest is None else f"{lowest[1]:.1f} {lowest[0]}"
            cells = [stream.replace("_", " "), str(size), str(images), f"{_mean_error(found):.1f}"]
            table.append([*cells, gap.text(LIMIT), best, far, _actions(found)])
        header = ["stream", "batch", "images", "error", "above source", "lowest", "from it", "done"]
        yield from ("", markdown.strong(model), "", *markdown.table(header, table, "lrrrrlrl"))


def _unknown_aims(rows: Sequence[Row]) -> list[Aim]:
    above = [not _gap(own).above(LIMIT) for own in by(rows, _cell).values()]
    aims = [Aim(f"streams nobody described: no cell above source + {LIMIT:g}", None, _count(above))]
    distances = _distances(rows)
    if distances:
        mean = sum(distances) / len(distances)
        text = f"mean distance to the record's lowest {mean:.1f} points, aim {NEAR:g}"
        aims.append(Aim(text, None, _count([mean <= NEAR])))
        text = (
            f"distance to the record's lowest at most {FAR:g} points, at worst {max(distances):.1f}"
        )
        aims.append(Aim(text, None, _count([distance <= FAR for distance in distances])))
    return aims


# Part 4


def _after(rows: Sequence[Row]) -> Lines:
    yield (
        "Points above source during the episode and afterwards, afterwards above a twin that had "
        "no episode, and batches until it is no more above that twin (ten batches together, by "
        "twice the standard error)."
    )
    yield ""
    table = []
    for (model, stream, *_), found in by(rows, _cell).items():
        back = _slowest(found)
        shown = f"not within {found[0]['batches_after']}" if back is None else str(back)
        late = back is None or back > BACK
        table.append(
            [
                model,
                stream.replace("_", " "),
                _gap(found, [0]).text(),
                _gap(found, [1]).text(LIMIT),
                _gap(found, [1], "partner").text(),
                markdown.strong(shown) if late else shown,
                _actions(found),
            ]
        )
    header = ["model", "episode", "during", "after", "above its twin", "batches", "done during it"]
    yield from markdown.table(header, table, "llrrrrl")


def _slowest(rows: Sequence[Row]) -> int | None:
    """Batches until the slowest seed is back; None if one is not."""
    found = [row["recovery"] for row in rows]
    return None if None in found else max(found)


def _after_aims(rows: Sequence[Row]) -> list[Aim]:
    cells = list(by(rows, _cell).values())
    after = [not _gap(own, [1]).above(LIMIT) for own in cells]
    slowest = [_slowest(own) for own in cells]
    back = [batches is not None and batches <= BACK for batches in slowest]
    return [
        Aim(f"after an episode: not above source + {LIMIT:g}", None, _count(after)),
        Aim(f"after an episode: back within {BACK} batches", None, _count(back)),
    ]


# Parts 5 and 6


def _photos(rows: Sequence[Row]) -> Lines:
    yield "Points above source without a guard → with it."
    yield from _by_stream(
        rows, lambda row: f"{row['stream'].replace('_', ' ')}, batches of {row['batch_size']}"
    )


def _photo_aims(rows: Sequence[Row]) -> list[Aim]:
    recipes = by((row for row in rows if row["recipe"]), _cell).values()
    aims = _stream_aims("photographs")([row for row in rows if not row["recipe"]])
    above = [not _gap(own).above(LIMIT) for own in recipes]
    text = f"photographs, the recipe: no stream above source + {LIMIT:g}"
    return [*aims, Aim(text, None, _count(above))]


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
                _actions([row]),
            ]
        )
    header = ["model", "recipe", "ratio", "second plain one", "plain (ms a batch)", "done"]
    yield from markdown.table(header, table, "llrrrl")


def _cost_aims(rows: Sequence[Row]) -> list[Aim]:
    found = [row["ratio"] <= COST for row in rows]
    return [Aim(f"a guard that does nothing costs at most {COST:g}", None, _count(found))]


def _estimators(rows: Sequence[Row]) -> Lines:
    if not rows:
        return
    yield ""
    yield markdown.heading("Estimates of accuracy", 2)
    yield ""
    yield (
        "What `health` estimates without labels against the truth, over windows of 500 images of "
        "parts 1 to 5: mean absolute error and mean error (above 0: too hopeful), in points."
    )
    yield ""
    header = ["estimator", "methods", "runs", "windows", "mean absolute error", "mean error"]
    yield from markdown.table(header, estimator_errors(rows), "llrrrr")


_SECTIONS: dict[
    int, tuple[Callable[[Sequence[Row]], Lines], Callable[[Sequence[Row]], list[Aim]]]
] = {
    1: (_recurring, _recurring_aims),
    2: (_recorded, _stream_aims("streams of the record")),
    3: (_unknown, _unknown_aims),
    4: (_after, _after_aims),
    5: (_photos, _photo_aims),
    6: (_cost, _cost_aims),
}
