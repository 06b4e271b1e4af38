"""What it costs to keep many streams on one model.

    python -m experiments switching

measures, on random networks and without images, how long a `tta.runtime.StreamPool` takes to put
another stream in place, beside `state()` and `load_state()`, and what many streams take: time to
begin and to switch among all, memory, time to write one and to bring it back. It writes
``experiments/results/switching.json`` and the tables in ``docs/serving.md``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch

import tta
from experiments.records import markdown
from experiments.records.environment import describe_environment
from tta.core.adapter_sets import AdapterSets
from tta.core.checks import LARGEST, whole_number
from tta.core.files import replacing

__all__ = ["Switching", "add_flags", "render"]

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "serving.md"
FIGURES = ROOT / "experiments" / "results" / "switching.json"
MARK = "switching"  # of the page's generated part
AIM = 1.0  # ms for 200 tensors, on a CPU
ROUNDS, ON_DISK = 200, 20
CASES = (
    ("resnet18", "tent"),
    ("resnet50", "tent"),
    ("resnet50", "rotta"),
    ("vit_small_patch16_224", "sar"),
    ("resnet18", "cotta"),
)
MANY = ("resnet18", "tent")


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Say what ``switching`` does and takes."""
    parser.description = __doc__
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("--streams", type=int, default=10_000, metavar="N", help="default: %(default)s")
    add("--device", default="cpu", help="default: %(default)s")
    parser.set_defaults(prepare=lambda args: Switching(args.streams, args.device))


class Switching:
    """Measures switches, and a pool of many streams.

    Args:
        streams: In that pool.
        device: Of the networks.
        cases: Pairs of a network of timm and a recipe.
        many: The pair for the pool.
    """

    def __init__(
        self,
        streams: int,
        device: str,
        cases: Sequence[tuple[str, str]] = CASES,
        many: tuple[str, str] = MANY,
    ) -> None:
        self.streams = whole_number("streams", streams, 2, LARGEST)
        self.device = torch.device(device)
        self.cases, self.many = cases, many

    def execute(self) -> Path:
        """Measure, and write figures and page; returns the page."""
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            rows = []
            for case in self.cases:
                rows.append(self._switches(*case))
                print(rows[-1], flush=True)
            many = self._many(*self.many)
        finally:
            torch.set_num_threads(before)
        figures = {"rounds": ROUNDS, "device": str(self.device), "switches": rows, "many": many}
        with replacing(FIGURES) as part:
            part.write_text(json.dumps(figures | describe_environment(), indent=1) + "\n")
        markdown.write_between(PAGE, MARK, render(json.loads(FIGURES.read_text())))
        print(f"{many}\n{FIGURES}\n{PAGE}")
        return PAGE

    def _adapter(self, network: str, method: str) -> tta.Adapter:
        model = timm.create_model(network, num_classes=1000).eval().to(self.device)
        return tta.wrap(model, method)

    def _time(self, act: Callable[[], Any], rounds: int = ROUNDS) -> float:
        """Median in ms."""
        found = []
        for _ in range(rounds):
            begun = time.perf_counter()
            act()
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            found.append(time.perf_counter() - begun)
        return 1e3 * statistics.median(found)

    def _switches(self, network: str, method: str) -> dict[str, Any]:
        adapter = self._adapter(network, method)
        sets = AdapterSets(adapter)
        held = [sets.new()]
        state = adapter.state()

        def switch() -> None:
            held[0], other = sets.take(), held[0]
            sets.put(other)

        rounds = ROUNDS if sum(t.numel() for t in state.values()) < 1e6 else ROUNDS // 10
        size = sum(t.numel() * t.element_size() for t in state.values())
        return {
            "network": network,
            "method": method,
            "tensors": len(state),
            "megabytes": size / 1e6,
            "switch": self._time(switch, rounds),
            "by_state": self._time(lambda: adapter.load_state(adapter.state()), rounds),
        }

    def _many(self, network: str, method: str) -> dict[str, Any]:
        adapter = self._adapter(network, method)
        names = [str(number) for number in range(self.streams)]
        with tempfile.TemporaryDirectory() as folder:
            pool = tta.runtime.StreamPool(
                adapter, capacity=self.streams, folder=Path(folder) / "pool", interval=None
            )
            memory = _resident()
            begun = time.perf_counter()
            for name in names:
                with pool.stream(name, create=True) as view:
                    view.reset()
            seconds = time.perf_counter() - begun
            grown = (_resident() - memory) / self.streams
            order = iter(names * 2)
            switch = self._time(lambda: pool.health(next(order)), min(1000, self.streams))
            pool.close(save=False)
        with tempfile.TemporaryDirectory() as folder:
            pool = tta.runtime.StreamPool(
                adapter, capacity=1, folder=Path(folder) / "pool", interval=None
            )
            few = names[:ON_DISK]
            for name in few:
                pool.stream(name, create=True)
            order = iter(few * 4)
            restore = self._time(lambda: pool.health(next(order)), 2 * len(few))
            order = iter(few * 4)
            both = self._time(lambda: pool.reset(next(order)), 2 * len(few))
            pool.close(save=False)
        return {
            "network": network,
            "method": method,
            "streams": self.streams,
            "megabytes": grown / 1e6,
            "begin": 1e3 * seconds / self.streams,
            "switch": switch,
            "restore": restore,
            "write": max(0.0, both - restore),
        }


def _resident() -> int:
    """Bytes of this process in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def render(figures: Mapping[str, Any]) -> str:
    """The tables."""
    rows = [
        [
            markdown.code(row["network"]),
            markdown.code(row["method"]),
            str(row["tensors"]),
            f"{row['megabytes']:.2f}",
            f"{row['switch']:.2f}",
            f"{200 * row['switch'] / row['tensors']:.2f}",
            f"{row['by_state']:.1f}",
        ]
        for row in figures["switches"]
    ]
    header = (
        "network", "recipe", "tensors", "MB", "switch, ms", "for 200 tensors",
        "`state` and `load_state`, ms",
    )  # fmt: skip
    many = figures["many"]
    about = (
        f"Medians, {figures['hardware']['cpu']}, {figures['device']}, one thread, torch "
        f"{figures['versions']['torch']}; the aim is {AIM:g} ms for 200 tensors where these are "
        "small:"
    )
    after = (
        f"{many['streams']:,} streams of {markdown.code(many['method'])} on "
        f"{markdown.code(many['network'])} in memory: {many['megabytes']:.2f} MB each; "
        f"{many['begin']:.1f} ms to begin one and use it once, {many['switch']:.1f} ms to switch "
        f"to the one that was used least recently. From a file: {many['restore']:.0f} ms to bring "
        f"one back, {many['write']:.0f} ms to write one that has changed (flushed to disk, file "
        "and folder)."
    )
    table = markdown.table(header, rows, "llrrrrr")
    return markdown.document([about, "", *table, "", after])
