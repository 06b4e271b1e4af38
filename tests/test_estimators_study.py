"""The study of estimators of accuracy: what is asked, what it costs, and the page."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from experiments import cli
from experiments.run.cache import Cache
from experiments.studies import estimators, estimators_page
from experiments.studies.estimators import CHOSEN, GRIDS, KEPT_OUT, Grid, Half, cells
from experiments.studies.estimators_observer import ESTIMATORS, stages
from experiments.studies.reliability_run import read_results
from experiments.sweep.benchmark import bundled_models
from tests.helpers.nets import tiny
from tests.helpers.tiny_models import use_tiny_models

GN = "cifar10_resnet20_gn"
TINY = Grid(
    halves=(
        Half(part=CHOSEN, streams=("continual",), methods=("source",), domains=("fog",)),
        Half(part=KEPT_OUT, streams=("recurring_iid",), methods=("eta", "bn"), domains=("snow",)),
    ),
    images=40,
    sizes=(2,),
)  # fmt: skip


@pytest.fixture
def study(monkeypatch, tmp_path):
    """The command on a grid of a handful of images; returns rows and page."""
    use_tiny_models(monkeypatch)
    monkeypatch.setitem(GRIDS, "small", TINY)
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        files = ["--results", "found.jsonl", "--page", "page.md", "--device", "cpu"]
        assert cli.main(["estimators", "--models", GN, *files, *arguments]) == 0
        rows = read_results(tmp_path / "found.jsonl")
        return list(rows.values()), (tmp_path / "page.md").read_text()

    return run


def test_every_estimator_is_asked_and_its_passes_are_counted(study, capsys):
    rows, page = study()
    assert [row["method"] for row in rows] == ["source", "eta", "bn"]
    for row in rows[:2]:
        assert set(row["estimates"]) == set(row["costs"]) == set(ESTIMATORS)
        forwards = {name: cost["forwards"] for name, cost in row["costs"].items()}
        assert forwards["aetta_stages"] == 11 and forwards["aetta"] == 1
        assert forwards["feature_dropout"] == 0 and forwards["agreement_always"] == 1
        assert forwards["confidence"] == forwards["agreement"] == 1 / 20
        truth = 1 - row["mean_error"]
        for found in row["estimates"].values():  # all of the same images
            assert found["truth"] == pytest.approx(truth) and 0 <= found["estimate"] <= 1
    source = rows[0]
    assert source["visits_found"]["errors"] == source["visits_found"]["source"]
    assert "refused" in rows[2]  # no BatchNorm
    assert "bn on cifar10_resnet20_gn" in page
    before = capsys.readouterr().out
    assert "0 done before" in before
    study()
    assert "3 done before" in capsys.readouterr().out


def test_watching_changes_no_prediction(study, monkeypatch):
    """The same errors as of the method alone."""
    rows, _ = study()
    from experiments.run.method_strings import parse_method
    from experiments.studies.reliability_paired import play

    runner = estimators.EstimatorRunner("found.jsonl", None, torch.device("cpu"))
    runner.cache = Cache()
    for cell, row in zip(cells(TINY, [GN])[:2], rows, strict=False):
        subject, stream = runner._shown(cell)
        with parse_method(cell.method, 10).applied(subject, cell.batch_size, 0) as adapter:
            assert play(adapter, stream, subject).mean_error() == row["mean_error"]


def test_the_page_has_both_halves_and_says_what_is_reached(study):
    rows, page = study()
    for text in estimators_page.HALVES.values():
        assert text in page
    near = [
        {**row, "estimates": {n: {**f, "mae": 0.02} for n, f in row["estimates"].items()}}
        for row in rows
        if "refused" not in row
    ]
    assert "The aim is not reached." not in estimators_page.render(near)
    far = json.loads(json.dumps(near).replace('"mae": 0.02', '"mae": 0.3'))
    assert "The aim is reached." not in estimators_page.render(far)


def test_the_second_half_was_kept_out():
    for grid in GRIDS.values():
        first, second = grid.halves
        for name in ("streams", "methods", "domains"):
            assert not set(getattr(first, name)) & set(getattr(second, name))
        found = cells(grid, bundled_models())
        assert len({cell.key for cell in found}) == len(found)


def test_stages_are_chains_of_layers():
    net = tiny("gn")
    assert stages(net) == ("layer1", "layer2")
    assert stages(nn.Sequential(nn.Conv2d(3, 3, 1), net.layer1)) == ("1.0", "1.1", "1.2")
    with pytest.raises(ValueError, match="`model` must have children that are"):
        stages(nn.Linear(2, 2))
