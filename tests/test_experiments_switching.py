"""What many streams cost is measured, and stands in the page and in the figures."""

from __future__ import annotations

import json

import pytest

from experiments import cli
from experiments.studies import stream_switching


@pytest.fixture
def places(tmp_path, monkeypatch):
    monkeypatch.setattr(stream_switching, "FIGURES", tmp_path / "switching.json")
    monkeypatch.setattr(stream_switching, "PAGE", tmp_path / "page.md")
    (tmp_path / "page.md").write_text("a\n<!-- switching -->\n<!-- /switching -->\nb\n")
    monkeypatch.setattr(stream_switching, "ROUNDS", 20)
    return tmp_path


def test_switches_and_many_streams_are_measured(places) -> None:
    many = ("resnet10t", "bn_ema")
    study = stream_switching.Switching(25, "cpu", cases=[("resnet10t", "tent")], many=many)
    study.execute()
    figures = json.loads((places / "switching.json").read_text())
    (row,) = figures["switches"]
    assert 0 < row["switch"] < row["by_state"] and row["tensors"] > 40
    assert figures["many"]["streams"] == 25 and figures["many"]["restore"] > 0
    page = (places / "page.md").read_text()
    assert "| `resnet10t` | `tent` |" in page and "25 streams of `bn_ema`" in page


def test_the_command_checks_its_arguments(capsys) -> None:
    assert cli.main(["switching", "--streams", "1"]) == 2
    assert "`streams` must be" in capsys.readouterr().err


def test_the_page_shows_the_committed_figures() -> None:
    figures = json.loads(stream_switching.FIGURES.read_text())
    assert stream_switching.render(figures) in stream_switching.PAGE.read_text()
    small = [row for row in figures["switches"] if row["megabytes"] < 10]
    assert all(200 * row["switch"] / row["tensors"] < stream_switching.AIM for row in small)
