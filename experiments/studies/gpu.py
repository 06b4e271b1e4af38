"""What waits for a GPU, in one script of at most 8 minutes: agreement, cost, streams, pipeline.

    python -m experiments gpu

compares recipes on the bundled network with those on a CPU; times them on a ResNet-50 and the
bundled network beside the plain forward pass, as they are and as captured steps; serves 16 streams
in one pass and one by one; feeds pipelines; and takes the experiment runner's own share. It writes
``experiments/results/gpu.jsonl`` and tables in ``docs/cost.md``, and prints these. The same command
goes on where it stopped; ``--again`` measures all anew. ``--device cpu --quick`` goes through all
of it in small and keeps nothing, with plain calls in place of CUDA graphs.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torchvision
from torch import Tensor

import models
import tta
from experiments.records import markdown
from experiments.records.config import BASELINE
from experiments.records.environment import describe_environment
from experiments.records.errors import CannotGoOn
from experiments.records.rows import Rows
from experiments.run.settings import make_run
from experiments.run.subject import pick_device
from experiments.studies.method_cost_networks import Setting, make_batch, make_subject
from experiments.studies.mixed_batches import Case, Mixed
from experiments.studies.overhead import Overhead
from tta.core.checks import number, told
from tta.runtime.capturing import Captured, NotCapturedError, graph_on, standing_in

__all__ = ["Gpu", "add_flags", "render"]

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "cost.md"
RESULTS = ROOT / "experiments" / "results" / "gpu.jsonl"
MARK = "gpu"  # of the page's generated part
KEYS = ("part", "network", "recipe")
BUNDLED = "cifar10_resnet20_bn"
RECIPES = ("source", "bn", "alpha_bn", "robust_bn", "unmix_tns", "neo", "lame", "auto", "tent",
           "eata", "sar")  # fmt: skip
FED = ("unmix_tns", "tent")  # to pipelines
CHECKED = 4  # batches that agree
PASSED = 4  # batches of a pipeline before the clock runs, in which steps are captured
WARM_UP = 3  # calls before the clock runs


@dataclass(frozen=True)
class Size:
    """How much is measured.

    Args:
        networks: What recipes are timed on, by name.
        recipes: That are compared and timed.
        rounds: Timed calls of each.
        cases: Of mixed batches.
        streams: In a mixed batch, of ``images`` images each.
        images: Of each stream.
        batches: That a pipeline is fed.
        overhead: Images of each domain in a run of the experiment runner.
    """

    networks: Mapping[str, Setting]
    recipes: Sequence[str]
    rounds: int
    cases: Sequence[Case]
    streams: int
    images: int
    batches: int
    overhead: int


def _bundled(batch: int, recipes: Sequence[str]) -> Setting:
    return Setting(lambda: models.load(BUNDLED)[0], batch, 32, tuple(recipes))


WHOLE = Size(
    {
        "resnet50": Setting(lambda: torchvision.models.resnet50(), 64, 224, RECIPES),
        BUNDLED: _bundled(64, RECIPES),
    },
    RECIPES,
    rounds=10,
    cases=[Case("resnet50", 224, method) for method in ("bn", "tent", "unmix_tns")],
    streams=16,
    images=4,
    batches=24,
    overhead=500,
)
_FEW = ("source", "unmix_tns", "lame", "tent")
QUICK = Size({BUNDLED: _bundled(4, _FEW)}, _FEW, 2, [Case("test_resnet", 32, "tent")], 2, 2, 6, 10)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Say what ``gpu`` does and takes."""
    parser.description = __doc__
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("--device", help="cpu, cuda, cuda:1 (default: CUDA if there is one)")
    add("--quick", action="store_true", help="all of it in small, to see that it runs")
    add("--minutes", type=float, default=7.0, metavar="N",
        help="after which nothing more is begun (default: %(default)s)")  # fmt: skip
    add("--results", type=Path, help="JSON lines (default: those of the repository)")
    add("--page", type=Path, help="with a place for the tables (default: docs/cost.md)")
    add("--again", action="store_true", help="measure rows again that are there")
    parser.set_defaults(
        prepare=lambda a: Gpu(pick_device(a.device), a.quick, a.minutes, a.results, a.page, a.again)
    )


class Gpu:
    """Measures what waits for a GPU.

    Args:
        device: Where.
        quick: Whether in small; then rows go to ``results`` and ``page`` only if these are given.
        minutes: After which nothing more is begun.
        results: Where rows are kept.
        page: With the tables.
        again: Whether rows that are there are measured again.

    Raises:
        ValueError: For the CPU in full, or minutes out of range.
    """

    def __init__(
        self,
        device: torch.device,
        quick: bool = False,
        minutes: float = 7.0,
        results: Path | None = None,
        page: Path | None = None,
        again: bool = False,
    ) -> None:
        if device.type != "cuda" and not quick:
            raise ValueError(
                f"`device` must be a GPU, got {device}: pass --quick to go through it in small"
            )
        self.device, self.quick, self.again = device, quick, again
        self.minutes = number("minutes", minutes, 0, 1e6)
        self.results = results or (None if quick else RESULTS)
        self.page = page or (None if quick else PAGE)
        self.size = QUICK if quick else WHOLE
        if self.page is not None:
            markdown.check_marks(self.page, MARK)

    def execute(self) -> str:
        """Measure what is left; print, write and return the tables."""
        stand_in = nullcontext() if self.device.type == "cuda" else standing_in()
        with TemporaryDirectory() as folder, stand_in:
            rows = Rows(self.results or Path(folder) / RESULTS.name, KEYS)
            try:
                left, failed = self._measure_all(rows)
            finally:
                tables = render(rows.rows)
                if self.page is not None:
                    markdown.write_between(self.page, MARK, tables)
        print(tables)
        if failed:
            raise CannotGoOn(f"{len(failed)} rows could not be measured: {'; '.join(failed)}")
        if left:
            print(f"{self.minutes:g} minutes are over; the same command goes on with {left} rows")
        return tables

    def _measure_all(self, rows: Rows) -> tuple[int, list[str]]:
        """Measure rows; return how many are left, and which could not be measured, with why."""
        hardware = describe_environment()["hardware"]
        name = hardware["cpu"]
        if self.device.type == "cuda":
            name = torch.cuda.get_device_name(self.device)
        about = {"device": name, "quick": self.quick}
        until, left = time.monotonic() + 60 * self.minutes, 0
        failed: list[str] = []
        for part, network, recipe, measure in self._plan():
            key = {"part": part, "network": network, "recipe": recipe}
            if not self.again and rows.measured(key, about):
                continue
            if time.monotonic() >= until:
                left += 1
                continue
            try:
                row = key | about | measure() | {"torch": torch.__version__}
            except Exception as error:  # the others are worth the time on a GPU all the same
                failed.append(f"{part} {network} {recipe} ({type(error).__name__}: {told(error)})")
                print(failed[-1], flush=True)
                continue
            rows.put(row)
            print(row, flush=True)
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
        return left, failed

    def _plan(self) -> Iterable[tuple[str, str, str, Callable[[], dict[str, Any]]]]:
        """All rows, the most important ones first."""
        size = self.size
        bundled = size.networks[BUNDLED]
        for recipe in size.recipes:
            yield "agreement", BUNDLED, recipe, lambda r=recipe: self._agreement(bundled, r)
        for name, setting in size.networks.items():
            for recipe in size.recipes:
                yield "cost", name, recipe, lambda s=setting, r=recipe: self._cost(s, r)
        for case in size.cases:
            network = f"{case.network} at {case.size}"
            yield "streams", network, case.method, lambda c=case: self._streams(c)
        for name, setting in size.networks.items():
            for recipe in FED:
                yield "pipeline", name, recipe, lambda s=setting, r=recipe: self._pipeline(s, r)
        yield "runner", BUNDLED, BASELINE, self._runner

    def _agreement(self, setting: Setting, recipe: str) -> dict[str, Any]:
        """The largest differences from a CPU, of logits by their size, and equal decisions."""
        before = torch.backends.cudnn.allow_tf32
        torch.backends.cudnn.allow_tf32 = False  # which has 10 bits
        try:
            here = make_subject(setting, recipe, torch.device("cpu"))
            there = make_subject(setting, recipe, self.device)
            replayed, why = self._replayed(setting, recipe)
            found = {"difference": 0.0, "replayed": None if replayed is None else 0.0, "equal": 1.0}
            for seed in range(CHECKED):
                x = make_batch(setting, seed, torch.device("cpu"))
                expected, ours = here(x), there(x.to(self.device)).cpu()
                found["difference"] = max(found["difference"], _apart(ours, expected))
                equal = (ours.argmax(1) == expected.argmax(1)).float().mean()
                found["equal"] = min(found["equal"], float(equal))
                if replayed is not None:
                    again = replayed(x.to(self.device)).cpu()
                    found["replayed"] = max(found["replayed"], _apart(again, ours))
        finally:
            torch.backends.cudnn.allow_tf32 = before
        return found | {"why": why}

    def _replayed(
        self, setting: Setting, recipe: str
    ) -> tuple[Callable[[Tensor], Tensor] | None, str]:
        """The recipe as a captured step, as after wrap, or why it has none."""
        adapter: Any = make_subject(setting, recipe, self.device)
        graph, start = graph_on(self.device), adapter.state()
        assert graph is not None
        x = make_batch(setting, 0, self.device)
        adapter(x)
        adapter.load_state(start, allow_nonfinite=True)
        try:
            captured = Captured(adapter, x, graph())
        except NotCapturedError as error:
            return None, str(error)

        def serve(x: Tensor) -> Tensor:
            logits = captured.serve(x)
            return adapter(x) if logits is None else logits

        return serve, ""

    def _cost(self, setting: Setting, recipe: str) -> dict[str, Any]:
        """Milliseconds of the plain pass, the recipe and its replay, in turns."""
        replayed, why = self._replayed(setting, recipe)
        ways = {name: make_subject(setting, name, self.device) for name in ("plain", recipe)}
        if replayed is not None:
            ways["graphs"] = replayed
        batches = [make_batch(setting, seed, self.device) for seed in range(4)]
        taken: dict[str, list[float]] = {name: [] for name in ways}
        for turn in range(WARM_UP + self.size.rounds):
            for name, way in ways.items():
                seconds = self._seconds(lambda way=way, x=batches[turn % 4]: way(x))
                if turn >= WARM_UP:
                    taken[name].append(1e3 * seconds)
        middle = {name: statistics.median(values) for name, values in taken.items()}
        found = {"plain_ms": middle["plain"], "ms": middle[recipe], "why": why}
        return found | {"graphs_ms": middle.get("graphs"), "batch": setting.batch}

    def _seconds(self, call: Callable[[], Any]) -> float:
        self._wait()
        begun = time.perf_counter()
        with torch.no_grad():
            call()
        self._wait()
        return time.perf_counter() - begun

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _streams(self, case: Case) -> dict[str, Any]:
        size = self.size
        study = Mixed(
            size.streams, size.images, size.rounds, torch.get_num_threads(), str(self.device)
        )
        row = study.measure(case)
        together, alone = row["milliseconds"]
        about = {"streams": size.streams, "images": size.images, "why": row["why"] or ""}
        kept = {name: row[name] for name in ("ratio", "ratios", "difference", "equal")}
        return about | kept | {"together_ms": together, "alone_ms": alone}

    def _pipeline(self, setting: Setting, recipe: str) -> dict[str, Any]:
        """Images per second of a loop and of pipelines, in turns."""
        ways: dict[str, dict[str, Any] | None] = {
            "loop": None, "pipeline": {}, "staleness": {"staleness": 1}, "graphs": {"graphs": True}
        }  # fmt: skip
        subjects = {name: make_subject(setting, recipe, self.device) for name in ways}
        frames = [f for seed in range(2) for f in make_batch(setting, seed, torch.device("cpu"))]
        rates: dict[str, list[float]] = {name: [] for name in ways}
        outcome = ""
        for _ in range(3 if not self.quick else 1):
            for name, options in ways.items():
                adapter: Any = subjects[name]
                if options is None:
                    rate = self._rate(_loop(adapter, frames, setting.batch, self), setting.batch)
                else:
                    pipeline = tta.runtime.Pipeline(
                        adapter,
                        _repeated(frames, setting.batch * self.size.batches),
                        batch_size=setting.batch,
                        max_wait=60,
                        workers=4,
                        queue=4 * setting.batch,
                        **options,
                    )
                    rate = self._rate(pipeline.batches(), setting.batch)
                    outcome = pipeline.graphs or outcome
                rates[name].append(rate)
        middle = {name: statistics.median(values) for name, values in rates.items()}
        return {"batch": setting.batch, "outcome": outcome} | middle

    def _rate(self, batches: Iterable[Any], batch: int) -> float:
        """Images per second, after the first batches."""
        begun, count = 0.0, 0
        for passed, _ in enumerate(batches, 1):
            if passed == PASSED:
                begun = time.perf_counter()
            count = passed
        return batch * (count - PASSED) / (time.perf_counter() - begun)

    def _runner(self) -> dict[str, Any]:
        flags = {
            "model": BUNDLED,
            "methods": [BASELINE],
            "scenario": "continual",
            "images": self.size.overhead,
            "batch_size": 64,
            "device": str(self.device),
        }
        rounds = 1 if self.quick else 3
        return {"share": Overhead(make_run({}, flags), rounds).execute()}


def _loop(adapter: Any, frames: list[Tensor], batch: int, study: Gpu) -> Iterable[Tensor]:
    for turn in range(study.size.batches):
        start = batch * turn % len(frames)
        x = torch.stack(frames[start : start + batch]).to(study.device)
        yield adapter(x).softmax(1).cpu()


def _repeated(frames: Sequence[Tensor], count: int) -> list[Tensor]:
    return [frames[place % len(frames)] for place in range(count)]


def _apart(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference, as a share of the largest value where that is above 1."""
    return float((ours - theirs).abs().max() / theirs.abs().max().clamp_min(1))


def render(rows: Iterable[Mapping[str, Any]]) -> str:
    """The tables, one for each part."""
    rows = list(rows)
    if not rows:
        return "Nothing is measured yet: this waits for a GPU.\n"
    devices = sorted({f"{row['device']}, torch {row['torch']}" for row in rows})
    lines = [f"{'; '.join(devices)}.", ""]
    for part, (about, header, cells) in TABLES.items():
        own = [row for row in rows if row["part"] == part]
        if own:
            table = [[markdown.code(row["network"]), markdown.code(row["recipe"]), *cells(row)]
                     for row in own]  # fmt: skip
            lines += [about, "", *markdown.table(("network", "recipe", *header), table), ""]
    return markdown.document(lines[:-1])


def _cost_cells(row: Mapping[str, Any]) -> list[str]:
    plain, graphs = row["plain_ms"], row["graphs_ms"]
    replayed = row["why"] if graphs is None else f"{graphs / plain:.2f}"
    return [f"{plain:.2f}", f"{row['ms'] / plain:.2f}", replayed]


TABLES: dict[str, tuple[str, tuple[str, ...], Callable[[Mapping[str, Any]], list[str]]]] = {
    "agreement": (
        "Largest difference of logits from a CPU over four batches, as a share of the largest; the "
        "least share of equal decisions; and the difference of replays from the recipe as it is:",
        ("from a CPU", "equal", "replayed"),
        lambda row: [
            f"{row['difference']:.0e}",
            f"{row['equal']:.3f}",
            row["why"] if row["replayed"] is None else f"{row['replayed']:.0e}",
        ],
    ),
    "cost": (
        "Milliseconds of a plain forward pass, and the recipe over it, as it is and replayed "
        "(`graphs=True`); medians of calls in turns:",
        ("plain, ms", "as it is", "replayed"),
        _cost_cells,
    ),
    "streams": (
        "A mixed batch in one pass against stream by stream (aim: 4 times faster):",
        ("streams x images", "together, ms", "one by one, ms", "times faster", "difference"),
        lambda row: [
            f"{row['streams']} x {row['images']}",
            f"{row['together_ms']:.1f}",
            f"{row['alone_ms']:.1f}",
            f"{row['ratio']:.2f}",
            f"{row['difference']:.0e}",
        ],
    ),
    "pipeline": (
        "Images a second, of frames on the CPU, by a loop and by pipelines:",
        ("loop", "pipeline", "staleness=1", "graphs=True", ""),
        lambda row: [
            *(f"{row[way]:,.0f}" for way in ("loop", "pipeline", "staleness", "graphs")),
            row["outcome"],
        ],
    ),
    "runner": (
        "The experiment runner's own share of the model's time (aim: under 15 %):",
        ("share",),
        lambda row: [f"{100 * row['share']:.0f} %"],
    ),
}
