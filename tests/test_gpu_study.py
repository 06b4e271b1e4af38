"""The script that waits for a GPU goes through all of it on a CPU, and goes on where it stopped."""

from __future__ import annotations

import json

import pytest
import torch

from experiments import cli
from experiments.studies import gpu
from experiments.studies.gpu import Gpu, render


@pytest.mark.slow
def test_all_of_it_in_small(tmp_path, capsys) -> None:
    page, results = tmp_path / "page.md", tmp_path / "gpu.jsonl"
    page.write_text("<!-- gpu -->\n<!-- /gpu -->\n")
    flags = ["gpu", "--device", "cpu", "--quick", "--results", str(results), "--page", str(page)]
    assert cli.main([*flags, "--minutes", "0"]) == 0
    assert "the same command goes on with 12 rows" in capsys.readouterr().out
    assert cli.main(flags) == 0
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    assert [row["part"] for row in rows] == (
        ["agreement"] * 4 + ["cost"] * 4 + ["streams"] + ["pipeline"] * 2 + ["runner"]
    )
    for row in rows[:4]:
        assert row["difference"] == 0 and row["equal"] == 1
        assert row["why"] or 0 <= row["replayed"] < 1e-4
    replayed = {row["recipe"]: row["graphs_ms"] for row in rows[4:8]}
    assert replayed["unmix_tns"] > 0 and replayed["tent"] > 0 and replayed["lame"] is None
    assert rows[8]["equal"] and rows[8]["ratio"] > 0
    assert all("are captured" in row["outcome"] for row in rows[9:11])
    assert all(rows[9][way] > 0 for way in ("loop", "pipeline", "staleness", "graphs"))
    assert rows[11]["share"] > 0
    text = page.read_text()
    assert text.count("| `cifar10_resnet20_bn` | `unmix_tns` |") == 3 and "runner's own" in text
    capsys.readouterr()
    assert cli.main(flags) == 0
    assert "'part'" not in capsys.readouterr().out  # nothing was measured again


def test_a_row_that_fails_does_not_end_the_rest(tmp_path, monkeypatch, capsys) -> None:
    def fail(*_):
        raise RuntimeError("no kernel")

    for name in ("_agreement", "_cost", "_streams", "_pipeline"):
        monkeypatch.setattr(Gpu, name, fail)
    monkeypatch.setattr(Gpu, "_runner", lambda self: {"share": 0.1})
    results = tmp_path / "gpu.jsonl"
    flags = ["gpu", "--device", "cpu", "--quick", "--results", str(results)]
    assert cli.main(flags) == 1
    out = capsys.readouterr()
    assert "11 rows could not be measured" in out.err and "RuntimeError: no kernel" in out.err
    assert "| 10 % |" in out.out and len(results.read_text().splitlines()) == 1


def test_the_whole_needs_a_gpu(capsys) -> None:
    assert cli.main(["gpu", "--device", "cpu"]) == 2
    assert "`device` must be a GPU, got cpu: pass --quick" in capsys.readouterr().err
    with pytest.raises(ValueError, match="`minutes`"):
        Gpu(torch.device("cpu"), quick=True, minutes=-1)


def test_the_page_shows_what_is_measured() -> None:
    lines = gpu.RESULTS.read_text().splitlines() if gpu.RESULTS.is_file() else []
    rows = [json.loads(line) for line in lines]
    assert not any(row["quick"] for row in rows)
    assert render(rows) in gpu.PAGE.read_text()
