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
        "from torch import nn\nfrom tests.helpers.nets import tiny\n\n\n"
        "def make():\n    return tiny('bn')\n\n\n"
        "def fixed():\n"
        "    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 10))\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1]))

    def run(*arguments: str, model: str = "make") -> tuple[int, str, str]:
        try:
            status = cli.main(["bench", f"bench_net:{model}", "--device", "cpu", *arguments])
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


def test_a_model_in_half_precision_gets_images_like_it(capsys) -> None:
    own = ["bench", "tests.helpers.own_models:half", "--device", "cpu", "--size", "16"]
    assert cli.main([*own, "--method", "tent.cifar10", "--rounds", "3"]) == 0
    assert list(_rows(capsys.readouterr().out)) == ["plain forward", "tent.cifar10"]


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
    """A full one, as a stream has from its n-th image on."""
    _, text, _ = out("--method", "bn", "--rounds", "2", "--window", "8", "--size", "16")
    assert _rows(text)["bn"][5] == 8 and "(1, 3, 16, 16)" in text
    _, text, _ = out(
        "--method", "bn", "--rounds", "2", "--window", "8", "--size", "16", "--batch-size", "3"
    )
    assert _rows(text)["bn"][5] == pytest.approx(8 / 3, abs=0.01)


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


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--size", "100000"), "`--batch-size` and images must leave room in memory"),
        (("--out", "gone/rows.jsonl"), "`out` must lie in a folder that is there, but gone is not"),
        (("--method", "tentt"), "did you mean 'tent'"),
        (("--method", "tent[lr="), "`method` must set fields as in tent[lr=1e-3, steps=2]"),
        (("--out", "/dev"), "`out` must be a file, got the folder /dev"),
        (("--classes", "gone"), "`classes` must be a text file"),
        (("--batch-size", "9" * 5000), "must be a whole number from 1"),
        (("--batch-size=+-1",), "must be a whole number from 1"),
    ],
)
def test_a_mistake_is_said_before_anything_is_measured(out, arguments, words) -> None:
    status, text, errors = out("--method", "source", "--rounds", "1", *arguments)
    assert status == 2 and words in errors and "plain forward" not in text, errors
    assert errors.count("\n") == 1 and len(errors) <= 330


def test_images_that_the_plain_model_does_not_take_are_refused(out) -> None:
    status, _, errors = out("--method", "source", "--size", "9", model="fixed")
    assert status == 2 and errors.count("\n") == 1
    assert "`--size` must be one that the model takes, but" in errors and "pass --size" in errors
