"""Methods on networks that were made for them: orders of images, rows and tables."""

from __future__ import annotations

import json

import pytest
import torch

import models
from experiments.run.method_strings import parse_method
from experiments.studies import own_networks
from experiments.studies.own_networks import ORDERS, Case, OwnNetworks

LABELS = torch.arange(10).repeat(50)


def order(name: str, count: int = 200) -> torch.Tensor:
    chosen = ORDERS[name](LABELS, count, torch.Generator().manual_seed(0))
    assert len(chosen.unique()) == len(chosen)
    return LABELS[chosen]


def test_orders() -> None:
    assert len(order("shuffled")) == 200 == len(order("runs"))
    assert int((order("runs").diff() == 0).sum()) > 150 > int((order("shuffled").diff() == 0).sum())
    counts = {name: torch.bincount(order(f"{name} shares"), minlength=10).tolist()
              for name in ("source", "equal", "inverted")}  # fmt: skip
    assert counts["source"] == counts["inverted"][::-1]
    assert counts["source"][0] == 50 and counts["source"][9] == 1
    assert counts["source"][4] == round(50 * 100 ** (-4 / 9))
    assert len(set(counts["equal"])) == 1 and sum(counts["equal"]) == 200


def test_every_case_names_methods_orders_and_networks_that_there_are() -> None:
    for case in own_networks.CASES.values():
        assert set(case.orders) <= set(ORDERS)
        for method in case.methods:
            parse_method(method, 10)
        for name in case.models:
            models.load(name)


@pytest.mark.slow
def test_rows_go_on_where_they_stopped(tmp_path, monkeypatch, capsys) -> None:
    case = Case(("cifar10_resnet20_bn_lt100",), ("equal shares",), ("source", "lsa"))
    monkeypatch.setattr(own_networks, "CASES", {"long-tailed classes": case})
    page, results = tmp_path / "page.md", tmp_path / "rows.jsonl"
    page.write_text("<!-- own networks -->\n<!-- /own networks -->\n")

    def study() -> None:
        OwnNetworks(["long-tailed classes"], 40, results=results, page=page).execute()

    study()
    source, lsa = (json.loads(line)["errors"] for line in results.read_text().splitlines())
    assert len(source) == 16 and source != lsa and source["clean"] < source["gaussian_noise"]
    mean = sum(error for domain, error in lsa.items() if domain != "clean") / 15
    assert f"| `lsa` | {lsa['clean']:.1f} / {mean:.1f} |" in page.read_text()
    capsys.readouterr()
    study()
    assert "errors" not in capsys.readouterr().out  # nothing was measured
