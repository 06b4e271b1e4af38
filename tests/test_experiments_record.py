"""The benchmark of record: which runs, in which order, and the page made of them."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import models
import tta
from experiments import cli
from experiments.report import collect
from experiments.run.method_strings import parse_method
from experiments.run.run import Cache
from experiments.sweep import benchmark
from experiments.sweep.benchmark import STREAMS, Benchmark, all_methods, bundled_models
from experiments.sweep.sweep import cell_folder
from tests.helpers.nets import tiny
from tests.helpers.tiny_models import use_tiny_models
from tta.core.registry import component

EXPENSIVE = tuple(name for name in tta.list_methods() if component(name).cost >= 10)


@pytest.fixture(autouse=True)
def tiny_models(monkeypatch):
    """Let the runner load tiny networks."""
    use_tiny_models(monkeypatch)
    monkeypatch.setattr("experiments.sweep.workers._CACHE", Cache())


def test_every_method_model_and_stream_is_there_the_affordable_part_first():
    names = tuple(bundled_models())
    assert names[0] == "cifar10_resnet20_bn" and set(names) == set(models.list_models())
    benchmark = Benchmark(device="cpu", models=names, methods=tuple(all_methods()))
    cells = benchmark.cells()
    assert len({cell_folder(cell) for cell in cells}) == len(cells)
    assert {cell.model for cell in cells} == set(names)
    assert {cell.streams[0].scenario for cell in cells} == set(STREAMS) == {
        "continual", "dirichlet", "imbalance", "mixed", "gradual", "recurring", "walk", "single",
    }  # fmt: skip
    bases = {re.split(r"[+\[]", cell.methods[0])[0] for cell in cells}
    guards = {"aetta", "periodic", "steady", "watch"}  # which need something to guard
    known = {name for name in tta.list_methods() if not component(name).needs_given}
    assert bases == known - guards
    seeds = {}
    for cell in cells:
        where = cell.model, cell.streams[0].name, cell.methods[0]
        seeds.setdefault(where, []).append(cell.seed)
    for (_, stream, method), found in seeds.items():
        many = stream in ("continual", "dirichlet") and method not in EXPENSIVE
        assert found == ([0, 1, 2] if many else [0])
        assert method not in EXPENSIVE or stream in ("continual", "dirichlet", "mixed")
    # An early stop leaves the first model's whole row, and something of the others.
    places = {}
    for i, cell in enumerate(cells):
        key = cell.model == names[0], cell.methods[0] in EXPENSIVE, cell.seed > 0
        places.setdefault(key, []).append(i)
    assert max(places[True, False, False][: -len(all_methods())]) < min(places[True, True, False])
    assert max(places[True, True, False]) < min(places[True, False, True])
    assert max(places[True, False, True]) < min(places[False, False, True])


def test_the_page_is_made_of_the_results(tmp_path, capsys):
    arguments = ["record", "--images", "20", "--models", "cifar10_resnet20_bn", "--streams"]
    arguments += ["continual", "mixed", "--methods", "source", "tent[lr=100.0]", "bn", "--device"]
    arguments += ["cpu", "--output", str(tmp_path / "runs"), "--quiet"]
    files = ["--results", str(tmp_path / "record.jsonl"), "--page", str(tmp_path / "record.md")]
    assert cli.main([*arguments, *files]) == 0
    results = collect([tmp_path / "record.jsonl"])
    assert len(results) == 3 * (3 + 1)  # three seeds of continual, one of mixed
    page = (tmp_path / "record.md").read_text()
    assert "| stream | what | images |" in page and "| continual | each domain once" in page
    (source,) = re.findall(r"^\| source \| \**(\S+) ± (\S+) \(3\)\** \| \**(\S+) \(1\)", page, re.M)
    errors = [
        r.summary["mean_error"]
        for r in results
        if r.method == "source" and r.setting.stream == "continual"
    ]
    assert float(source[0]) == pytest.approx(100 * sum(errors) / 3, abs=0.051)
    for target in re.findall(r"\]\(([^)]+\.png)\)", page):
        assert (tmp_path / target).is_file()
    assert page.count(".png)") == 4 + 1
    again = tmp_path / "again.md"
    assert cli.main(["record", "--page-only", *files[:2], "--page", str(again)]) == 0
    assert again.read_text() == page
    # What is done is not run again.
    assert cli.main([*arguments, *files]) == 0
    assert (tmp_path / "record.md").read_text() == page


def test_compact_results_are_gone_on_from(tmp_path, monkeypatch, capsys):
    """In a fresh checkout, with no run's folder: only what they lack is run."""
    entry = benchmark.STREAMS["mixed"]
    short = replace(entry, stream=replace(entry.stream, images=20))
    monkeypatch.setattr(benchmark, "STREAMS", {"mixed": short})
    files = ["--results", str(tmp_path / "record.jsonl"), "--page", str(tmp_path / "record.md")]

    def record(folder, *methods):
        arguments = ["record", "--models", "cifar10_resnet20_bn", "--methods", *methods]
        arguments += ["--device", "cpu", "--output", str(tmp_path / folder), *files]
        assert cli.main(arguments) == 0
        return capsys.readouterr().out

    assert "1 runs" in record("one", "source")
    assert "1 runs" in record("two", "source", "bn")
    assert {r.method for r in collect([tmp_path / "two"])} == {"bn"}
    assert {r.method for r in collect([tmp_path / "record.jsonl"])} == {"source", "bn"}
    assert "0 runs" in record("three", "source", "bn")
    assert {r.method for r in collect([tmp_path / "record.jsonl"])} == {"source", "bn"}


def test_where_every_run_is_refused_the_reason_is_said(tmp_path, monkeypatch, capsys):
    entry = benchmark.STREAMS["mixed"]
    short = replace(entry, stream=replace(entry.stream, images=20))
    monkeypatch.setattr(benchmark, "STREAMS", {"mixed": short})
    arguments = ["record", "--models", "cifar10_resnet20_bn", "--methods", "foa", "--device", "cpu"]
    arguments += ["--output", str(tmp_path / "runs"), "--results", str(tmp_path / "record.jsonl")]
    assert cli.main([*arguments, "--page", str(tmp_path / "record.md")]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: nothing was run, since all 1 runs") and "foa" in error
    assert not (tmp_path / "record.md").exists()


def test_a_page_of_no_results_is_refused_in_a_sentence(tmp_path, capsys):
    (tmp_path / "record.jsonl").touch()
    files = ["--results", str(tmp_path / "record.jsonl"), "--page", str(tmp_path / "record.md")]
    assert cli.main(["record", "--page-only", *files]) in (1, 2)
    assert "`runs` must hold finished runs" in capsys.readouterr().err


def test_the_overhead_is_said(capsys):
    arguments = ["overhead", "--images", "10", "--rounds", "1", "--device", "cpu"]
    assert cli.main(arguments) == 0
    assert "150 images in batches of 64: the runner takes" in capsys.readouterr().out


def test_tensorboard_has_scalars_entropies_images_and_the_configuration(tmp_path):
    arguments = ["run", "--images", "20", "--corruptions", "fog", "snow", "--batch-size", "10"]
    arguments += ["--methods", "source", "tent", "--quiet", "--output", str(tmp_path)]
    assert cli.main([*arguments, "--device", "cpu"]) == 0
    (folder,) = tmp_path.iterdir()
    tags = {}
    for method in ("source", "tent"):
        events = EventAccumulator(str(folder / "tensorboard" / "continual" / method))
        events.Reload()
        tags[method] = events.Tags()
        assert [event.step for event in events.Scalars("error/running")] == [0, 1, 2, 3]
        assert {"domain/fog", "domain/snow", "nll", "entropy"} <= {*tags[method]["scalars"]}
        assert tags[method]["histograms"] == ["entropy/fog", "entropy/snow"]
        assert any("config" in tag for tag in tags[method]["tensors"])
    assert {tag.split("/")[1] for tag in tags["source"]["images"]} == {"fog", "snow"}
    assert tags["tent"]["images"] == []  # the same ones, once a stream


@pytest.mark.parametrize(
    ("name", "components"),
    [
        ("auto", {"norm": "adaptive_bn", "output": "drift", "guard": "auto"}),
        ("asr", {"norm": "bn", "update": "eta", "guard": "asr"}),
        ("tent+steady", {"norm": "bn", "update": "tent", "guard": "steady"}),
        ("unmix_tns+eta", {"norm": "unmix_tns", "update": "eta"}),
    ],
)
def test_a_recipe_by_its_name_is_the_whole_recipe(name, components):
    """As in `tta.wrap` and on the command line of `tta`, and not its guard over the source."""
    adapter = parse_method(name, 10).wrap(tiny("bn"))
    found = {slot: config.name for slot, config in adapter.config.components.items()}
    assert found == components
