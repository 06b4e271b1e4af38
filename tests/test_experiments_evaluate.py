"""`experiments.evaluate`: models and streams that are Python objects, with the runner's numbers."""

from __future__ import annotations

from contextlib import contextmanager
from types import SimpleNamespace
from unittest.mock import ANY

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import experiments
import models
import tta
from experiments import cli
from experiments.records.config import RunConfig, StreamConfig
from experiments.records.file import read_header, read_lines
from experiments.run.metrics import METRICS, Metric
from experiments.run.run import Run, load_setup
from experiments.run.subject import Subject
from tests.helpers.nets import tiny

TIMES = {"seconds", "images_per_second", "peak_memory"}
PIXELS = {"mean": 0, "std": 1}


def small_stream(scenario="continual", classes=10, **options):
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(32, 3, 16, 16, generator=generator)
    sets = {name: (images.sqrt() if name == "b" else images, torch.arange(32) % classes)
            for name in "ab"}  # fmt: skip
    return tta.streams.build(scenario, None, sets, batch_size=8, **options)


@contextmanager
def unchanged(model):
    """Check that a block leaves weights, buffers and flags as they are."""
    values = {name: value.clone() for name, value in model.state_dict().items()}
    flags = [module.training for module in model.modules()]
    trained = [p.requires_grad for p in model.parameters()]
    yield
    after = model.state_dict()
    assert list(after) == list(values)
    assert all(torch.equal(after[name], value) for name, value in values.items())
    assert [module.training for module in model.modules()] == flags
    assert [p.requires_grad for p in model.parameters()] == trained


def lines(folder):
    """The numbers of a run without times."""
    return [
        {k: v for k, v in row.items() if k not in TIMES}
        for row in read_lines(folder / "results.jsonl")
        if row["kind"] in ("batch", "domain", "summary", "method")
    ]


def test_numbers_are_those_of_the_command_line(tmp_path):
    arguments = ["run", "--methods", "source", "tent", "--corruptions", "fog", "contrast"]
    arguments += ["--images", "20", "--batch-size", "10", "--device", "cpu", "--seed", "3"]
    assert cli.main([*arguments, "--quiet", "--output", str(tmp_path / "cli")]) == 0
    (folder,) = (tmp_path / "cli").iterdir()
    setup = load_setup(RunConfig.from_dict(read_header(folder)["config"]))
    model, info = models.load("cifar10_resnet20_bn")
    with unchanged(model):
        found = experiments.evaluate(
            model,
            setup.streams[0],
            ["source", "tent"],
            tmp_path / "python",
            source=info.source,
            mean=info.mean,
            std=info.std,
            clean=setup.clean,
            seed=3,
            device="cpu",
            show="nothing",
        )
    assert lines(found.folder) == lines(folder)
    assert found.folder == tmp_path / "python" and len(lines(folder)) == 2 * (4 + 2 + 1 + 1)
    expected = {row["method"]: row["mean_error"] for row in read_lines(folder / "results.jsonl",
                                                                       "summary")}  # fmt: skip
    shown = found.summaries["continual"]
    assert {name: row["mean_error"] for name, row in shown.items()} == expected


def test_streams_configs_and_a_report(tmp_path, capsys):
    net = tiny("bn").train()
    configs = ["source", tta.get_config("tent", lr=1e-2), "tent"]
    streams = {"slow": small_stream(), "mixed": small_stream("mixed")}
    with unchanged(net):
        found = experiments.evaluate(net, streams, configs, tmp_path / "a", **PIXELS)
    assert "Without adaptation (source)" in capsys.readouterr().out
    assert list(found.summaries) == ["slow", "mixed"]
    assert list(found.summaries["slow"]) == ["source", "tent[lr=0.01]", "tent"]
    assert "tent[lr=0.01]" in str(found) and str(found).count("source") == 2
    assert all((found.folder / f"{name}-errors.png").is_file() for name in streams)
    page = found.report()
    assert "tent[lr=0.01]" in page.read_text() and page.is_relative_to(found.folder)
    assert cli.main(["report", str(found.folder), "--output", str(tmp_path / "r")]) == 0


def test_a_registered_metric_reaches_the_results_file(tmp_path, monkeypatch):
    def top5(predictions):
        best = np.argsort(-predictions.log_probs, axis=1)[:, :5]
        return (best != predictions.labels[:, None]).all(1)

    monkeypatch.setitem(METRICS, "top5_error", Metric("top5_error", top5, "top-5 error", 1.0))
    found = experiments.evaluate(
        tiny("bn"), small_stream(), "source", tmp_path / "a", show="nothing", **PIXELS
    )
    summary = found.summaries["continual"]["source"]
    rows = list(read_lines(found.folder / "results.jsonl", "batch"))
    mean = sum(row["top5_error"] * row["images"] for row in rows) / summary["images"]
    assert 0 < summary["top5_error"] < 1 and summary["top5_error"] == pytest.approx(mean)
    assert all("top5_error" in r for r in read_lines(found.folder / "results.jsonl", "domain"))


def test_an_adapter_is_evaluated_as_it_is(tmp_path):
    net = tiny("bn")
    adapter = tta.wrap(net, "tent", lr=0.05, batch_size=8)
    for batch in small_stream(seed=9):
        adapter(batch.images)
    before = adapter.state()
    streams = {"first": small_stream(), "again": small_stream()}
    found = experiments.evaluate(adapter, streams, out=tmp_path / "a", show="nothing", **PIXELS)
    after = adapter.state()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    (one,), (other,) = (rows.values() for rows in found.summaries.values())
    assert one["method"] == "bn+tent" and one["selected"] == 64 and one["nll"] == other["nll"]
    outputs = [adapter(batch.images) for batch in small_stream()]
    labels = torch.cat([batch.labels for batch in small_stream()])
    wrong = torch.cat(outputs).argmax(1) != labels
    assert one["error"] == pytest.approx(float(wrong.float().mean()))
    for name, value in (("methods", ["tent"]), ("logits", 0), ("num_classes", 10)):
        with pytest.raises(ValueError, match=f"`{name}` must be left out"):
            experiments.evaluate(adapter, small_stream(), **{name: value}, **PIXELS)


def test_pixels_may_be_prepared_by_a_function(tmp_path):
    options = {"methods": ["source"], "show": "nothing"}
    mean, std = (0.2, 0.4, 0.5), (0.3, 0.2, 0.1)
    scale = [torch.tensor(v).view(1, 3, 1, 1) for v in (mean, std)]
    found = [
        experiments.evaluate(tiny("bn"), small_stream(), out=tmp_path / str(i), **options, **how)
        for i, how in enumerate(
            [
                {"mean": mean, "std": std},
                {"preprocess": lambda x: (x - scale[0]) / scale[1]},
                {"mean": 0, "std": 1},
            ]
        )
    ]
    nll = [result.summaries["continual"]["source"]["nll"] for result in found]
    assert nll[0] == nll[1] != nll[2]


class Returning(nn.Module):
    """A tiny network whose logits are a part of what it returns."""

    def __init__(self, change):
        super().__init__()
        self.net, self.change = tiny("bn"), change

    def forward(self, x):
        return self.change(self.net(x))


@pytest.mark.parametrize(
    ("change", "spec"),
    [
        (lambda z: {"loss": None, "logits": z}, None),
        (lambda z: {"aux": z.sum(), "out": z}, "out"),
        (lambda z: (z.mean(1), z), 1),
        (lambda z: SimpleNamespace(logits=z), None),
        (lambda z: {"half": z / 2}, lambda result: 2 * result["half"]),
    ],
)
def test_a_model_may_return_more_than_logits(change, spec, tmp_path):
    options = {"methods": ["source", "tent", "lame"], "show": "nothing", **PIXELS}
    images = torch.rand(8, 3, 16, 16), torch.arange(8) % 10
    pairs = [(images[0][i], int(images[1][i])) for i in range(8)]
    plain = experiments.evaluate(
        tiny("bn"), small_stream(), out=tmp_path / "plain", clean=pairs, **options
    )
    model = Returning(change)
    with unchanged(model):
        found = experiments.evaluate(
            model, small_stream(), out=tmp_path / "a", logits=spec, clean=pairs, **options
        )
    assert lines(found.folder) == [
        row | ({"config": ANY} if row["kind"] == "method" else {}) for row in lines(plain.folder)
    ]
    (rows,) = found.summaries.values()
    assert (rows["tent"]["forwards"], rows["tent"]["backwards"]) == (1, 1)
    assert rows["source"]["backwards"] == 0
    # An adapter that was told is evaluated without being told again.
    adapter = tta.wrap(Returning(change), "lame", batch_size=8, logits=spec)
    given = experiments.evaluate(
        adapter, small_stream(), out=tmp_path / "b", show="nothing", **PIXELS
    )
    (row,) = given.summaries["continual"].values()
    assert row["nll"] == rows["lame"]["nll"]


def test_logits_that_are_not_there_are_said(tmp_path):
    options = {"methods": "source", "show": "nothing", **PIXELS}
    with pytest.raises(TypeError, match="`logits`='scores' must lead to a tensor"):
        experiments.evaluate(
            tiny("bn"), small_stream(), out=tmp_path / "a", logits="scores", **options
        )


def test_a_model_without_a_linear_head_says_what_its_features_are(tmp_path):
    class Cosine(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU())
            self.head = nn.Module()
            self.weight = nn.Parameter(torch.randn(10, 6, generator=torch.Generator()))

        def features(self, x):
            return self.body(x).mean((2, 3))

        def forward(self, x):
            return 9 * F.normalize(self.features(x), dim=1) @ F.normalize(self.weight, dim=1).T

    model = Cosine()
    with unchanged(model):
        found = experiments.evaluate(
            model,
            small_stream(),
            ["lame", "bn"],
            tmp_path / "a",
            num_classes=10,
            features=lambda net, x: net.features(x),
            show="nothing",
            **PIXELS,
        )
    assert list(found.summaries["continual"]) == ["lame", "bn"]
    rule = experiments.evaluate(
        model, small_stream(), "bn", tmp_path / "b", num_classes=10, activation="sigmoid",
        show="nothing", **PIXELS,
    )  # fmt: skip
    method = next(read_lines(rule.folder / "results.jsonl", "method"))
    assert method["config"]["activation"] == "sigmoid"


def test_warming_up_leaves_the_buffers_of_a_model(tmp_path, monkeypatch):
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = tiny("bn")
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            self.calls += 1
            return self.net(x) + self.calls + torch.rand(())

    warmed = []
    real = Subject.warm_up

    def warm_up(subject, images):
        real(subject, images)
        warmed.append((float(subject.model.calls), len(images)))

    monkeypatch.setattr(Subject, "warm_up", warm_up)
    drawn = []
    whole = Run._warm_up

    def seeded(run, method, images):
        torch.manual_seed(0)
        whole(run, method, images)
        drawn.append(torch.rand(()))

    monkeypatch.setattr(Run, "_warm_up", seeded)
    model = Counting()
    experiments.evaluate(model, small_stream(), "source", tmp_path / "a", show="nothing", **PIXELS)
    assert warmed == [(1, 8)] * 3 and model.calls == 0
    torch.manual_seed(0)
    assert drawn == [torch.rand(2)[1]]  # as after one pass


def test_results_go_to_a_new_folder_under_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for count in (1, 2):
        experiments.evaluate(tiny("gn"), small_stream(), "source", show="nothing", **PIXELS)
        names = sorted(path.name for path in (tmp_path / "runs").iterdir())
        assert len(names) == count and "evaluation" in names[-1]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"model": "cifar10_resnet20_bn"}, TypeError, "torch.nn.Module or a tta.Adapter"),
        ({"stream": [1]}, TypeError, "tta.streams.Stream or several by name, got list"),
        ({"stream": {}}, TypeError, "an empty mapping"),
        ({"stream": {"a/b": None}}, ValueError, "usable in file names, got 'a/b'"),
        ({"stream": {"..": None}}, ValueError, "usable in file names, got '..'"),
        ({"stream": {"a": None}}, TypeError, "got NoneType as 'a'"),
        ({"stream": small_stream().from_step(2)}, ValueError, "begin at its first batch"),
        ({"stream": small_stream(classes=11)}, ValueError, "labels in 0..9.*got the label 10"),
        ({"mean": None}, ValueError, "given together"),
        ({"mean": None, "std": None}, ValueError, "mean=0, std=1"),
        ({"std": 0}, ValueError, "`std`"),
        ({"mean": (0.5, 0.5), "std": (1, 1)}, ValueError, "`mean` .* 3 channels .* got 2 of them"),
        ({"mean": 0, "std": (1, 1, 1, 1)}, ValueError, "`std` .* 3 channels .* got 4 of them"),
        ({"preprocess": 1}, TypeError, "`preprocess` must be callable"),
        ({"preprocess": lambda x: None}, TypeError, "`preprocess` must return .* 8 .* got None"),
        ({"preprocess": lambda x: x[:3]}, TypeError, "got a tensor of shape .3, 3, 16, 16."),
        ({"clean": "x"}, TypeError, "`clean` must have __len__ .* got 'x'; open the images"),
        ({"logits": 1.5}, TypeError, "`logits` must be a key"),
        ({"num_classes": 0}, ValueError, "`num_classes`"),
        ({"features": "fx"}, ValueError, "`features` must name a module .* did you mean 'fc'"),
        ({"activation": "relu"}, ValueError, "`activation`"),
        ({"methods": []}, ValueError, "at least one method"),
        ({"methods": ["tennt"]}, ValueError, "did you mean 'tent'"),
        ({"methods": ["tent", "tent"]}, ValueError, "tent twice"),
        ({"methods": [1]}, TypeError, "names or what tta.get_config returns, got int"),
        ({"methods": 1}, TypeError, "a list of names or configs"),
        ({"source": iter([])}, TypeError, "got an iterator"),
        ({"source": 1}, TypeError, "batches"),
        ({"seed": -1}, ValueError, "`seed`"),
        ({"show": "some"}, ValueError, "`show`"),
        ({"device": "nowhere"}, ValueError, "`device`"),
        ({"out": __file__}, ValueError, "got a file"),
    ],
)
def test_nonsense_is_refused_in_words(change, error, message, tmp_path):
    given = {"model": tiny("bn"), "stream": small_stream(), "out": tmp_path / "a", **PIXELS}
    with pytest.raises(error, match=message):
        experiments.evaluate(**{**given, **change})
    assert not (tmp_path / "a").exists()


def test_a_folder_with_results_is_refused(tmp_path):
    folder = tmp_path / "a"
    folder.mkdir()
    (folder / "results.jsonl").write_text("")
    with pytest.raises(ValueError, match="holds results"):
        experiments.evaluate(tiny("bn"), small_stream(), out=folder, **PIXELS)


def test_what_is_not_there_is_said():
    with pytest.raises(AttributeError, match="evaluated"):
        experiments.evaluated  # noqa: B018


def test_a_stream_says_its_own_batch_size():
    config = StreamConfig(name="s", scenario="single", domains=(), options={"window": 4})
    assert config.size(64) == 4
    assert StreamConfig(name="s", scenario="single", domains=()).size(64) == 1
    assert StreamConfig(name="s", scenario="mixed", domains=()).size(64) == 64
