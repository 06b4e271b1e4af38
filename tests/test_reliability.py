"""The study of reliability: its cells, what it measures, and the page made of the results."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import corruptions
import tta
from experiments import cli
from experiments.data import read_bundled
from experiments.studies import reliability, reliability_grid, reliability_page
from experiments.studies.reliability_episodes import UNSCORED
from experiments.studies.reliability_figures import Gap, estimator_errors, gap_of, mean_gap, points
from experiments.studies.reliability_grid import GRIDS, PARTS, Cell, Choice, Grid, cells, stream_of
from experiments.studies.reliability_paired import Played, estimates, paired, play, recovery
from experiments.studies.reliability_photos import load_photos, why_not
from experiments.studies.reliability_run import Runner, read_results
from experiments.sweep.benchmark import DOMAINS
from tests.helpers.nets import tiny
from tests.helpers.tiny_models import fake_load, use_tiny_models
from tta.core.registry import component

BN, GN = "cifar10_resnet20_bn", "cifar10_resnet20_gn"
FEW = Grid(
    visits=2, images=10, few=10, share=0.02, few_images=10, seeds=1, photos=4, rounds=2,
    photo_domains=("fog",),
)  # fmt: skip


@pytest.fixture(autouse=True)
def small(monkeypatch, tmp_path):
    """Tiny networks, three domains, and a grid of a handful of images."""
    use_tiny_models(monkeypatch)
    monkeypatch.setitem(GRIDS, "quick", FEW)
    domains = ("fog", "contrast")
    for name, stream in reliability_grid.BY_NAME.items():
        if stream.domains == DOMAINS and not stream.spec.own_severities:
            changed = replace(stream, domains=domains)
            monkeypatch.setitem(reliability_grid.BY_NAME, name, changed)
    monkeypatch.chdir(tmp_path)


def run(*arguments):
    return cli.main(["reliability", "--grid", "quick", "--quiet", "--device", "cpu", *arguments])


def results(path="runs/reliability/quick.jsonl"):
    with open(path) as file:
        return [json.loads(line) for line in file]


# Which cells


def test_the_grid_of_the_page_is_the_issue_s():
    found, _ = cells(GRIDS["page"], Choice(models=(BN, GN), guard="periodic"))
    first = [cell for cell in found if cell.part == 1]
    assert len({cell.key for cell in found}) == len(found)
    assert {cell.visits for cell in first} == {20}
    sizes = {(cell.stream, cell.batch_size) for cell in first}
    assert sizes == {("recurring_iid", 64), ("recurring_iid", 10), ("recurring_correlated", 10)}
    assert {cell.stream for cell in first} == {"recurring_iid", "recurring_correlated"}
    names = {cell.method.partition("[")[0].partition("+")[0] for cell in first}
    assert names == set(tta.list_methods(slot="update"))
    images = {cell.method.partition("[")[0]: cell.images for cell in first if not cell.guard}
    costly = {m for m in names if component(m).cost >= 10 or component(m).replays_source}
    assert {m for m, n in images.items() if n == 20} == costly >= {"cotta", "petal", "rmt"}
    assert set(images.values()) == {20, 50}
    seeds: dict[str, set[int]] = {}
    for cell in first:
        seeds.setdefault(cell.method.partition("+")[0], set()).add(cell.seed)
    assert {m for m, own in seeds.items() if len(own) == 3} == {
        "tent", "eta", "sar", "roid", "rotta",
    }  # fmt: skip
    assert all(
        cell.partner == cell.method.removesuffix("+periodic") for cell in first if cell.guard
    )
    second = {cell.stream for cell in found if cell.part == 2}
    assert len(second) == 8
    full, _ = cells(GRIDS["full"], Choice(parts=(1,), models=(GN,), guard="periodic"))
    assert {(cell.images, cell.seed) for cell in full} == {(50, 0), (50, 1), (50, 2)}


def test_what_is_not_there_is_left_out_in_words():
    found, missing = cells(FEW, Choice(models=(GN,), methods=("tent",), guard="nobody"))
    assert all(cell.guard is None for cell in found)
    assert "tent with a guard: there is no guard called nobody" in missing
    assert why_not(None, None) == "photographs: pass a folder with labels.json as --photos"


def test_the_recipe_has_all_streams_and_sizes(monkeypatch):
    monkeypatch.setattr(reliability_grid, "RECIPE", "tent")
    found, missing = cells(GRIDS["page"], Choice(parts=(3, 4, 5), models=(GN,)))
    assert not [text for text in missing if "recipe" in text]
    own = [cell for cell in found if cell.recipe]
    third = {cell.stream for cell in own if cell.part == 3}
    assert third >= {"class_sorted", "markov", "long_tailed", "label_shift", "clean", "walk"}
    sizes = {c.batch_size for c in own if c.part == 3 and c.stream == "continual"}
    assert sizes == {1, 4, 16, 64}
    assert {cell.stream for cell in own if cell.part == 4} == {*reliability_grid.EPISODES}
    photos = {(cell.stream, cell.batch_size) for cell in own if cell.part == 5}
    assert len(photos) == 4 * 3


@pytest.mark.parametrize("name", reliability_grid.BY_NAME)
def test_streams_of_any_length_can_be_built(name):
    """With the options that were made for more images."""
    cell = Cell(part=1, model=BN, stream=name, method="tent", batch_size=8, images=20, seed=0)
    config = stream_of(replace(cell, visits=3))
    data = np.zeros((20, 8, 8, 3), np.uint8), np.arange(20) % 10
    options = {k: v for k, v in config.options.items() if k != "total"}
    stream = tta.streams.build(
        config.scenario, data, ["fog", "snow"], transform=lambda x, *_, **__: x, batch_size=8,
        **options | ({"total": 40} if "total" in config.options else {}),
    )  # fmt: skip
    assert sum(len(batch) for batch in stream) > 0


# What is measured


def test_differences_are_paired_by_image():
    generator = np.random.default_rng(0)
    mine, source, partner = generator.random((3, 60)) < [[0.5], [0.3], [0.4]]
    places = np.repeat([0, 1], 30)
    found = paired(mine, source, partner, places)
    for place in (0, 1):
        rows = places == place
        gaps = [int(a) - int(b) for a, b in zip(mine[rows], source[rows], strict=True)]
        mean = sum(gaps) / 30
        error = (sum((g - mean) ** 2 for g in gaps) / 29 / 30) ** 0.5
        assert found["se"][place] == pytest.approx(error)
        assert found["errors"][place] - found["source"][place] == sum(gaps)
        assert found["partner"][place] == partner[rows].sum()
    row = {"visits_found": found}
    whole = gap_of(row)
    assert whole.points == pytest.approx(100 * (mine.mean() - source.mean()))
    assert whole.error == pytest.approx(50 * np.hypot(*found["se"]))
    assert gap_of(row, [1], "partner").points == pytest.approx(
        100 * (mine[30:].mean() - partner[30:].mean())
    )


def test_above_means_by_two_standard_errors():
    assert Gap(3.1, 1.0).above(1) and not Gap(2.9, 1.0).above(1)
    assert Gap(1.5, 0.2).text(1) == "**+1.5**" and Gap(1.5, 0.3).text(1) == "+1.5"
    assert mean_gap([Gap(1, 3), Gap(3, 4)]) == Gap(2.0, 2.5)
    assert points(-0.04) == "0.0" and points(-0.06) == "-0.1"


def test_estimates_are_compared_over_windows():
    batches = [("a", 0.9, 10, 5), ("a", 0.5, 10, 5), ("a", 0.5, 10, 10), ("a", 0.1, 10, 10)]
    found = estimates(batches, window=20)["a"]
    assert found["windows"] == 2
    assert found["mae"] == pytest.approx((abs(0.7 - 0.5) + abs(0.3 - 0.0)) / 2)
    assert found["estimate"] == pytest.approx(0.5) and found["truth"] == pytest.approx(0.25)
    assert estimates([("b", 0.5, 3, 1)])["b"]["windows"] == 1
    assert estimates([]) == {}
    big = estimates([("c", 0.5, 100, 50), ("c", 1.0, 100, 0)], window=20)["c"]
    assert big["windows"] == 2 and big["mae"] == 0.0


def test_recovery_counts_batches_until_the_twin_s_level():
    bad, good = np.ones(20, bool), np.zeros(20, bool)
    assert recovery([good] * 5, [good] * 5, back=2) == 0
    assert recovery([bad, bad, good, good, good], [good] * 5, back=2) == 2
    assert recovery([bad] * 3, [good] * 3, back=2) is None


def test_the_mean_error_is_over_shifted_domains():
    played = Played(
        wrong=[np.array([True, False]), np.array([True, True])],
        domains=["fog", "snow", "fog", "clean"],
    )
    assert played.mean_error() == pytest.approx((1.0 + 0.0) / 2)


def test_a_walk_s_error_is_over_images_also_where_every_batch_is_mixed():
    stream = tta.streams.build(
        "walk", read_bundled().balanced(20), transform=corruptions.corrupt, speed=1, total=64,
        batch_size=16,
    )  # fmt: skip
    subject = SimpleNamespace(preprocess=lambda x: x, device=torch.device("cpu"))
    played = play(tta.wrap(tiny("bn"), "source"), stream, subject)
    assert len({*played.domains}) > 1 and played.pairs
    assert played.mean_error() == played.all_wrong.mean()


def test_a_run_pairs_with_source_and_with_the_method_alone():
    arguments = ("--part", "1", "--models", GN, "--methods", "tent", "--guard", "periodic")
    assert run(*arguments, "--streams", "recurring_iid") == 0
    rows = {(r["batch_size"], r["method"]): r for r in results()}
    assert {*rows} == {(size, m) for size in (64, 10) for m in ("tent", "tent+periodic")}
    guarded, alone = rows[10, "tent+periodic"]["visits_found"], rows[10, "tent"]["visits_found"]
    assert guarded["images"] == [20, 20]
    assert guarded["source"] == alone["source"] and guarded["partner"] == alone["errors"]
    assert alone["partner"] == [None, None]
    assert rows[10, "tent"]["actions"] == {"learn": 8 // 2}
    assert "estimates" in rows[10, "tent"]
    page = (reliability.RUNS / "quick.md").read_text()
    assert "| tent + periodic | recurring, iid | 10 |" in page


def test_the_source_is_that_of_a_plain_loop(tmp_path):
    cell = Cell(part=1, model=GN, stream="recurring_iid", method="tent", batch_size=10, images=10,
                seed=0, visits=2)  # fmt: skip
    runner = Runner(tmp_path / "r.jsonl", tmp_path / "kept", torch.device("cpu"))
    row = runner.run(cell)
    subject, stream = runner._shown(cell)
    with torch.no_grad():
        wrong = [
            (subject.model(subject.preprocess(b.images)).argmax(1) != b.labels).sum()
            for b in stream
        ]
    assert sum(row["visits_found"]["source"]) == int(sum(wrong))


# Resumption


def test_what_is_done_is_not_run_again(capsys):
    arguments = ["--part", "1", "--models", GN, "--methods", "tent", "--guard", "periodic"]
    arguments += ["--streams", "recurring_iid"]
    assert run(*arguments, "--budget-minutes", "0") == 0
    assert not read_results(reliability.RUNS / "quick.jsonl")
    assert run(*arguments) == 0
    before = results()
    assert run(*arguments) == 0 and results() == before
    path = reliability.RUNS / "quick.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in before[1:]))
    assert run(*arguments) == 0
    after = results()
    assert len(after) == len(before)
    assert after[-1]["visits_found"] == before[0]["visits_found"]
    assert run(*arguments, "--again") == 0
    again = results()[len(after) :]
    assert [row["guard"] for row in again] == ["periodic", "periodic"]
    assert len(read_results(path)) == len(before)  # the later line counts


def test_a_cut_line_is_repaired():
    arguments = ["--part", "1", "--models", GN, "--methods", "tent", "--guard", "periodic"]
    arguments += ["--streams", "recurring_iid"]
    assert run(*arguments) == 0
    path = reliability.RUNS / "quick.jsonl"
    path.write_text(path.read_text()[:-40])
    assert run(*arguments) == 0
    assert len(read_results(path)) == 4


def test_shares_of_the_cells_are_all_of_them():
    found, _ = cells(GRIDS["page"], Choice(models=(BN, GN), guard="periodic"))
    shares = [reliability._share(found, f"{number}/3") for number in (1, 2, 3)]
    keys = [{cell.stream_key for cell in share} for share in shares]
    assert not keys[0] & keys[1] and not keys[0] & keys[2] and not keys[1] & keys[2]
    assert {cell.key for share in shares for cell in share} == {cell.key for cell in found}
    for wrong in ("0/2", "3/2", "1", "a/b"):
        with pytest.raises(ValueError, match="`shard` must be I/N"):
            reliability._share(found, wrong)


def test_mistakes_are_said_before_anything_runs(capsys):
    assert cli.main(["reliability", "--methods", "tents"]) == 2
    assert "`methods` must be names of updates or auto, got 'tents'" in capsys.readouterr().err
    assert cli.main(["reliability", "--streams", "recuring_iid"]) == 2
    assert "`streams` must be some of the parts'" in capsys.readouterr().err
    assert run("--part", "5", "--methods", "tent", "--guard", "periodic") == 0  # no photographs
    assert not (reliability.RUNS / "quick.jsonl").exists()


# Episodes, photographs, cost


@pytest.mark.parametrize("name", reliability_grid.EPISODES)
def test_episodes(name, tmp_path, monkeypatch):
    cell = Cell(part=4, model=GN, stream=name, method="tent", batch_size=8, images=20, seed=0,
                visits=2, recipe=True)  # fmt: skip
    runner = Runner(tmp_path / "r.jsonl", tmp_path / "kept", torch.device("cpu"))
    _, episode = runner._episode(cell)
    during = list(episode.during)
    images = torch.cat([batch.images for batch in during])
    labels = torch.cat([batch.labels for batch in during])
    told = {
        "bad_frames": lambda: (
            bool((images.flatten(1).isnan().all(1) <= (labels == UNSCORED)).all())
            and bool((labels == UNSCORED).float().mean() > 0.2)
            and images.nan_to_num().max() > 1
        ),
        "frozen_camera": lambda: bool((images == images[0]).all()) and len(images) == 20 * 8,
        "day_and_night": lambda: {b.domain for b in during} == {"brightness", "contrast"},
        "one_class": lambda: len(labels.unique()) == 1,
    }
    assert told[name]()
    row = runner.run(cell)
    found = row["visits_found"]
    assert found["images"][0] == int((labels >= 0).sum())
    assert found["images"][1] == 4 * 20
    assert row["recovery"] is None or 0 <= row["recovery"] < row["batches_after"]


def test_a_method_that_forgets_is_its_own_twin(tmp_path):
    """The model without adaptation is the same before and after anything."""
    cell = Cell(part=4, model=GN, stream="one_class", method="source", batch_size=8, images=20,
                seed=0)  # fmt: skip
    row = Runner(tmp_path / "r.jsonl", tmp_path / "kept", torch.device("cpu")).run(cell)
    assert row["recovery"] == 0
    assert row["visits_found"]["errors"] == row["visits_found"]["partner"]
    assert row["visits_found"]["se"] == [0.0, 0.0]


def test_bad_rows_are_shown_and_not_scored():
    class Subject:
        device = torch.device("cpu")
        preprocess = staticmethod(lambda images: images)

    class Adapter:
        health = None

        def __call__(self, images):
            return torch.eye(3)[[0, 1, 2, 0]]

    (batch,) = tta.streams.build(
        "continual", (np.zeros((4, 8, 8, 3), np.uint8), np.array([0, 1, 2, 1])), ["clean"],
        batch_size=4,
    )  # fmt: skip
    shown = replace(batch, labels=torch.tensor([UNSCORED, 1, 0, 0]))
    played = play(Adapter(), [shown], Subject())
    assert played.all_wrong.tolist() == [False, True, False] and len(played.domains) == 3


def test_cost_is_a_ratio_of_interleaved_runs(monkeypatch):
    assert run("--part", "6", "--models", GN, "--methods", "tent", "--guard", "periodic") == 0
    (row,) = results()
    assert row["ratio"] > 0 and row["twin"] > 0
    assert row["actions"] == {"learn": FEW.rounds + 3}
    assert "| tent+periodic |" in (reliability.RUNS / "quick.md").read_text()


def test_photographs_are_read_from_a_folder(tmp_path, monkeypatch):
    from PIL import Image

    generator = np.random.default_rng(0)
    named = {}
    for number in range(60):
        pixels = generator.integers(0, 255, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number:03}.jpg")
        named[f"{number:03}.jpg"] = 7 * number
    (tmp_path / "labels.json").write_text(json.dumps(named))
    weights = tmp_path / "weights.pth"
    weights.write_bytes(b"")
    assert why_not(tmp_path, weights) is None

    def load(name, checkpoint, match):
        assert (name, checkpoint, match) == ("timm:some", weights, "order")
        return fake_load(BN)

    monkeypatch.setattr("experiments.studies.reliability_photos.models.load", load)
    subject = load_photos("some", tmp_path, weights, 3, torch.device("cpu"))
    assert len(subject.clean) == 3 and sum(len(y) for _, y in subject.source) == 56
    shown = {int(label) for label in subject.clean.labels}
    assert not shown & {int(label) for _, y in subject.source for label in y}


# The page


def _row(method, errors, guard=None, **rest):
    cell = Cell(part=1, model=GN, stream="recurring_iid", method=method, batch_size=64, images=50,
                seed=0, visits=2, guard=guard,
                partner=None if guard is None else method.removesuffix(f"+{guard}"))  # fmt: skip
    count = len(errors)
    found = {
        "images": [1000] * count, "errors": errors, "source": [300] * count, "se": [0.01] * count,
        "partner": [None] * count if guard is None else [250] * count,
        "partner_se": [None] * count if guard is None else [0.001] * count,
    }  # fmt: skip
    base = vars(cell) | {
        "visits_found": found,
        "mean_error": sum(errors) / 1000 / count,
        "actions": {"learn": 9, "skip": 1},
        "estimates": {"aetta": {"estimate": 0.6, "truth": 0.5, "mae": 0.2, "windows": 2}},
        "seconds": 1.0,
        "date": "2026-01-01",
        "about": {},
    }
    return json.loads(json.dumps({**base, **rest}))


def test_the_page_says_what_is_reached_and_what_is_not():
    rows = [_row("tent", [290, 350]), _row("tent+periodic", [300, 310], "periodic")]
    page = reliability_page.render(rows)
    # Alone: visit 2 is 5 points above source, by four standard errors more than 1.
    assert (
        "| tent + periodic | recurring, iid | 64 | +2.0 | **+5.0 (1)** | **+6.0** | +0.5 "
        "| +1.0 (0) | +1.0 |  | skip 10.0% |" in page
    )
    assert "no visit above source + 1 | **0 of 1** | 1 of 1 |" in page
    assert "the last visit no worse than the first | **0 of 1** | 1 of 1 |" in page
    better = [_row("tent", [250, 250]), _row("tent+periodic", [270, 270], "periodic")]
    page = reliability_page.render(better)
    assert "at most 0.5 lost where the method alone is below source |  | **0 of 1** |" in page
    assert "| **+2.0** | skip 10.0% |" in page
    assert "kept out of it" in page and ", ".join(reliability_grid.TUNED["streams"]) in page
    assert "| aetta | all | 2 | 4 | 20.0 | +10.0 |" in page
    assert [row[1] for row in estimator_errors(rows)] == ["all", "with a guard", "without"]


def test_the_record_stands_beside_guarded_methods(monkeypatch):
    record = {(GN, "walk", 64): {"tent": {0: 40.0}, "source": {0: 30.0}, "eata": {0: 28.0}}}
    monkeypatch.setattr("experiments.studies.reliability_record.record", lambda: record)
    rows = [
        _row("tent+periodic", [305], "periodic", part=2, stream="walk", images=500, visits=1,
             partner=None),
        _row("auto", [390], part=3, stream="walk", images=500, visits=1, recipe=True),
    ]  # fmt: skip
    page = reliability_page.render(rows)
    assert "| tent + periodic | **+10.0** → +0.5 |" in page
    assert "streams of the record: no cell above source + 1 | **0 of 1** | 1 of 1 |" in page
    assert "| walk | 64 | 500 | 39.0 | **+9.0** | 28.0 eata | **+11.0** | skip 10.0% |" in page
    assert "at most 7 points, at worst 11.0 |  | **0 of 1** |" in page


def test_long_visits_of_part_2_are_shown_visit_by_visit(monkeypatch):
    record = {(GN, "recurring", 64): {"tent": {0: 89.2}, "source": {0: 37.9}}}
    monkeypatch.setattr("experiments.studies.reliability_record.record", lambda: record)
    long = {"part": 2, "stream": "recurring", "images": 200, "visits": 20, "partner": None}
    page = reliability_page.render([_row("tent+periodic", [300, 400], "periodic", **long)])
    assert "| tent + periodic | recurring | 64 | +51.3 |  |  | +5.0 | **+10.0 (1)** |" in page
    assert "domains that come back: no visit above source + 1 |  | **0 of 1** |" in page
    assert "| tent + periodic | **+51.3** → **+5.0** |" in page  # and in its own part


def test_several_seeds_are_one_cell():
    rows = [
        _row("tent", [300, 300]),
        _row("tent", [340, 340], seed=1),
    ]
    page = reliability_page.render(rows)
    assert "| tent | recurring, iid | 64 | +2.0 | +2.0 (0) |" in page
    assert "several seeds: tent" in page


def test_refusals_are_said_and_every_part_has_a_section():
    rows = [_row("tent", [300]), _row("rotta", [300]) | {"refused": "..."}]
    page = reliability_page.render(rows)
    assert "refused, since the model has no BatchNorm: rotta" in page
    assert set(reliability_page._SECTIONS) == set(PARTS)
