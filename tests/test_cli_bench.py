"""`tta bench`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.helpers.nets import tiny
from tta import cli


@pytest.fixture
def out(capsys, monkeypatch, tmp_path):
    (tmp_path / "bench_net.py").write_text(
        "from tests.helpers.nets import tiny\n\n\ndef make():\n    return tiny('bn')\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1]))

    def run(*arguments: str) -> tuple[int, str, str]:
        try:
            status = cli.main(["bench", "bench_net:make", "--device", "cpu", *arguments])
        except SystemExit as exit:
            status = int(exit.code or 0)
        return status, *capsys.readouterr()

    return run


def _rows(text: str) -> dict[str, list[float]]:
    found = {}
    for line in text.splitlines():
        try:
            values = [float(v) for v in line.split()[-7:]]
        except ValueError:
            continue
        found[line[:24].strip()] = values
    return found


def test_one_recipe_is_measured_beside_the_plain_forward(out) -> None:
    status, text, errors = out("--method", "tent.cifar10", "--rounds", "5", "--batch-size", "4")
    assert status == 0, errors
    rows = _rows(text)
    assert list(rows) == ["plain forward", "tent.cifar10"] and "(4, 3, 32, 32) on cpu" in text
    plain, tent = rows.values()
    assert plain[3] == 1 and plain[5:] == [1, 0] and tent[5:] == [1, 1]
    assert tent[0] <= tent[1] <= tent[2] and tent[4] > plain[4] > 0


def test_rows_go_to_a_file_too(out, tmp_path) -> None:
    file = tmp_path / "rows.jsonl"
    before = torch.get_num_threads()
    for _ in range(2):
        _, text, _ = out("--method", "bn", "--rounds", "2", "--out", str(file), "--threads", "1")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [row["method"] for row in rows] == ["plain forward", "bn"] * 2
    assert rows[-1]["ratio"] == pytest.approx(_rows(text)["bn"][3], abs=0.006)
    assert "1 threads" in text and torch.get_num_threads() == before


def test_a_window_costs_its_passes(out) -> None:
    _, text, _ = out("--method", "bn", "--rounds", "6", "--window", "4", "--size", "16")
    assert _rows(text)["bn"][5] > 3 and "(1, 3, 16, 16)" in text


def test_a_setting_is_found_first(out) -> None:
    status, text, _ = out("--method", "bn", "--rounds", "2", "--tune", "--tune-seconds", "1")
    assert status == 0 and text.startswith("setting: Setting(memory_format=")


def test_an_unknown_recipe_is_refused(out) -> None:
    status, _, errors = out("--method", "tentt", "--rounds", "1")
    assert status == 2 and errors.startswith("error: ") and tiny("bn") is not None
    assert torch.get_num_threads() >= 1


@pytest.mark.slow
def test_every_recipe_is_measured_or_left_out_in_words(out) -> None:
    status, text, errors = out("--rounds", "1", "--batch-size", "4")
    assert status == 0
    rows = _rows(text)
    assert {"source", "bn", "tent", "eata", "cotta", "lame"} <= set(rows) and rows["tent"][6] == 1
    assert "left out: pea: " in errors or "pea" in rows
