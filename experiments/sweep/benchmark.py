"""``python -m experiments record``: the benchmark of record, as far as there is time for it.

Every method x the bundled models x eight streams of the bundled slice. The runs come in an order in
which an early stop leaves the most to say: everything cheap for the first model, the other models
on two streams, what is expensive, further seeds, and then the rest. The same command goes on, also
in a fresh checkout: what the compact results hold is not run again. After each time they and the
page of documentation are written anew from all there is.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import models
import tta
from experiments.records.config import RunConfig, StreamConfig
from experiments.report.collect import collect, write_compact
from experiments.report.record_page import write_page
from experiments.run.subject import pick_device
from experiments.sweep.sweep import Sweep, add_workers, pick_executor
from experiments.sweep.workers import Outcome
from tta.core.registry import component

__all__ = ["Benchmark", "Record", "add_command"]

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "experiments" / "results" / "record.jsonl"
PAGE = ROOT / "docs" / "record.md"

# 500 images of each corruption, 200 where the stream shows them 9 or 20 times, 100 where they come
# one by one.
STREAMS = {
    "continual": StreamConfig(name="continual", scenario="continual", domains=(), images=500),
    "dirichlet": StreamConfig(
        name="dirichlet", scenario="dirichlet", domains=(), images=500, options={"delta": 0.1}
    ),
    "mixed": StreamConfig(name="mixed", scenario="mixed", domains=(), images=500),
    "imbalance": StreamConfig(
        name="imbalance",
        scenario="imbalance",
        domains=(),
        images=500,
        options={"total": 500},
    ),
    "single": StreamConfig(name="single", scenario="single", domains=(), images=100),
    "walk": StreamConfig(
        name="walk",
        scenario="walk",
        domains=(),
        images=500,
        options={"speed": 100, "total": 7500},
    ),
    "gradual": StreamConfig(name="gradual", scenario="gradual", domains=(), images=200),
    "recurring": StreamConfig(
        name="recurring", scenario="recurring", domains=(), images=200, options={"visits": 20}
    ),
}
SEEDS = (0, 1, 2)
SEEDED = ("continual", "dirichlet")  # streams with all seeds; the others have the first
LONGEST = "recurring"
# Tens of forward passes a batch: only on these streams, and with one seed.
EXPENSIVE = tuple(n for n in tta.list_methods(slot="update") if component(n).cost > 10)
EXPENSIVE_STREAMS = ("continual", "dirichlet", "mixed")
# The bundled models come without source images, which RMT replays unless told not to.
SPELLED = {"rmt": "rmt[warmup_samples=0,weight_source=0]"}
COMPOSED = ("unmix_tns+eata", "unmix_tns+lame", "eata+lame")

Key = tuple[str, str, str, int]  # of a run: model, stream, method, seed


def add_command(commands: Any) -> None:
    """Add ``record`` to the command line."""
    parser = commands.add_parser(
        "record",
        help="the benchmark of record, as far as a time budget goes",
        description="Run every method on the bundled models and eight streams of the bundled "
        "slice, the affordable part first. The same command goes on; each time the compact results "
        "and docs/record.md are written from all there is.",
    )
    add = parser.add_argument
    add("--models", nargs="+", metavar="MODEL", help="default: all bundled")
    add("--methods", nargs="+", metavar="METHOD", help="default: all, and some compositions")
    add("--streams", nargs="+", choices=STREAMS, metavar="STREAM", help="default: all eight")
    add("--images", type=int, help="of each domain, in place of each stream's own (for a trial)")
    add("--output", type=Path, default=Path("runs"), help="the runs lie in OUTPUT/record")
    add(
        "--results",
        type=Path,
        default=RESULTS,
        help="compact results; what they hold is not run again (default: %(default)s)",
    )
    add("--page", type=Path, default=PAGE, help="page of documentation (default: %(default)s)")
    add("--page-only", action="store_true", help="write the page from the compact results")
    add("--device", help="cpu, cuda, cuda:1 (default: CUDA if there is one)")
    add("--quiet", action="store_true", help="print nothing")
    add_workers(parser)
    parser.set_defaults(prepare=_prepare)


def _prepare(args: argparse.Namespace) -> Record:
    if args.images is not None and args.results == RESULTS:
        raise ValueError(
            "`results` must be another file than the record's with `images`, got the default: pass "
            "--results and --page"
        )
    benchmark = Benchmark(
        device=str(pick_device(args.device)),
        models=tuple(args.models or bundled_models()),
        methods=tuple(args.methods or all_methods()),
        streams=tuple(args.streams or STREAMS),
        images=args.images,
        done=_keys(args.results) if args.images is None else frozenset(),
    )
    deadline = None if args.budget_minutes is None else time.time() + 60 * args.budget_minutes
    sweep = Sweep(
        benchmark,
        args.output,
        pick_executor(args),
        args.threads,
        args.retries,
        deadline,
        args.quiet,
    )
    return Record(None if args.page_only else sweep, args.results, args.page)


def all_methods() -> list[str]:
    """Every registered method, with fields where a bundled model cannot give what it asks for."""
    names = sorted(tta.list_methods(), key=lambda name: name != "source")
    return [SPELLED.get(name, name) for name in names] + list(COMPOSED)


def bundled_models() -> list[str]:
    """The bundled models, that with BatchNorm first: every method runs on it."""
    return sorted(models.list_models(), key=lambda name: not name.endswith("_bn"))


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """Which runs, in which order; takes the place of a `SweepConfig`.

    Args:
        device: Where.
        models: Names; the first gets everything before the others do.
        methods: Method strings.
        streams: Names in `STREAMS`.
        images: Of each domain, in place of the streams' own.
        done: What is not to be run: model, stream, method and seed of each.
    """

    device: str
    models: tuple[str, ...]
    methods: tuple[str, ...]
    streams: tuple[str, ...] = field(default_factory=lambda: tuple(STREAMS))
    images: int | None = None
    done: frozenset[Key] = frozenset()

    @property
    def run(self) -> RunConfig:
        """What the runs have in common."""
        return self._run(self.models[0], STREAMS[self.streams[0]], self.methods[0], 0)

    def cells(self) -> list[RunConfig]:
        """All runs, the affordable ones first."""
        return [cell for cell in self._tiers() if _key(cell) not in self.done]

    def _tiers(self) -> Iterator[RunConfig]:
        cheap = [method for method in self.methods if not _expensive(method)]
        costly = [method for method in self.methods if _expensive(method)]
        first, others = self.models[:1], self.models[1:]
        short = [name for name in self.streams if name != LONGEST]
        longest = [name for name in self.streams if name == LONGEST]
        few = [name for name in self.streams if name in EXPENSIVE_STREAMS]
        seeded = [name for name in self.streams if name in SEEDED]
        unseeded = [name for name in short if name not in SEEDED]
        seed, more = SEEDS[:1], SEEDS[1:]
        yield from self._grid(short, first, cheap, seed)
        yield from self._grid(seeded, others, cheap, seed)
        yield from self._grid(few, first, costly, seed)
        yield from self._grid(seeded, first, cheap, more)
        yield from self._grid(longest, first, cheap, seed)
        yield from self._grid(unseeded, others, cheap, seed)
        yield from self._grid(seeded, others, cheap, more)
        yield from self._grid(few, others, costly, seed)
        yield from self._grid(longest, others, cheap, seed)

    def _grid(
        self,
        streams: Sequence[str],
        models: Sequence[str],
        methods: Sequence[str],
        seeds: Sequence[int],
    ) -> Iterator[RunConfig]:
        for seed in seeds:
            for name in streams:
                for model in models:
                    for method in methods:
                        yield self._run(model, STREAMS[name], method, seed)

    def _run(self, model: str, stream: StreamConfig, method: str, seed: int) -> RunConfig:
        return RunConfig(
            name="record",
            model=model,
            data="bundled",
            clean=None,
            source=None,
            methods=(method,),
            streams=(stream if self.images is None else replace(stream, images=self.images),),
            batch_size=64,
            seed=seed,
            device=self.device,
        )


class Record:
    """Runs the benchmark and writes it down.

    Args:
        sweep: Of a `Benchmark`; None to write the page alone.
        results: Where the compact results go.
        page: Where the page of documentation goes; its pictures go into ``images/record`` beside.
    """

    def __init__(self, sweep: Sweep | None, results: Path, page: Path) -> None:
        self.sweep = sweep
        self.results = results
        self.page = page

    def execute(self) -> list[Outcome]:
        """Run what there is time for, then write results and page."""
        left: list[Outcome] = []
        if self.sweep is not None:
            left = self.sweep.execute()
            known = [self.results] if self.results.is_file() else []
            # What the results hold is later than a folder's run of the same thing, if there is one.
            write_compact(collect([self.sweep.folder, *known]), self.results)
        results = collect([self.results])
        write_page(results, self.page, self.page.parent / "images" / "record")
        print(f"{len(results)} results: {self.results}\n{self.page}", flush=True)
        return left


def _key(cell: RunConfig) -> Key:
    return cell.model, cell.streams[0].name, cell.methods[0], cell.seed


def _keys(results: Path) -> frozenset[Key]:
    if not results.is_file():
        return frozenset()
    found = collect([results])
    return frozenset((r.setting.model, r.setting.stream, r.method, r.seed) for r in found)


def _expensive(method: str) -> bool:
    return any(name in method for name in EXPENSIVE)
