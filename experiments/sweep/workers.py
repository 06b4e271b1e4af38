"""Runs one by one, in a pool of processes, or on Ray: three ways to the same numbers.

Each way takes cells and gives out what became of them, in the order in which they end. A cell is
run by `run_cell` alone, with a fixed number of threads, so that sums are added in the same order.
"""

from __future__ import annotations

import os
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from experiments.records.config import RunConfig
from experiments.records.errors import CannotGoOn
from experiments.records.file import RESULTS, Busy, Conflict, read_lines
from experiments.run.run import Cache, Run, load_setup
from experiments.run.trial import OutOfTime
from tta.core.checks import shown
from tta.core.files import replacing

__all__ = ["Cell", "NoClusterError", "Outcome", "in_pool", "on_ray", "one_by_one", "run_cell"]


class NoClusterError(CannotGoOn):
    """Ray is not where it was said to be, or has not what was asked for."""


_CACHE = Cache()  # of this process: cells with the same model and images follow each other


@dataclass(frozen=True)
class Cell:
    """One run of a sweep.

    Args:
        config: What to run.
        folder: Where.
        threads: Of torch.
        deadline: Time (of `time.time`) after which to stop, or None.
    """

    config: RunConfig
    folder: str
    threads: int = 1
    deadline: float | None = None


@dataclass(frozen=True)
class Outcome:
    """What became of a cell.

    Args:
        cell: Which.
        status: "done"; "refused" (cannot be run: a method that does not fit the model);
            "unfinished" (out of time, goes on next time); "failed".
        text: Why, where it is not done.
        seconds: It took.
        results: The bytes of its results file, where it may have been written elsewhere.
    """

    cell: Cell
    status: str
    text: str = ""
    seconds: float = 0.0
    results: bytes | None = None

    @property
    def error(self) -> float | None:
        """The mean error of a cell that is done."""
        path = Path(self.cell.folder) / RESULTS
        if self.status != "done":
            return None
        return next(row["mean_error"] for row in read_lines(path, "summary"))


def run_cell(cell: Cell, carry: bool = False) -> Outcome:
    """Run a cell, or go on with it.

    Args:
        cell: Which.
        carry: Whether to give the results file back.
    """
    if cell.deadline is not None and time.time() > cell.deadline:
        return Outcome(cell, "unfinished")
    start, threads = time.monotonic(), torch.get_num_threads()
    torch.set_num_threads(cell.threads)
    deadline = None if cell.deadline is None else start + cell.deadline - time.time()
    status, text = "done", ""
    try:
        try:
            setup = load_setup(cell.config, cache=_CACHE)
            run = Run(setup, folder=cell.folder, show="nothing", deadline=deadline)
        except (ValueError, TypeError, OSError) as error:
            return Outcome(cell, "refused", str(error))
        run.execute()
    except OutOfTime:
        status = "unfinished"
    except (Busy, Conflict) as error:
        status, text = "refused", str(error)
    except Exception as error:
        status, text = "failed", "".join(traceback.format_exception(error))
    finally:
        torch.set_num_threads(threads)
    path = Path(cell.folder) / RESULTS
    results = path.read_bytes() if carry and path.is_file() else None
    return Outcome(cell, status, text, time.monotonic() - start, results)


def one_by_one(cells: Sequence[Cell]) -> Iterator[Outcome]:
    """Run cells in this process."""
    for cell in cells:
        yield run_cell(cell)


def in_pool(cells: Sequence[Cell], workers: int) -> Iterator[Outcome]:
    """Run cells in `workers` processes; a process that dies fails the cell that it was running.

    Every process is a pool of its own. One pool for all would fail all cells at once, and hang for
    good when a process dies while the next one is being started (CPython 3.11).
    """
    waiting = list(cells)
    idle = [_start_process() for _ in range(min(workers, len(waiting)))]
    running: dict[Future[Outcome], tuple[Cell, ProcessPoolExecutor]] = {}
    try:
        while waiting or running:
            while waiting and idle:
                pool = idle.pop()
                try:
                    future = pool.submit(run_cell, waiting[0])
                except BrokenProcessPool:  # it died with nothing to do
                    pool.shutdown()
                    idle.append(_start_process())
                else:
                    running[future] = waiting.pop(0), pool
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                cell, pool = running.pop(future)
                try:
                    outcome = future.result()
                except BrokenProcessPool:
                    outcome = Outcome(cell, "failed", "its process died")
                    pool.shutdown()
                    pool = _start_process()
                idle.append(pool)
                yield outcome
    finally:
        for pool in (*idle, *(pool for _, pool in running.values())):
            pool.shutdown()


def _start_process() -> ProcessPoolExecutor:
    """A pool of one, started anew and not forked: CUDA and thread pools do not survive a fork."""
    return ProcessPoolExecutor(1, mp_context=get_context("spawn"))


def on_ray(
    cells: Sequence[Cell], address: str | None, workers: int | None, gpus: float
) -> Iterator[Outcome]:
    """Run cells as tasks of Ray.

    Args:
        cells: What to run.
        address: Of a cluster; None starts Ray on this machine.
        workers: Cells at once on this machine; None for as many as there are cores.
        gpus: Share of a GPU that each takes, 0 for none.

    Raises:
        NoClusterError: For an address where no Ray answers, or more GPUs than there are.
    """
    ray = import_ray()
    root = str(Path(__file__).parents[2])
    # Workers on this machine find modules where this process does.
    places = os.pathsep.join(dict.fromkeys([root, *filter(None, sys.path)]))
    environment: dict[str, Any] = {"env_vars": {"PYTHONPATH": places}}
    if address is not None:  # the other machines have not got our code
        hidden = [".git", ".venv", "runs", "tests"]
        environment = {"working_dir": root, "excludes": hidden}
        own = {name.partition(".")[0] for cell in cells for name in cell.config.imports}
        if own:
            environment["py_modules"] = [sys.modules[name] for name in sorted(own)]
    ours = not ray.is_initialized()
    if ours:
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # keep what CUDA sees
        try:
            _check_reachable(address)
            ray.init(
                address=address or "local",  # and none that the environment speaks of
                num_cpus=workers if address is None else None,
                include_dashboard=False if address is None else None,
                log_to_driver=False,
                logging_level="error",
                runtime_env=environment,
            )
        except OSError as error:
            if address is None:
                raise
            raise NoClusterError(
                f"`ray-address` must be that of a running Ray cluster, got {shown(address)}: "
                "start one "
                "by ray start --head, or use --ray for this machine alone"
            ) from error
    try:
        there = max(node["Resources"].get("GPU", 0) for node in ray.nodes() if node["Alive"])
        if gpus > there:  # such a task would wait for ever
            raise NoClusterError(
                f"`gpus-per-run` must be at most the {there:g} GPUs of one machine of Ray's, got "
                f"{gpus:g}: ask for fewer"
            )
        # Retries are the sweep's, in all three ways alike.
        task = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=0)(run_cell)
        running = {task.remote(cell, carry=True): cell for cell in cells}
        while running:
            (reference,), _ = ray.wait(list(running), num_returns=1)
            cell = running.pop(reference)
            try:
                yield _with_results_here(ray.get(reference))
            except ray.exceptions.RayError as error:
                yield Outcome(cell, "failed", f"Ray: {str(error).strip()}")
    finally:
        if ours:
            ray.shutdown()


def _check_reachable(address: str | None) -> None:
    """Raise OSError where nobody answers at ``host:port``; Ray itself tries for minutes."""
    host, _, port = (address or "").removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()


def import_ray() -> Any:
    """The package, or an error that says where it comes from."""
    try:
        import ray  # type: ignore[import-not-found]
    except ImportError as error:
        raise ValueError(
            "`ray` must be installed for --ray and --ray-address: pip install ray; --workers needs "
            "nothing"
        ) from error
    return ray


def _with_results_here(outcome: Outcome) -> Outcome:
    """Write the results file of a cell that ran on a machine with disks of its own."""
    path = Path(outcome.cell.folder) / RESULTS
    if outcome.results is not None and not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as part:
            part.write_bytes(outcome.results)
    return outcome


Executor = Callable[[Sequence[Cell]], Iterator[Outcome]]
