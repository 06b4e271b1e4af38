"""What exported graphs cost beside the plain model's, by onnxruntime alone.

    python -m experiments edge-cost

exports the plain model and every recipe on every network, with random weights, and runs each graph
in a process of its own without torch: one image at a time, one thread. Processes take turns, a few
rounds each, so that what else the machine does falls on all. It writes
``experiments/results/edge_cost.jsonl`` and the table in ``docs/edge.md``. The same command goes on
where it stopped; ``--again`` measures all anew.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from torch import nn

import tta
from experiments.records import markdown
from experiments.records.environment import describe_environment
from experiments.records.rows import Rows
from experiments.run.method_strings import parse_method
from experiments.studies.device_cost import NETWORKS, check_timm
from tta.core.checks import LARGEST, whole_number
from tta.export.onnx_graph import OPSET

__all__ = ["PLAIN", "RECIPES", "EdgeCost", "add_flags", "render"]

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "edge.md"
RESULTS = ROOT / "experiments" / "results" / "edge_cost.jsonl"
SCRIPT = Path(__file__).with_name("edge_process.py")
MARK = "cost"  # of the page's generated part
PLAIN = "plain model"
RECIPES = ("source", "robust_bn", "neo", "bn", "alpha_bn", "unmix_tns")
ROUNDS = 4  # processes of each graph, over which the calls are spread
PERCENTILES = (50, 95, 99)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Say what ``edge-cost`` does and takes."""
    parser.description = __doc__
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("--networks", nargs="+", metavar="NAME", default=NETWORKS,
        help="of timm (default: %(default)s)")  # fmt: skip
    add("--methods", nargs="+", metavar="METHOD", default=RECIPES, help="default: %(default)s")
    add("--calls", type=int, default=200, metavar="N", help="of a graph (default: %(default)s)")
    add("--size", type=int, default=224, metavar="PIXELS", help="default: %(default)s")
    add("--again", action="store_true", help="measure rows again that are there")
    parser.set_defaults(
        prepare=lambda args: EdgeCost(
            args.networks, args.methods, args.calls, args.size, args.again
        )
    )


class EdgeCost:
    """Measures graphs.

    Args:
        networks: Of timm.
        methods: Method strings, without an update.
        calls: That are timed, of each graph.
        size: Pixels on a side.
        again: Whether rows that are there are measured again.
        results: Where rows are kept.
        page: With the table.
    """

    def __init__(
        self,
        networks: Sequence[str],
        methods: Sequence[str],
        calls: int,
        size: int,
        again: bool = False,
        results: Path = RESULTS,
        page: Path = PAGE,
    ) -> None:
        self.calls = whole_number("calls", calls, ROUNDS, LARGEST)
        self.size = whole_number("size", size, 1, 4096)
        self.networks, self.again, self.page = networks, again, page
        self.methods = [method for method in methods if method != PLAIN]
        for method in self.methods:
            parse_method(method, 1000)
        for network in networks:
            check_timm("networks", network)
        self.rows = Rows(results, ("network", "method"))

    def execute(self) -> Path:
        """Measure what is left, and write the page; returns it."""
        about = {"size": self.size, "calls": self.calls}
        with self.rows.shown_on(self.page, MARK, render):
            for network in self.networks:
                keys = [{"network": network, "method": m} for m in (PLAIN, *self.methods)]
                left = [k["method"] for k in keys if self.again or not self.rows.measured(k, about)]
                if left:
                    self._measure(network, [PLAIN, *(m for m in left if m != PLAIN)])
        return self.page

    def _measure(self, network: str, methods: Sequence[str]) -> None:
        """Export and run some of a network's graphs; the plain one is among them."""
        figures: dict[str, list[dict[str, Any]]] = {method: [] for method in methods}
        with tempfile.TemporaryDirectory() as place:
            folders = {m: Path(place) / str(i) for i, m in enumerate(methods)}
            for method, folder in folders.items():
                print(f"{network}  {method}: exporting", flush=True)
                export(network, method, folder, self.size)
            for _ in range(ROUNDS):
                for method, folder in folders.items():
                    figures[method].append(self._run(folder))
            sizes = {m: (f / "model.onnx").stat().st_size for m, f in folders.items()}
        plain = _summary(figures[PLAIN])
        for method in methods:
            found = _summary(figures[method])
            row = {"network": network, "method": method, "size": self.size, "calls": self.calls}
            row |= found | {f"{key}_ratio": round(found[key] / plain[key], 3) for key in found}
            row |= {"file": sizes[method], "load": round(os.getloadavg()[0], 1)}
            row["cpu"] = describe_environment()["hardware"]["cpu"]
            self.rows.put(row)
            print(row, flush=True)

    def _run(self, folder: Path) -> dict[str, Any]:
        shape = f"1x3x{self.size}x{self.size}"
        calls = str(self.calls // ROUNDS)
        command = [sys.executable, SCRIPT, folder / "model.onnx", folder / "state.npz", calls]
        done = subprocess.run([*command, shape], capture_output=True, text=True, check=True)
        found = json.loads(done.stdout)
        assert not found["torch"], found["torch"]
        return found


def export(network: str, method: str, folder: Path, size: int) -> None:
    """Write a graph of a network of timm with random weights.

    Args:
        network: Its name.
        method: A method string, or `PLAIN` for the model as it is, by torch's exporter.
        folder: Where to.
        size: Pixels on a side.
    """
    torch.manual_seed(0)
    model = timm.create_model(network, pretrained=False).eval()
    example = torch.rand(2, 3, size, size)
    if method != PLAIN:
        adapter = parse_method(method, 1000).wrap(model, batch_size=1)
        tta.export.to_onnx(adapter, folder, example)
        return
    folder.mkdir(parents=True)
    _export_plain(model, example, folder / "model.onnx")


def _export_plain(model: nn.Module, example: torch.Tensor, path: Path) -> None:
    program: Any = torch.onnx.export(
        model,
        (example,),
        dynamo=True,
        verbose=False,
        opset_version=OPSET,
        input_names=["images"],
        output_names=["logits"],
        dynamic_shapes=({0: torch.export.Dim.DYNAMIC},),
    )
    program.save(str(path))


def _summary(processes: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Percentiles in ms over the calls of all processes, and the peak in MB, their median."""
    clock = np.concatenate([found["clock"] for found in processes])
    figures = {f"p{p}": 1e3 * float(np.percentile(clock, p)) for p in PERCENTILES}
    processor = np.concatenate([found["processor"] for found in processes])
    figures["processor"] = 1e3 * float(np.median(processor))
    figures["peak"] = float(np.median([found["peak"] for found in processes])) / 1e6
    return {key: round(value, 3) for key, value in figures.items()}


def render(rows: Iterable[Mapping[str, Any]]) -> str:
    """The table."""
    rows = list(rows)
    if not rows:
        return ""
    header = ("network", "recipe", "p50, ms", "p95", "p99", "beside plain", "processor, ms",
              "beside plain", "peak, MB", "beside plain", "file, MB")  # fmt: skip
    shown = [
        [
            markdown.code(row["network"]),
            row["method"] if row["method"] == PLAIN else markdown.code(row["method"]),
            *(f"{row[f'p{p}']:.2f}" for p in PERCENTILES),
            f"{row['p50_ratio']:.2f}",
            f"{row['processor']:.2f}",
            f"{row['processor_ratio']:.2f}",
            f"{row['peak']:.0f}",
            f"{row['peak_ratio']:.2f}",
            f"{row['file'] / 1e6:.1f}",
        ]
        for row in rows
    ]
    cpus = ", ".join(sorted({row["cpu"] for row in rows}))
    sizes = " or ".join(str(n) for n in sorted({row["size"] for row in rows}))
    loads = [row["load"] for row in rows]
    about = (
        f"One image of {sizes} pixels at a time, {cpus}, one thread; the load of the machine was "
        f"{min(loads):g} to {max(loads):g}, so that the processor's time (medians too) says more "
        "than the clock's where it is above the number of cores. The peak is that of the whole "
        "process, Python and onnxruntime included:"
    )
    return markdown.document([about, "", *markdown.table(header, shown, "ll" + "r" * 9)])
