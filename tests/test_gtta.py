"""GTTA: replaying its trace, and what it does beyond it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import tta
from tests.helpers.batches import images, source_batches
from tests.helpers.nets import tiny
from tests.helpers.traces import GOLDEN, Trace
from tests.helpers.update_traces import check_source
from tta.methods.gtta import NONE, Gtta

# What the keys of its traces are, see `tests/helpers/trace_keys.py`.
TRACE_KEYS = {
    "set-e": {
        "arrays": {
            "avg_conf": "state: update/confidence",
            "mix_index": "output: partners of the source images",
            r"loss_(source|target)": "report.source, report.loss",
        },
        "hparams": {
            "params.lambda_mixup": "field: mixup",
        },
    },
}

OUTPUTS: dict[str, Any] = {"atol": 5e-4, "rtol": 1e-4}
LOSSES: dict[str, Any] = {"atol": 5e-5, "rtol": 1e-4}
WEIGHTS: dict[str, Any] = {"atol": 5e-5, "rtol": 0.0}
TRACES = sorted((GOLDEN / "set-e").glob("gtta_*.npz"))
close = torch.testing.assert_close


def open_to_all(**fields: Any) -> Any:
    """A config by which every image of a network that is unsure gets a label."""
    return tta.get_config("gtta", **{"start_confidence": 0.0, "lr": 1e-3} | fields)


@pytest.mark.parametrize("path", TRACES, ids=lambda p: p.stem)
def test_trace(path: Path, monkeypatch) -> None:
    trace = Trace(path)
    check_source(trace)
    seen: list[tuple[Tensor, Tensor]] = []
    steps, partners = Gtta._steps, Gtta._partners

    def watch(update: Any, x: Tensor, probs: Tensor, labels: Tensor, count: int) -> Any:
        seen.append((labels, torch.empty(0)))
        return steps(update, x, probs, labels, count)

    def watch_partners(update: Any, source: Tensor, probs: Tensor) -> Tensor:
        found = partners(update, source, probs)
        seen[-1] = (seen[-1][0], found)
        return found

    monkeypatch.setattr(Gtta, "_steps", watch)
    monkeypatch.setattr(Gtta, "_partners", watch_partners)
    config = tta.get_config(
        "gtta",
        mixup=trace.params["lambda_mixup"],
        steps=trace.params["steps"],
        official=True,
        **trace.optimizer(),
    )
    pairs = zip(trace.tensor("source_inputs"), trace.tensor("source_labels"), strict=True)
    adapter = tta.wrap(trace.model(), update=config, source=list(pairs))
    for t, x in enumerate(trace.tensor("inputs")):
        close(adapter(x), trace.tensor("outputs")[t], **OUTPUTS)
        u = (t + 1) * trace.params["steps"] - 1
        for key, figure in (("loss_source", "source"), ("loss_target", "loss")):
            found, expected = adapter.report[figure], trace.arrays[key][u]
            np.testing.assert_allclose(found, expected, rtol=1e-4, atol=5e-5)
        labels = torch.where(seen[u][0] == NONE, -1, seen[u][0])
        assert torch.equal(labels, trace.tensor("pseudo_labels")[t])
        assert adapter.report.selected == int((labels >= 0).sum())
        assert torch.equal(adapter.report["kept"], labels >= 0)
        assert torch.equal(seen[u][1], trace.tensor("mix_index")[u])
        close(adapter.state()["update/confidence"], trace.tensor("avg_conf")[t], **LOSSES)
    state = adapter.state()
    assert list(adapter.parameters_adapted) == list(trace.arrays["param_names"])
    for name, value in trace.group("adapted").items():
        close(state[f"param/{name}"], value, **WEIGHTS)
    for name, value in trace.group("opt").items():
        close(state["optim/" + name.replace("/", ".")], value, **WEIGHTS)


def test_both_steps_by_hand() -> None:
    (images_s, labels_s), *_ = batches = source_batches()
    x, net = images(0, 5), tiny("gn")
    config = open_to_all(optimizer="sgd", lr=0.1, momentum=0.0, mixup=0.25)
    adapter = tta.wrap(tiny("gn"), update=config, source=batches)
    found = adapter(x)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    images_s, labels_s = images_s[:5], labels_s[:5]
    probs, of_source = net(x).softmax(1).detach(), net(images_s).softmax(1).detach()
    confidence = 0.1 * probs.amax(1).mean()
    mixed = torch.stack(
        [
            0.25 * x[int((probs @ p).argmax())] + 0.75 * s
            for p, s in zip(of_source, images_s, strict=True)
        ]
    )
    for inputs, labels in ((mixed, labels_s), (x, probs.argmax(1))):
        logits = net(inputs)
        optimizer.zero_grad()
        F.cross_entropy(logits, labels).backward()
        optimizer.step()
    assert (probs.amax(1) >= confidence.sqrt()).all() and adapter.report.selected == 5
    close(found, logits.detach(), atol=1e-5, rtol=1e-5)
    for name, p in net.named_parameters():
        close(adapter.state()[f"param/{name}"], p.detach(), atol=1e-6, rtol=1e-5)
    close(adapter.state()["update/confidence"], confidence)


def test_each_step_takes_the_next_source_batch() -> None:
    batches = source_batches()
    read: list[int] = []

    class Batches(list):
        def __getitem__(self, i: Any) -> Any:
            read.append(i)
            return super().__getitem__(i)

    config = open_to_all(steps=3)
    adapter = tta.wrap(tiny("bn"), update=config, source=batches)
    update: Any = adapter.update
    update.replay.batches = Batches(batches)
    adapter(images(0))
    assert read == [0, 1, 0] and adapter.state()["update/source_position"] == 3
    adapter.reset()
    adapter(images(0))
    assert read[3:] == [0, 1, 0]


@pytest.mark.parametrize("official", [False, True])
def test_where_no_image_is_sure_enough(official: bool) -> None:
    config = tta.get_config("gtta", lr=1e-3, official=official)
    adapter = tta.wrap(tiny("bn"), update=config, source=source_batches())
    found = adapter(images(0))
    report = adapter.report
    assert found.isfinite().all() and report.selected == 0 and np.isnan(report.loss)
    assert report.stepped and np.isfinite(report.source)
    # The code's second step has a gradient of zero, and counts.
    assert adapter.state()["optim/fc.weight.step"] == (2 if official else 1)
    moved = adapter.state()
    adapter.reset()
    start = adapter.state()
    for key in ("update/confidence", "update/source_position"):
        assert torch.equal(start[key], moved[key]) is official


def test_source_batches_are_needed_and_of_one_size() -> None:
    with pytest.raises(ValueError, match="`source` must give gtta labelled batches"):
        tta.wrap(tiny("bn"), "gtta")
    adapter = tta.wrap(tiny("gn"), update=open_to_all(), source=source_batches())
    before = adapter.state()
    with pytest.raises(ValueError, match="of the size of the source's"):
        adapter(images(0)[:, :, :24])
    assert all(torch.equal(v, before[k]) for k, v in adapter.state().items())


@pytest.mark.parametrize("source", [[], tta.SourceStatistics(batches=[])])
def test_no_source_batch_is_refused_at_wrap(source: Any) -> None:
    with pytest.raises(ValueError, match="`source` must give gtta at least one labelled batch"):
        tta.wrap(tiny("gn"), update=open_to_all(), source=source)


def test_levels_are_not_mixed_with_pixels() -> None:
    levels = [((x * 255).byte(), y) for x, y in source_batches()]
    adapter = tta.wrap(tiny("gn"), update=open_to_all(), source=levels)
    before = adapter.state()
    with pytest.raises(TypeError, match=r"`source` must give gtta .*float32.* got torch.uint8"):
        adapter(images(0))
    assert all(torch.equal(v, before[k]) for k, v in adapter.state().items())


def test_a_loader_must_be_given_again(tmp_path: Path) -> None:
    loader = torch.utils.data.DataLoader(source_batches(), batch_size=None)  # type: ignore[arg-type]
    adapter = tta.wrap(tiny("bn"), update=open_to_all(), source=loader)
    listed = tta.wrap(tiny("bn"), update=open_to_all(), source=source_batches())
    assert torch.equal(adapter(images(0)), listed(images(0)))
    tta.save(adapter, tmp_path / "loader")
    tta.save(listed, tmp_path / "list")
    with pytest.raises(ValueError, match="`source` must give gtta labelled batches"):
        tta.load(tiny("bn"), tmp_path / "loader")
    again = tta.load(tiny("bn"), tmp_path / "loader", source=loader)
    whole = tta.load(tiny("bn"), tmp_path / "list")
    assert torch.equal(again(images(1)), whole(images(1)))


@pytest.mark.parametrize("name", ["mixup", "start_confidence"])
def test_shares_lie_between_0_and_1(name: str) -> None:
    with pytest.raises(ValueError, match=f"`{name}`"):
        tta.get_config("gtta", **{name: 1.5})
