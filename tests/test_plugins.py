"""Components from outside the repository: named by `--import`, or by an installed package."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import tta
from experiments import cli
from experiments.records.file import read_header, read_lines
from experiments.sweep.workers import Cell, on_ray, run_cell
from tests.helpers.results import figures
from tests.helpers.tiny_models import use_tiny_models
from tta.core import plugins, registry

ROOT = Path(__file__).parents[1]
# An output rule with a field, outside of every package.
RULE = '''
"""Favour: the first class is said more often."""
from dataclasses import dataclass
import tta

@dataclass(frozen=True, kw_only=True)
class FavourConfig(tta.ComponentConfig):
    bonus: float = 2.0  # added to the first logit

@tta.register("{name}")
class Favour(tta.Output):
    """The first class, more often."""
    Config = FavourConfig

    def correct(self, prediction):
        logits = prediction.logits.clone()
        logits[:, 0] += self.config.bonus
        return logits
'''
ARGUMENTS = ["--scenario", "mixed", "--corruptions", "fog", "--images", "20", "--batch-size", "10"]


@pytest.fixture
def outside(tmp_path):
    """A folder with the module `outside_rules`, which registers `favour`."""
    folder = tmp_path / "outside"
    folder.mkdir()
    (folder / "outside_rules.py").write_text(RULE.format(name="favour"))
    return folder


@pytest.fixture
def forget(monkeypatch):
    """Components and modules that the test adds are gone after it."""
    monkeypatch.setattr(registry, "_COMPONENTS", dict(registry._COMPONENTS))
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if name.startswith(("outside_rules", "broken_rules")):
            del sys.modules[name]


@pytest.fixture
def fresh_entry_points(monkeypatch):
    """The first look-up of a name is still to come."""
    monkeypatch.setattr(plugins, "_loaded", False)


def python(*arguments: str | Path, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a fresh interpreter in the repository that also finds what is in `folder`."""
    path = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
    )


def install(folder: Path, entry_points: str, name: str = "their-rules") -> None:
    """What an installer leaves of a package: its metadata, here in a folder on sys.path."""
    info = folder / f"{name.replace('-', '_')}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{plugins.GROUP}]\n{entry_points}\n")


# Modules by name


def test_a_module_by_name_registers_its_components(outside, monkeypatch, forget):
    monkeypatch.syspath_prepend(outside)
    assert "favour" not in tta.list_methods()
    plugins.import_modules(["outside_rules"])
    assert "favour" in tta.list_methods(slot="output")
    plugins.import_modules(["outside_rules"])  # once more changes nothing
    assert tta.get_config("favour", bonus=3.0).to_dict() == {
        "name": "favour",
        "bonus": 3.0,
    }


def test_modules_that_cannot_be_imported_are_refused(outside, monkeypatch, forget):
    monkeypatch.syspath_prepend(outside)
    (outside / "broken_rules.py").write_text("import not_there_either\n")
    (outside / "broken_rules_too.py").write_text("1 / 0\n")
    for name, message in [
        ("outside_rules.py", "a module that Python finds"),
        ("./outside_rules", "the name of a module"),
        ("not_there", "a module that Python finds, got 'not_there': put the folder"),
        ("broken_rules", "got 'broken_rules', which raised ModuleNotFoundError: No module named"),
        ("broken_rules_too", "got 'broken_rules_too', which raised ZeroDivisionError: division"),
    ]:
        with pytest.raises(ValueError, match=message):
            plugins.import_modules([name])
    with pytest.raises(TypeError, match="`import` must be a string, got 3"):
        plugins.import_modules([3])  # type: ignore[list-item]


# Entry points


def test_installed_packages_are_found_at_the_first_look_up(
    outside, monkeypatch, forget, fresh_entry_points
):
    install(outside, "rules = outside_rules")
    monkeypatch.syspath_prepend(outside)
    assert "favour" not in registry._COMPONENTS
    assert tta.get_config("favour").to_dict()["bonus"] == 2.0
    assert "outside_rules" in sys.modules


def test_one_that_fails_is_warned_of_and_skipped(outside, monkeypatch, forget, fresh_entry_points):
    (outside / "broken_rules.py").write_text("raise RuntimeError('no such licence')\n")
    (outside / "broken_rules_taken.py").write_text(RULE.format(name="tent"))
    install(outside, "a = broken_rules\nb = broken_rules_taken\nc = outside_rules:Favour")
    monkeypatch.syspath_prepend(outside)
    with pytest.warns(UserWarning) as caught:
        assert "favour" in tta.list_methods()
    texts = sorted(str(warning.message) for warning in caught)
    assert len(texts) == 2
    assert texts[0].startswith("the entry point 'a' of their-rules in the group 'tta.components'")
    assert "RuntimeError: no such licence" in texts[0]
    assert "`name` must be new, got 'tent'" in texts[1]
    assert tta.get_config("tent").name == "tent"


def test_import_tta_imports_no_entry_point(outside):
    install(outside, "rules = outside_rules")
    code = (
        "import sys, tta; print('outside_rules' in sys.modules, end=' '); "
        "print('favour' in tta.list_methods(), 'outside_rules' in sys.modules)"
    )
    assert python("-c", code, folder=outside).stdout == "False True True\n"


# The runner


def test_runs_know_their_modules(outside, tmp_path, monkeypatch, forget, capsys):
    use_tiny_models(monkeypatch)
    monkeypatch.syspath_prepend(outside)
    output = ["--output", str(tmp_path / "runs"), "--quiet"]
    flags = ["run", "--methods", "favour", *ARGUMENTS, *output]
    assert cli.main(flags) == 2
    assert "got 'favour'" in capsys.readouterr().err
    assert cli.main([*flags, "--import", "nowhere_rules"]) == 2
    assert "a module that Python finds, got 'nowhere_rules'" in capsys.readouterr().err
    assert cli.main([*flags, "--import", "outside_rules"]) == 0
    (folder,) = (tmp_path / "runs").iterdir()
    header = read_header(folder)
    assert header is not None and header["config"]["imports"] == ["outside_rules"]
    settings = tmp_path / "settings.toml"
    settings.write_text('imports = "outside_rules"\n')
    assert cli.main([*flags, "--config", str(settings)]) == 2
    assert "`imports` must be a list of modules" in capsys.readouterr().err
    settings.write_text('imports = ["outside_rules"]\n')
    assert cli.main([*flags, "--config", str(settings)]) == 0
    assert len(list((tmp_path / "runs").iterdir())) == 2


@pytest.mark.slow
def test_every_way_to_run_finds_an_own_component(outside, tmp_path):
    """In fresh processes: a run, its continuation without the flag, and a sweep with workers."""
    runs, sweeps = tmp_path / "runs", tmp_path / "sweeps"
    own = ["--import", "outside_rules", *ARGUMENTS, "--quiet"]
    methods = ["--methods", "favour", "bn+favour[bonus=4]"]
    run = ["-m", "experiments", "run", *methods, *own, "--output", runs]
    done = python(*run, folder=outside)
    assert done.returncode == 0, done.stderr
    (folder,) = runs.iterdir()
    whole = figures(folder)
    lines = (folder / "results.jsonl").read_text().splitlines(keepends=True)
    cut = next(i for i, line in enumerate(lines) if json.loads(line)["kind"] == "summary") + 1
    (folder / "results.jsonl").write_text("".join(lines[:cut]))
    done = python("-m", "experiments", "run", "--resume", folder, "--quiet", folder=outside)
    assert done.returncode == 0, done.stderr
    assert figures(folder) == whole

    sweep = ["-m", "experiments", "sweep", *methods, *own, "--workers", "2", "--output", sweeps]
    done = python(*sweep, folder=outside)
    assert done.returncode == 0, done.stdout + done.stderr
    files = sorted(sweeps.rglob("results.jsonl"))
    swept = [row["mean_error"] for file in files for row in read_lines(file, "summary")]
    assert len(swept) == 2
    run_errors = [row["mean_error"] for row in read_lines(folder / "results.jsonl", "summary")]
    assert sorted(swept) == sorted(run_errors)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed")
def test_workers_of_ray_find_an_own_component(outside, tmp_path, monkeypatch, forget):
    from experiments.run.settings import make_run

    monkeypatch.syspath_prepend(outside)
    flags = {"methods": ["favour"], "scenario": "mixed", "domains": ["fog"], "images": 20}
    config = make_run(
        {}, {**flags, "batch_size": 10, "device": "cpu", "imports": ["outside_rules"]}
    )
    here = run_cell(Cell(config, str(tmp_path / "here")))
    (there,) = on_ray([Cell(config, str(tmp_path / "there"))], None, 1, 0.0)
    assert (here.status, there.status) == ("done", "done"), there.text
    assert here.error == there.error
