"""The parts of ``docs/reliability.md`` that show the recipe on streams that nobody described."""

from __future__ import annotations

from collections.abc import Sequence

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
)
from experiments.studies.reliability_record import lowest_of

__all__ = ["after", "after_aims", "unknown", "unknown_aims"]

BACK = 20  # batches
NEAR, FAR = 3.0, 7.0  # points from the record's lowest figure: on average, and at worst


def _distances(rows: Sequence[Row]) -> list[float]:
    """Points above the record's lowest figure, of each cell that the record has."""
    found = []
    for own in by(rows, cell_of).values():
        lowest = lowest_of(own[0])
        if lowest is not None:
            found.append(mean_error(own) - lowest[1])
    return found


def mean_error(rows: Sequence[Row]) -> float:
    return 100 * sum(row["mean_error"] for row in rows) / len(rows)


def unknown(rows: Sequence[Row]) -> Lines:
    yield (
        "Mean error over the domains in % (of a walk: over its images), points above source, and "
        "how far that is from the lowest figure that any method or composition has in the "
        "[record](record.md)."
    )
    for model, own in by(rows, lambda row: row["model"]).items():
        table = []
        for (_, stream, size, images, _), found in by(own, cell_of).items():
            far_from_source, lowest = gap(found), lowest_of(found[0])
            distance = None if lowest is None else mean_error(found) - lowest[1]
            far = "" if distance is None else Gap(distance, 0.0).text(FAR)
            best = "" if lowest is None else f"{lowest[1]:.1f} {lowest[0]}"
            cells = [stream.replace("_", " "), str(size), str(images), f"{mean_error(found):.1f}"]
            table.append([*cells, far_from_source.text(LIMIT), best, far, actions(found)])
        header = ["stream", "batch", "images", "error", "above source", "lowest", "from it", "done"]
        yield from ("", markdown.strong(model), "", *markdown.table(header, table, "lrrrrlrl"))


def unknown_aims(rows: Sequence[Row]) -> list[Aim]:
    above = [not gap(own).above(LIMIT) for own in by(rows, cell_of).values()]
    aims = [Aim(f"streams nobody described: no cell above source + {LIMIT:g}", None, count(above))]
    distances = _distances(rows)
    if distances:
        mean = sum(distances) / len(distances)
        text = f"mean distance to the record's lowest {mean:.1f} points, aim {NEAR:g}"
        aims.append(Aim(text, None, count([mean <= NEAR])))
        text = (
            f"distance to the record's lowest at most {FAR:g} points, at worst {max(distances):.1f}"
        )
        aims.append(Aim(text, None, count([distance <= FAR for distance in distances])))
    return aims


def after(rows: Sequence[Row]) -> Lines:
    yield (
        "Points above source during the episode and afterwards, afterwards above a twin that had "
        "no episode, and batches until it is no more above that twin (ten batches together, by "
        "twice the standard error)."
    )
    yield ""
    table = []
    for (model, stream, *_), found in by(rows, cell_of).items():
        back = _slowest(found)
        shown = f"not within {found[0]['batches_after']}" if back is None else str(back)
        late = back is None or back > BACK
        table.append(
            [
                model,
                stream.replace("_", " "),
                gap(found, [0]).text(),
                gap(found, [1]).text(LIMIT),
                gap(found, [1], "partner").text(),
                markdown.strong(shown) if late else shown,
                actions(found),
            ]
        )
    header = ["model", "episode", "during", "after", "above its twin", "batches", "done during it"]
    yield from markdown.table(header, table, "llrrrrl")


def _slowest(rows: Sequence[Row]) -> int | None:
    """Batches until the slowest seed is back; None if one is not."""
    found = [row["recovery"] for row in rows]
    return None if None in found else max(found)


def after_aims(rows: Sequence[Row]) -> list[Aim]:
    cells = list(by(rows, cell_of).values())
    after = [not gap(own, [1]).above(LIMIT) for own in cells]
    slowest = [_slowest(own) for own in cells]
    back = [batches is not None and batches <= BACK for batches in slowest]
    return [
        Aim(f"after an episode: not above source + {LIMIT:g}", None, count(after)),
        Aim(f"after an episode: back within {BACK} batches", None, count(back)),
    ]
