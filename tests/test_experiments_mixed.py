"""What mixed batches gain is measured, and stands in the page and in the figures."""

from __future__ import annotations

import json

import pytest

from experiments import cli
from experiments.studies import mixed_batches
from experiments.studies.mixed_batches import Case, Mixed


@pytest.fixture
def places(tmp_path, monkeypatch):
    monkeypatch.setattr(mixed_batches, "FIGURES", tmp_path / "mixed.json")
    monkeypatch.setattr(mixed_batches, "PAGE", tmp_path / "page.md")
    (tmp_path / "page.md").write_text("a\n<!-- mixed -->\n<!-- /mixed -->\nb\n")
    return tmp_path


def test_passes_together_and_one_by_one_are_measured(places) -> None:
    cases = [Case("test_resnet", 32, "tent")]
    Mixed(3, 2, 1, 1, "cpu", cases).execute()
    figures = json.loads((places / "mixed.json").read_text())
    (row,) = figures["rows"]
    assert row["why"] is None and row["equal"] and row["ratio"] > 0
    together, alone = row["calls"]
    assert 2 * together < alone and row["flops"][0] == row["flops"][1] > 0
    assert "| `test_resnet` at 32 | `tent` |" in (places / "page.md").read_text()


def test_the_command_checks_its_arguments(capsys) -> None:
    assert cli.main(["mixed", "--streams", "1"]) == 2
    assert "`streams` must be" in capsys.readouterr().err


def test_the_page_shows_the_committed_figures() -> None:
    figures = json.loads(mixed_batches.FIGURES.read_text())
    assert mixed_batches.render(figures) in mixed_batches.PAGE.read_text()
    for row in figures["rows"]:
        assert row["equal"] and row["difference"] <= 1e-4 and row["flops"][0] == row["flops"][1]
        assert row["calls"][0] < row["calls"][1] / 8
