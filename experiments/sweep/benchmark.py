"""``python -m experiments record``: the committed benchmark, as far as there is time for it.

Every method x the bundled models x eight streams of the bundled slice. The runs come in an order in
which an early stop leaves the most to say: everything cheap for the first model, the other models
on two streams, what is expensive, further seeds, and then the rest. The same command goes on, also
in a fresh checkout: what the compact results hold is not run again. After each time they and the
page of documentation are written anew from all there is.
"""

from __future__ import annotations

import argparse
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import corruptions
import models
import tta
from experiments.records.config import BASELINE, RunConfig, StreamConfig
from experiments.report.benchmark_page import write_page
from experiments.report.collect import collect, write_compact
from experiments.run.subject import pick_device
from experiments.sweep.sweep import Sweep, add_workers, pick_executor
from experiments.sweep.workers import Outcome
from tta.core.component import Component
from tta.core.guard import Guard
from tta.core.registry import component
from tta.core.update import Update
from tta.runtime.method_strings import PLUS

__all__ = ["DOMAINS", "Benchmark", "BenchmarkRun", "add_flags", "without_replay"]

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "experiments" / "results" / "record.jsonl"
PAGE = ROOT / "docs" / "record.md"
SEEDS = (0, 1, 2)
EXPENSIVE = 10.0  # forward passes that a component adds to those of the model, or more
# On every stream, also where a scenario has others or another order, so that streams compare.
DOMAINS = tuple(corruptions.list_corruptions())
COMPOSED = ("unmix_tns+eata", "unmix_tns+lame", "eata+lame")


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A stream of the benchmark, and how much of it is run.

    Args:
        stream: The stream.
        seeded: Whether affordable methods are run with all of `SEEDS`, and not with the first.
        expensive: Whether expensive methods are run too.
        late: Whether it waits until the other streams have been run on the first model.
    """

    stream: StreamConfig
    seeded: bool = False
    expensive: bool = False
    late: bool = False


def _entry(name: str, images: int, options: dict[str, Any] | None = None, **rest: Any) -> Entry:
    stream = StreamConfig(
        name=name, scenario=name, domains=DOMAINS, images=images, options=options or {}
    )
    return Entry(stream=stream, **rest)


# 500 images of each corruption, 200 where the stream shows them 9 or 20 times, 100 where they come
# one by one.
STREAMS = {
    entry.stream.name: entry
    for entry in (
        _entry("continual", 500, seeded=True, expensive=True),
        _entry("dirichlet", 500, {"delta": 0.1}, seeded=True, expensive=True),
        _entry("mixed", 500, expensive=True),
        _entry("imbalance", 500, {"total": 500}),
        _entry("single", 100),
        _entry("walk", 500, {"speed": 100, "total": 7500}),
        _entry("gradual", 200),
        _entry("recurring", 200, {"visits": 20}, late=True),
    )
}

Key = tuple[str, str, str, int]  # of a run: model, stream, method, seed


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Say what ``record`` does and takes."""
    parser.description = (
        "Run every method on the bundled models and eight streams of the bundled "
        "slice, the affordable part first. The same command goes on; each time the compact results "
        "and docs/record.md are written from all there is."
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


def _prepare(args: argparse.Namespace) -> BenchmarkRun:
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
        imports=tuple(args.imports or ()),
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
    return BenchmarkRun(None if args.page_only else sweep, args.results, args.page)


def all_methods() -> list[str]:
    """Every registered method that a name is enough for, and some compositions.

    The bundled models come without source images, so methods that replay these do without.
    """
    known = [name for name in tta.list_methods() if _does_something(component(name))]
    names = sorted(known, key=lambda name: name != BASELINE)
    return [without_replay(name) for name in names] + list(COMPOSED)


def _does_something(found: type[Component]) -> bool:
    """Whether a component by itself is a method: a guard needs something to guard."""
    bare = issubclass(found, Guard) and not (found.companions or found.host)
    return not (bare or found.needs_given)


def without_replay(name: str) -> str:
    """The method as a string, with the fields that switch a replay of source images off."""
    found = component(name)
    if not (issubclass(found, Update) and found.replays_source):
        return name
    fields = sorted(found.artefact_fields.items())
    set_to = ",".join(f"{field}={value:g}" for field, value in fields)
    return f"{name}[{set_to}]" if fields else name


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
        imports: Modules that register components of a user's own.
    """

    device: str
    models: tuple[str, ...]
    methods: tuple[str, ...]
    streams: tuple[str, ...] = field(default_factory=lambda: tuple(STREAMS))
    images: int | None = None
    done: frozenset[Key] = frozenset()
    imports: tuple[str, ...] = ()

    @property
    def run(self) -> RunConfig:
        """What the runs have in common."""
        return self._run(self.models[0], STREAMS[self.streams[0]].stream, self.methods[0], 0)

    def cells(self) -> list[RunConfig]:
        """All runs, the affordable ones first."""
        return [cell for cell in self._tiers() if _key(cell) not in self.done]

    def _tiers(self) -> Iterator[RunConfig]:
        cheap = [method for method in self.methods if not _expensive(method)]
        costly = [method for method in self.methods if _expensive(method)]
        first, others = self.models[:1], self.models[1:]
        entries = [STREAMS[name] for name in self.streams]
        soon = [entry for entry in entries if not entry.late]
        late = [entry for entry in entries if entry.late]
        few = [entry for entry in entries if entry.expensive]
        seeded = [entry for entry in entries if entry.seeded]
        unseeded = [entry for entry in soon if not entry.seeded]
        seed, more = SEEDS[:1], SEEDS[1:]
        yield from self._grid(soon, first, cheap, seed)
        yield from self._grid(seeded, others, cheap, seed)
        yield from self._grid(few, first, costly, seed)
        yield from self._grid(seeded, first, cheap, more)
        yield from self._grid(late, first, cheap, seed)
        yield from self._grid(unseeded, others, cheap, seed)
        yield from self._grid(seeded, others, cheap, more)
        yield from self._grid(few, others, costly, seed)
        yield from self._grid(late, others, cheap, seed)

    def _grid(
        self,
        entries: Sequence[Entry],
        models: Sequence[str],
        methods: Sequence[str],
        seeds: Sequence[int],
    ) -> Iterator[RunConfig]:
        for seed in seeds:
            for entry in entries:
                for model in models:
                    for method in methods:
                        yield self._run(model, entry.stream, method, seed)

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
            imports=self.imports,
        )


class BenchmarkRun:
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
            left = self.sweep.run()
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
    names = (re.split(r"[.\[]", part.strip())[0] for part in PLUS.split(method))
    return any(component(name).cost >= EXPENSIVE for name in names)
