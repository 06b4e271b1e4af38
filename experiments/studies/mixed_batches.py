"""What it gains to serve a mixed batch of many streams in one pass of the model.

    python -m experiments mixed

serves the same batches of 16 streams with 4 images each to two `tta.runtime.StreamPool`, in one
pass and stream by stream, in turn in one process, on random networks and images. It counts calls
of layers with weights and the operations in them, and writes
``experiments/results/mixed.json`` and the table in ``docs/serving.md``.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import tta
from experiments.records import markdown
from experiments.records.environment import describe_environment
from tta.core.checks import LARGEST, whole_number
from tta.core.files import replacing

__all__ = ["Mixed", "add_flags", "render"]

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "serving.md"
FIGURES = ROOT / "experiments" / "results" / "mixed.json"
MARK = "mixed"  # of the page's generated part
WEIGHTED = ("convolution", "addmm", "mm.default")  # in the names of such operations


@dataclass(frozen=True)
class Case:
    """A network of timm, the side of its images, and a recipe."""

    network: str
    size: int
    method: str


CASES = (
    Case("resnet18", 64, "bn"),
    Case("resnet18", 64, "tent"),
    Case("resnet18", 64, "unmix_tns"),
    Case("resnet50", 64, "tent"),
    Case("vit_small_patch16_224", 64, "tent"),
)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Say what ``mixed`` does and takes."""
    parser.description = __doc__
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("--streams", type=int, default=16, metavar="N", help="default: %(default)s")
    add("--images", type=int, default=4, metavar="N", help="of each; default: %(default)s")
    add("--rounds", type=int, default=7, metavar="N", help="default: %(default)s")
    add("--threads", type=int, default=1, metavar="N", help="of torch; default: %(default)s")
    add("--device", default="cpu", help="default: %(default)s")
    parser.set_defaults(prepare=lambda a: Mixed(a.streams, a.images, a.rounds, a.threads, a.device))


class Mixed:
    """Measures mixed batches.

    Args:
        streams: In a batch.
        images: Of each.
        rounds: Batches whose time is taken, after one that is not.
        threads: Of torch on the CPU.
        device: Of the networks.
        cases: What is measured.
    """

    def __init__(
        self,
        streams: int,
        images: int,
        rounds: int,
        threads: int,
        device: str,
        cases: Sequence[Case] = CASES,
    ) -> None:
        self.streams = whole_number("streams", streams, 2, LARGEST)
        self.images = whole_number("images", images, 1, LARGEST)
        self.rounds = whole_number("rounds", rounds, 1, LARGEST)
        self.threads = whole_number("threads", threads, 1, 1024)
        self.device, self.cases = torch.device(device), cases

    def execute(self) -> Path:
        """Measure, and write figures and page; returns the page."""
        before = torch.get_num_threads()
        torch.set_num_threads(self.threads)
        rows = []
        try:
            for case in self.cases:
                rows.append(self.measure(case))
                print(rows[-1], flush=True)
        finally:
            torch.set_num_threads(before)
        figures = {
            "streams": self.streams,
            "images": self.images,
            "rounds": self.rounds,
            "threads": self.threads,
            "device": str(self.device),
            "load": os.getloadavg()[1],
            "rows": rows,
        }
        with replacing(FIGURES) as part:
            part.write_text(json.dumps(figures | describe_environment(), indent=1) + "\n")
        markdown.write_between(PAGE, MARK, render(json.loads(FIGURES.read_text())))
        print(f"{FIGURES}\n{PAGE}")
        return PAGE

    def _pool(self, case: Case, batched: bool) -> tta.runtime.StreamPool:
        torch.manual_seed(0)
        more: dict[str, Any] = {"img_size": case.size} if "vit" in case.network else {}
        model = timm.create_model(case.network, num_classes=1000, **more).eval().to(self.device)
        pool = tta.runtime.StreamPool(tta.wrap(model, case.method, batch_size=self.images))
        pool.batched = batched
        return pool

    def measure(self, case: Case) -> dict[str, Any]:
        """Figures of one case."""
        pools = self._pool(case, True), self._pool(case, False)
        names = [str(i) for i in range(self.streams) for _ in range(self.images)]
        generator = torch.Generator().manual_seed(0)
        seconds: tuple[list[float], list[float]] = ([], [])
        difference, equal, counts = 0.0, True, []
        for number in range(self.rounds + 2):
            shape = (len(names), 3, case.size, case.size)
            batch = torch.rand(shape, generator=generator).to(self.device)
            found: list[Tensor] = []
            for pool, taken in zip(pools, seconds, strict=True):
                if number == 1:
                    found.append(_counted(pool, batch, names, counts))
                    continue
                begun = time.perf_counter()
                found.append(pool(batch, names, create=True))
                if self.device.type == "cuda":
                    torch.cuda.synchronize(self.device)
                if number > 1:
                    taken.append(time.perf_counter() - begun)
            difference = max(difference, float((found[0] - found[1]).abs().max()))
            equal = equal and torch.equal(found[0].argmax(1), found[1].argmax(1))
        ratios = [alone / one for one, alone in zip(*seconds, strict=True)]
        return {
            "network": case.network,
            "size": case.size,
            "method": case.method,
            "why": pools[0].one_by_one,
            "calls": [count[0] for count in counts],
            "flops": [count[1] for count in counts],
            "milliseconds": [1e3 * statistics.median(taken) for taken in seconds],
            "ratio": statistics.median(ratios),
            "ratios": [min(ratios), max(ratios)],
            "difference": difference,
            "equal": equal,
        }


class _Calls(TorchDispatchMode):
    """Counts operations with the weights of a model's layers."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.weights = {p.data_ptr() for p in model.parameters() if p.ndim > 1}
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(name in str(func) for name in WEIGHTED):
            given = [a.data_ptr() for a in args if isinstance(a, Tensor)]
            self.count += not self.weights.isdisjoint(given)
        return func(*args, **(kwargs or {}))


def _counted(
    pool: tta.runtime.StreamPool, batch: Tensor, names: list[str], counts: list[Any]
) -> Tensor:
    """Serve a batch, and note the passes' calls of layers and their operations."""
    flops = FlopCounterMode(display=False)
    with _Calls(pool.adapter.model) as calls, flops:
        logits = pool(batch, names)
    counts.append((calls.count, flops.get_total_flops()))
    return logits


def _threads(count: int) -> str:
    return "one thread" if count == 1 else f"{count} threads"


def render(figures: Mapping[str, Any]) -> str:
    """The table."""
    rows = []
    for row in figures["rows"]:
        together, alone = row["milliseconds"]
        rows.append(
            [
                f"{markdown.code(row['network'])} at {row['size']}",
                markdown.code(row["method"]),
                "{:,} / {:,}".format(*row["calls"]),
                "{:.1f} / {:.1f}".format(*(count / 1e9 for count in row["flops"])),
                f"{together:.0f} / {alone:.0f}",
                "{:.2f} ({:.2f} to {:.2f})".format(row["ratio"], *row["ratios"]),
                f"{row['difference']:.0e}" if row["difference"] else "0",
                "one by one: " + row["why"] if row["why"] else "",
            ]
        )
    header = (
        "network", "recipe", "calls of layers", "10^9 operations", "ms", "times faster",
        "difference", "",
    )  # fmt: skip
    hardware, threads = figures["hardware"], _threads(figures["threads"])
    about = (
        f"{figures['streams']} streams with {figures['images']} images each, in one pass / one by "
        f"one; {hardware['cpu']}, {figures['device']}, {threads}, torch "
        f"{figures['versions']['torch']}, beside a load of {figures['load']:.0f} on "
        f"{hardware['cores']} cores. Times of {figures['rounds']} batches are taken in turn in one "
        "process; their ratio is the median (least to largest). Calls and operations are those of "
        "convolutions and linear layers, forward and backward; the difference is that of logits:"
    )
    return markdown.document([about, "", *markdown.table(header, rows, "llrrrrrl")])
