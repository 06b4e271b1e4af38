"""``python -m experiments reliability``: whether adapting is ever worse than not adapting.

Six parts: every update on domains that come back, with and without its guard; every update with
its guard on the streams of the record; the recipe ``auto`` on streams that nobody described to it;
the same after accidents; a network and photographs of ImageNet; and the cost of a guard. What is
measured is a difference to the model without adaptation on the same images in the same order, with
its standard error, paired image by image.

The same command goes on where it stopped. Several processes may work on one file of results, on
different parts, models or methods.
"""

from __future__ import annotations

import argparse
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import models
import tta
from experiments.records.progress import Progress
from experiments.run.flags import amount
from experiments.run.subject import pick_device
from experiments.studies.reliability_grid import GRIDS, PARTS, RECIPE, Cell, Choice, cells, updates
from experiments.studies.reliability_page import write_page
from experiments.studies.reliability_photos import find_weights, why_not
from experiments.studies.reliability_run import Runner, read_results
from experiments.sweep.benchmark import bundled_models
from tta.core.checks import nearest, shown

__all__ = ["Left", "Reliability", "add_flags", "committed_results"]

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "experiments" / "results" / "reliability.jsonl"
PAGE = ROOT / "docs" / "reliability.md"
RUNS = Path("runs") / "reliability"
QUICK = "quick"  # the grid whose results are for nobody to read


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Say what ``reliability`` does and takes."""
    parser.description = __doc__
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("--grid", choices=GRIDS, default="page", help="how much is run (default: %(default)s)")
    parts = "; ".join(f"{number}: {text}" for number, text in PARTS.items())
    add("--part", nargs="+", type=int, choices=PARTS, help=f"default: all. {parts}")
    add("--models", nargs="+", metavar="MODEL", help="default: all bundled")
    add("--methods", nargs="+", metavar="METHOD", help=f"updates or {RECIPE} (default: all)")
    add("--streams", nargs="+", metavar="STREAM", help="default: all of the parts")
    add("--guard", metavar="NAME", help="in place of each update's own")
    add("--seeds", nargs="+", type=int, metavar="N", help="of the grid's (default: all of them)")
    add("--photos", type=Path, metavar="FOLDER", help="photographs of ImageNet with labels.json")
    add(
        "--photo-weights",
        type=Path,
        metavar="FILE",
        help="of the network that is shown them (default: those of the installed package)",
    )
    add(
        "--results",
        type=Path,
        help="JSON lines (default: experiments/results/reliability.jsonl; "
        "with --grid quick, runs/reliability/quick.jsonl)",
    )
    add(
        "--page",
        type=Path,
        help="Markdown (default: docs/reliability.md; "
        "with --grid quick, runs/reliability/quick.md)",
    )
    add("--page-only", action="store_true", help="write the page from the results")
    add(
        "--again",
        action="store_true",
        help="run guarded methods and recipes anew, though there are results of them",
    )
    add("--list", action="store_true", help="say what would be run")
    add(
        "--shard",
        default="1/1",
        metavar="I/N",
        help="the I-th of N shares of the cells, for processes at the same time",
    )
    add("--budget-minutes", type=amount, metavar="M", help="stop then; the same command goes on")
    add("--threads", type=int, default=1, help="of torch (default: %(default)s)")
    add("--device", help="cpu, cuda, cuda:1 (default: CUDA if there is one)")
    add("--quiet", action="store_true", help="print nothing")
    parser.set_defaults(prepare=_prepare)


def _prepare(args: argparse.Namespace) -> Reliability:
    for name in args.models or ():
        if name not in models.list_models():
            raise ValueError(
                f"`models` must be bundled ones, got {shown(name)}: "
                + nearest(name, models.list_models())
            )
    known = [*(method.partition("[")[0] for method in updates(Choice())), RECIPE]
    for name in args.methods or ():
        if name not in known:
            raise ValueError(
                f"`methods` must be names of updates or {RECIPE}, got {shown(name)}: "
                + nearest(name, known)
            )
    guards = tta.list_methods(slot="guard")
    if args.guard is not None and args.guard not in guards:
        raise ValueError(
            f"`guard` must be a guard, got {shown(args.guard)}: {nearest(args.guard, guards)}"
        )
    if args.threads < 1:
        raise ValueError(f"`threads` must be at least 1, got {args.threads}")
    torch.set_num_threads(args.threads)
    choice = Choice(
        parts=args.part or tuple(PARTS),
        models=args.models or bundled_models(),
        methods=args.methods or (),
        guard=args.guard,
    )
    found, missing = cells(GRIDS[args.grid], choice)
    streams = sorted({cell.stream for cell in found})
    for name in args.streams or ():
        if name not in streams:
            raise ValueError(
                f"`streams` must be some of the parts', got {shown(name)}: {nearest(name, streams)}"
            )
    seeds = sorted({cell.seed for cell in found})
    for seed in args.seeds or ():
        if seed not in seeds:
            raise ValueError(
                f"`seeds` must be some of the grid's, got {seed}: Known: "
                f"{', '.join(map(str, seeds))}."
            )
    found = [
        cell
        for cell in found
        if (not args.streams or cell.stream in args.streams)
        and (not args.seeds or cell.seed in args.seeds)
    ]
    found = _share(found, args.shard)
    quick = args.grid == QUICK
    runner = Runner(
        args.results or (RUNS / "quick.jsonl" if quick else RESULTS),
        RUNS / ("quick" if quick else "kept"),
        pick_device(args.device),
        args.photos,
        args.photo_weights or find_weights(),
    )
    return Reliability(
        runner,
        [] if args.page_only else found,
        missing,
        args.page or (RUNS / "quick.md" if quick else PAGE),
        again=args.again,
        only_list=args.list,
        budget=None if args.budget_minutes is None else 60 * args.budget_minutes,
        quiet=args.quiet,
    )


def _share(found: Sequence[Cell], shard: str) -> list[Cell]:
    """One share of the cells; those on one stream stay together, as they share its images."""
    first, _, last = shard.partition("/")
    if not (first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last)):
        raise ValueError(f"`shard` must be I/N with I from 1 to N, got {shown(shard)}: such as 1/2")
    groups: dict[tuple[Any, ...], list[Cell]] = {}
    for cell in found:
        groups.setdefault(cell.stream_key, []).append(cell)
    return [cell for group in list(groups.values())[int(first) - 1 :: int(last)] for cell in group]


@dataclass(frozen=True)
class Left:
    """A cell that was not run to its end.

    Args:
        cell: The cell.
        status: "failed", "skipped" or "unfinished".
        text: Why.
    """

    cell: Cell
    status: str
    text: str


def committed_results() -> list[dict[str, Any]]:
    """The lines of results that the page of documentation is made from."""
    return list(read_results(RESULTS).values())


class Reliability:
    """Runs cells and writes the page.

    Args:
        runner: Runs a cell.
        cells: Which.
        missing: What the cells lack, in words.
        page: The page.
        again: Run guarded methods and recipes anew.
        only_list: Say what would be run, and do nothing.
        budget: Seconds after which no cell is begun.
        quiet: Print nothing.
    """

    def __init__(
        self,
        runner: Runner,
        cells: Sequence[Cell],
        missing: Sequence[str],
        page: Path,
        *,
        again: bool = False,
        only_list: bool = False,
        budget: float | None = None,
        quiet: bool = False,
    ) -> None:
        self.runner, self.cells, self.missing, self.page = runner, cells, missing, page
        self.again, self.only_list, self.budget = again, only_list, budget
        self.progress = Progress(len(cells), quiet)

    def execute(self) -> list[Left]:
        """Run what is not done, then write the page; returns what is left."""
        say = self.progress.say
        for text in self.missing:
            say(f"left out: {text}")
        done = read_results(self.runner.results)
        todo = [cell for cell in self.cells if cell.key not in done or self._anew(cell)]
        say(f"{len(self.cells)} cells, {len(self.cells) - len(todo)} done before")
        if self.only_list:
            for cell in todo:
                say(_words(cell))
            return []
        self.progress.skip(len(self.cells) - len(todo))
        left = self._run(todo)
        rows = read_results(self.runner.results)
        if rows:
            self._write(list(rows.values()))
            say(f"{len(rows)} results: {self.runner.results}\n{self.page}")
        return left

    def _write(self, rows: list[dict[str, Any]]) -> None:
        write_page(rows, self.page)

    def _anew(self, cell: Cell) -> bool:
        """Whether a cell that has a result is to be run again: not what no guard can change."""
        return self.again and (cell.guard is not None or cell.recipe)

    def _run(self, todo: Sequence[Cell]) -> list[Left]:
        left: list[Left] = []
        start = time.monotonic()
        for cell in todo:
            text = why_not(self.runner.photos, self.runner.weights) if _is_photo(cell) else None
            if text is not None:
                if all(entry.text != text for entry in left):
                    self.progress.say(f"part {cell.part} is skipped without {text}")
                left.append(Left(cell, "skipped", text))
            elif self.budget is not None and time.monotonic() - start > self.budget:
                left.append(Left(cell, "unfinished", "out of time"))
            else:
                left += self._try(cell)
        cut = sum(entry.status == "unfinished" for entry in left)
        if cut:
            self.progress.say(f"out of time for {cut} cells; the same command goes on with them")
        return left

    def _try(self, cell: Cell) -> list[Left]:
        """Run a cell, unless another one has brought it along; a failure does not stop the rest."""
        if self.runner.done(cell) is not None and not self._anew(cell):
            self.progress.skip(1)
            return []
        try:
            row = self.runner.run(cell)
        except Exception as error:
            self.progress.say(f"failed: {_words(cell)}\n{traceback.format_exc()}")
            return [Left(cell, "failed", str(error))]
        self.progress.advance(1, f"{_words(cell)}  {row['seconds']:.0f} s")
        return []


def _is_photo(cell: Cell) -> bool:
    return cell.model not in models.list_models()


def _words(cell: Cell) -> str:
    return (
        f"part {cell.part}, {cell.model}, {cell.stream}, batches of {cell.batch_size}, "
        f"{cell.images} images, seed {cell.seed}: {cell.method}"
    )
