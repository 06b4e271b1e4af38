"""What a results file says but for the times that it took, to compare one run with another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from experiments.records.file import read_lines

__all__ = ["figures"]

TIMES = {"seconds", "images_per_second", "peak_memory", "started", "at", "finished", "command"}


def figures(folder: Path) -> dict[tuple[str, ...], dict[str, Any]]:
    """All numbers of a run but times, in an order that does not depend on interruptions."""
    rows = [
        {key: value for key, value in row.items() if key not in TIMES}
        for row in read_lines(folder / "results.jsonl")
        if row["kind"] in ("stream", "method", "batch", "domain", "summary")
    ]
    keys = [
        [str(row.get(k)) for k in ("kind", "stream", "method", "step", "domain")] for row in rows
    ]
    assert len({tuple(key) for key in keys}) == len(keys), "a line is there twice"
    return dict(zip(map(tuple, keys), rows, strict=True))
