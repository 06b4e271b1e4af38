"""The folder of a run: found or made, begun or continued."""

from __future__ import annotations

import json
import time
from glob import escape
from pathlib import Path
from typing import Any

from experiments.records.config import RunConfig
from experiments.records.file import (
    END,
    RESULTS,
    Busy,
    Conflict,
    Results,
    make_run_folder,
    read_header,
)
from experiments.records.lines import split

__all__ = ["begin", "is_finished", "now", "open_results"]


def open_results(
    config: RunConfig, root: Path, folder: Path | None = None, fresh: bool = False
) -> Results:
    """Open the results file of a run, in a new folder or in that of a run that was cut off.

    Args:
        config: What is run.
        root: Where the folder is made, and where an unfinished run of `config` is looked for.
        folder: The folder itself, which is made if it is not there.
        fresh: Do not look for an unfinished run.

    Raises:
        Busy: `folder` is given, and another process is writing there.
    """
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        return Results(folder / RESULTS)
    found = [] if fresh else sorted(root.glob(f"*-{escape(config.name)}*"))
    for candidate in reversed(found):
        header = read_header(candidate)
        same = header is not None and config.is_that_of(header)
        if same and not is_finished(candidate):
            try:
                return Results(candidate / RESULTS)
            except Busy:  # it was not cut off: another process is at it
                continue
    return Results(make_run_folder(root, config.name) / RESULTS)


def begin(results: Results, config: RunConfig, header: dict[str, Any]) -> list[str]:
    """Write the ``run`` line, or check that the one that is there is of the same run.

    Args:
        results: The results file.
        config: What is run.
        header: The ``run`` line.

    Returns:
        What the user should know, a sentence each.

    Raises:
        Conflict: The file is of a run of another configuration.
    """
    notes = []
    folder, begun = results.path.parent, results.find("run")
    if results.repaired:
        notes.append(
            f"repaired {results.repaired} lines of {results.path} that were cut off, changed or "
            "there twice; what is lost is run again"
        )
    if begun is None:
        results.write("run", **header)
    elif not config.is_that_of(begun):
        raise Conflict(f"`{folder}` holds a run of another configuration: choose another folder")
    elif not results.ended:
        before = {name: begun.get(name) for name in ("git", "versions")}
        current = {name: header[name] for name in before}
        results.add("continued", at=now(), **current)
        notes.append(f"continuing {folder}, begun {begun['started']}")
        if json.dumps(before, sort_keys=True) != json.dumps(current, sort_keys=True):
            notes.append("code or versions have changed since; --fresh starts anew")
    return notes


def is_finished(folder: str | Path) -> bool:
    """Tell whether a folder holds a whole run: no line is damaged, and the last one is its end."""
    path = Path(folder) / RESULTS
    rows = [row for _, row in split(path.read_bytes())] if path.is_file() else []
    last = rows[-1] if rows else None
    return last is not None and None not in rows and last["kind"] == END


def now() -> str:
    """The time as results files have it."""
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")
