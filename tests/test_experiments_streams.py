"""Choosing fields on held-out corruptions, previews of streams, surfaces for walks."""

from __future__ import annotations

import glob
import json

import numpy as np
import pytest
import torch
from PIL import Image

import corruptions
import tta
from experiments import cli
from experiments.data import read_bundled
from experiments.data.surfaces import read_surface
from experiments.records.file import read_header, read_lines
from experiments.run.domains import image_seeds
from experiments.run.run import Cache
from experiments.studies.surface import fill_in
from experiments.sweep.tune import HELD_OUT, candidates, with_fields
from tests.helpers.nets import tiny
from tests.helpers.tiny_models import use_tiny_models
from tta.streams.schedules import ROTTA_ORDER
from tta.streams.walk import best_path, walk_domains


@pytest.fixture(autouse=True)
def tiny_models(monkeypatch):
    """Let the runner load tiny networks."""
    use_tiny_models(monkeypatch)
    monkeypatch.setattr("experiments.sweep.workers._CACHE", Cache())


# Tuning


def test_fields_go_to_the_component_that_has_them():
    assert with_fields("tent", {"lr": 0.1}) == "tent[lr=0.1]"
    assert with_fields("lame + eata[steps=2]+bn", {"lr": 0.1, "neighbours": 3}) == (
        "lame[neighbours=3]+eata[steps=2, lr=0.1]+bn"
    )
    with pytest.raises(ValueError, match="fields of tent, got neighbours"):
        with_fields("tent", {"neighbours": 3})
    assert candidates("tent", {"lr": [1, 2], "steps": [1]}) == [
        "tent", "tent[lr=1, steps=1]", "tent[lr=2, steps=1]",
    ]  # fmt: skip


def test_a_choice_is_made_on_held_out_corruptions_and_logged(tmp_path, capsys):
    common = ["--output", str(tmp_path), "--device", "cpu", "--images", "20", "--batch-size", "10"]
    arguments = ["tune", "tent", "--grid", "lr=1e-3,30.0", "--seeds", "0", "1", *common]
    assert cli.main(arguments) == 0
    found = json.loads((tmp_path / "tune-tent" / "tuned.json").read_text())
    assert found["domains"] == list(HELD_OUT) and found["grid"] == {"lr": [0.001, 30.0]}
    assert not set(HELD_OUT) & set(corruptions.list_corruptions())
    means = [row["mean"] for row in found["candidates"]]
    assert len(means) == 3 and means == sorted(means) and found["candidates"][0]["count"] == 2
    assert found["chosen"] == found["candidates"][0]["method"]
    # The figures are those of the runs.
    chosen = glob.escape(found["chosen"])
    own = [
        next(read_lines(path, "summary"))["mean_error"]
        for path in (tmp_path / "tune-tent").rglob(f"{chosen}/*/results.jsonl")
    ]
    assert np.mean(own) == pytest.approx(means[0]) and len(own) == 2

    tuned = str(tmp_path / "tune-tent" / "tuned.json")
    arguments = ["run", "--methods", "tent", "source", "--tuned", tuned, "--quiet"]
    assert cli.main([*arguments, *common, "--corruptions", "fog"]) == 0
    (folder,) = tmp_path.glob("*-demo")
    header = read_header(folder)
    assert header["config"]["methods"] == [found["chosen"], "source"]
    assert header["config"]["tuned"] == [found]
    capsys.readouterr()
    assert cli.main(["tune", "lame", *common]) == 2
    assert "no learning rate" in capsys.readouterr().err
    assert cli.main(["tune", "tent", "--corruptions", "fog", *common]) == 2
    assert "must be held out" in capsys.readouterr().err
    assert cli.main(["run", "--tuned", str(folder / "results.jsonl")]) == 2
    assert "must be a tuned.json" in capsys.readouterr().err


def test_without_a_grid_the_learning_rate_is_varied(tmp_path):
    arguments = ["tune", "bn+tent", "--output", str(tmp_path), "--images", "10", "--quiet"]
    assert cli.main([*arguments, "--device", "cpu"]) == 0
    found = json.loads((tmp_path / "tune-bn+tent" / "tuned.json").read_text())
    rates = np.array(found["grid"]["lr"])
    assert rates / rates[2] == pytest.approx([0.1, 0.3, 1, 3, 10])


# Previews


@pytest.mark.parametrize("scenario", ["dirichlet", "gradual", "mixed", "walk"])
def test_a_preview_is_words_a_picture_and_a_definition(tmp_path, capsys, scenario):
    arguments = ["preview", "--scenario", scenario, "--images", "200", "--output", str(tmp_path)]
    arguments += ["--corruptions", "fog", "contrast", "snow"]
    if scenario == "walk":
        arguments += ["--option", "total=600", "--option", "speed=20"]
    assert cli.main(arguments) == 0
    assert capsys.readouterr().out.startswith(f"{scenario}: ")
    with Image.open(tmp_path / f"preview-{scenario}.png") as picture:
        assert picture.width > 1000 and len(np.unique(picture)) > 10
    config = json.loads((tmp_path / f"preview-{scenario}.json").read_text())
    images = read_bundled().balanced(200)
    stream = tta.streams.from_config(config, images, transform=corruptions.corrupt)
    assert stream.config == config and len(json.dumps(config)) < 1500


@pytest.mark.parametrize(
    ("scenario", "options", "domains"),
    [
        ("recurring", ["visits=1"], ROTTA_ORDER),
        ("walk", ["difficulty=hard", "total=200", "speed=5"], walk_domains("hard")),
        ("continual", [], corruptions.list_corruptions()),
    ],
)
def test_a_scenario_has_its_own_domains_where_none_are_named(tmp_path, scenario, options, domains):
    arguments = ["preview", "--scenario", scenario, "--images", "10", "--output", str(tmp_path)]
    assert cli.main([*arguments, *(a for o in options for a in ("--option", o))]) == 0
    config = json.loads((tmp_path / f"preview-{scenario}.json").read_text())
    assert config["domains"] == list(domains)


# Surfaces


def test_a_preview_of_a_name_with_a_dot_keeps_it(tmp_path):
    arguments = ["preview", "--scenario", "mixed", "--images", "10", "--name", "v1.2"]
    assert cli.main([*arguments, "--output", str(tmp_path)]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"v1.2-mixed.png", "v1.2-mixed.json"}


def test_a_surface_keeps_the_name_that_it_was_given(tmp_path):
    path = tmp_path / "surface.jsonl"  # as the file of its rows would be called
    arguments = ["surface", "--corruptions", "fog", "snow", "--images", "10", "--step", "2.5"]
    assert cli.main([*arguments, "--output", str(path)]) == 0
    assert list(tmp_path.iterdir()) == [path] and read_surface(path)["fog"]


def test_a_surface_is_measured_and_walked(tmp_path, capsys):
    path = tmp_path / "surface.json"
    arguments = ["surface", "--corruptions", "fog", "contrast", "--images", "20"]
    arguments += ["--step", "2.5", "--device", "cpu", "--output", str(path)]
    assert cli.main(arguments) == 0
    surface = read_surface(path)
    images = read_bundled().balanced(20)
    net = tiny("bn")

    def accuracy(pixels):
        with torch.no_grad():
            right = net(pixels.float() / 255).argmax(1).numpy() == images.labels
        return 100 * right.mean()

    both = images.tensor()
    for name, key in (("fog", "fog"), ("contrast", "fog+contrast")):
        seeds = image_seeds(0, key, images.index)
        both = corruptions.corrupt(both, name, 2.5, seeds=seeds)
    assert surface["fog"]["contrast"][10][10] == pytest.approx(accuracy(both))
    assert surface["contrast"]["fog"][0][0] == pytest.approx(accuracy(images.tensor()))

    arguments = ["run", "--scenario", "walk", "--option", f"surface={path}", "--images", "20"]
    arguments += ["--option", "total=100", "--device", "cpu"]
    arguments += ["--methods", "source", "--output", str(tmp_path / "runs"), "--quiet"]
    arguments += ["--option", "target=30.0"]
    assert cli.main(arguments) == 0
    (folder,) = (tmp_path / "runs").iterdir()
    (stream,) = read_lines(folder / "results.jsonl", "stream")
    assert np.array(stream["build"]["surface"]["fog"]["contrast"]).shape == (21, 21)
    severities = [tuple(row["severity"]) for row in read_lines(folder / "results.jsonl", "batch")
                  if isinstance(row["severity"], list)]  # fmt: skip
    first = next(read_lines(folder / "results.jsonl", "domain"))["domain"].split("+")
    path_wanted = best_path(np.array(surface[first[0]][first[1]]), 30.0)
    assert set(severities) <= {
        *path_wanted,
        *best_path(np.array(surface[first[1]][first[0]]), 30.0),
    }
    assert cli.main([*arguments, "--option", "surface=nowhere.json"]) == 2
    assert "python -m experiments surface" in capsys.readouterr().err


def test_a_surface_goes_on_where_it_was(tmp_path, monkeypatch, capsys):
    arguments = ["surface", "--corruptions", "fog", "contrast", "--images", "20"]
    arguments += ["--step", "2.5", "--device", "cpu", "--quiet"]
    whole, cut = tmp_path / "whole.json", tmp_path / "cut.json"
    assert cli.main([*arguments, "--output", str(whole)]) == 0
    real, calls = corruptions.corrupt, []

    def stop(*positional, **named):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return real(*positional, **named)

    monkeypatch.setattr("corruptions.corrupt", stop)
    assert cli.main([*arguments, "--output", str(cut)]) == 130
    assert len(list(read_lines(tmp_path / "cut.json.jsonl", "row"))) >= 1 and not cut.exists()
    assert cli.main([*arguments, "--seed", "1", "--output", str(cut)]) == 1
    assert "something else" in capsys.readouterr().err
    assert cli.main([*arguments, "--output", str(cut)]) == 0
    assert read_surface(cut) == read_surface(whole)
    assert cli.main(["surface", "--corruptions", "fog", "--output", str(cut)]) == 2


def test_surfaces_are_filled_in_linearly():
    levels = [0.0, 2.5, 5.0]
    measured = np.add.outer(np.array(levels), 2 * np.array(levels))
    filled = fill_in(measured, levels)
    fine = np.arange(21) / 4
    assert filled == pytest.approx(np.add.outer(fine, 2 * fine))
