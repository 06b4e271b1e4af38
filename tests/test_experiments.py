"""The runner's parts: method strings, shared domains, records, progress, tables, plots."""

from __future__ import annotations

import io
import json
from datetime import date
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image

import corruptions
import tta
from experiments.data import Collection, read_bundled
from experiments.records.config import StreamConfig
from experiments.records.environment import describe_environment
from experiments.records.file import JsonLines, make_run_folder, read_lines
from experiments.records.progress import Progress
from experiments.report.plots import plot_errors, plot_running, running
from experiments.report.run_table import describe, render_markdown, render_text, short_names
from experiments.run.domains import Shifts, corrupt_set, resolve_domains
from experiments.run.method_strings import parse_method, parse_methods
from experiments.run.scoring import iter_evaluate
from tests.helpers.nets import tiny

CPU = torch.device("cpu")


# Method strings


def test_a_component_goes_to_its_slot_whatever_the_order():
    expected = {"norm": "unmix_tns.cifar10", "update": "eata.cifar10", "output": "lame"}
    for text in ("unmix_tns+eata+lame", "lame+eata+unmix_tns", " eata + lame + unmix_tns "):
        assert parse_method(text, 10).slots == expected
    assert parse_method("source", 10).slots == {}


def test_presets_follow_the_number_of_classes_unless_given():
    assert parse_method("eata", 10).slots == {"update": "eata.cifar10"}
    assert parse_method("eata", 1000).slots == {"update": "eata.imagenet"}
    assert parse_method("eata.imagenet", 10).slots == {"update": "eata.imagenet"}
    assert parse_method("bn", 10).slots == {"norm": "bn"}  # has no presets
    assert parse_method("tent", 7).slots == {"update": "tent"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("eatta", "got 'eatta': did you mean 'eata'"),
        ("eata.cifar11", "did you mean 'cifar10'"),
        ("bn+alpha_bn", "bn and alpha_bn are both norm components"),
        ("source+lame", "source means no adaptation"),
        ("bn++lame", "got ''"),
        ("tent[lr]", r"such as|must set fields as in tent\[lr=1e-3"),
        ("tent[rl=0.1]", "rl"),
        pytest.param(f"tent[lr={'-' * 5000}1]", "must set fields as in tent", id="deep"),
    ],
)
def test_method_strings_that_cannot_be(text, message):
    with pytest.raises(ValueError, match=message):
        parse_method(text, 10)


def test_fields_are_set_in_brackets():
    method = parse_method("lame[neighbours=3] + tent[lr=1e-3, betas=(0.8, 0.9)]", 10)
    assert method.slots == {"output": "lame", "update": "tent.cifar10"}
    assert method.overrides == {"neighbours": 3, "lr": 1e-3, "betas": (0.8, 0.9)}
    adapter = parse_method("tent[lr=1e+0]", 10).wrap(tiny("bn"), batch_size=16)
    assert adapter.config.update.lr == 1.0


def test_methods_are_named_once():
    with pytest.raises(ValueError, match="tent twice"):
        parse_methods(["tent", "bn", "tent"], 10)
    with pytest.raises(ValueError, match="at least one"):
        parse_methods([], 10)


def test_a_parsed_method_wraps_what_it_says():
    net = tiny("bn")
    adapter = parse_method("unmix_tns+tent", 10).wrap(net, batch_size=16, seed=3)
    assert adapter.config.norm.name == "unmix_tns" and adapter.config.update.name == "tent"
    assert adapter.config.batch_size == 16 and adapter.config.seed == 3
    adapter.unwrap()
    adapter = parse_method("source", 10).wrap(net)
    images = torch.rand(2, 3, 16, 16)
    assert torch.equal(adapter(images), net(images))


# Domains


def test_an_image_is_corrupted_alike_whatever_is_chosen_with_it():
    images = read_bundled()
    few, more = images.balanced(10), images.balanced(40)
    where = np.searchsorted(more.index, few.index)
    for name in ("gaussian_noise", "elastic_transform"):
        a = corrupt_set(few, name, 3, 0, CPU)
        b = corrupt_set(more, name, 3, 0, CPU)
        assert torch.equal(a, b[torch.from_numpy(where)])
        assert not torch.equal(a, corrupt_set(few, name, 3, 1, CPU))


def test_a_domain_is_corrupted_once_for_all_streams():
    images = read_bundled().balanced(40)
    made = []
    shifts = Shifts(Collection("d", images), images, 0, CPU, lambda n, s: made.append((n, s)))
    for count in (40, 20):
        arguments = shifts.build_arguments(
            ["fog", "snow"], [5], lambda data, count=count: data.balanced(count)
        )
        for _ in range(2):
            stream = tta.streams.build("continual", severity=5, batch_size=16, **arguments)
            assert sum(len(batch) for batch in stream) == 2 * count
            batch = next(iter(stream))
            chosen = arguments["dataset"]
            index = chosen.index[batch.index.numpy()]
            wanted = corrupt_set(images, "fog", 5, 0, CPU)[np.searchsorted(images.index, index)]
            assert torch.equal(batch.images, wanted.float() / 255)
            assert batch.labels.tolist() == chosen.labels[batch.index.numpy()].tolist()
    assert made == [("fog", 5), ("snow", 5)]


def test_gradual_and_stored_and_smooth_streams_can_be_built():
    images = read_bundled().balanced(10)
    shifts = Shifts(Collection("d", images), images, 0, CPU)
    config = StreamConfig(name="g", scenario="gradual", domains=("fog",))
    assert config.severities == (1, 2, 3, 4, 5)
    arguments = shifts.build_arguments(config.domains, config.severities)
    levels = [b.severity for b in tta.streams.build("gradual", batch_size=10, **arguments)]
    assert levels == [1, 2, 3, 4, 5, 4, 3, 2, 1]
    arguments = shifts.build_arguments(["fog"], [5], smooth=True)
    batch = next(iter(tta.streams.build("continual", batch_size=4, **arguments)))
    assert batch.images.shape == (4, 3, 32, 32) and callable(arguments["transform"])
    stored = Collection("d", None, ("fog",), lambda name, severity: images)
    arguments = Shifts(stored, None, 0, CPU).build_arguments(["fog"], [5])
    batch = next(iter(tta.streams.build("continual", batch_size=4, **arguments)))
    assert torch.equal(batch.images[0], images[int(batch.index[0])][0].float() / 255)


@pytest.mark.parametrize("smooth", [False, True])
def test_clean_images_are_a_domain_too(smooth):
    images = read_bundled().balanced(10)
    shifts = Shifts(Collection("d", images), images, 0, CPU)
    arguments = shifts.build_arguments(["fog", "clean"], [5], smooth=smooth)
    (fog, clean) = tta.streams.build("continual", batch_size=10, **arguments)
    assert (clean.domain, clean.severity) == ("clean", 0)
    assert torch.equal(clean.images, images.tensor()[clean.index].float() / 255)
    assert not torch.equal(fog.images, images.tensor()[fog.index].float() / 255)


def test_domains_by_name():
    fly = Collection("d", read_bundled())
    assert resolve_domains([], fly) == tuple(corruptions.list_corruptions())
    assert resolve_domains(["saturate"], fly) == ("saturate",)
    assert resolve_domains([], fly, ["snow", "fog"]) == ("snow", "fog")
    assert resolve_domains(["fog"], fly, ["snow", "fog"]) == ("fog",)
    stored = Collection("d", None, ("speckle_noise", "snow", "shot_noise"), lambda n, s: None)
    assert resolve_domains([], stored) == ("shot_noise", "snow")
    assert resolve_domains([], stored, ["snow", "shot_noise"]) == ("snow", "shot_noise")
    assert resolve_domains([], stored, ["snow", "fog"]) == ("shot_noise", "snow")  # has no fog
    assert resolve_domains([], Collection("d", None, ("night", "day"), lambda n, s: None)) == (
        "day",
        "night",
    )
    with pytest.raises(ValueError, match="'gausian_noise': did you mean 'gaussian_noise'"):
        resolve_domains(["gausian_noise"], fly)
    with pytest.raises(ValueError, match="each domain once"):
        resolve_domains(["fog", "fog"], fly)


# Evaluation


def small_stream(scenario="continual", **options):
    images = read_bundled().balanced(40)
    shifts = Shifts(Collection("d", images), images, 0, CPU)
    arguments = shifts.build_arguments(["fog", "snow"], [5])
    return tta.streams.build(scenario, batch_size=16, **arguments, **options)


def evaluated(method, stream):
    adapter = parse_method(method, 10).wrap(tiny("bn"), batch_size=16)
    pairs = list(iter_evaluate(adapter, stream, CPU, lambda images: images))
    return [step.row for steps, _ in pairs for step in steps], pairs[-1][1]


def test_totals_agree_with_a_plain_loop():
    stream = small_stream()
    rows, totals = evaluated("source", stream)
    net = tiny("bn")
    wrong = {"fog": 0, "snow": 0}
    with torch.no_grad():
        for batch in stream:
            wrong[batch.domain] += int((net(batch.images).argmax(1) != batch.labels).sum())
    counts = {name: (tally.images, tally.errors) for name, tally in totals.by_domain.items()}
    assert counts == {name: (40, count) for name, count in wrong.items()}
    summary = totals.summary()
    assert summary["mean_error"] == pytest.approx(sum(wrong.values()) / 80)
    assert [row["images"] for row in rows] == [16, 16, 8, 16, 16, 8]
    assert summary["selected"] == 0 and summary["resets"] == 0


def test_resets_and_used_samples_are_counted():
    _, totals = evaluated("tent", small_stream("reset_each_shift"))
    assert totals.resets == 1  # the one before the first batch undoes nothing
    assert totals.selected == 80
    _, totals = evaluated("tent", small_stream(clock={"ratio": 2.0}))
    assert totals.selected == 16 + 8 + 16  # every second batch is late, and only predicted


def test_mixed_batches_are_scored_by_each_images_domain():
    rows, totals = evaluated("source", small_stream("mixed"))
    assert rows[0]["domain"] == "mixed"
    assert {name: tally.images for name, tally in totals.by_domain.items()} == {
        "fog": 40,
        "snow": 40,
    }


# Records


def test_lines_are_appended_whole_and_plain(tmp_path):
    path = tmp_path / "results.jsonl"
    for value in (1.5, float("nan")):
        with JsonLines(path) as lines:
            lines.write("batch", loss=value, shape=(1, 2), path=path)
    rows = list(read_lines(path))
    assert [row["loss"] for row in rows] == [1.5, None]
    assert rows[0] == {"kind": "batch", "loss": 1.5, "shape": [1, 2], "path": str(path)}
    with path.open("a") as file:
        file.write('{"kind": "ba')
    with pytest.raises(ValueError, match="line 3 is cut off"):
        list(read_lines(path))


def test_a_run_never_writes_into_anothers_folder(tmp_path, monkeypatch):
    monkeypatch.setattr("experiments.records.file.date", Mock(today=lambda: date(2026, 2, 3)))
    names = [make_run_folder(tmp_path, "x").name for _ in range(3)]
    assert names == ["2026-02-03-x", "2026-02-03-x-2", "2026-02-03-x-3"]


def test_environment_is_json():
    found = json.loads(json.dumps(describe_environment()))
    assert found["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert found["hardware"]["cores"] >= 1 and found["hardware"]["cpu"]


# Progress


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self):
        return True


def test_progress_is_a_bar_on_a_terminal_only():
    out = Terminal()
    progress = Progress(10, stream=out)
    progress.advance(5, "half")
    assert "half" in out.getvalue() and "50 %" in out.getvalue() and "left" in out.getvalue()
    before = len(out.getvalue())
    progress.say("a line that stays")
    # The bar goes away, the line is written whole, and the bar comes back below it.
    wiped, line, below = out.getvalue()[before:].partition("a line that stays\n")
    assert line and not wiped.strip() and "half" in below
    progress.clear()
    progress.say("done")
    assert out.getvalue().endswith(" \rdone\n")
    out = io.StringIO()
    progress = Progress(10, stream=out)
    for _ in range(5):
        progress.advance(1, "half")
    assert out.getvalue().count("\n") == 1 and "\r" not in out.getvalue()
    progress.skip(5)
    assert progress.total == 5 and progress.left() == "00:00 left"
    out = Terminal()
    progress = Progress(10, stream=out, quiet=True)
    progress.advance(5, "half")
    progress.note("more")
    progress.say("done")
    assert out.getvalue() == ""


# Tables and plots


def summary(method, errors, clean=0.1, **figures):
    names = corruptions.list_corruptions()[: len(errors)]
    return {
        "method": method,
        "domain_errors": dict(zip(names, errors, strict=True)),
        "mean_error": float(np.mean(errors)),
        "clean_error": clean,
        "images_per_second": 1234.5,
        "selected": 15000,
        "used": 0.451,
        "resets": 0,
        **figures,
    }


SUMMARIES = [
    summary("source", np.linspace(0.3, 0.7, 15), 0.1),
    summary("unmix_tns+eata", np.linspace(0.2, 0.4, 15), 0.15),
    summary("lame", np.linspace(0.8, 1.0, 15), 0.9),
]


@pytest.mark.parametrize("width", [200, 140, 80, 40])
def test_text_table_fits(width):
    text = render_text(SUMMARIES, width)
    assert max(map(len, text.splitlines())) <= width
    for word in ("source", "unmix_tns+eata", "30.0", "100.0", "mean", "45.1", "gauss"):
        assert word in text
    assert text.count("\nlame") == {200: 1, 140: 1, 80: 2, 40: 5}[width]


def test_markdown_table():
    lines = render_markdown(SUMMARIES).splitlines()
    rows = [line for line in lines if line.startswith("|")]
    assert len(rows) == 5 and len({row.count("|") for row in rows}) == 1
    assert "**20.0**" in rows[3] and "**" not in rows[4]
    assert "gauss = gaussian_noise" in lines[-1]


def test_short_names_are_distinct():
    names = corruptions.list_corruptions(extra=True)
    short = short_names(names)
    assert len(set(short.values())) == len(names) and short["fog"] == "fog"
    assert max(map(len, short.values())) <= 5


def test_the_description_comes_from_the_figures():
    text = describe(SUMMARIES)
    assert "(source) the model errs on 50.0%" in text
    assert "unmix_tns+eata brings that down most, to 30.0% (20.0 points)." in text
    assert "lame (90.0%) does worse than doing nothing." in text
    assert "after the stream lame is furthest from that with 90.0%" in text
    assert describe(SUMMARIES[1:2]) == "Lowest mean error: unmix_tns+eata with 30.0%."
    same = [SUMMARIES[0], summary("bn", np.linspace(0.3, 0.7, 15), None)]
    assert "bn makes no difference" in describe(same) and "clean" not in describe(same)


def test_plots_are_pictures(tmp_path):
    plot_errors(SUMMARIES, tmp_path / "a.png", "title")
    rows = [
        {"images": 10, "errors": i % 10, "domain": "fog" if i < 9 else "snow"} for i in range(20)
    ]
    plot_running({"source": rows, "tent": rows}, tmp_path / "b.png", "title", window=50)
    for name in ("a.png", "b.png"):
        with Image.open(tmp_path / name) as picture:
            assert picture.width > 800 and len(np.unique(picture)) > 10


def test_the_running_error_looks_back_on_the_window():
    seen, wrong = np.array([10, 20, 30, 40]), np.array([10, 10, 10, 15])
    assert running(seen, wrong, window=20).tolist() == [1.0, 0.5, 0.0, 0.25]
