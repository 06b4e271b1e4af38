"""Accuracy when time counts: hand-computed figures, from the functions, a stream and a report."""

from __future__ import annotations

import pytest
import torch

import tta
from experiments import evaluate
from experiments.report.collect import by_setting, collect
from experiments.report.report import Report
from experiments.report.tables import TIME_NOTES, csv_rows, setting_table
from experiments.run.metrics import METRICS
from experiments.run.scoring import iter_evaluate
from experiments.run.totals import Totals
from experiments.run.utilities import UTILITIES, amortised, continuous, discrete
from tests.helpers.nets import tiny

CPU = torch.device("cpu")


def test_the_three_figures_by_hand():
    right = [True, True, False, True, False]
    assert discrete(right, [False, True, True, False, False]) == pytest.approx(2 / 5)
    assert discrete(right, True) == 0.0 and discrete(right, False) == pytest.approx(3 / 5)
    # 1 / (1 + 3/3), 1 / (1 + 6/3) and 1 / (1 + 0/3) for the three right ones.
    assert continuous(right, [3, 6, 1, 0, 1], 3.0) == pytest.approx((1 / 2 + 1 / 3 + 1) / 5)
    assert continuous(right, 0.0, 1.0) == pytest.approx(3 / 5)
    learning, frozen = [0.5, 0.6, 0.7, 0.8], [0.1, 0.2, 0.3, 0.4]
    # Batches begin with 0, 2, 4 and 6 used: the third is the last that is learned from.
    assert amortised(learning, frozen, [2.0] * 4, 5.0) == pytest.approx((0.5 + 0.6 + 0.7 + 0.4) / 4)
    assert amortised(learning, frozen, [2.0] * 4, 0.0) == pytest.approx(0.25)
    assert amortised(learning, frozen, [0.0] * 4, 1.0) == pytest.approx(0.65)
    with pytest.raises(ValueError, match="`half_life` must be"):
        continuous(right, 1.0, 0.0)
    with pytest.raises(ValueError, match="`overhead` must be"):
        amortised(learning, frozen, [1.0] * 4, -1.0)


def made(**clock):
    generator = torch.Generator().manual_seed(0)
    data = torch.rand(64, 3, 16, 16, generator=generator), torch.arange(64) % 10
    return tta.streams.build("continual", data, domains=["clean"], batch_size=16, clock=clock)


def evaluated(stream, method="tent.cifar10", totals=None):
    adapter = tta.wrap(tiny("bn"), method, batch_size=16)
    (*_, (_, found)) = blocks = list(iter_evaluate(adapter, stream, CPU, lambda x: x, totals))
    return [step for steps, _ in blocks for step in steps], found


def right(step):
    return int((~step.scores.values["error"].astype(bool)).sum())


def test_a_run_has_the_figures_that_its_clock_asks_for():
    steps, totals = evaluated(made(ratio=2.0, queue=1, half_life=3.0))
    # Batches 0, 1 and 3 are answered after 2, 3 and 3 plain forwards; batch 2 is evicted, and
    # predicted beside in 1.
    assert [step.row["late"] for step in steps] == [False, False, True, False]
    assert [step.row["latency"] for step in steps] == [2.0, 3.0, 1.0, 3.0]
    hits = [right(step) for step in steps]
    assert sum(hits) > 0
    summary = totals.summary()
    assert summary["discrete"] == pytest.approx((hits[0] + hits[1] + hits[3]) / 64)
    worth = [hits[0] * 3 / 5, hits[1] / 2, hits[2] * 3 / 4, hits[3] / 2]
    assert summary["continuous"] == pytest.approx(sum(worth) / 64)
    assert summary["amortised"] is None
    steps, totals = evaluated(made(ratio=3.0, eta=0.0, overhead=3.0))
    assert [step.row["selected"] for step in steps] == [16, 16, 0, 0]
    assert totals.summary()["amortised"] == totals.summary()["discrete"]
    assert totals.summary()["amortised"] == pytest.approx(1 - totals.error)
    assert totals.late == 0 and totals.summary()["continuous"] is None


def test_the_figures_go_on_where_they_were(monkeypatch):
    times = iter(range(10**6))
    monkeypatch.setattr("tta.streams.clock._now", lambda: float(next(times)))
    for clock in (
        {"ratio": 2.0, "queue": 1, "half_life": 3.0, "overhead": 2.0},
        # Three readings are a second apart: a ratio of 1, and no extra time.
        {"measured": True, "eta": 0.0, "half_life": 1.0, "overhead": 1.0},
    ):
        _, whole = evaluated(made(**clock), "source")
        adapter = tta.wrap(tiny("bn"), "source", batch_size=16)
        stepper = iter_evaluate(adapter, made(**clock), CPU, lambda x: x, every=2)
        _, part = next(stepper)
        numbers, tensors = part.state()
        again = Totals.from_state(numbers | {"utilities": dict(numbers["utilities"])}, tensors)
        stepper.close()
        assert again.batches == 2 and again.utilities == part.utilities
        _, found = evaluated(made(**clock), "source", again)
        assert {name: found.summary()[name] for name in UTILITIES} == {
            name: whole.summary()[name] for name in UTILITIES
        }


def test_the_time_that_was_used_is_not_given_again(monkeypatch):
    times = iter(range(0, 10**6, 2))
    plain = {"now": 0.0}

    def now():  # an adaptive forward takes 3, a plain one 1
        step = next(times) // 2 % 3
        plain["now"] += (0.0, 3.0, 1.0)[step]
        return plain["now"]

    monkeypatch.setattr("tta.streams.clock._now", now)
    clock = {"measured": True, "eta": 0.0, "overhead": 3.0}
    steps, totals = evaluated(made(**clock))
    assert [step.row["selected"] for step in steps] == [16, 16, 0, 0]
    assert [step.row["latency"] for step in steps] == [3.0, 3.0, 1.0, 1.0]
    adapter = tta.wrap(tiny("bn"), "tent.cifar10", batch_size=16)
    _, part = next(iter_evaluate(adapter, made(**clock), CPU, lambda x: x, every=1))
    assert part.batches == 1 and part.utilities.spent == 2.0
    steps, totals = evaluated(made(**clock), totals=part)
    assert [step.row["selected"] for step in steps] == [16, 0, 0]
    assert totals.utilities.spent == 4.0


def test_a_report_shows_them_where_there_are_some(tmp_path):
    net = tiny("bn")
    asked = made(ratio=2.0, queue=1, half_life=3.0)
    plain = tta.streams.build(
        "sorted", (torch.rand(20, 3, 16, 16), torch.arange(20) % 10), domains=["clean"]
    )
    found = evaluate(
        net, {"timed": asked, "plain": plain}, ["source", "tent.cifar10"], tmp_path / "run",
        mean=0.0, std=1.0, show="nothing",
    )  # fmt: skip
    results = collect([found.folder])
    tables = {s.stream: setting_table(m) for s, m in by_setting(results).items()}
    header = tables["timed"].header
    assert "discrete" in header and "continuous" in header and "amortised" not in header
    assert not set(UTILITIES) & set(tables["plain"].header)
    column = header.index("discrete")
    for row in tables["timed"].rows:
        value = found.summaries["timed"][row[0]]["discrete"]
        assert row[column] == f"{100 * value:.1f}"
    best = max(range(2), key=lambda i: float(tables["timed"].rows[i][column]))
    assert (best, column) in tables["timed"].best  # the highest, where errors want the lowest
    page = Report(results, tmp_path / "report", "all").execute().read_text()
    assert "late ones are wrong" in page and "when learning ends" not in page
    assert "continuous" in csv_rows(results[::-1]).splitlines()[0]
    assert set(TIME_NOTES) == set(UTILITIES) and not set(UTILITIES) & set(METRICS)
