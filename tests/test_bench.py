"""The bench measures what it says; its figures are never tested."""

from __future__ import annotations

import json

import pytest
import torch

from experiments.cli import main
from experiments.studies import method_cost, method_cost_networks


@pytest.fixture
def small(monkeypatch) -> str:
    from tests.helpers.nets import tiny

    setting = method_cost_networks.Setting(
        lambda: tiny("gn"), 8, 16, (method_cost_networks.BARE, "source", "eata", "sar")
    )
    monkeypatch.setitem(method_cost_networks.SETTINGS, "small", setting)
    return "small"


def test_counts_of_passes(small, tmp_path, capsys) -> None:
    page, output = tmp_path / "page.md", tmp_path / "bench.jsonl"
    page.write_text("before\n<!-- bench -->\nold\n<!-- /bench -->\nafter\n")
    cpu = torch.device("cpu")
    result = method_cost.Bench(small, cpu, 2, memory=False, output=output, page=page).execute()
    rows = {row["recipe"]: row for row in result["rows"]}
    assert rows["plain"]["ratio"] == 1.0
    for name in ("plain", method_cost_networks.TWIN, "source"):
        assert (rows[name]["forwards"], rows[name]["backwards"]) == (1.0, 0.0)
    assert rows[method_cost_networks.BARE]["forwards"] == pytest.approx(1.0, rel=0.02)
    assert rows[method_cost_networks.BARE]["backwards"] > 0.3
    # A kept sample goes through the network once more, a rejected one does not go back.
    assert 1.0 < rows["eata"]["forwards"] < 1.6
    assert 0.0 < rows["eata"]["backwards"] < 0.8 * rows[method_cost_networks.BARE]["backwards"]
    assert rows["sar"]["forwards"] > rows["eata"]["forwards"]
    assert json.loads(output.read_text()) == result
    text = page.read_text()
    assert text.startswith("before\n<!-- bench -->\n### small")
    assert text.endswith("<!-- /bench -->\nafter\n") and "\nold\n" not in text
    assert "| sar |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["imagenet"], "did you mean 'imagenet_"),
        (["cifar_bn", "--rounds", "0"], "`rounds` must be at least 1"),
        (["cifar_bn", "--recipes", "sar"], "`recipes` must be measured in cifar_bn, got 'sar'"),
        (["cifar_bn", "--page", "nowhere.md"], "`page` must be a file"),
    ],
)
def test_bad_arguments(arguments, words, capsys) -> None:
    assert main(["bench", *arguments]) == 2
    assert words in capsys.readouterr().err
