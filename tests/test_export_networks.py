"""Exported graphs of networks of different kinds do what their adapters do.

``python -m tests.test_export_networks --batches 10`` compares all of them, or those that are named,
and writes the table in ``docs/edge.md`` anew; the rows are in ``experiments/results``.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from experiments.records import markdown
from experiments.records.rows import Rows
from tests.helpers.edge_networks import NETWORKS, REAL, SIZES, Network, compare

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "edge.md"
RESULTS = ROOT / "experiments" / "results" / "edge_networks.jsonl"
MARK = "networks"
LIMIT = 1e-3
QUICK = {  # among the slow tests, over a few batches
    "timm:mobilenetv3_small_050": "robust_bn",
    "timm:vit_tiny_patch16_224": "foa_shift",
}
ALL = [*NETWORKS, REAL]
CASES = [pytest.param(n, r, 200, marks=pytest.mark.soak) for n in ALL for r in n.recipes]
CASES += [pytest.param(n, QUICK[n.name], 6, marks=pytest.mark.slow) for n in ALL if n.name in QUICK]


def _name(value: Any) -> str:
    return value.name if isinstance(value, Network) else str(value)


@pytest.mark.parametrize(("network", "recipe", "batches"), CASES, ids=_name)
def test_graph_and_adapter_agree(network, recipe, batches, tmp_path) -> None:
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    for size, found in compare(network, recipe, tmp_path / "g", batches).items():
        assert found["logits"] < LIMIT and found["state"] < LIMIT, (size, found)
        assert found["decisions"] == 0, size


def test_every_recipe_meets_several_networks() -> None:
    met = [recipe for network in NETWORKS for recipe in network.recipes]
    assert len(ALL) == 20 and len({n.name for n in ALL}) == 20
    assert set(QUICK) <= {n.name for n in ALL}
    assert min(met.count(recipe) for recipe in ("robust_bn", "unmix_tns", "t3a", "neo")) >= 2


def render(rows: Iterable[Mapping[str, Any]]) -> str:
    """The table: a row for each network."""
    by_network: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        by_network.setdefault(row["network"], []).append(row)
    if not by_network:
        return ""
    header = ("network", "pixels", "recipes", *(f"logits, batch {s}" for s in SIZES), "state")
    shown = []
    for network in ALL:
        if listed := by_network.get(network.name):
            recipes = ", ".join(markdown.code(row["recipe"]) for row in listed)
            worst = [max(row[f"logits_{size}"] for row in listed) for size in SIZES]
            worst.append(max(row["state"] for row in listed))
            cells = [f"{value:.1e}" for value in worst]
            shown.append([network.name, str(network.shape[-1]), recipes, *cells])
    measured = [row for rows in by_network.values() for row in rows]
    counts = " or ".join(str(n) for n in sorted({row["batches"] for row in measured}))
    decided = sum(row["decisions"] for row in measured)
    images = sum(row["batches"] * sum(SIZES) for row in measured)
    about = (
        f"Largest differences over {counts} batches of each size whose brightness drifts, logits "
        f"as a share of the largest of the batch where that is above 1; {decided} of {images:,} "
        "decisions differ:"
    )
    return markdown.document([about, "", *markdown.table(header, shown, "lrl" + "r" * 3)])


def measure(names: Sequence[str], batches: int) -> None:
    """Compare networks and write the rows and the page."""
    torch.set_num_threads(1)
    rows = Rows(RESULTS, ("network", "recipe"))
    with rows.shown_on(PAGE, MARK, render):
        chosen = [n for n in ALL if not names or n.name in names]
        # The first recipe of each network comes first, so that what is stopped has seen all kinds.
        in_turn = itertools.zip_longest(*([(n, r) for r in n.recipes] for n in chosen))
        for network, recipe in filter(None, itertools.chain.from_iterable(in_turn)):
            key, about = {"network": network.name, "recipe": recipe}, {"batches": batches}
            if rows.measured(key, about):
                continue
            with tempfile.TemporaryDirectory() as place:
                found = compare(network, recipe, Path(place), batches)
            row = {f"logits_{size}": found[size]["logits"] for size in SIZES}
            row["state"] = max(f["state"] for f in found.values())
            row["decisions"] = sum(f["decisions"] for f in found.values())
            print(key | about | row, flush=True)
            rows.put(key | about | row)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("networks", nargs="*", help="default: all")
    parser.add_argument("--batches", type=int, default=10, help="of each size")
    arguments = parser.parse_args()
    measure(arguments.networks, arguments.batches)
