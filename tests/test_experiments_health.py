"""Health figures in results: who has them, what visits come to, and the report's plots of them."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

import experiments
import tta
from experiments import cli
from experiments.records.file import read_lines
from experiments.records.health import FIGURES, errors_expected, in_all, visits
from experiments.report import collect, write_compact
from experiments.report.report import Report
from experiments.run.settings import make_run, read_settings
from tests.helpers.nets import tiny
from tests.helpers.tiny_models import use_tiny_models

FLAGS = ["--methods", "source", "tent", "tent+periodic", "--images", "20", "--batch-size", "10"]
FLAGS += ["--scenario", "recurring", "--option", "visits=2", "--corruptions", "fog", "snow"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The same run with the flag and without it."""
    root = tmp_path_factory.mktemp("runs")
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        use_tiny_models(patch)
        for name, flag in (("off", []), ("on", ["--health"])):
            arguments = [*FLAGS, *flag, "--name", name, "--output", str(root), "--quiet"]
            assert cli.main(["run", *arguments, "--device", "cpu"]) == 0
            (found[name],) = root.glob(f"*-{name}")
    return found


def lines(folder, kind):
    return list(read_lines(folder / "results.jsonl", kind))


def test_off_by_default_and_results_stay_as_they_are(folders):
    """Only a guarded method has figures without the flag, and the flag changes no error."""
    seen = {row["method"] for row in lines(folders["off"], "health")}
    assert seen == {"tent+periodic"}
    for off, on in zip(lines(folders["off"], "batch"), lines(folders["on"], "batch"), strict=True):
        assert ("health" in off) == (off["method"] == "tent+periodic")
        assert "health" in on
        same = off.keys() - {"health", "seconds"}
        assert {key: off[key] for key in same} == {key: on[key] for key in same}
    for row in lines(folders["off"], "summary"):
        assert ("health" in row) == (row["method"] == "tent+periodic")


def test_every_visit_has_a_line_made_of_its_batches(folders):
    rows = lines(folders["on"], "health")
    for method in ("source", "tent", "tent+periodic"):
        own = [row for row in rows if row["method"] == method]
        assert [row["domain"] for row in own] == ["fog", "snow"] * 2
        batches = [row for row in lines(folders["on"], "batch") if row["method"] == method]
        for row in own:
            assert set(FIGURES) <= row.keys() and row["estimator"] == "confidence"
            assert sum(row["actions"].values()) == row["batches"]
            mine = batches[row["step"] : row["step"] + row["batches"]]
            assert {b["domain"] for b in mine} == {row["domain"]}
            assert row["errors"] == sum(b["errors"] for b in mine)
            mean = np.average(
                [b["health"]["estimated_accuracy"] for b in mine],
                weights=[b["images"] for b in mine],
            )
            assert row["estimated_accuracy"] == pytest.approx(mean)
    (summary,) = (row for row in lines(folders["on"], "summary") if row["method"] == "tent")
    found = summary["health"]["estimates"]["confidence"]
    assert found["windows"] == 1  # fewer images than a window
    assert found["mae"] == pytest.approx(abs(found["estimate"] - found["truth"]))
    assert found["truth"] == pytest.approx(1 - summary["error"])


def test_a_lost_line_is_made_again(folders, tmp_path, monkeypatch):
    use_tiny_models(monkeypatch)
    lost = tmp_path / "lost"
    lost.mkdir()
    whole = (folders["on"] / "results.jsonl").read_bytes().splitlines(keepends=True)
    gone = [n for n, line in enumerate(whole) if json.loads(line)["kind"] == "health"][3]
    (lost / "results.jsonl").write_bytes(b"".join(whole[:gone] + whole[gone + 1 :]))
    assert cli.main(["run", "--resume", str(lost), "--quiet"]) == 0
    key = lambda row: (row["method"], row["step"])  # noqa: E731
    before, after = (sorted(lines(folder, "health"), key=key) for folder in (folders["on"], lost))
    assert before == after


def test_batches_without_an_estimate_have_the_last_one():
    def row(estimate, images=10):
        return {"images": images, "health": {"estimated_accuracy": estimate}}

    rows = [row(None), row(0.5), row(None, 20), row(0.9)]
    assert errors_expected(rows) == pytest.approx([5, 10, 20, 21])
    assert errors_expected([row(None)]) is None
    assert errors_expected([{"images": 10}]) is None
    blank = dict.fromkeys(FIGURES) | {"estimator": "none", "action": "skip", "visit": 0}
    found = in_all([{"images": 10, "health": blank}])
    assert math.isnan(found["agreement"]) and found["actions"] == {"skip": 1}
    assert visits([{"images": 10, "domain": "fog"}]) == []


def test_the_report_plots_estimates_only_where_there_are_any(folders, tmp_path):
    results = collect([folders["on"]])
    write_compact(results, tmp_path / "compact.jsonl")
    again = collect([tmp_path / "compact.jsonl"])
    for result, held in zip(results, again, strict=True):
        assert held.estimate_error == pytest.approx(result.estimate_error)
        assert held.expected == pytest.approx(result.expected, rel=1e-5)
    for name, methods in (("on", ["source", "tent", "tent+periodic"]), ("off", ["tent+periodic"])):
        found = collect([folders[name]])
        assert [r.method for r in found if r.expected is not None] == methods
        report = Report(found, tmp_path / name, "test")
        page = report.execute().read_text()
        assert len(list((tmp_path / name).glob("*-estimates.png"))) == 1
        assert "estimate off" in page
    plain = [result for result in collect([folders["off"]]) if result.expected is None]
    page = Report(plain, tmp_path / "plain", "test").execute().read_text()
    assert not list((tmp_path / "plain").glob("*-estimates.png"))
    assert "estimate off" not in page


def test_a_file_of_settings_asks_for_it(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text("health = true\n")
    assert make_run(read_settings(path), {}).health
    assert not make_run({}, {}).health
    path.write_text('health = "yes"\n')
    with pytest.raises(TypeError, match="`health` must be True or False"):
        read_settings(path)


def test_from_python(tmp_path):
    sets = {"a": (torch.rand(16, 3, 16, 16), torch.arange(16) % 10)}
    stream = tta.streams.build("continual", None, sets, batch_size=8)
    pixels = {"mean": 0.0, "std": 1.0, "show": "nothing"}
    found = experiments.evaluate(
        tiny("bn"), stream, ["tent"], tmp_path / "a", health=True, **pixels
    )
    assert found.summaries["continual"]["tent"]["health"]["estimator"] == "confidence"
    adapter = tta.wrap(tiny("bn"), "tent.cifar10", health=True)
    found = experiments.evaluate(adapter, stream, out=tmp_path / "b", **pixels)
    (summary,) = found.summaries["continual"].values()
    assert summary["health"]["estimator"] == "confidence"
    with pytest.raises(ValueError, match="`health` must be left out"):
        experiments.evaluate(adapter, stream, out=tmp_path / "c", health=True, **pixels)
