"""What the benchmark of record says of the cells of ``python -m experiments reliability``."""

from __future__ import annotations

import re
from functools import lru_cache

from experiments.records.config import BASELINE
from experiments.report.collect import collect
from experiments.studies.reliability_figures import Row, plain_method
from experiments.sweep.benchmark import RESULTS as RECORD
from experiments.sweep.benchmark import STREAMS

__all__ = ["is_recorded", "lowest_of", "record", "recorded_gap"]


@lru_cache(maxsize=1)
def record() -> dict[tuple[str, str, int], dict[str, dict[int, float]]]:
    """Mean errors of the record in %: by model, stream and batch size, then by method and seed."""
    found: dict[tuple[str, str, int], dict[str, dict[int, float]]] = {}
    for result in collect([RECORD]) if RECORD.is_file() else []:
        key = result.setting.model, result.setting.stream, result.setting.batch_size
        seeds = found.setdefault(key, {}).setdefault(_plain(result.method), {})
        seeds[result.seed] = 100 * result.summary["mean_error"]
    return found


def _plain(method: str) -> str:
    return re.sub(r"\[[^\]]*\]", "", method)


def is_recorded(row: Row) -> bool:
    """Whether the record has the very stream of a line."""
    entry = STREAMS.get(row["stream"])
    visits = 1 if entry is None else entry.stream.options.get("visits", 1)
    return entry is not None and (row["images"], row["visits"]) == (entry.stream.images, visits)


def recorded_gap(row: Row) -> float | None:
    """Points of the method without its guard above source, in the record."""
    if not is_recorded(row):
        return None
    found = record().get((row["model"], row["stream"], row["batch_size"]), {})
    own, source = found.get(plain_method(row), {}), found.get(BASELINE, {})
    seed = row["seed"]
    return own[seed] - source[seed] if seed in own and seed in source else None


def lowest_of(row: Row) -> tuple[str, float] | None:
    """The record's lowest figure of another method for the cell of a line, and whose it is."""
    if not is_recorded(row):
        return None
    found = record().get((row["model"], row["stream"], row["batch_size"]), {})
    others = {method: s for method, s in found.items() if method != plain_method(row)}
    means = {method: sum(s.values()) / len(s) for method, s in others.items()}
    best = min(means, key=lambda method: means[method], default=None)
    return None if best is None else (best, means[best])
