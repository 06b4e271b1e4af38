"""Whether numbers depend on torch's threads: measured, written down, and said in results."""

from __future__ import annotations

import json

import pytest
import torch

import tta
from experiments import cli
from experiments.records import environment
from experiments.records.environment import THREADS, threads_matter
from experiments.records.file import read_lines
from experiments.studies import thread_counts
from tests.helpers.nets import tiny
from tests.helpers.tiny_models import use_tiny_models

CPU = torch.device("cpu")
PAGE = thread_counts.PAGE


@pytest.fixture(autouse=True)
def own_files(monkeypatch, tmp_path):
    """Files of the test's own, and tiny networks."""
    use_tiny_models(monkeypatch)
    monkeypatch.setattr(thread_counts, "PAGE", tmp_path / "page.md")
    monkeypatch.setattr(thread_counts, "THREADS", tmp_path / "threads.json")
    monkeypatch.setattr(environment, "THREADS", tmp_path / "threads.json")
    environment._depending.cache_clear()
    (tmp_path / "page.md").write_text("a\n<!-- threads -->\n<!-- /threads -->\nb\n")
    yield
    environment._depending.cache_clear()


def _measure(*methods, threads=2):
    arguments = ["threads", "--batches", "1", "--batch-size", "4", "--threads", str(threads)]
    arguments += ["--models", "cifar10_resnet20_bn", "cifar10_resnet20_gn"]
    assert cli.main([*arguments, "--methods", *methods]) == 0
    return json.loads(thread_counts.THREADS.read_text())


def test_outputs_of_one_and_of_more_threads_are_compared(monkeypatch):
    serve = thread_counts.ThreadCounts._serve

    def drifting(self, subject, method, batches, threads):
        assert torch.get_num_threads() == 1
        return serve(self, subject, method, batches, threads) + (threads - 1) * (
            method.label == "tent"
        )

    monkeypatch.setattr(thread_counts.ThreadCounts, "_serve", drifting)
    found = _measure("source", "tent", "bn")
    same = {"same": True, "largest": 0.0, "decisions": 0}
    assert found["recipes"]["source"] == {name: same for name in found["recipes"]["source"]}
    assert found["recipes"]["bn"] == {"cifar10_resnet20_bn": same, "cifar10_resnet20_gn": None}
    assert {row["same"] for row in found["recipes"]["tent"].values()} == {False}
    page = thread_counts.PAGE.read_text()
    assert "| `tent` | `cifar10_resnet20_bn`, `cifar10_resnet20_gn` | 1e+00 | 0 |" in page
    assert "The same bit for bit: `bn`, `source`." in page
    assert set(_measure("lame")["recipes"]) == {"source", "tent", "bn", "lame"}
    assert set(_measure("lame", threads=3)["recipes"]) == {"lame"}  # others were with two


def test_what_needs_source_images_or_a_denoiser_gets_some():
    found = _measure("petta", "dda[steps=1]", "rmt", "foa")["recipes"]
    for name in ("petta", "dda[steps=1]", "rmt"):
        assert all(row is not None for row in found[name].values()), name
    # It fits neither network: that is no measurement, and is not said to be one.
    assert set(found["foa"].values()) == {None}
    page = thread_counts.PAGE.read_text()
    assert "Not measured, as they fit none of these networks: `foa`." in page
    assert "`foa`" not in page.partition("Not measured")[0]


def test_every_component_is_measured_unless_some_are_named():
    assert set(thread_counts.ThreadCounts([], None, 2, 1, 4).methods) == set(tta.list_methods())


def test_results_say_what_was_measured(tmp_path):
    rows = {"tent": False, "bn": True, "source": True}
    recipes = {name: {"net": {"same": same}, "other": None} for name, same in rows.items()}
    recipes["cafa"] = {"net": None}  # on no network
    environment.THREADS.write_text(json.dumps({"recipes": recipes}))
    arguments = ["run", "--images", "20", "--corruptions", "fog", "--quiet", "--device", "cpu"]
    arguments += ["--methods", "source", "bn", "tent", "bn+tent", "lame", "lame+tent"]
    assert cli.main([*arguments, "--output", str(tmp_path / "runs")]) == 0
    (path,) = (tmp_path / "runs").glob("*/results.jsonl")
    said = {row["method"]: row["threads_matter"] for row in read_lines(path, "method")}
    expected = {"source": False, "bn": False, "tent": True, "bn+tent": True}
    assert said == {**expected, "lame": None, "lame+tent": True}
    (header,) = read_lines(path, "run")
    assert header["hardware"]["torch_threads"] == 1
    config = tta.wrap(tiny("bn"), "bn").config
    assert threads_matter(config, torch.device("cuda")) is None
    assert "cafa" not in environment._depending()


def test_the_committed_table_is_that_of_the_figures():
    figures = json.loads(THREADS.read_text())
    # A component that is new is measured by `python -m experiments threads --methods NAME`.
    assert set(figures["recipes"]) <= set(tta.list_methods())
    table = thread_counts.render(figures)
    assert f"<!-- threads -->\n{table}<!-- /threads -->" in PAGE.read_text()
    # Where nothing is summed over images or weights, no number moves.
    assert all(row is None or row["same"] for row in figures["recipes"]["source"].values())
