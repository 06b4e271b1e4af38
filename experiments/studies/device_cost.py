"""What recipes cost a device's CPU: `tta bench` on three small networks.

    python -m experiments device-cost

measures recipes with torch on random weights and images, for each batch size and number of threads,
beside the plain forward pass that is measured before each. It writes
``experiments/results/device_cost.jsonl`` and the tables in ``docs/budgets.md``. The same command
goes on where it stopped; ``--again`` measures all anew.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.records import markdown
from experiments.records.environment import describe_environment
from experiments.records.rows import Rows
from experiments.run.method_strings import parse_method
from tta.cli import bench
from tta.core.checks import nearest, shown

__all__ = ["METHODS", "NETWORKS", "DeviceCost", "add_flags", "check_timm", "render"]

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "budgets.md"
RESULTS = ROOT / "experiments" / "results" / "device_cost.jsonl"
MARK = "device"  # of the page's generated part
NETWORKS = ("mobilenetv3_small_050", "efficientnet_lite0", "resnet18")
METHODS = ("source", "neo", "bn", "alpha_bn", "robust_bn", "unmix_tns", "lame", "auto", "tent",
           "robust_bn+tent", "eata", "sar", "rotta", "rotta[spread=True]")  # fmt: skip
BATCHES, THREADS = (1, 8), (1, 2)
KEYS = ("network", "batch", "threads", "method")


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Say what ``device-cost`` does and takes."""
    parser.description = __doc__
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("--networks", nargs="+", metavar="NAME", default=NETWORKS,
        help="of timm (default: %(default)s)")  # fmt: skip
    add("--methods", nargs="+", metavar="METHOD", default=METHODS, help="default: %(default)s")
    add("--batch-sizes", nargs="+", type=int, metavar="N", default=BATCHES,
        help="default: %(default)s")  # fmt: skip
    add("--threads", nargs="+", type=int, metavar="N", default=THREADS,
        help="of torch (default: %(default)s)")  # fmt: skip
    add("--rounds", type=int, default=100, metavar="N",
        help="timed calls (default: %(default)s)")  # fmt: skip
    add("--size", type=int, default=224, metavar="PIXELS", help="default: %(default)s")
    add("--again", action="store_true", help="measure rows again that are there")
    parser.set_defaults(
        prepare=lambda args: DeviceCost(
            args.networks,
            args.methods,
            args.batch_sizes,
            args.threads,
            args.rounds,
            args.size,
            args.again,
        )
    )


class DeviceCost:
    """Measures recipes.

    Args:
        networks: Of timm.
        methods: Method strings.
        batches: Batch sizes.
        threads: Numbers of torch's threads.
        rounds: Timed calls of each.
        size: Pixels on a side.
        again: Whether rows that are there are measured again.
        results: Where rows are kept.
        page: With the tables.
    """

    def __init__(
        self,
        networks: Sequence[str],
        methods: Sequence[str],
        batches: Sequence[int],
        threads: Sequence[int],
        rounds: int,
        size: int,
        again: bool = False,
        results: Path = RESULTS,
        page: Path = PAGE,
    ) -> None:
        for method in methods:
            parse_method(method, 1000)
        for network in networks:
            check_timm("networks", network)
        self.keys: list[dict[str, Any]] = [
            dict(zip(KEYS, (network, batch, count, method), strict=True))
            for network in networks
            for batch in batches
            for count in threads
            for method in methods
        ]
        self.about = {"rounds": rounds, "size": size}
        self.again, self.page = again, page
        self.rows = Rows(results, KEYS)

    def execute(self) -> Path:
        """Measure what is left, and write the page; returns it."""
        with self.rows.shown_on(self.page, MARK, render):
            self.rows.fill(self.keys, self.about, self._measure, self.again)
        return self.page

    def _measure(self, key: Mapping[str, Any]) -> dict[str, Any]:
        parser = argparse.ArgumentParser()
        bench.add_arguments(parser)
        flags = {
            "weights": "random",
            "device": "cpu",
            "batch-size": key["batch"],
            "threads": key["threads"],
            "method": key["method"],
            **self.about,
        }
        given = [f"--{name}={value}" for name, value in flags.items()]
        plain, row = bench.measured_rows(parser.parse_args([f"timm:{key['network']}", *given]))
        found = {name: round(row[name], 3) for name in bench.COLUMNS}
        found |= {"plain ms": round(plain["p50 ms"], 3), "load": round(os.getloadavg()[0], 1)}
        return found | {"cpu": describe_environment()["hardware"]["cpu"]}


def check_timm(name: str, network: str) -> None:
    """Raise for a network that timm does not have.

    Args:
        name: Of the argument.
        network: In the words of timm.

    Raises:
        ValueError: For an unknown one.
    """
    import timm  # slow to import

    known = timm.list_models()
    if network.partition(".")[0] not in known:
        raise ValueError(
            f"`{name}` must be networks of timm, got {shown(network)}: {nearest(network, known, 6)}"
        )


def render(rows: Iterable[Mapping[str, Any]]) -> str:
    """A table for each network: the median beside the plain forward pass, and what is behind it."""
    rows = list(rows)
    if not rows:
        return ""
    lines: list[str] = []
    settings = sorted({(row["batch"], row["threads"]) for row in rows})
    heads = [f"batch {b}, {t} thread{'s'[: t > 1]}" for b, t in settings]
    for network in dict.fromkeys(row["network"] for row in rows):
        own = [row for row in rows if row["network"] == network]
        table = []
        for method in dict.fromkeys(row["method"] for row in own):
            found = {(r["batch"], r["threads"]): r for r in own if r["method"] == method}
            cells = [_cell(found.get(setting)) for setting in settings]
            passes = next(iter(found.values()))
            both = f"{passes['forwards']:.1f} / {passes['backwards']:.1f}"
            table.append([markdown.code(method), *cells, both])
        plain = ", ".join(
            f"{min(r['plain ms'] for r in own if (r['batch'], r['threads']) == s):.1f} ms"
            for s in settings
            if any((r["batch"], r["threads"]) == s for r in own)
        )
        lines += [f"`{network}`, plain forward pass {plain}:", ""]
        header = ("recipe", *heads, "forward / backward")
        lines += [*markdown.table(header, table, "l" + "r" * (len(heads) + 1)), ""]
    loads, rounds = [row["load"] for row in rows], sorted({row["rounds"] for row in rows})
    about = (
        f"Images of {' or '.join(str(n) for n in sorted({row['size'] for row in rows}))} pixels on "
        f"{', '.join(sorted({row['cpu'] for row in rows}))}, at a load of {min(loads):g} to "
        f"{max(loads):g}, {' or '.join(map(str, rounds))} calls. A cell is the median over that of "
        "the plain forward pass, the slowest calls (p99) over it, and MB at the peak; "
        "the last column counts images through the model for each of the stream:"
    )
    return markdown.document([about, "", *lines[:-1]])


def _cell(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return ""
    return f"{row['ratio']:.2f}, {row['p99 ms'] / row['plain ms']:.1f}, {row['peak MB']:.0f}"
