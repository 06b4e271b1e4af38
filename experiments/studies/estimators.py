"""``python -m experiments estimators``: how far estimates of accuracy without labels are off.

Every estimator is asked about every batch of the same runs, collapses included, and never acts.
The runs are in two halves: conditions as those in which the constants of the estimators were
chosen, and streams, methods and corruptions that were kept out of it. The same command goes on
where it stopped.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from experiments.records.health import estimates
from experiments.run.flags import amount
from experiments.run.subject import pick_device
from experiments.studies.estimators_observer import ESTIMATORS, observed
from experiments.studies.estimators_page import write_page
from experiments.studies.reliability import Reliability
from experiments.studies.reliability_grid import Cell
from experiments.studies.reliability_paired import paired, play
from experiments.studies.reliability_run import Runner
from experiments.sweep.benchmark import bundled_models
from tta.core.checks import LARGEST, whole_number

__all__ = ["CHOSEN", "KEPT_OUT", "EstimatorRunner", "Estimators", "add_flags", "cells"]

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "experiments" / "results" / "estimators.jsonl"
PAGE = ROOT / "docs" / "estimators.md"
CHOSEN, KEPT_OUT = 1, 2  # the halves, as parts of a study


@dataclass(frozen=True, kw_only=True)
class Half:
    """Which runs one half has.

    Args:
        part: Its number.
        streams: Names of streams, of the study of reliability.
        methods: Method strings.
        domains: Corruptions.
    """

    part: int
    streams: Sequence[str]
    methods: Sequence[str]
    domains: Sequence[str]


@dataclass(frozen=True, kw_only=True)
class Grid:
    """How much is run.

    Args:
        halves: Both halves.
        images: Of each domain; where domains come twice, half as many at each visit.
        sizes: Of batches.
    """

    halves: tuple[Half, Half]
    images: int
    sizes: Sequence[int]


# The constants were chosen with an update (tent) and without one, shuffled and sorted, on eight of
# the fifteen corruptions. The four further corruptions were kept out for certain.
_SMALL = ("gaussian_noise", "fog", "contrast", "jpeg_compression")
_FURTHER = ("speckle_noise", "gaussian_blur", "spatter", "saturate")
GRIDS = {
    "small": Grid(
        halves=(
            Half(
                part=CHOSEN,
                streams=("continual", "class_sorted"),
                methods=("source", "tent"),
                domains=_SMALL,
            ),
            Half(
                part=KEPT_OUT,
                streams=("dirichlet", "recurring_iid"),
                methods=("eta", "sar"),
                domains=_FURTHER,
            ),
        ),
        images=260,
        sizes=(16,),
    ),
    "full": Grid(
        halves=(
            Half(
                part=CHOSEN,
                streams=("continual", "class_sorted"),
                methods=("source", "bn", "tent"),
                domains=(),
            ),
            Half(
                part=KEPT_OUT,
                streams=("dirichlet", "recurring_iid", "recurring_correlated", "markov", "mixed"),
                methods=("eata", "eta", "deyo", "sar", "roid", "rotta", "unmix_tns", "neo"),
                domains=_FURTHER,
            ),
        ),
        images=500,
        sizes=(16, 64),
    ),
}
AGAIN = 2  # visits, on streams whose domains come back


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Say what ``estimators`` does and takes."""
    parser.description = __doc__
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("--grid", choices=GRIDS, default="small", help="how much is run (default: %(default)s)")
    add("--models", nargs="+", metavar="MODEL", choices=bundled_models(), help="default: all")
    add("--batch-sizes", nargs="+", type=int, metavar="N", help="in place of the grid's")
    add("--results", type=Path, default=RESULTS, help="JSON lines (default: %(default)s)")
    add("--page", type=Path, default=PAGE, help="Markdown (default: %(default)s)")
    add("--page-only", action="store_true", help="write the page from the results")
    add("--list", action="store_true", help="say what would be run")
    add("--budget-minutes", type=amount, metavar="M", help="stop then; the same command goes on")
    add("--threads", type=int, default=1, help="of torch (default: %(default)s)")
    add("--device", help="cpu, cuda, cuda:1 (default: CUDA if there is one)")
    add("--quiet", action="store_true", help="print nothing")
    parser.set_defaults(prepare=_prepare)


def _prepare(args: argparse.Namespace) -> Estimators:
    if args.threads < 1:
        raise ValueError(f"`threads` must be at least 1, got {args.threads}: leave it out for 1")
    torch.set_num_threads(args.threads)
    runner = EstimatorRunner(args.results, Path("runs") / "estimators", pick_device(args.device))
    sizes = [whole_number("batch-sizes", size, 1, LARGEST) for size in args.batch_sizes or ()]
    grid = replace(GRIDS[args.grid], sizes=sizes) if sizes else GRIDS[args.grid]
    found = [] if args.page_only else cells(grid, args.models or bundled_models())
    budget = None if args.budget_minutes is None else 60 * args.budget_minutes
    return Estimators(
        runner, found, [], args.page, only_list=args.list, budget=budget, quiet=args.quiet
    )


def cells(grid: Grid, models: Sequence[str]) -> list[Cell]:
    """All cells of a grid, those that share images one after the other."""
    found = []
    for model in models:
        for half in grid.halves:
            for stream in half.streams:
                again = AGAIN if stream.startswith("recurring") else 1
                images = grid.images // again // 10 * 10
                found += [
                    Cell(
                        part=half.part, model=model, stream=stream, method=method, batch_size=size,
                        images=images, seed=0, visits=again, domains=tuple(half.domains),
                    )
                    for size in grid.sizes
                    for method in half.methods
                ]  # fmt: skip
    return found


class EstimatorRunner(Runner):
    """Runs cells under all estimators."""

    def _find(self, cell: Cell) -> dict[str, Any]:
        subject, stream = self._shown(cell)
        batches = list(stream)
        with observed(subject, cell.method, cell.batch_size, cell.seed) as observer:
            played = play(observer.adapter, batches, subject)
        source = np.concatenate(
            [
                (guessed != batch.labels.cpu()).numpy()
                for guessed, batch in zip(observer.source, batches, strict=True)
            ]
        )
        shares = [
            (name, told[name], len(wrong), int(wrong.sum()))
            for told, wrong in zip(observer.estimates, played.wrong, strict=True)
            for name in ESTIMATORS
            if np.isfinite(told.get(name, np.nan))
        ]
        everything = np.zeros(len(source), np.int64)
        return {
            "mean_error": played.mean_error(),
            "visits_found": paired(played.all_wrong, source, None, everything),
            "estimates": estimates(shares),
            "costs": observer.costs(),
        }


class Estimators(Reliability):
    """Runs cells and writes the page of estimators."""

    def _write(self, rows: list[dict[str, Any]]) -> None:
        write_page(rows, self.page)
