"""``python -m experiments sweep``: methods x models x streams x severities x batch sizes x seeds.

Every combination is a run of its own in ``<output>/<name>/<model>/<stream>/<method>/<seed>``. What
is done stays done: the same command goes on after an interruption, and does only what is new after
the lists have grown.
"""

from __future__ import annotations

import argparse
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from experiments.records.config import RunConfig
from experiments.records.errors import CannotGoOn
from experiments.records.file import Conflict, JsonLines, read_header
from experiments.records.progress import Progress
from experiments.run.flags import add_settings, amount, settings_flags
from experiments.run.run import is_finished
from experiments.run.settings import make_sweep
from experiments.sweep.workers import (
    Cell,
    Executor,
    Outcome,
    import_ray,
    in_pool,
    on_ray,
    one_by_one,
)

__all__ = ["Plan", "Sweep", "add_flags", "add_workers", "cell_folder", "pick_executor"]


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Say what ``sweep`` does and takes."""
    parser.description = (
        "Run every method on every stream, on every model, at every severity, with "
        "every batch size and every seed. The same command goes on with what is not done."
    )
    add_settings(parser)
    add = parser.add_argument
    add("--models", nargs="+", metavar="MODEL", help="in place of --model")
    add("--severities", nargs="+", type=int, choices=range(1, 6), metavar="1..5")
    add("--batch-sizes", nargs="+", type=int, metavar="N")
    add("--seeds", nargs="+", type=int, metavar="N")
    add("--name", help="the folder's name (default: sweep)")
    add("--output", type=Path, default=Path("runs"), help="where the folder is made")
    add("--quiet", action="store_true", help="print nothing")
    add_workers(parser)
    parser.set_defaults(prepare=_prepare)


def add_workers(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say how runs are run."""
    add = parser.add_argument
    add("--workers", type=int, metavar="N", help="processes at once (default: this one alone)")
    add("--threads", type=int, default=1, help="of torch in each run (default: %(default)s)")
    add("--retries", type=int, default=1, help="of a failed run (default: %(default)s)")
    add("--ray", action="store_true", help="run on Ray, started on this machine")
    add("--ray-address", metavar="ADDRESS", help="run on this Ray cluster, or 'auto'")
    add(
        "--gpus-per-run",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="on Ray, of a GPU: 0.25 lets four runs share one (default: %(default)s)",
    )
    add("--budget-minutes", type=amount, metavar="M", help="stop then; the same command goes on")


def pick_executor(args: argparse.Namespace) -> Executor:
    """The way to run cells that the flags ask for."""
    for name, least in (("workers", 1), ("threads", 1), ("retries", 0)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise ValueError(f"`{name}` must be at least {least}, got {value}")
    if args.ray or args.ray_address is not None:
        import_ray()
        return lambda cells: on_ray(cells, args.ray_address, args.workers, args.gpus_per_run)
    if args.workers is not None:
        return lambda cells: in_pool(cells, args.workers)
    return one_by_one


def _prepare(args: argparse.Namespace) -> Sweep:
    settings, flags = settings_flags(args)
    lists = {name: getattr(args, name) for name in ("models", "severities", "batch_sizes", "seeds")}
    budget = args.budget_minutes
    return Sweep(
        make_sweep(settings, {**flags, **lists}),
        args.output,
        pick_executor(args),
        args.threads,
        args.retries,
        None if budget is None else time.time() + 60 * budget,
        args.quiet,
    )


class Plan(Protocol):
    """What a sweep asks of its configuration; `SweepConfig` is one."""

    @property
    def run(self) -> RunConfig: ...
    def cells(self) -> list[RunConfig]: ...


class Sweep:
    """Many runs.

    Args:
        config: Which.
        root: The sweep's folder is made in here.
        executor: How they are run, see `experiments.sweep.workers`.
        threads: Of torch, in each run.
        retries: How often a failed run is tried again.
        deadline: Time (of `time.time`) after which no run goes on, or None.
        quiet: Print only what failed.
    """

    def __init__(
        self,
        config: Plan,
        root: str | Path = "runs",
        executor: Executor = one_by_one,
        threads: int = 1,
        retries: int = 1,
        deadline: float | None = None,
        quiet: bool = False,
    ) -> None:
        self.config = config
        self.folder = Path(root).absolute() / config.run.name
        self.executor = executor
        self.retries = retries
        self.progress = Progress(0, quiet)
        self.cells = [
            Cell(cell, str(self.folder / cell_folder(cell)), threads, deadline)
            for cell in config.cells()
        ]

    def execute(self) -> list[Outcome]:
        """Run what is not done, and say how to look at it; see :meth:`run`."""
        lasting = self.run()
        if len(lasting) < len(self.cells):
            self.progress.say(f"\npython -m experiments report {self.folder}")
        return lasting

    def run(self) -> list[Outcome]:
        """Run what is not done.

        Returns:
            The runs that are not done afterwards.

        Raises:
            CannotGoOn: Every run of the sweep was refused, or a folder holds another one.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        todo = [cell for cell in self.cells if not is_finished(cell.folder)]
        for cell in self.cells:  # what is not finished is compared when it is gone on with
            header = None if cell in todo else read_header(Path(cell.folder))
            if header is not None and not _fits(cell.config.to_dict(), header.get("config")):
                raise Conflict(
                    f"`{cell.folder}` holds a run of another configuration: choose another folder"
                )
        self.progress.say(
            f"{len(self.cells)} runs in {self.folder}, {len(self.cells) - len(todo)} done before"
        )
        lasting: list[Outcome] = []
        failed: list[Outcome] = []
        with JsonLines(self.folder / "sweep.jsonl") as log:
            for attempt in range(1 + self.retries):
                failed = self._attempt(todo, attempt, log, lasting)
                todo = [outcome.cell for outcome in failed]
                if not todo:
                    break
            lasting += failed
        for outcome in lasting:
            if outcome.status != "unfinished":
                self.progress.say(f"{outcome.status}: {_describe(outcome)}\n  {_reason(outcome)}")
        cut = sum(outcome.status == "unfinished" for outcome in lasting)
        if cut:
            self.progress.say(f"out of time for {cut} runs; the same command goes on with them")
        refused = [outcome for outcome in lasting if outcome.status == "refused"]
        if refused and len(refused) == len(self.cells):
            raise CannotGoOn(
                f"nothing was run, since all {len(refused)} runs of the sweep were refused, the "
                f"first because {_reason(refused[0])}"
            )
        return lasting

    def _attempt(
        self, cells: Sequence[Cell], attempt: int, log: JsonLines, lasting: list[Outcome]
    ) -> list[Outcome]:
        """Run cells once; returns those that failed, adds to `lasting` those not worth trying."""
        failed = []
        start = time.monotonic()
        for number, outcome in enumerate(self.executor(cells), 1):
            if outcome.status == "unfinished":
                lasting.append(outcome)
                continue
            log.write(
                "cell",
                folder=str(Path(outcome.cell.folder).relative_to(self.folder)),
                status=outcome.status,
                attempt=attempt + 1,
                seconds=outcome.seconds,
                text=outcome.text,
            )
            if outcome.status == "failed":
                failed.append(outcome)
            elif outcome.status == "refused":
                lasting.append(outcome)
            error = outcome.error
            left = (time.monotonic() - start) * (len(cells) / number - 1)
            self.progress.say(
                f"{number}/{len(cells)} {outcome.status:<8} {_describe(outcome)}"
                + ("" if error is None else f"  {100 * error:.1f} % error")
                + f"  {outcome.seconds:.0f} s, {left / 60:.0f} min left"
            )
        return failed


def cell_folder(cell: RunConfig) -> Path:
    """Where a run of one method on one stream lies, under the sweep's folder."""
    (stream,), (method,) = cell.streams, cell.methods
    where = f"{stream.name}-s{stream.severity}-b{stream.size(cell.batch_size)}"
    parts = [cell.model, where, method, f"seed{cell.seed}"]
    return Path(*(re.sub(r"[^\w.,+=\[\]-]+", "_", part) for part in parts))


def _describe(outcome: Outcome) -> str:
    return str(cell_folder(outcome.cell.config))


def _reason(outcome: Outcome) -> str:
    return outcome.text.strip().splitlines()[-1] if outcome.text.strip() else "no reason given"


def _fits(asked: Any, done: Any) -> bool:
    """Whether what was run is what is asked for, where None and no names stand for what is usual.

    What a run writes of itself has these filled in; settings that it does not have are of a later
    version.
    """
    if asked is None or asked in ([], ()):
        return True
    if isinstance(asked, dict) and isinstance(done, dict):
        known = [key for key in asked if key in done]
        return len(known) == len(done) and all(_fits(asked[key], done[key]) for key in known)
    if isinstance(asked, (list, tuple)) and isinstance(done, list):
        return len(asked) == len(done) and all(map(_fits, asked, done))
    return asked == done
