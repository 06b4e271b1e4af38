"""The console script `tta`, in this process where that is enough."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file

import tta
from tta import cli
from tta.cli.methods import field_meanings, papers
from tta.core.config import SLOTS, UpdateConfig
from tta.core.registry import component


@pytest.fixture
def out(capsys, monkeypatch):
    """Runs the command line; gives its exit status, output and errors."""
    monkeypatch.setenv("COLUMNS", "100")

    def run(*arguments: str) -> tuple[int, str, str]:
        try:
            status = cli.main(arguments)
        except SystemExit as exit:  # of argparse
            status = int(exit.code or 0)
        return status, *capsys.readouterr()

    return run


def test_all_components_are_listed_by_slot(out):
    status, text, errors = out("methods")
    assert (status, errors) == (0, "")
    lines = text.splitlines()
    names = [line.split()[0] for line in lines if line[:3].strip()[:1] and line.startswith("  ")]
    names = [name for name in names if name in tta.list_methods()]
    assert sorted(names) == tta.list_methods()
    order = [component(name).slot for name in names]
    assert order == sorted(order, key=[*SLOTS, ""].index)
    (tent,) = [line for line in lines if line.startswith("  tent ")]
    assert "Entropy minimisation. [imagenet, imagenet_vit, come_imagenet" in tent


def test_patterns_and_slots_choose(out):
    _, text, _ = out("methods", "*bn", "--slot", "norm")
    lines = (line for line in text.splitlines() if line.startswith("  ") and line[2] != " ")
    listed = {line.split()[0] for line in lines}
    assert (
        listed
        == {"adaptive_bn", "alpha_bn", "bn", "iabn", "robust_bn"}
        == set(tta.list_methods("*bn", slot="norm"))
    )
    _, text, _ = out("methods", "eata.*")
    assert [line.split()[0] for line in text.splitlines() if line[0] != " "] == tta.list_methods(
        "eata.*"
    )
    assert "lr=0.005, lr_scaling='linear_below', redundancy_margin=0.4" in text


@pytest.mark.parametrize("name", tta.list_methods())
def test_details_show_every_field_and_preset(out, name):
    status, text, _ = out("methods", name)
    assert status == 0 and text.startswith(f"{name} (")
    config, cls = tta.get_config(name), component(name)
    for field, value in config.to_dict().items():
        if field != "name":
            value = getattr(config, field)
            assert f"\n  {field} = {value!r}" in text
    for tag in cls.PRESETS:
        assert f"\n  {name}.{tag} " in text
    if name != "source" and "no arXiv number is known" not in text:
        assert papers(cls) and f"arXiv {papers(cls)[0]}" in text


def test_fields_are_explained_by_the_comments_behind_them():
    meanings = field_meanings(UpdateConfig)
    assert meanings["lr"] == "learning rate"

    @dataclass(frozen=True, kw_only=True)
    class Config(UpdateConfig):
        lr: float = 0.5  # of this method
        steps: int = 2

    own = field_meanings(Config)
    assert own["lr"] == "of this method" and own["steps"] == meanings["steps"] != ""

    scope = {"UpdateConfig": UpdateConfig, "dataclass": dataclass}
    exec("@dataclass(frozen=True)\nclass Typed(UpdateConfig):\n    more: int = 1  # gone", scope)
    assert field_meanings(scope["Typed"]) == meanings  # its source cannot be read


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "error: the following arguments are required: COMMAND; see tta --help"),
        (["mehods"], "invalid choice: 'mehods'"),
        (["methods", "eatta"], "`NAME` must be that of a component, got 'eatta': did you mean"),
        (["methods", "eata.cifra10"], "got 'eata.cifra10': did you mean 'eata.cifar10'?"),
        (["methods", "eata", "--slot", "norm"], "a component in the slot norm, got 'eata'"),
        (["methods", "--slot", "x"], "invalid choice: 'x'"),
        (["methods", "--import", "nowhere"], "a module that Python finds, got 'nowhere'"),
    ],
)
def test_mistakes_are_said_in_one_sentence(out, arguments, message):
    status, text, errors = out(*arguments)
    assert (status, text) == (2, "")
    assert errors.startswith("error: ") and message in errors and errors.count("\n") == 1


def test_help_and_version(out):
    status, text, _ = out("--version")
    assert (status, text) == (0, f"tta {tta.__version__}\n")
    status, text, _ = out("--help")
    assert status == 0 and all(f"\n    {name} " in text for name in cli.COMMANDS)
    status, text, _ = out("methods", "--help")
    assert status == 0 and "--import MODULE" in text and "--slot" in text


@pytest.mark.parametrize("arguments", ["--help", "--version", "nope"])
def test_help_and_mistakes_come_without_torch(arguments):
    code = f"import sys\nfrom tta.cli import main\ntry:\n    main(['{arguments}'])\nfinally:\n"
    code += "    print('torch' in sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr.endswith("False\n"), done.stderr


@pytest.mark.parametrize(
    "first",
    [
        "from tta.core.registry import list_methods",
        "import tta.wrapping\nfrom tta import list_methods",
        "import tta.methods.tent\nfrom tta.core.registry import list_methods",
        "from tta import *",
        "from tta.streams import build\nfrom tta import list_methods",
        "from tta.core.update import Update\nfrom tta.core.registry import list_methods",
    ],
)
def test_whatever_is_imported_first_all_components_are_known(first):
    code = f"{first}\nimport tta\nprint(*list_methods())\nassert callable(tta.wrap)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == tta.list_methods(), done.stderr


def test_every_public_name_is_there_and_said():
    assert {*tta.__all__, "core", "parts"} <= set(dir(tta))
    assert all(getattr(tta, name) is not None for name in tta.__all__)
    named = [name for names in tta.PLACES.values() for name in names]
    assert sorted([*named, "__version__", "export", "methods", "runtime", "streams"]) == tta.__all__
    root = os.path.dirname(tta.__file__)  # a module of that name would take its place
    assert not any(os.path.exists(os.path.join(root, f"{name}.py")) for name in named)


def test_an_own_component_is_shown(tmp_path):
    """In a fresh process, from the folder that holds the module."""
    (tmp_path / "own_rules.py").write_text(
        '"""Sharper: less doubt."""\nimport tta\n\nclass Config(tta.ComponentConfig): ...\n\n'
        '@tta.register("sharper")\nclass Sharper(tta.Output):\n    """Doubled logits."""\n\n'
        "    Config = Config\n\n"
        "    def correct(self, prediction):\n        return 2 * prediction.logits\n"
    )
    code = "import sys; sys.path.pop(0); from tta.cli import main; sys.exit(main())"
    root = os.path.dirname(os.path.dirname(tta.__file__))
    done = subprocess.run(
        [sys.executable, "-c", code, "methods", "sharper", "--import", "own_rules"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": root},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("sharper (slot output): Doubled logits.\n\nSharper: less doubt.")


def test_a_reader_that_stops_early_is_no_error():
    done = subprocess.run(
        [f"{sys.executable} -m tta methods eata | head -n 1"],
        shell=True,
        capture_output=True,
        text=True,
    )
    assert done.stdout.startswith("eata (slot update)") and done.stderr == ""


@pytest.mark.parametrize("arguments", [["methods", "eata"], ["methods", "nope"], []])
def test_the_package_runs_like_the_console_script(arguments):
    ways = ["-m", "tta"], ["-c", "import sys; from tta.cli import main; sys.exit(main())"]
    done = [subprocess.run([sys.executable, *way, *arguments], capture_output=True) for way in ways]
    assert len({(d.returncode, d.stdout, d.stderr) for d in done}) == 1
    assert done[0].stdout if "eata" in arguments else done[0].stderr.startswith(b"error: ")


def test_a_saved_adapter_is_measured_and_exported(out, tmp_path):
    weights, saved = str(tmp_path / "net.safetensors"), str(tmp_path / "saved")
    net = timm.create_model("test_resnet")
    save_file(net.state_dict(), weights)
    adapter = tta.wrap(net, norm="robust_bn", guard=False, batch_size=2)
    adapter(torch.randn(2, 3, 64, 64))
    tta.save(adapter, saved)
    moved = sorted(float(v.double().sum()) for v in adapter.state().values() if v.ndim)
    model, common = f"timm:test_resnet@{weights}", ("--folder", saved)
    status, text, errors = out("bench", model, *common, "--rounds", "1", "--size", "64")
    assert (status, errors) == (0, "")
    assert [line.split()[0] for line in text.splitlines()[2:]] == ["plain", saved]
    status, _, errors = out("bench", model, *common, "--tune")
    assert status == 2 and "leave --tune and --window out" in errors
    pytest.importorskip("onnxscript")
    status, _, errors = out("export", model, *common, "--out", str(tmp_path / "edge"))
    assert (status, errors) == (0, "")
    state = np.load(tmp_path / "edge" / "state.npz")
    found = [float(state[key].astype("float64").sum()) for key in state.files]
    assert all(min(abs(value - one) for one in found) < 1e-4 for value in moved[:4])
    status, _, errors = out("export", model, "--folder", "none", "--out", str(tmp_path / "x"))
    assert status == 2 and "`folder` must" in errors


def test_help_says_what_is_done(out):
    assert "(default: all)" in " ".join(out("bench", "--help")[1].split())
    assert "over HTTP" in out("serve", "--help")[1]


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs a folder that nobody can write to")
@pytest.mark.parametrize(
    "command", [("collect", "timm:test_resnet", ".", "--for", "eata"), ("export", "timm:none")]
)
def test_a_place_that_cannot_be_written_is_refused_before_the_work(out, command):
    status, _, errors = out(*command, "--out", "/proc/x")
    assert status == 2 and "`out` must be one that can be written to, but /proc/x is not" in errors
