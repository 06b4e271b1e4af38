"""Write a corrupted data set: several processes, resumable, with checksums and a contact sheet."""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from corruptions.layouts import Layout
from corruptions.manifest import finished, open_folder, put
from corruptions.sheet import contact_sheet

__all__ = ["SHEET", "write"]

SHEET = "contact-sheet.png"


def write(layout: Layout, output: Path, processes: int, *, quiet: bool = False) -> list[str]:
    """Write what is missing of a data set.

    Args:
        layout: What to write.
        output: Folder, empty or begun before with the same settings.
        processes: How many to use; the result does not depend on it.
        quiet: Print nothing.

    Returns:
        Why each picture that cannot be read was left out, one sentence each; no sentence where
        the layout raises instead.
    """
    options = layout.options
    # A limit shows in the layout's own settings, by the number of images.
    settings = {key: value for key, value in asdict(options).items() if key != "limit"}
    settings |= {"names": list(options.names), "severities": list(options.severities)}
    open_folder(output, layout.settings() | settings)
    done = finished(output)
    work = []
    total = 0
    for piece in layout.pieces():
        files = layout.files(piece)
        total += len(files)
        missing = {name for name in files if name not in done}
        if missing:
            work.append((piece, missing))
    progress = _Progress(total, total - sum(len(missing) for _, missing in work), quiet)
    processes = min(processes, len(work))
    if processes <= 1:
        for piece, missing in work:
            progress.advance(*_write_missing(layout, output, piece, missing))
    else:
        _write_in_processes(layout, output, processes, work, progress)
    progress.end()

    def save(part: Path) -> None:
        clean = layout.example(output, None, 0)
        sheet = contact_sheet(
            clean,
            lambda name, severity: layout.example(output, name, severity),
            options.names,
            [float(severity) for severity in options.severities],
        )
        sheet.save(part, "png")

    put(output, SHEET, save, listed=False)
    return sorted(progress.skipped)


def _write_in_processes(
    layout: Layout,
    output: Path,
    processes: int,
    work: list[tuple[Any, set[str]]],
    progress: _Progress,
) -> None:
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context, _start, (layout, output)) as pool:
        try:
            for future in as_completed([pool.submit(_write_piece, *task) for task in work]):
                progress.advance(*future.result())
        except BrokenProcessPool:
            raise OSError(
                "a writing process was killed, perhaps for want of memory: give the same command "
                "again, with fewer `--processes`"
            ) from None
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


class _Worker:
    """What this writing process works on; set when it starts."""

    layout: Layout
    output: Path


def _start(layout: Layout, output: Path) -> None:
    torch.set_num_threads(1)
    _Worker.layout, _Worker.output = layout, output
    threading.Thread(target=_die_with_parent, daemon=True).start()


def _die_with_parent() -> None:
    """Exit when the parent was killed, so that the next run does not find this process at work."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _write_piece(piece: Any, missing: set[str]) -> tuple[int, int, list[str]]:
    return _write_missing(_Worker.layout, _Worker.output, piece, missing)


def _write_missing(
    layout: Layout, output: Path, piece: Any, missing: set[str]
) -> tuple[int, int, list[str]]:
    """Write one piece; returns the numbers of files and images, and what was left out."""
    results = list(layout.write(output, piece, missing))
    skipped = [str(result) for result in results if not isinstance(result, int)]
    return len(missing), sum(r for r in results if isinstance(r, int)), skipped


class _Progress:
    """A line that renews itself on a terminal, or a line now and then in a log."""

    def __init__(self, total: int, done: int, quiet: bool) -> None:
        self._total, self._done, self._images = total, done, 0
        self._quiet, self._terminal = quiet, sys.stderr.isatty()
        self._start = self._last = time.monotonic()
        if done and not quiet:
            print(f"{done} of {total} files were finished before", file=sys.stderr)
        self._before = done
        self.skipped: list[str] = []

    def advance(self, files: int, images: int, skipped: list[str]) -> None:
        self.skipped += skipped
        self._done += files
        self._images += images
        now = time.monotonic()
        if not self._quiet and now - self._last >= (0.2 if self._terminal else 10):
            self._last = now
            self._show("\r\x1b[K" if self._terminal else "", "" if self._terminal else "\n")

    def _show(self, lead: str, end: str) -> None:
        passed = time.monotonic() - self._start
        left = passed * (self._total - self._done) / max(self._done - self._before, 1)
        print(
            f"{lead}{self._done} of {self._total} files, {self._images / passed:.0f} images/s, "
            f"{int(left) // 60}:{int(left) % 60:02d} left",
            end=end,
            file=sys.stderr,
            flush=True,
        )

    def end(self) -> None:
        if not self._quiet:
            self._show("\r\x1b[K" if self._terminal else "", "\n")
