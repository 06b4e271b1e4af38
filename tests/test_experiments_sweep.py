"""Settings from files and flags; sweeps one by one, in a pool and on Ray, and what goes wrong."""

from __future__ import annotations

import importlib.util
import multiprocessing
import sys
import threading
import time
from dataclasses import replace

import pytest

from experiments import cli
from experiments.records.config import RunConfig
from experiments.records.file import Conflict, read_header, read_lines
from experiments.run.run import Cache
from experiments.run.settings import make_run, make_sweep, read_settings
from experiments.sweep import workers
from experiments.sweep.sweep import Sweep, cell_folder
from experiments.sweep.workers import Cell, Outcome, in_pool, on_ray, one_by_one
from tests.helpers.results import figures
from tests.helpers.tiny_models import use_tiny_models

FILE = """
name = "grid"
methods = ["source", "tent[lr=0.01]"]
batch_size = 10

[[streams]]
scenario = "continual"
domains = ["fog", "contrast"]
images = 20

[[streams]]
name = "ramp"
scenario = "gradual"
domains = ["fog"]
images = 10
options = { severities = [1, 2] }

[sweep]
models = ["cifar10_resnet20_bn", "cifar10_resnet20_gn"]
severities = [3, 5]
seeds = [0, 1]
"""


@pytest.fixture(autouse=True)
def empty_cache(monkeypatch):
    """Forget the model of the test before."""
    monkeypatch.setattr(workers, "_CACHE", Cache())


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "grid.toml"
    path.write_text(FILE)
    return path


# Settings


def test_flags_win_over_the_file_and_the_file_over_defaults(file):
    settings = read_settings(file)
    config = make_run(settings, {"severity": 2, "seed": 7, "methods": None})
    assert config.methods == ("source", "tent[lr=0.01]") and config.batch_size == 10
    assert config.seed == 7 and config.model == "cifar10_resnet20_bn"
    assert [stream.severity for stream in config.streams] == [2, 2]
    assert [stream.name for stream in config.streams] == ["continual", "ramp"]
    assert config.streams[1].options == {"severities": [1, 2]}
    other = make_run(settings, {"scenario": "sorted", "images": 30, "options": {"delta": 1}})
    (stream,) = other.streams
    assert (stream.scenario, stream.images, stream.domains) == ("sorted", 30, ())
    assert stream.options == {"delta": 1}
    assert RunConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("metods = []", "no setting `metods`: did you mean 'methods'"),
        ("[[streams]]\nscenario='mixed'\nimage=3", r"streams\[0\].image`: did you mean 'images'"),
        ("[[streams]]\nseverity=3", "each stream a scenario"),
        ("[[streams]]\nscenario='mixd'", "got 'mixd'; did you mean 'mixed'"),
        ("[sweep]\nseed = [1]", "`sweep.seed`: did you mean 'seeds'"),
        ("name = ", "must be a TOML file"),
        ("batch_size = 0", "`batch_size` must be a whole number of at least 1"),
        ("[[streams]]\nscenario='mixed'\n[[streams]]\nscenario='mixed'", "names of their own"),
    ],
)
def test_settings_that_cannot_be(tmp_path, text, message):
    path = tmp_path / "x.toml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        make_run(read_settings(path), {})


def test_a_sweep_is_every_combination_once(file):
    config = make_sweep(read_settings(file), {"batch_sizes": [5, 10], "name": None})
    cells = config.cells()
    # Two models, seeds, batch sizes and methods; the gradual stream has no other severity.
    assert len(cells) == 2 * 2 * 2 * 2 * (2 + 1)
    assert len({cell_folder(cell) for cell in cells}) == len(cells)
    assert str(cell_folder(cells[1])) == ("cifar10_resnet20_bn/continual-s3-b5/tent[lr=0.01]/seed0")


def test_run_from_a_file(file, tmp_path, monkeypatch, capsys):
    use_tiny_models(monkeypatch)
    arguments = ["run", "--config", str(file), "--output", str(tmp_path / "runs"), "--quiet"]
    assert cli.main(arguments) == 2
    assert "describes a sweep" in capsys.readouterr().err
    file.write_text(FILE[: FILE.index("[sweep]")])
    assert cli.main([*arguments, "--seed", "3"]) == 0
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name.endswith("-grid") and read_header(folder)["seed"] == 3
    assert len(list(read_lines(folder / "results.jsonl", "summary"))) == 4


# Sweeps


def small(methods=("source", "tent"), seeds=(0, 1)):
    flags = {"methods": methods, "scenario": "mixed", "domains": ["fog", "snow"], "images": 20}
    return make_sweep({}, {**flags, "batch_size": 10, "seeds": seeds, "device": "cpu"})


def results(folder):
    found = sorted(folder.rglob("results.jsonl"))
    return {str(path.parent.relative_to(folder)): figures(path.parent) for path in found}


def test_a_sweep_does_what_is_not_done(tmp_path, monkeypatch, capsys):
    use_tiny_models(monkeypatch)
    Sweep(small(seeds=(0,)), tmp_path).execute()
    before = results(tmp_path)
    assert len(before) == 2
    sweep = Sweep(small(methods=("source", "tent", "bn")), tmp_path)
    assert sweep.execute() == []
    out = capsys.readouterr().out
    assert "6 runs in" in out and ", 2 done before" in out
    after = results(tmp_path)
    assert len(after) == 6 and before.items() <= after.items()
    assert sweep.execute() == [] and results(tmp_path) == after


def test_what_fails_is_tried_again_and_reported(tmp_path, monkeypatch, capsys):
    use_tiny_models(monkeypatch)
    real, calls = workers.run_cell, []

    def shaky(cell):
        calls.append(cell.config.methods[0])
        if cell.config.methods == ("tent",) and calls.count("tent") == 1:
            return Outcome(cell, "failed", "Traceback\nValueError: no luck")
        if cell.config.methods == ("eata",):
            return Outcome(cell, "failed", "never works")
        return real(cell)

    config = small(methods=("source", "tent", "eata"), seeds=(0,))
    sweep = Sweep(config, tmp_path, executor=lambda cells: map(shaky, cells), retries=2)
    (lasting,) = sweep.execute()
    assert lasting.cell.config.methods == ("eata",) and calls.count("eata") == 3
    assert calls.count("source") == 1 and calls.count("tent") == 2
    assert "failed: " in (out := capsys.readouterr().out) and "never works" in out
    log = list(read_lines(tmp_path / "sweep" / "sweep.jsonl", "cell"))
    assert [row["status"] for row in log if "/tent/" in row["folder"]] == ["failed", "done"]
    assert "no luck" in next(row["text"] for row in log if "/tent/" in row["folder"])


def test_a_run_that_breaks_is_a_failure_with_its_traceback(tmp_path, monkeypatch):
    use_tiny_models(monkeypatch)
    monkeypatch.setattr("experiments.run.run.Run.execute", lambda self: 1 / 0)
    (cell,) = Sweep(small(("bn",), (0,)), tmp_path).cells
    outcome = workers.run_cell(cell)
    assert outcome.status == "failed" and "ZeroDivisionError" in outcome.text


def test_what_cannot_be_run_is_refused_once(tmp_path, monkeypatch, capsys):
    use_tiny_models(monkeypatch)
    arguments = ["sweep", "--output", str(tmp_path), "--methods", "bn", "source", "--images", "10"]
    arguments += ["--models", "cifar10_resnet20_gn", "--corruptions", "fog", "--scenario", "mixed"]
    assert cli.main([*arguments, "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert "refused: cifar10_resnet20_gn/mixed-s5-b64/bn/seed0" in out and "BatchNorm" in out
    log = read_lines(tmp_path / "sweep" / "sweep.jsonl", "cell")
    assert sorted(row["status"] for row in log) == ["done", "refused"]


def test_a_sweep_of_which_nothing_can_be_run_fails(tmp_path, capsys):
    arguments = ["sweep", "--output", str(tmp_path), "--models", "nope", "--methods", "source"]
    assert cli.main([*arguments, "--images", "10", "--corruptions", "fog"]) == 1
    said = capsys.readouterr()
    assert "experiments report" not in said.out
    assert "error: nothing was run, since all 1 runs" in said.err and "nope" in said.err
    late = Sweep(small(), tmp_path / "late", deadline=0.0)
    assert {outcome.status for outcome in late.execute()} == {"unfinished"}
    assert "experiments report" not in capsys.readouterr().out


def test_a_sweep_out_of_time_goes_on(tmp_path, monkeypatch, capsys):
    use_tiny_models(monkeypatch)
    whole = tmp_path / "whole"
    Sweep(small(), whole).execute()
    late = Sweep(small(), tmp_path / "cut", deadline=0.0)
    outcomes = late.execute()
    assert outcomes and {outcome.status for outcome in outcomes} == {"unfinished"}
    said = f"out of time for {len(outcomes)} runs; the same command goes on"
    assert said in capsys.readouterr().out
    assert Sweep(small(), tmp_path / "cut").execute() == []
    assert results(whole) == results(tmp_path / "cut")


@pytest.mark.parametrize("flag", [["--workers", "0"], ["--threads", "0"], ["--retries", "-1"]])
def test_numbers_of_workers_that_cannot_be(tmp_path, capsys, flag):
    assert cli.main(["sweep", "--output", str(tmp_path), *flag]) == 2
    assert f"`{flag[0][2:]}` must be at least" in capsys.readouterr().err


@pytest.mark.parametrize("minutes", ["nan", "-1", "inf", "soon"])
def test_budgets_that_cannot_be(tmp_path, capsys, minutes):
    for command in (["sweep", "--output", str(tmp_path)], ["reliability", "--list"]):
        with pytest.raises(SystemExit) as ended:
            cli.main([*command, "--budget-minutes", minutes])
        assert ended.value.code == 2 and not list(tmp_path.iterdir())
        assert f"must be a number from 0 to 1,000,000, got '{minutes}'" in capsys.readouterr().err


def test_what_is_done_with_other_settings_is_not_taken_for_done(tmp_path):
    assert Sweep(small(), tmp_path).execute() == []
    other = replace(small(), run=replace(small().run, health=True))
    with pytest.raises(Conflict, match="holds a run of another configuration"):
        Sweep(other, tmp_path).execute()
    assert Sweep(small(), tmp_path).execute() == []


def test_without_ray_the_error_says_what_to_do(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ray", None)
    assert cli.main(["sweep", "--output", str(tmp_path), "--ray"]) == 2
    assert "pip install ray" in capsys.readouterr().err


# The three ways; the bundled model, since other processes know nothing of a tiny one


@pytest.mark.slow
def test_a_pool_gives_the_same_numbers_though_a_process_dies(tmp_path):
    config = small(("source", "unmix_tns+eata+lame"))
    assert Sweep(config, tmp_path / "one").execute() == []
    killed = []

    def kill_one():
        # At once, while the next process is being started: one pool of two hung there.
        while not killed:
            time.sleep(0.001)
            for child in multiprocessing.active_children()[:1]:
                child.kill()
                killed.append(child)

    def executor(cells: list[Cell]):
        threading.Thread(target=kill_one, daemon=True).start()
        yield from in_pool(cells, 2)

    assert Sweep(config, tmp_path / "pool", executor, retries=1).execute() == []
    log = list(read_lines(tmp_path / "pool" / "sweep" / "sweep.jsonl", "cell"))
    assert "its process died" in [row["text"] for row in log]
    assert results(tmp_path / "one") == results(tmp_path / "pool")


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed")
def test_ray_gives_the_same_numbers(tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")  # locally is locally
    config = small(("source", "unmix_tns+eata+lame"))
    assert Sweep(config, tmp_path / "one", one_by_one).execute() == []
    ray = Sweep(config, tmp_path / "ray", lambda cells: on_ray(cells, None, 2, 0.0))
    assert ray.execute() == []
    assert results(tmp_path / "one") == results(tmp_path / "ray")


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed")
def test_a_cluster_that_is_not_there_is_said(tmp_path, capsys):
    flags = ["sweep", "--images", "10", "--corruptions", "fog", "--methods", "source"]
    flags += ["--device", "cpu", "--output", str(tmp_path)]
    assert cli.main([*flags, "--ray-address", "127.0.0.1:1"]) == 1
    assert "error: `ray-address` must be that of a running Ray cluster" in capsys.readouterr().err
    assert cli.main([*flags, "--ray", "--gpus-per-run", "3"]) == 1
    assert "error: `gpus-per-run` must be at most the" in capsys.readouterr().err
