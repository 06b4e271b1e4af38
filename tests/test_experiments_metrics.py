"""Metrics against plain loops, passes against what methods are known to cost."""

from __future__ import annotations

import math
import os

import numpy as np
import pytest
import torch
from torchmetrics.functional.classification import multiclass_calibration_error

import tta
from experiments.records.file import plain as plain_types
from experiments.run.cost import Passes, PeakMemory
from experiments.run.method_strings import parse_method
from experiments.run.metrics import METRICS, SMALLEST, Metric, score
from experiments.run.scoring import iter_evaluate
from experiments.run.totals import BINS, Totals
from tests.helpers.nets import tiny
from tta.core.component import log_probabilities

CPU = torch.device("cpu")


def outputs(seed=0, rows=40, classes=10):
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(rows, classes, generator=generator)
    return logits, torch.randint(0, classes, (rows,), generator=generator)


def totals_of(batches, domains=None):
    totals = Totals(10)
    for number, (log_probs, labels) in enumerate(batches):
        scores = score(log_probs.argmax(1), log_probs, labels)
        row = {
            "images": len(labels),
            "seconds": 0.5,
            "selected": 3,
            "resets": 0,
            "late": number > 0,
        }
        row["concentration"] = scores.concentration
        names = domains or ["fog"] * len(labels)
        totals.add(row, scores, names, [5] * len(labels))
    return totals


def test_scores_agree_with_plain_loops():
    logits, labels = outputs()
    log_probs = logits.log_softmax(1)
    scores = score(logits.argmax(1), log_probs, labels)
    for i, label in enumerate(labels.tolist()):
        p = np.exp(logits[i].double().numpy())
        p /= p.sum()
        hot = np.eye(10)[label]
        assert scores.values["nll"][i] == pytest.approx(-math.log(p[label]), rel=1e-5)
        assert scores.values["brier"][i] == pytest.approx(((p - hot) ** 2).sum(), rel=1e-5)
        assert scores.values["entropy"][i] == pytest.approx(-(p * np.log(p)).sum(), rel=1e-5)
        assert bool(scores.values["error"][i]) == (int(p.argmax()) != label)
    mean = np.exp(logits.double().mean(0).numpy())
    mean /= mean.sum()
    assert scores.concentration == pytest.approx((mean * np.log(mean)).sum(), rel=1e-5)


def test_totals_are_means_and_calibration_is_torchmetrics():
    batches = [(logits.log_softmax(1), labels) for logits, labels in map(outputs, range(3))]
    summary = totals_of(batches).summary()
    probs = torch.cat([lp for lp, _ in batches]).exp()
    labels = torch.cat([y for _, y in batches])
    right = probs.argmax(1) == labels
    assert summary["error"] == pytest.approx(1 - float(right.float().mean()))
    assert summary["nll"] == pytest.approx(-float(probs.log()[range(120), labels].mean()), rel=1e-5)
    assert summary["ece"] == pytest.approx(
        float(multiclass_calibration_error(probs, labels, 10, n_bins=BINS)), rel=1e-5
    )
    # The bins of the reliability diagram give the same figure.
    rows = np.array(summary["reliability"])
    full = rows[:, 0] > 0
    gaps = np.abs(rows[full, 1] - rows[full, 2]) * rows[full, 0]
    assert rows[:, 0].sum() == 120 and gaps.sum() / 120 == pytest.approx(summary["ece"], rel=1e-5)
    assert summary["used"] == 9 / 120 and summary["late"] == 80


def test_a_confidence_of_one_is_in_the_last_bin():
    logits = torch.zeros(4, 10)
    logits[:2, 0], logits[2:, 0] = 200.0, 6.0  # softmax 1.0 and 0.978: one bin of fifteen
    labels = torch.tensor([0, 1, 0, 0])
    summary = totals_of([(logits.log_softmax(1), labels)]).summary()
    mean = float(logits.softmax(1)[:, 0].mean())
    assert summary["reliability"][-1][0] == 4
    assert summary["ece"] == pytest.approx(mean - 0.75, rel=1e-6)


def test_images_count_for_their_own_domain_and_severity():
    logits, labels = outputs()
    totals = totals_of([(logits.log_softmax(1), labels)], ["fog", "clean"] * 20)
    wrong = logits.argmax(1) != labels
    assert totals.by_domain["fog"].errors == int(wrong[::2].sum())
    assert totals.by_domain["clean"].severities == {"5": [20, int(wrong[1::2].sum())]}
    summary = totals.summary()
    assert summary["mean_error"] == summary["domain_errors"]["fog"] == summary["worst_error"]
    assert summary["worst_domain"] == "fog"  # clean images are no shift


def test_rows_that_are_no_numbers_are_errors_and_nothing_else():
    logits, labels = outputs(rows=4)
    log_probs = logits.log_softmax(1)
    alone = score(logits[:3].argmax(1), log_probs[:3], labels[:3])
    log_probs[3] = math.nan
    scores = score(labels.clone(), log_probs, labels)
    assert scores.values["error"].tolist() == [False, False, False, True]
    assert scores.concentration == pytest.approx(alone.concentration)
    totals = totals_of([(log_probs, labels)])
    assert totals.everything.scored == 3
    assert totals.summary()["nll"] == pytest.approx(float(alone.values["nll"].mean()), rel=1e-6)
    nothing = totals_of([(torch.full((2, 10), math.nan), labels[:2])]).summary()
    assert nothing["error"] == 1.0 and math.isnan(nothing["nll"]) and math.isnan(nothing["ece"])


def test_a_probability_of_zero_is_clipped():
    log_probs = torch.full((1, 10), -math.inf)
    log_probs[0, 3] = 0.0
    scores = score(torch.tensor([3]), log_probs, torch.tensor([4]))
    assert (
        scores.values["nll"][0] == pytest.approx(-math.log(SMALLEST))
        and scores.values["brier"][0] == 2.0
    )
    assert scores.values["entropy"][0] == 0.0 and scores.concentration == pytest.approx(
        0.0, abs=1e-9
    )


def test_outputs_are_read_as_what_they_are():
    net = tiny("bn")
    logits, _ = outputs()
    for method, divisor in (
        ("source", 1),
        ("lame", 1),
        ("rmt[warmup_samples=0, weight_source=0]", 2),
        ('rmt[warmup_samples=0, weight_source=0, combine="mean"]', 1),
        ("rmt[warmup_samples=0, weight_source=0]+lame", 1),
    ):
        artefacts = tta.SourceStatistics(prototypes=torch.rand(10, net.fc.in_features))
        adapter = parse_method(method, 10).wrap(net, source=artefacts, mean=(0,) * 3, std=(1,) * 3)
        expected = (logits / divisor).log_softmax(1)
        assert torch.equal(log_probabilities(adapter, logits), expected), method
        adapter.unwrap()


def test_totals_are_taken_up_where_they_were():
    batches = [(logits.log_softmax(1), labels) for logits, labels in map(outputs, range(4))]
    plain, tensors = totals_of(batches[:2]).state()
    again = Totals.from_state(plain, tensors)
    for (log_probs, labels), late in zip(batches[2:], (True, True), strict=True):
        scores = score(log_probs.argmax(1), log_probs, labels)
        row = {"images": 40, "seconds": 0.5, "selected": 3, "resets": 0, "late": late}
        row["concentration"] = scores.concentration
        again.add(row, scores, ["fog"] * 40, [5] * 40)
    assert plain_types(again.summary()) == plain_types(totals_of(batches).summary())


def stream(**options):
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(48, 3, 16, 16, generator=generator)
    data = images, torch.arange(48) % 10
    return tta.streams.build("continual", data, domains=["clean"], batch_size=16, **options)


def passes(method, **options):
    net = tiny("bn")
    fisher = {name: 0 * p.detach() for name, p in net.named_parameters()}
    source = tta.SourceStatistics(fisher=fisher)
    arguments = {"batch_size": 16, "mean": (0,) * 3, "std": (1,) * 3, "source": source}
    adapter = parse_method(method, 10).wrap(net, **arguments)
    (*_, (_, totals)) = iter_evaluate(adapter, stream(**options), CPU, lambda x: x)
    return totals


@pytest.mark.parametrize(
    ("method", "forwards", "backwards"),
    [
        ("source", 1, 0),
        ("bn", 1, 0),
        ("lame", 1, 0),
        ("tent", 1, 1),
        ("tent[steps=2]", 2, 2),
        ("eata[entropy_margin=1.0, redundancy_margin=1.0]", 1, 1),
        ("sar[entropy_margin=1.0]", 2, 2),
        # Student and anchor see an image once each, and the teacher its views.
        ("cotta[views=4, confidence_threshold=1.0]", 2 + 4, 1),
    ],
)
def test_passes_are_counted(method, forwards, backwards):
    summary = passes(method).summary()
    assert (summary["forwards"], summary["backwards"]) == (forwards, backwards)


def test_late_batches_are_predicted_without_learning():
    totals = passes("tent", clock={"ratio": 3.0})
    assert totals.late == 32 and totals.selected == 16
    assert totals.summary()["backwards"] == pytest.approx(1 / 3)


def test_a_measured_clock_is_told_what_adapting_costs(monkeypatch):
    net, forwards = tiny("bn"), []
    net.fc.register_forward_hook(lambda *_: forwards.append(1))
    # The time is the number of forwards: the same on every machine.
    monkeypatch.setattr("tta.streams.clock._now", lambda: float(len(forwards)))
    adapter = parse_method("tent[steps=40]", 10).wrap(net, batch_size=16)
    measured = stream(clock={"measured": True})
    blocks = iter_evaluate(adapter, measured, CPU, lambda x: x)
    # 40 steps cost more than 3 plain forwards: only the first batch is in time.
    assert [s.row["late"] for steps, _ in blocks for s in steps] == [False, True, True]
    adapter.unwrap()
    adapter = parse_method("tent", 10).wrap(net, batch_size=16)
    offline = stream(clock={"measured": True, "eta": 0.0})
    (*_, (_, totals)) = iter_evaluate(adapter, offline, CPU, lambda x: x)
    # The plain forwards that the clock asks for are no cost of the method.
    assert totals.late == 0 and totals.forwards == 48


def source_steps(net, data, batch_size=4):
    """The steps of the source model on a stream."""
    adapter = tta.wrap(net, "source")
    built = tta.streams.build("continual", data, domains=["clean"], batch_size=batch_size)
    found = list(iter_evaluate(adapter, built, CPU, lambda x: x))
    adapter.unwrap()
    return [step for steps, _ in found for step in steps]


def test_outputs_in_a_tensor_that_a_model_uses_again_are_scored_as_they_were() -> None:
    net = tiny("bn")
    data = torch.rand(16, 3, 16, 16), torch.arange(16) % 10
    expected = [step.row["entropy"] for step in source_steps(net, data)]
    kept, forward = torch.zeros(4, 10), net.forward
    net.forward = lambda x: kept.copy_(forward(x))
    assert [step.row["entropy"] for step in source_steps(net, data)] == expected
    assert len(set(expected)) == 4


def test_a_block_does_not_hold_the_images_of_its_batches(monkeypatch) -> None:
    held = []

    def look(adapter, block, totals, clock):
        held.extend(p.batch.images.untyped_storage().nbytes() for p in block)
        return []

    monkeypatch.setattr("experiments.run.scoring._score", look)
    source_steps(tiny("bn"), (torch.rand(16, 3, 16, 16), torch.arange(16) % 10))
    assert held == [0, 0, 0, 0]


def test_the_error_of_a_domain_is_that_of_its_images_so_far() -> None:
    net = tiny("bn")
    sets = {name: (torch.rand(8, 3, 16, 16), torch.arange(8) % 10) for name in "ab"}
    built = tta.streams.build("recurring", None, sets, batch_size=4)
    adapter = tta.wrap(net, "source")
    steps = [s for found, _ in iter_evaluate(adapter, built, CPU, lambda x: x) for s in found]
    counts = {"a": [0, 0], "b": [0, 0]}
    for step in steps:
        count = counts[step.row["domain"]]
        count[0] += step.row["errors"]
        count[1] += step.row["images"]
        assert step.domain_error == count[0] / count[1]
    assert len(steps) > 4


def test_hooks_go_when_the_counting_ends():
    net = tiny("bn")
    counter = Passes(net)
    images = torch.rand(4, 3, 16, 16)
    net(images).sum().backward()
    with counter.uncounted():
        net(images)
    counter.close()
    net(images)
    assert (counter.forward, counter.backward) == (4, 4)


def test_the_peak_of_memory_is_seen():
    """Where the system forgets a former peak."""
    if not os.access("/proc/self/clear_refs", os.W_OK):
        pytest.skip(
            "resets the peak of memory in /proc/self/clear_refs, which cannot be written here"
        )
    memory = PeakMemory(CPU)
    before = memory.read()
    held = torch.zeros(50_000_000)
    held += 1
    del held
    assert memory.read() - before > 100_000_000


# The table of metrics


def top5_error(predictions):
    """Whether the label is not among the five most probable classes."""
    best = np.argsort(-predictions.log_probs, axis=1)[:, :5]
    return (best != predictions.labels[:, None]).all(1)


def test_a_new_metric_is_one_entry(monkeypatch):
    metric = Metric("top5_error", top5_error, "share of labels not among the first five", 1.0)
    monkeypatch.setitem(METRICS, "top5_error", metric)
    batches = [(logits.log_softmax(1), labels) for logits, labels in map(outputs, range(2))]
    batches[1][0][7] = math.nan
    totals = totals_of(batches, ["fog", "snow"] * 20)
    wrong = np.array([
        row is None or int(label) not in row
        for log_probs, labels in batches
        for row, label in zip(
            [None if lp.isnan().any() else lp.topk(5).indices.tolist() for lp in log_probs],
            labels, strict=True,
        )
    ])  # fmt: skip
    assert 0 < wrong.sum() < len(wrong)
    assert totals.summary()["top5_error"] == pytest.approx(wrong.mean())
    assert totals.by_domain["snow"].figures()["top5_error"] == pytest.approx(wrong[1::2].mean())
    again = Totals.from_state(*totals.state())
    assert again.summary()["top5_error"] == totals.summary()["top5_error"]
    adapter = tta.wrap(tiny("bn"), "source")
    found = [s for steps, _ in iter_evaluate(adapter, stream(), CPU, lambda x: x) for s in steps]
    assert all(0 <= step.row["top5_error"] <= 1 for step in found)


def test_totals_with_other_metrics_are_refused(monkeypatch):
    logits, labels = outputs()
    numbers, tensors = totals_of([(logits.log_softmax(1), labels)]).state()
    with pytest.raises(ValueError, match="those of an earlier version"):
        Totals.from_state({k: v for k, v in numbers.items() if k != "metrics"}, tensors)
    monkeypatch.setitem(METRICS, "top5_error", Metric("top5_error", top5_error, "words"))
    with pytest.raises(ValueError, match="top5_error, got error, nll"):
        Totals.from_state(numbers, tensors)
    monkeypatch.setitem(METRICS, "two", Metric("two", lambda p: p.probs[:, :2], "words"))
    with pytest.raises(ValueError, match="one number per image"):
        score(logits.argmax(1), logits.log_softmax(1), labels)


def test_errors_by_recurrence_and_of_walks():
    right = torch.tensor([[0.9, 0.1]]).log().repeat(4, 1)
    totals = Totals(2)
    for number, wrong in enumerate((4, 2, 1)):
        labels = torch.tensor([1] * wrong + [0] * (4 - wrong))
        scores = score(right.argmax(1), right, labels)
        row = {"images": 4, "errors": wrong, "seconds": 0.1, "selected": 0, "resets": 0}
        row |= {"late": False, "concentration": 0.0, "recurrence": number // 2}
        totals.add(row, scores, ["a+b"] * 4 if number < 2 else ["b+c"] * 4, [(5.0, 0.25)] * 4)
    found = totals.summary()
    assert found["recurrence_errors"] == [6 / 8, 1 / 4]
    assert found["mean_error"] == found["error"] == 7 / 12  # and not (6 / 8 + 1 / 4) / 2
    again = Totals.from_state(*totals.state()).summary()
    assert again["recurrence_errors"] == found["recurrence_errors"]
    assert again["mean_error"] == found["mean_error"]
    numbers, tensors = totals.state()
    del numbers["by_recurrence"]  # as in a snapshot of before there was any
    with pytest.raises(ValueError, match="by_recurrence: they are those of an earlier version"):
        Totals.from_state(numbers, tensors)


def test_a_batch_may_pass_over_a_whole_recurrence():
    totals = Totals(2)
    right = torch.tensor([[0.9, 0.1]]).log().repeat(2, 1)
    for number in (0, 2):
        scores = score(right.argmax(1), right, torch.tensor([0, 1]))
        row = {"images": 2, "errors": 1, "seconds": 0.1, "selected": 0, "resets": 0}
        row |= {"late": False, "concentration": 0.0, "recurrence": number}
        totals.add(row, scores, ["fog"] * 2, [5, 5])
    assert totals.summary()["recurrence_errors"] == [0.5, 0.5]
