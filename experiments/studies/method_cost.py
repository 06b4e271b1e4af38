"""``python -m experiments bench``: what each recipe costs beside the plain forward pass.

All recipes take turns in one process, each on its own copy of the same random network, and every
round sees a new batch; what is reported is the ratio of medians. Two plain copies of the network
are among them: how far their ratio is from 1 is how far any ratio may be trusted. Forward and
backward passes are counted by torch's FLOP counter in a round of their own, and the peak of memory
in one process for each recipe (on a GPU in this one, above what it held before).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from experiments.records import markdown
from experiments.records.environment import describe_environment
from experiments.records.progress import Progress
from experiments.run.subject import pick_device
from experiments.studies.method_cost_networks import BARE, SETTINGS, TWIN, make_batch, make_subject
from tta.core.backbone import Backbone
from tta.core.checks import nearest, shown

__all__ = ["Bench", "add_flags", "render_bench"]

MARK = "bench"  # of the page's generated part
WARM_UP = 3  # rounds that are not counted


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Say what ``bench`` does and takes."""
    parser.description = (
        "Time recipes against the plain forward pass of the same network, in turns in "
        "one process; count passes; measure the peak of memory. "
        "Settings: " + ", ".join(SETTINGS) + "."
    )
    add = parser.add_argument
    add("setting", help="a network and what it is fed")
    add("--recipes", nargs="+", default=[], metavar="NAME", help="default: all of the setting's")
    add("--rounds", type=int, default=50, help="turns of each recipe (default: %(default)s)")
    add("--no-memory", action="store_true", help="leave the peak of memory out")
    add("--output", type=Path, help="JSON-lines file to append the result to")
    add("--page", type=Path, help="Markdown page to renew from that file, such as docs/cost.md")
    add("--device", help="cpu, cuda, cuda:1 (default: CUDA if there is one)")
    add("--quiet", action="store_true", help="print only the table")
    parser.set_defaults(prepare=_prepare)


def _prepare(args: argparse.Namespace) -> Bench:
    return Bench(
        args.setting,
        pick_device(args.device),
        args.rounds,
        tuple(args.recipes),
        not args.no_memory,
        args.output,
        args.page,
        args.quiet,
    )


class Bench:
    """Measures one setting; checked when it is made, done by `execute`.

    Args:
        setting: A key of `SETTINGS`.
        device: Where to measure.
        rounds: How often each recipe has its turn; at least 1, and 50 for a figure to publish.
        recipes: Some of the setting's; default all.
        memory: Also start one process per recipe for its peak of memory.
        output: A JSON-lines file that the result is appended to.
        page: A Markdown page that gets the last result of every setting in `output`, between its
            two `bench` comments.
        quiet: Print nothing but the table.
    """

    def __init__(
        self,
        setting: str,
        device: torch.device,
        rounds: int = 50,
        recipes: tuple[str, ...] = (),
        memory: bool = True,
        output: Path | None = None,
        page: Path | None = None,
        quiet: bool = False,
    ) -> None:
        if page is not None and (output is None or not page.is_file()):
            raise ValueError(
                f"`page` must be a file with bench comments, beside an output, got {page} and "
                f"{output}: pass both."
            )
        if setting not in SETTINGS:
            raise ValueError(
                f"`setting` must be one of the bench's, got {shown(setting)}: "
                + nearest(setting, SETTINGS)
            )
        if rounds < 1:
            raise ValueError(f"`rounds` must be at least 1, got {rounds}: pass 50 or more")
        known = SETTINGS[setting].recipes
        for recipe in recipes:
            if recipe not in known:
                raise ValueError(
                    f"`recipes` must be measured in {setting}, got {shown(recipe)}: "
                    + nearest(recipe, known)
                )
        self.name, self.setting, self.device = setting, SETTINGS[setting], device
        self.rounds, self.memory, self.output, self.page = rounds, memory, output, page
        self.recipes = tuple(recipes) or known
        self.progress = Progress(rounds + WARM_UP, quiet)

    def execute(self) -> dict[str, Any]:
        """Measure, print the table and append the result to the output; returns it."""
        names = ("plain", TWIN, *self.recipes)
        subjects = {n: make_subject(self.setting, n, self.device) for n in names}
        times: dict[str, list[float]] = {n: [] for n in names}
        outside: dict[str, list[float | None]] = {n: [] for n in names}
        for turn in range(self.rounds + WARM_UP):
            x = make_batch(self.setting, turn, self.device)
            first = turn % len(names)  # nobody always follows the same neighbour
            for name in (*names[first:], *names[:first]):
                seconds, share = _timed(subjects[name], x, self.device)
                if turn >= WARM_UP:
                    times[name].append(seconds)
                    outside[name].append(share)
            self.progress.advance(1, f"round {turn + 1}")
        flops = {
            n: _passes(s, make_batch(self.setting, 999, self.device)) for n, s in subjects.items()
        }
        memory = {n: _peak_memory(self.name, n, self.device) for n in names if self.memory}
        plain = statistics.median(times["plain"])
        rows = [
            {
                "recipe": name,
                "ratio": statistics.median(times[name]) / plain,
                "forwards": flops[name][0] / flops["plain"][0],
                "backwards": flops[name][1] / flops["plain"][0],
                "outside": None if name == BARE else _median(outside[name]),
                "megabytes": memory.get(name),
            }
            for name in names
        ]
        result = {
            "setting": self.name,
            "date": date.today().isoformat(),
            "batch": self.setting.batch,
            "size": self.setting.size,
            "rounds": self.rounds,
            "device": str(self.device),
            "plain_seconds": plain,
            "rows": rows,
            **describe_environment(),
        }
        self.progress.clear()
        print(render_bench(result), flush=True)
        if self.output is not None:
            self.output.parent.mkdir(parents=True, exist_ok=True)
            with self.output.open("a") as file:
                file.write(json.dumps(result) + "\n")
            if self.page is not None:
                _write_page(self.page, self.output)
        return result


def _write_page(page: Path, results: Path) -> None:
    """Put the last result of every setting between the page's two comments."""
    last = {r["setting"]: r for r in map(json.loads, results.read_text().splitlines())}
    tables = "\n".join(render_bench(last[name]) for name in SETTINGS if name in last)
    markdown.write_between(page, MARK, tables)


def _timed(
    subject: Callable[[Tensor], Tensor], x: Tensor, device: torch.device
) -> tuple[float, float | None]:
    """Seconds of one call, and the share of them outside network passes if it has any."""
    passes = _Passes(device)
    with passes:
        seconds = _seconds(subject, x, device)
    share = 1 - passes.seconds / seconds if passes.seconds else None
    if device.type == "cuda":
        # To wait for every pass keeps the next launches from their head start.
        seconds = _seconds(subject, x, device)
    return seconds, share


def _seconds(subject: Callable[[Tensor], Tensor], x: Tensor, device: torch.device) -> float:
    with torch.no_grad():
        _wait(device)
        started = time.perf_counter()
        subject(x)
        _wait(device)
        return time.perf_counter() - started


def _median(shares: list[float | None]) -> float | None:
    known = [share for share in shares if share is not None]
    return statistics.median(known) if known else None


class _Passes:
    """Adds up the time inside forward passes of a backbone and inside backward passes."""

    def __init__(self, device: torch.device) -> None:
        self.seconds, self.device = 0.0, device
        self._originals = (Backbone.__call__, Tensor.backward, torch.autograd.grad)

    def _counted(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            _wait(self.device)
            started = time.perf_counter()
            result = function(*args, **kwargs)
            _wait(self.device)
            self.seconds += time.perf_counter() - started
            return result

        return call

    def __enter__(self) -> _Passes:
        forward, backward, grad = map(self._counted, self._originals)
        Backbone.__call__, Tensor.backward, torch.autograd.grad = forward, backward, grad
        return self

    def __exit__(self, *_: object) -> None:
        Backbone.__call__, Tensor.backward, torch.autograd.grad = self._originals


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _passes(subject: Callable[[Tensor], Tensor], x: Tensor) -> tuple[int, int]:
    """FLOPs of forward and of backward operations of one call."""
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        subject(x)
    counts = counter.get_flop_counts()["Global"]
    backward = sum(v for op, v in counts.items() if "backward" in str(op))
    return sum(counts.values()) - backward, backward


def _peak_memory(setting: str, name: str, device: torch.device) -> float:
    """Megabytes at the peak of three calls, above what was held before the network."""
    if device.type == "cuda":
        return _peak(setting, name, str(device))
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply(_peak, (setting, name, str(device)))


def _peak(setting: str, name: str, device_name: str) -> float:
    device = torch.device(device_name)
    before = _peak_kilobytes()
    held = 0
    if device.type == "cuda":
        held = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
    subject = make_subject(SETTINGS[setting], name, device)
    with torch.no_grad():
        for seed in range(3):
            subject(make_batch(SETTINGS[setting], seed, device))
    if device.type == "cuda":
        return (torch.cuda.max_memory_allocated(device) - held) / 2**20
    return (_peak_kilobytes() - before) / 2**10


def _peak_kilobytes() -> int:
    """Peak of this process's memory; ``ru_maxrss`` would begin with that of its parent."""
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    (line,) = (t for t in status.read_text().splitlines() if t.startswith("VmHWM"))
    return int(line.split()[1])


def render_bench(result: dict[str, Any]) -> str:
    """One setting's result as Markdown."""
    hardware, versions = result["hardware"], result["versions"]
    where = ", ".join(hardware["gpus"]) if result["device"] != "cpu" else hardware["cpu"]
    title = f"{result['setting']}: batch {result['batch']} of {result['size']} x {result['size']}"
    head = [
        markdown.heading(title, 3),
        "",
        f"{result['date']}, {where}, {hardware['torch_threads']} threads, torch "
        f"{versions['torch']}, {result['rounds']} rounds; one plain forward takes "
        f"{1000 * result['plain_seconds']:.1f} ms.",
        "",
    ]
    header = ["recipe", "time / plain", "forwards", "backwards", "outside the network"]
    header.append("peak memory (MB)")
    rows = []
    for row in result["rows"]:
        outside = "" if row["outside"] is None else f"{100 * row['outside']:.0f} %"
        memory = "" if row["megabytes"] is None else f"{row['megabytes']:.0f}"
        figures = [f"{row[key]:.2f}" for key in ("ratio", "forwards", "backwards")]
        rows.append([row["recipe"], *figures, outside, memory])
    return markdown.document([*head, *markdown.table(header, rows)])
