"""The parts of ``docs/reliability.md`` that show methods with and without their guards."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from experiments.records import markdown
from experiments.studies.reliability_figures import (
    LIMIT,
    Aim,
    Gap,
    Lines,
    Row,
    actions,
    by,
    cell_of,
    count,
    gap,
    mean_gap,
    plain_method,
)
from experiments.studies.reliability_record import recorded_gap

__all__ = ["photo_aims", "photos", "recorded", "recurring", "recurring_aims", "stream_aims"]

LOST = 0.5  # points


def pairs(rows: Sequence[Row]) -> Iterator[tuple[tuple[Any, ...], list[Row], list[Row]]]:
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


def _visit_gaps(rows: Sequence[Row]) -> list[Gap]:
    count = len(rows[0]["visits_found"]["images"])
    return [gap(rows, [visit]) for visit in range(count)]


def _lost(plain: Sequence[Row], guarded: Sequence[Row]) -> Gap | None:
    """What the guard costs where the method alone is below source."""
    if not plain or not guarded or gap(plain).points >= 0:
        return None
    if any(None in row["visits_found"]["partner"] for row in guarded):
        return None
    return gap(guarded, against="partner")


def recurring(rows: Sequence[Row]) -> Lines:
    yield (
        "A batch ends where the domain changes, so one of 64 holds the 50 images of a domain in "
        "whatever order; what batches of 64 of a class-correlated stream do is seen on the longer "
        "visits of the record's stream, at the end of each table. "
        "Points above source: of all visits together, of the worst visit, and in brackets how many "
        f"visits are above source + {LIMIT:g}. Lost: above the method without its guard, where "
        "that is below source. Later: the last visit less the first. Done: what the guard did "
        "other than let it learn, in batches."
    )
    for model, own in by(rows, lambda row: row["model"]).items():
        table = []
        for (_, stream, size, method), plain, guarded in pairs(own):
            lost = _lost(plain, guarded)
            guard = "" if not guarded else f" + {guarded[0]['guard']}"
            table.append(
                [
                    f"{method}{guard}",
                    stream.replace("_", ", "),
                    str(size),
                    *_three(plain, _alone([], guarded)),
                    *_three(guarded),
                    "" if lost is None else lost.text(LOST),
                    actions(guarded),
                ]
            )
        header = ["update", "stream", "batch", "alone: all", "worst visit", "later"]
        header += ["guarded: all", "worst visit", "later", "lost", "done"]
        table.sort(key=lambda cells: (cells[1].count(",") == 0, cells[0]))
        yield from (
            "", markdown.strong(model), "", *markdown.table(header, table, "llrrrrrrrrl"),
        )  # fmt: skip


def _three(rows: Sequence[Row], recorded: Gap | None = None) -> list[str]:
    """All visits, the worst, and the last less the first; at least the record's figure of all."""
    if not rows:
        return ["" if recorded is None else recorded.text(), "", ""]
    gaps = _visit_gaps(rows)
    worst = max(gaps, key=lambda gap: gap.points)
    above = sum(gap.above(LIMIT) for gap in gaps)
    later = gaps[-1].less(gaps[0])
    shown = f"{worst.text()} ({above})"
    return [gap(rows).text(), markdown.strong(shown) if above else shown, later.text(0.0)]


def recurring_aims(rows: Sequence[Row]) -> list[Aim]:
    found = list(pairs(rows))

    def reached(side: int, test: Callable[[list[Gap]], bool]) -> tuple[int, int]:
        return count([test(_visit_gaps(entry[side])) for entry in found if entry[side]])

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
    kept = count([not gap.above(LOST) for gap in lost if gap is not None])
    text = f"domains that come back: at most {LOST:g} lost where the method alone is below source"
    return [*aims, Aim(text, None, kept)]


def _alone(plain: Sequence[Row], guarded: Sequence[Row]) -> Gap | None:
    """The method without its guard, from the results or, without an error, from the record."""
    if plain:
        return gap(plain)
    found = [recorded_gap(row) for row in guarded]
    known = [Gap(value, 0.0) for value in found if value is not None]
    return mean_gap(known) if known else None


def recorded(rows: Sequence[Row]) -> Lines:
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
        for _, plain, guarded in pairs(own):
            alone, row = _alone(plain, guarded), [*guarded, *plain][0]
            before = "" if alone is None else alone.text(LIMIT)
            after = f" → {gap(guarded).text(LIMIT)}" if guarded else ""
            guard = f" + {row['guard']}" if guarded else ""
            cells[f"{plain_method(row)}{guard}", name(row)] = f"{before}{after}"
        methods = list(dict.fromkeys(method for method, _ in cells))
        table = [[m, *(cells.get((m, stream), "") for stream in streams)] for m in methods]
        yield from ("", markdown.strong(model), "", *markdown.table(["method", *streams], table))


def stream_aims(text: str) -> Callable[[Sequence[Row]], list[Aim]]:
    def aims(rows: Sequence[Row]) -> list[Aim]:
        found = [(_alone(plain, guarded), guarded) for _, plain, guarded in pairs(rows)]
        before = [not gap.above(LIMIT) for gap, guarded in found if gap is not None and guarded]
        after = [not gap(guarded).above(LIMIT) for _, guarded in found if guarded]
        return [Aim(f"{text}: no cell above source + {LIMIT:g}", count(before), count(after))]

    return aims


def photos(rows: Sequence[Row]) -> Lines:
    yield "Points above source without a guard → with it."
    yield from _by_stream(
        rows, lambda row: f"{row['stream'].replace('_', ' ')}, batches of {row['batch_size']}"
    )


def photo_aims(rows: Sequence[Row]) -> list[Aim]:
    recipes = by((row for row in rows if row["recipe"]), cell_of).values()
    aims = stream_aims("photographs")([row for row in rows if not row["recipe"]])
    above = [not gap(own).above(LIMIT) for own in recipes]
    text = f"photographs, the recipe: no stream above source + {LIMIT:g}"
    return [*aims, Aim(text, None, count(above))]
