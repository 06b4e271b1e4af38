"""AdaContrast: replaying its trace, and what it does beyond it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import tta
from tests.helpers.batches import images
from tests.helpers.nets import tiny
from tests.helpers.traces import GOLDEN, Trace
from tta.core.random import CountedDraws
from tta.parts.augment import Augmenter
from tta.parts.contrast_views import strong_view, weak_view

# What the keys of its traces are, see `tests/helpers/trace_keys.py`.
TRACE_KEYS = {
    "set-e": {
        "arrays": {
            r"queue_(labels_)?init": "wrap: draws=",
            "refined": "report.refined",
            "bank_ptr": "state: update/bank_position",
            "bank_size": "state: update/bank_count",
            "queue_ptr": "state: update/queue_position",
            r"queue(_labels)?_final": "state: update/queue, .queue_labels",
            r"bank_(features|probs)_final": "state: update/bank_features, .bank_probs",
        },
        "hparams": {
            "params.queue_size": "field: queue_size, bank_size",
            r"params\.(refine_after|seen_at_start)": "field: refine_after is their difference",
            "params.weights": "field: weight_classification, weight_instance, weight_diversity",
        },
    },
}

OUTPUTS: dict[str, Any] = {"atol": 5e-4, "rtol": 1e-4}
LOSSES: dict[str, Any] = {"atol": 5e-5, "rtol": 1e-4}
WEIGHTS: dict[str, Any] = {"atol": 5e-5, "rtol": 0.0}
SLOW_MOVING: dict[str, Any] = {"atol": 1e-5, "rtol": 0.0}
PIXELS: dict[str, Any] = {"mean": (0.0,) * 3, "std": (1.0,) * 3}
TRACES = sorted((GOLDEN / "set-e").glob("adacontrast_*.npz"))
close = torch.testing.assert_close


def small(**fields: Any) -> Any:
    """A config whose queue and bank are full after two batches of eight."""
    sizes = {"queue_size": 16, "bank_size": 16, "neighbours": 3, "refine_after": 8, "lr": 0.01}
    return tta.get_config("adacontrast.cifar10", **sizes | fields)


def replaying(trace: Trace) -> tta.Adapter:
    p = trace.params
    config = tta.get_config(
        "adacontrast",
        queue_size=p["queue_size"],
        bank_size=p["queue_size"],
        neighbours=p["neighbours"],
        distance=p["distance"],
        refine_after=p["refine_after"] - p["seen_at_start"],
        teacher_momentum=p["teacher_momentum"],
        temperature=p["temperature"],
        weight_classification=p["weights"][0],
        weight_instance=p["weights"][1],
        weight_diversity=p["weights"][2],
        official=True,
        **trace.optimizer(),
    )
    return tta.wrap(
        trace.model(),
        update=config,
        augment=trace.augment,
        draws=lambda name, shape, call: trace.tensor(name),
        **PIXELS,
    )


@pytest.mark.parametrize("path", TRACES, ids=lambda p: p.stem)
def test_trace(path: Path, monkeypatch) -> None:
    trace = Trace(path)
    net = trace.model()
    with torch.no_grad():
        close(net(trace.tensor("inputs")[0]), trace.tensor("source_outputs")[0])
    adapter = replaying(trace)
    labels: list[Tensor] = []
    contrast = type(adapter.update)._contrast  # type: ignore[union-attr]

    def watch(update: Any, queries: Tensor, keys: Tensor, found: Tensor) -> Tensor:
        labels.append(found)
        return contrast(update, queries, keys, found)

    monkeypatch.setattr(type(adapter.update), "_contrast", watch)
    for t, x in enumerate(trace.tensor("inputs")):
        close(adapter(x), trace.tensor("outputs")[t], **OUTPUTS)
        report, state = adapter.report, adapter.state()
        for key, figure in (
            ("loss", "loss"),
            ("loss_cls", "classification"),
            ("loss_ins", "instance"),
            ("loss_div", "diversity"),
        ):
            close(torch.tensor(report[figure]), trace.tensor(key)[t], **LOSSES)
        assert torch.equal(labels[t], trace.tensor("pseudo_labels")[t])
        assert report.refined == bool(trace.arrays["refined"][t])
        assert state["update/bank_position"] == trace.arrays["bank_ptr"][t]
        assert state["update/bank_count"] == trace.arrays["bank_size"][t]
        assert state["update/queue_position"] == trace.arrays["queue_ptr"][t]
        if t == 0:
            for name, value in trace.group("adapted_after_step0").items():
                close(state[f"param/{name}"], value, **WEIGHTS)
    state = adapter.state()
    assert list(adapter.parameters_adapted) == list(trace.arrays["param_names"])
    for name, value in trace.group("adapted").items():
        close(state[f"param/{name}"], value, **WEIGHTS)
    for name, value in trace.group("opt").items():
        close(state["optim/" + name.replace("/", ".")], value, **WEIGHTS)
    for name, value in trace.group("teacher_final").items():
        close(state[f"update/teacher.{name}"], value, **SLOW_MOVING)
    for who, prefix in (("student", "norm/"), ("teacher", "update/teacher.")):
        for name, value in trace.group(f"bn_{who}_final").items():
            close(state[prefix + name.replace("running_", "")], value, **SLOW_MOVING)
    for name in ("queue", "bank_features", "bank_probs"):
        close(state[f"update/{name}"], trace.tensor(f"{name}_final"), **WEIGHTS)
    assert torch.equal(state["update/queue_labels"], trace.tensor("queue_labels_final"))


def adapter_with(family: str = "bn", **fields: Any) -> tta.Adapter:
    return tta.wrap(tiny(family), update=small(**fields), augment=lambda x, n: x, **PIXELS)


def test_the_bank_is_a_ring() -> None:
    adapter = adapter_with(bank_size=10, lr=0.0, momentum=0.0, nesterov=False)
    rows = []
    for t, count in enumerate((4, 4, 4, 4)):
        adapter(images(t, count))
        with torch.no_grad():
            rows.append(adapter.state()["update/bank_features"])
        assert adapter.state()["update/bank_count"] == min(4 * (t + 1), 10)
    first, second, third, last = rows
    assert second[8:].isnan().all() and not second[:8].isnan().any()
    assert torch.equal(second[:4], first[:4])
    assert torch.equal(third[2:8], second[2:8]) and not torch.equal(third[:2], second[:2])
    assert torch.equal(last[6:], third[6:]) and torch.equal(last[:2], third[:2])
    assert not (last[2:6] == third[2:6]).all(1).any()
    assert adapter.state()["update/bank_position"] == 6


def test_a_batch_longer_than_queue_and_bank() -> None:
    adapter = adapter_with(queue_size=5, bank_size=3, neighbours=7, refine_after=0)
    for t in range(3):
        assert adapter(images(t)).isfinite().all()
    state = adapter.state()
    assert state["update/bank_count"] == 3 and state["update/queue_position"] == 24 % 5
    assert adapter.report.refined is True
    close(state["update/queue"].norm(dim=0), torch.ones(5))


def test_labels_are_refined_by_neighbours() -> None:
    for distance in ("cosine", "euclidean"):
        adapter = adapter_with(distance=distance, neighbours=2)
        update: Any = adapter.update
        features = torch.randn(4, adapter.network.classifier.in_features)
        probs = torch.eye(10)[[3, 5, 7, 7]]
        update.bank_features[:4], update.bank_probs[:4] = features, probs
        update.bank_count.fill_(4)
        update.images_seen.fill_(8)
        asked = features[[2, 3]] if distance == "cosine" else features[[2, 3]] + 1e-3
        apart = torch.cdist(asked, features)
        if distance == "cosine":
            asked, apart = 5 * asked, 1 - F.normalize(asked) @ F.normalize(features).t()
        expected = probs[apart.argsort(1)[:, :2]].mean(1).argmax(1)
        found, refined = update._labels(tta.Prediction(torch.zeros(2, 10), asked))
        assert refined and torch.equal(found, expected)
        update.images_seen.fill_(7)
        assert not update._labels(tta.Prediction(torch.zeros(2, 10), asked))[1]


@pytest.mark.parametrize("official", [False, True])
def test_the_contrast_by_hand(official: bool) -> None:
    adapter = adapter_with(official=official, queue_size=6, temperature=0.5)
    update: Any = adapter.update
    width = adapter.network.classifier.in_features
    queries, keys = (F.normalize(torch.randn(2, width), dim=1) for _ in range(2))
    queue, old = update.queue.clone(), torch.tensor([0, 1, 2, 0, 1, 2])
    update.queue_labels.copy_(old)
    labels = torch.tensor([1, 2])
    found = update._contrast(queries, keys, labels)
    seen = old.clone()
    if official:
        seen[:2] = labels
    expected = 0.0
    for i in range(2):
        others = [queries[i] @ queue[:, j] for j in range(6) if seen[j] != labels[i]]
        scores = torch.stack([queries[i] @ keys[i], *others]) / 0.5
        expected -= float(scores.log_softmax(0)[0]) / 2
    assert float(found) == pytest.approx(expected, abs=1e-5)
    assert torch.equal(update.queue, torch.cat([keys.t(), queue[:, 2:]], 1))
    assert update.queue_labels.tolist() == [1, 2, 2, 0, 1, 2]


def test_reset_goes_back_to_the_start_that_was_drawn() -> None:
    adapter = tta.wrap(tiny("bn"), update=small(), seed=5, **PIXELS)
    start = adapter.state()
    assert start["update/bank_features"].isnan().all() and start["update/bank_probs"].isnan().all()
    close(start["update/queue"].norm(dim=0), torch.ones(16))
    adapter(images(0))
    assert not torch.equal(adapter.state()["update/queue"], start["update/queue"])
    adapter.reset()
    assert torch.equal(adapter.state()["update/queue"], start["update/queue"])
    other = tta.wrap(tiny("bn"), update=small(), seed=6, **PIXELS)
    assert not torch.equal(other.state()["update/queue"], start["update/queue"])


def test_passes_of_training_move_statistics_and_the_last_one_does_not() -> None:
    net = tiny("bn")
    adapter = adapter_with(lr=0.0, weight_decay=0.0, teacher_momentum=1.0)
    x = images(0)
    answer = adapter(x)
    net.train()
    with torch.no_grad():
        for _ in range(2):
            net(x)  # the weak view and the first strong one
    assert adapter.config.norm == tta.get_config("bn_ema", official=True)
    close(answer, net.eval()(x).detach(), atol=1e-5, rtol=1e-5)
    state = adapter.state()
    for name, buffer in net.named_buffers():
        if "running" in name:  # the teacher sees the second strong view and the weak one
            key = name.replace("running_", "")
            close(state[f"norm/{key}"], buffer, atol=1e-6, rtol=1e-5)
            close(state[f"update/teacher.{key}"], buffer, atol=1e-6, rtol=1e-5)
    with adapter.frozen():
        close(adapter(x), answer)


def test_views_are_asked_for_in_order() -> None:
    asked: list[int] = []
    adapter = tta.wrap(
        tiny("gn"), update=small(), augment=lambda x, n: asked.append(n) or x, **PIXELS
    )
    adapter(images(0))
    adapter.reset()
    adapter(images(1))
    assert asked == list(range(6))


@pytest.mark.parametrize("recipe", [weak_view, strong_view])
@pytest.mark.parametrize("shape", [(2, 3, 32, 32), (1, 1, 20, 28), (2, 3, 7, 5)])
def test_views_are_pixels_of_the_same_shape(recipe: Any, shape: tuple[int, ...]) -> None:
    x = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    kept = x.clone()
    found = [recipe(x, CountedDraws(seed)) for seed in range(40)]
    assert all(v.shape == x.shape and v.min() >= 0 and v.max() <= 1 for v in found)
    assert len({float(v.sum()) for v in found}) > 5 and torch.equal(x, kept)
    assert all(v.data_ptr() != x.data_ptr() for v in found)
    assert torch.equal(recipe(x, CountedDraws(3)), found[3])
    adapter = tta.wrap(tiny("gn"), "source", **PIXELS)
    augmenter = Augmenter(adapter.model, adapter._context)
    (view,) = augmenter.views(x, 1, CountedDraws(3), recipe)
    close(view, found[3])


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"queue_size": 0}, "`queue_size`"),
        ({"distance": "manhattan"}, "`distance`"),
        ({"temperature": 0.0}, "`temperature`"),
        ({"refine_after": -1}, "`refine_after`"),
    ],
)
def test_fields_out_of_range_are_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        small(**fields)


def test_images_whose_features_overflow_are_left_out() -> None:
    x = images(0, 4)
    x[1] *= 3e38
    adapter = adapter_with("gn")
    with pytest.warns(UserWarning, match="1 of 4"):
        found = adapter(x)
    assert found[1].isnan().all() and found[[0, 2, 3]].isfinite().all()
    assert adapter.report.rejected == 1 and adapter.report.selected == 3


def test_small_first_logits_leave_the_first_batch_as_every_other() -> None:
    """They are looked at in a pass with the source's statistics, amid a learning one."""
    net = tiny("bn")
    head = [module for module in net.modules() if isinstance(module, torch.nn.Linear)][-1]
    with torch.no_grad():
        head.weight.mul_(0.01)
        head.bias.fill_(0.5)
    adapter = tta.wrap(net, "adacontrast.cifar10", mean=[0.5] * 3, std=[0.5] * 3)
    first, moved = adapter(images(0)), adapter.state()
    adapter.reset()
    assert torch.equal(adapter(images(0)), first)
    for key, value in adapter.state().items():
        assert torch.equal(value.nan_to_num(), moved[key].nan_to_num()), key
