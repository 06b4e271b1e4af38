"""The command line: whole runs and cards on a tiny model, and what it refuses."""

from __future__ import annotations

import json
import re
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from experiments import cli
from experiments.data import read_bundled
from experiments.records.file import read_lines
from experiments.studies.card import render_card
from tests.helpers.nets import tiny
from tests.helpers.tiny_models import fake_load, use_tiny_models


@pytest.fixture(autouse=True)
def tiny_models(monkeypatch):
    """Let the runner load tiny networks."""
    use_tiny_models(monkeypatch)


def run(tmp_path, *arguments):
    """Run the command line; returns the status and the run's folder."""
    status = cli.main(["run", "--output", str(tmp_path), "--device", "cpu", *arguments])
    folders = sorted(tmp_path.iterdir()) if tmp_path.exists() else []
    return status, folders[-1] if folders else Path()


def test_the_demo_in_small(tmp_path, capsys):
    status, folder = run(tmp_path, "--images", "10", "--name", "small", "--batch-size", "8")
    assert status == 0 and folder.name.endswith("-small")
    out = capsys.readouterr().out
    methods = ["source", "bn", "alpha_bn", "tent", "eata", "unmix_tns", "lame", "unmix_tns+eata"]
    for method in methods:
        assert len(re.findall(rf"^{re.escape(method)} +\d+\.\d ", out, re.MULTILINE)) == 2
    assert "15 domains at severity 5, 150 images" in out and "Stream correlated" in out
    assert "Without adaptation (source) the model errs on" in out

    rows = list(read_lines(folder / "results.jsonl"))
    header = rows[0]
    assert header["kind"] == "run" and header["seed"] == 0 and header["versions"]["torch"]
    assert header["hardware"]["cpu"] and header["model"]["norm_layers"] == {"BatchNorm2d": 2}
    assert header["model"]["source_artefacts"] == ["fisher"]
    by_kind = {kind: [r for r in rows if r["kind"] == kind] for kind in {r["kind"] for r in rows}}
    assert set(by_kind) == {"run", "stream", "method", "batch", "domain", "summary", "end"}
    assert [r["method"] for r in by_kind["summary"]] == methods * 2
    assert len(by_kind["batch"]) == 8 * (30 + 3 * 13)
    assert len(by_kind["domain"]) == 8 * (15 + 3)
    eata = next(r for r in by_kind["method"] if r["method"] == "eata")["config"]
    assert eata["update"]["name"] == "eata" and eata["batch_size"] == 8
    for summary in by_kind["summary"]:
        own = [
            r
            for r in by_kind["batch"]
            if (r["stream"], r["method"]) == (summary["stream"], summary["method"])
        ]
        assert sum(r["errors"] for r in own) / summary["images"] == summary["error"]
        assert 0 <= summary["clean_error"] <= 1

    for name in ("continual-errors.png", "continual-running.png", "correlated-errors.png"):
        assert (folder / name).stat().st_size > 10_000 and name in out
    assert "| unmix_tns+eata |" in (folder / "continual.md").read_text()
    events = list((folder / "tensorboard" / "continual" / "tent").glob("events*"))
    assert events and events[0].stat().st_size > 1000


def test_a_run_repeats_itself(tmp_path):
    figures = []
    for _ in range(2):
        arguments = ("--images", "10", "--corruptions", "snow", "--methods", "unmix_tns+eata+lame")
        _, folder = run(tmp_path, *arguments, "--batch-size", "4", "--quiet")
        rows = read_lines(folder / "results.jsonl", "batch")
        figures.append([(r["errors"], r["entropy"], r["loss"], r["selected"]) for r in rows])
    assert figures[0] == figures[1]


def test_one_stream_on_a_model_without_batch_norm(tmp_path, capsys):
    arguments = ["--model", "cifar10_resnet20_gn", "--methods", "tent", "lame", "--quiet"]
    arguments += ["--scenario", "dirichlet_slots", "--option", "delta=0.5", "--severity", "2"]
    status, folder = run(tmp_path, *arguments, "--corruptions", "fog", "--images", "20")
    assert status == 0
    out = capsys.readouterr().out
    assert out.startswith("method") and "Lowest mean error" in out
    (stream,) = read_lines(folder / "results.jsonl", "stream")
    assert stream["build"]["delta"] == 0.5 and stream["build"]["severity"] == 2


def test_stored_domains_with_and_without_clean_images(tmp_path):
    images = read_bundled().balanced(20)
    data = tmp_path / "c"
    data.mkdir()
    # As published: 10,000 rows per severity.
    rows = np.zeros((50_000, 32, 32, 3), np.uint8)
    rows[40_000:40_020] = images.images
    np.save(data / "fog.npy", rows)
    np.save(data / "labels.npy", np.arange(50_000) % 10)
    arguments = ["--data", str(data), "--methods", "source", "--images", "20", "--quiet"]
    status, folder = run(tmp_path / "runs", *arguments)
    assert status == 0
    (summary,) = read_lines(folder / "results.jsonl", "summary")
    assert summary["clean_error"] is None and summary["domain_errors"].keys() == {"fog"}
    status, folder = run(tmp_path / "runs", *arguments, "--clean", "bundled", "--name", "x")
    (summary,) = read_lines(folder / "results.jsonl", "summary")
    assert status == 0 and summary["clean_error"] is not None


def test_images_in_folders_are_a_shift_by_themselves(tmp_path, capsys):
    images = read_bundled().balanced(40)
    for number, (picture, label) in enumerate(zip(images.images, images.labels, strict=True)):
        if label in (3, 7):  # two of the model's classes, and each with a domain of its own below
            for domain in ("sketch", "photo"):
                path = tmp_path / domain / str(label) / f"{number}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(picture).save(path)
    common = ["--methods", "source", "--batch-size", "4", "--scenario", "continual", "--quiet"]
    found = {}
    for name, flags in {
        "as-it-is": ["--data", str(tmp_path / "sketch"), "--corruptions", "clean"],
        "shifted": ["--data", str(tmp_path / "sketch"), "--clean", str(tmp_path / "photo")],
        "domains": ["--data", str(tmp_path), "--images", "8"],
        "of-more-classes": [
            *("--data", str(tmp_path / "sketch"), "--clean", "bundled", "--images", "8"),
        ],
        "in-memory": ["--corruptions", "clean", "fog", "--images", "10"],
    }.items():
        status, folder = run(tmp_path.parent / name, *flags, *common)
        assert status == 0
        (found[name],) = read_lines(folder / "results.jsonl", "summary")
    assert found["as-it-is"]["domain_errors"].keys() == {"clean"}
    assert found["as-it-is"]["images"] == found["shifted"]["images"] == 8
    assert found["shifted"]["domain_errors"].keys() == {"sketch"}
    # The source model, on the same pictures; 3 and 7 are not its first two labels.
    error = found["as-it-is"]["clean_error"]
    for name, summary in found.items():
        errors = summary["domain_errors"].values()
        if name == "of-more-classes":
            assert summary["images"] == 8 and summary["clean_error"] is not None
        elif name != "in-memory":
            assert set(errors) == {error} and summary["clean_error"] in (error, None)
    memory = found["in-memory"]
    assert memory["domain_errors"]["clean"] == memory["clean_error"]
    expected, _ = fake_load("cifar10_resnet20_bn")
    chosen = images.subset(np.flatnonzero(np.isin(images.labels, (3, 7))))
    with torch.no_grad():
        wrong = expected(chosen.tensor() / 255).argmax(1) != torch.from_numpy(chosen.labels)
    assert error == wrong.double().mean().item()

    capsys.readouterr()
    (tmp_path / "sketch" / "3").rename(tmp_path / "sketch" / "ship")
    status, _ = run(tmp_path.parent / "no", "--data", str(tmp_path / "sketch"), *common)
    assert status == 2 and "got 2 folders (7, ship)" in capsys.readouterr().err
    (tmp_path / "names").write_text("\n".join([*"012", "ship", *"456789"]))
    flags = ["--data", str(tmp_path / "sketch"), "--corruptions", "clean"]
    status, folder = run(
        tmp_path.parent / "named", *flags, "--classes", str(tmp_path / "names"), *common
    )
    (summary,) = read_lines(folder / "results.jsonl", "summary")
    assert status == 0 and summary["error"] == error
    (tmp_path / "names").write_text("ship\nship")
    status, _ = run(tmp_path.parent / "no", *flags, "--classes", str(tmp_path / "names"), *common)
    assert status == 2 and "has 'ship' again" in capsys.readouterr().err
    (tmp_path / "names").write_text("ship")
    status, _ = run(tmp_path.parent / "no", *flags, "--classes", str(tmp_path / "names"), *common)
    assert status == 2 and "name the 10 classes" in capsys.readouterr().err


def test_image_files_are_read_ahead_with_the_same_numbers(tmp_path):
    images = read_bundled().balanced(40)
    for number, (picture, label) in enumerate(zip(images.images, images.labels, strict=True)):
        path = tmp_path / "files" / f"class{label}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(path)
    arguments = ["--data", str(tmp_path / "files"), "--corruptions", "fog", "snow", "--quiet"]
    arguments += ["--methods", "source", "tent", "--batch-size", "8"]
    figures = []
    for readers in ("0", "2"):
        status, folder = run(tmp_path / readers, *arguments, "--readers", readers)
        assert status == 0
        lines = [*read_lines(folder / "results.jsonl", "batch")]
        lines += read_lines(folder / "results.jsonl", "summary")
        times = {"seconds", "images_per_second", "peak_memory"}
        figures.append([{k: v for k, v in line.items() if k not in times} for line in lines])
    assert figures[0] == figures[1] and figures[0][-1]["clean_error_before"] is not None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--readers", "-1"], "`readers` must be a whole number of at least 0, got -1"),
        (["--methods", "tentt"], "got 'tentt': did you mean 'tent'"),
        (["--model", "cifar10_resnet20"], "unknown model 'cifar10_resnet20': did you mean"),
        (["--corruptions", "gauss_noise"], "did you mean 'gaussian_noise'"),
        (["--scenario", "continuous"], "did you mean 'continual'"),
        (["--images", "55"], "multiple of the 10 classes, got 55"),
        (["--images", "few"], "`images` must be a number of 1 up or 'all', got 'few'"),
        (["--images", "5000"], "has 200: ask for fewer"),
        (["--batch-size", "0"], "`batch-size` must be a whole number of at least 1, got 0"),
        (["--seed", "-1"], "`seed` must be a whole number of at least 0"),
        (["--name", "a/b"], "`name` must be usable in a folder's name"),
        (["--name", ".."], "`name` must be usable in a folder's name"),
        (["--option", "delta"], "`option` must be KEY=VALUE"),
        (["--option", "gama=1"], "gama"),
        (["--option", "seed=3"], "`option` must be none of the run's own arguments, got 'seed=3'"),
        (["--option", "domains=['fog']"], "use --corruptions"),
        (["--option", "num_samples=5000"], "`num_samples` must be at most the 1000 images"),
        (["--option", "schedule=''"], "`schedule` must be one of"),
        (["--output", __file__], f"`output` must be a folder, got the file {__file__}"),
        (["--output", f"{__file__}/runs"], f"`output` must be a folder, got the file {__file__}"),
        (["--data", __file__], "must be a whole .npz file"),
        (["--source", __file__], "is no whole safetensors file"),
        (["--model", f"timm:test_resnet@{__file__}"], "`checkpoint` must be a .safetensors"),
        (["--device", "cuda:99"], "`device` must be one that torch can use here"),
        (["--data", "/nowhere"], "`/nowhere` is missing"),
        (["--source", "/nowhere"], "`/nowhere` is missing"),
        (["--model", "cifar10_resnet20_gn", "--methods", "bn"], "norm"),
        (["--tuned", "/nowhere"], "`tuned` must be a tuned.json, but /nowhere is not there"),
        (["--tuned", str(Path(__file__).parent)], "`tuned` must be a tuned.json"),
    ],
)
def test_mistakes_are_one_sentence_and_leave_nothing(tmp_path, capsys, arguments, message):
    status, _ = run(tmp_path / "runs", *arguments)
    error = capsys.readouterr().err.strip()
    assert status == 2 and message in error and "\n" not in error, error
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("name", ["", "a/b", "../../elsewhere", ".."])
def test_streams_are_called_so_that_files_can_be(tmp_path, capsys, name):
    file = tmp_path / "settings.toml"
    file.write_text(f'[[streams]]\nscenario = "continual"\nname = "{name}"\nimages = 10\n')
    assert run(tmp_path / "runs", "--config", str(file))[0] == 2
    assert "`streams.name` must be usable in a folder's name" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_a_settings_file_takes_what_tune_has_chosen(tmp_path, capsys):
    (tmp_path / "tuned.json").write_text(json.dumps({"method": "bn", "chosen": "bn"}))
    file = tmp_path / "settings.toml"
    file.write_text(f'methods = ["source"]\ntuned = ["{tmp_path / "tuned.json"}"]\n')
    few = ["--config", str(file), "--corruptions", "fog", "--images", "10"]
    assert run(tmp_path / "runs", *few)[0] == 0
    rows = [json.loads(line) for path in (tmp_path / "runs").rglob("results.jsonl")
            for line in path.read_text().splitlines()]  # fmt: skip
    assert {r["method"] for r in rows if r["kind"] == "summary"} == {"source", "bn"}
    file.write_text("tuned = 3\n")
    assert run(tmp_path / "runs", "--config", str(file))[0] == 2
    assert "`tuned` must be a list" in capsys.readouterr().err


@pytest.mark.parametrize("content", [{"chosen": "tent"}, {"method": "tent", "chosen": 3}, 3])
def test_a_file_that_is_not_of_tune_is_refused(tmp_path, capsys, content):
    file = tmp_path / "tuned.json"
    file.write_text(json.dumps(content))
    assert run(tmp_path / "runs", "--tuned", str(file))[0] == 2
    assert "which holds no choice" in capsys.readouterr().err


@pytest.mark.parametrize(
    "command",
    [
        "run",
        "sweep",
        "preview",
        "tune tent --grid lr=1e-3",
        "surface --corruptions fog snow",
        "report",
    ],
)
def test_where_nothing_can_be_written_it_is_said_in_a_sentence(tmp_path, capsys, command):
    file = tmp_path / "a file"
    file.touch()
    arguments = [*command.split(), "--output", str(file / "runs")]
    if command == "report":
        _, folder = run(tmp_path / "runs", "--images", "10", "--methods", "source", "--quiet")
        arguments.append(str(folder))
        capsys.readouterr()
    else:
        arguments += ["--images", "10"]
    assert cli.main(arguments) in (1, 2)
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: `") and "\n" not in error and str(file) in error


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("record --page-only --results /nowhere.jsonl", "`/nowhere.jsonl` is missing"),
        ("overhead --rounds 0", "`rounds` must be a whole number of at least 1"),
        ("overhead --model resnet", "unknown model 'resnet'"),
        ("device-cost --networks resnet188", "did you mean 'resnet18'"),
        ("tuned --networks resnet188", "`networks` must be networks of timm"),
        ("edge-cost --networks resnet188", "`networks` must be networks of timm"),
        ("edge-int8 --methods tentt", "did you mean 'tent'"),
        ("edge-int8 --images 0", "`images` must be a whole number of at least 1"),
        ("own-networks --images 0", "`images` must be a whole number of at least 1"),
        ("reliability --list --guard stead", "did you mean 'steady'"),
        ("reliability --list --seeds 77", "`seeds` must be some of the grid's, got 77"),
        ("live --method tentt", "did you mean 'tent'"),
        ("corruption-errors --images 5", "`images` must be a positive multiple"),
    ],
)
def test_studies_refuse_what_they_cannot_measure(capsys, command, words):
    assert cli.main(command.split()) in (1, 2)
    error = capsys.readouterr().err.strip()
    assert words in error and "\n" not in error


@pytest.mark.parametrize("arguments", [["--severity", "6"], ["--colour", "red"], []])
def test_argparse_refuses_the_rest(arguments):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["run", *arguments] if arguments else [])
    assert stopped.value.code == 2


def test_the_module_is_the_command(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["experiments", "--help"])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_module("experiments", run_name="__main__")
    assert stopped.value.code == 0
    out = capsys.readouterr().out
    assert "python -m experiments" in out and "run" in out and "card" in out


def test_a_card(tmp_path, capsys):
    images = read_bundled().balanced(40)
    np.savez(tmp_path / "t.npz", test_images=images.images, test_labels=images.labels)
    folder = tmp_path / "card"
    folder.mkdir()
    training = {"name": "x", "seed": 3, "epochs": 2, "seconds": 90, "command": "python -m train"}
    (folder / "training.json").write_text(json.dumps({**training, "history": []}))
    arguments = ["card", "cifar10_resnet20_bn", "--data", str(tmp_path / "t.npz")]
    assert cli.main([*arguments, "--images", "20", "--output", str(folder), "--quiet"]) == 0
    card = json.loads((folder / "card.json").read_text())
    net = tiny("bn")
    with torch.no_grad():
        right = (net(images.tensor().float() / 255).argmax(1).numpy() == images.labels).mean()
    assert card["clean_accuracy"] == pytest.approx(right) and card["clean_images"] == 40
    assert len(card["corruption_errors"]) == 15 and card["corruption_images"] == 20
    text = (folder / "card.md").read_text()
    assert text == render_card(card) and "2 epochs, 2 minutes, seed 3" in text
    assert "| gaussian_noise |" in text and "`python -m train`" in text
    assert cli.main(["card", "cifar10_resnet", "--data", "bundled"]) == 2
    assert "did you mean 'cifar10_resnet20_" in capsys.readouterr().err
