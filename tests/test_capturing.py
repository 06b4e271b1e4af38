"""Steps that are captured once and replayed: what is equal, what falls back, and what it says."""

from __future__ import annotations

import copy
import logging
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import tta
from tests.helpers.batches import source_batches
from tests.helpers.capturable import LEARNING, RECIPES, named
from tests.helpers.exported import make
from tests.helpers.fake_gpu import DEVICE, on_fake_gpu
from tests.helpers.faults import same
from tests.helpers.nets import tiny
from tta.core.learning_step import LearningStep
from tta.core.step_function import Step, at_least_1d, moving_keys
from tta.core.tracing import NoLoopError, capturing
from tta.methods.tent import Tent
from tta.runtime import Pipeline, StreamPool
from tta.runtime import capturing as room
from tta.runtime.capturing import Captured, NotCapturedError, StandIn, standing_in
from tta.runtime.steps import Replaying

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
SHAPE = (3, 16, 16)
draws = torch.Generator().manual_seed(3)
BATCHES = [torch.randn(4, *SHAPE, generator=draws) * (1 + 0.3 * i) + 0.2 * i for i in range(7)]
FRAMES = torch.cat(BATCHES)
LEARNS = {"norm": "unmix_tns", "update": "tent.cifar10"}
CLOSE = 1e-6  # of logits and states, of which the largest differences were 1.2e-7 and 2.8e-7


def difference(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """The largest of two states, by the size of values."""
    assert ours.keys() == theirs.keys()
    found = 0.0
    for key, value in theirs.items():
        a, b = ours[key].double(), value.double()
        assert torch.equal(a.isnan(), b.isnan()), key
        gap = (a - b).abs() / b.abs().clamp_min(1)
        found = max(found, float(gap.nan_to_num().max()) if gap.numel() else 0.0)
    return found


@pytest.mark.parametrize(
    ("recipe", "bitwise"), RECIPES, ids=lambda r: named(r) if isinstance(r, dict) else ""
)
def test_replays_give_what_the_adapter_gives(recipe, bitwise):
    one, other = make(recipe, tiny("bn")), make(recipe, tiny("bn"))
    one(BATCHES[0]), other(BATCHES[0])
    captured = Captured(one, BATCHES[1], StandIn())
    assert same(one.state(), other.state())  # warm-ups and the trial have left nothing
    for images in BATCHES[1:]:
        logits = captured.serve(images)
        assert logits is not None
        expected = other(images)
        assert torch.equal(logits, expected) if bitwise else (logits - expected).abs().max() < CLOSE
        assert one.report.keys() == other.report.keys()
        assert one.report["seen"] == 4 and str(one.report) == str(other.report)
    assert difference(one.state(), other.state()) <= (0 if bitwise else CLOSE)
    assert one._context.draws.call == other._context.draws.call


@pytest.mark.parametrize("recipe", LEARNING, ids=named)
def test_replays_learn_as_the_adapter_does(recipe):
    one, other = make(recipe, tiny("bn")), make(recipe, tiny("bn"))
    one(BATCHES[0]), other(BATCHES[0])
    captured = Captured(one, BATCHES[1], StandIn())
    assert same(one.state(), other.state())
    for number, images in enumerate(BATCHES[1:]):
        if number == 3:  # the adapter serves one itself
            one(images), other(images)
            continue
        if number == 4:
            one.reset(), other.reset()
        logits = captured.serve(images)
        assert logits is not None
        assert (logits - other(images)).abs().max() < CLOSE
        assert one.report.keys() == other.report.keys() and one.report["stepped"] is True
        assert one.report["loss"] == pytest.approx(other.report["loss"], rel=1e-5)
    assert difference(one.state(), other.state()) <= CLOSE
    assert all(p.grad is None for p in one.model.parameters())


@pytest.mark.parametrize("recipe", [r for r, _ in RECIPES], ids=named)
def test_on_a_gpu_nothing_waits_for_values(recipe):
    """Operations that would, and copies to the device, are refused; no GPU is needed for that."""
    adapter = make(recipe, tiny("bn"))
    adapter(BATCHES[0])
    mode = FakeTensorMode()
    there, step = on_fake_gpu(adapter, mode), copy.copy(Step(adapter, moving_keys(adapter)))
    step.__dict__ = step.__dict__ | {"adapter": there, "_modules": {}, "device": DEVICE}
    ways = []
    for by_tensors in (False, True):
        with mode, torch.no_grad(), capturing(by_tensors):
            state = [at_least_1d(held[key]) for held, key in step.places()]
            images = torch.rand(4, *SHAPE, device=DEVICE)
            try:
                with room._Waits():
                    fine, logits, after, _ = step.advance(images, state)
            except room._WaitsError:
                continue
            assert {t.device for t in (fine, logits, *state, *after)} == {DEVICE}
            ways.append(by_tensors)
    assert ways
    # Norm rules, of which there is one a layer, go on as they are.
    assert ways[0] is False or "norm" not in recipe or "output" in recipe


@pytest.mark.parametrize("recipe", LEARNING, ids=named)
def test_learning_on_a_gpu_waits_for_no_values(recipe, monkeypatch):
    """But for the backward pass itself, which autograd runs on real devices alone."""
    adapter = make(recipe, tiny("bn"))
    adapter(BATCHES[0])
    mode = FakeTensorMode()
    there = on_fake_gpu(adapter, mode)
    zeros = lambda _, inputs: [torch.zeros_like(p) for p in inputs]  # noqa: E731
    monkeypatch.setattr(there.session, "gradients", zeros)
    with mode, torch.no_grad(), capturing(False):
        images = torch.rand(4, *SHAPE, device=DEVICE)
        step = LearningStep(there, images)
        state = [held[key] for held, key in step.places()]
        with room._Waits():
            fine, logits, after, _ = step.advance(images, state)
    assert {t.device for t in (fine, logits, *state, *after)} == {DEVICE}


def test_a_loop_that_ends_by_a_value_is_not_captured():
    adapter = tta.wrap(tiny("bn"), "lame")
    adapter(BATCHES[0])
    with pytest.raises(NotCapturedError, match="repeats something until a value"):
        Captured(adapter, BATCHES[0], StandIn())
    with pytest.raises(NoLoopError), capturing(True):
        adapter._serving.traced(BATCHES[0])


class Counting(nn.Sequential):
    """Goes by a count that is kept in Python."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x * self.calls)


class Looking(nn.Sequential):
    """Decides by a value."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if bool(x.mean() > 0) else 2 * x)


@pytest.mark.parametrize(
    ("make_it", "why"),
    [
        (lambda: tta.wrap(tiny("bn"), "sar"), "it waits for values, by"),
        (lambda: tta.wrap(tiny("bn"), "note"), "must have a state of fixed shapes"),
        (lambda: tta.wrap(tiny("bn"), "adacontrast", mean=0.5, std=0.5), "keeps rows of earlier"),
        (lambda: tta.wrap(tiny("bn"), "bn", guard="periodic"), "periodic looks at each batch"),
        (lambda: tta.wrap(tiny("bn"), "bn", health=True), "looks at each batch"),
        (lambda: tta.wrap(tiny("bn"), "bn", window=8), "`window` must be left out"),
        (lambda: tta.wrap(tiny("bn"), "bn", setting=tta.Setting()), "a setting of its own"),
        (lambda: tta.wrap(Looking(*plain()), "neo"), "it waits for values, by"),
        (lambda: tta.wrap(Counting(*plain()), "neo"), "its logits then differ by"),
    ],
)
def test_what_cannot_be_captured_is_said(make_it, why):
    adapter = make_it()
    adapter(BATCHES[0])
    before = adapter.state()
    with pytest.raises(NotCapturedError, match=why):
        Captured(adapter, BATCHES[1], StandIn())
    assert same(adapter.state(), before) and torch.isfinite(adapter(BATCHES[1])).all()


class EverySecond(Tent):
    """Learns from every second batch, by a count that is kept in Python."""

    count = 0

    def step(self, *args: Any, **kwargs: Any) -> bool:
        self.count += 1
        return super().step(*args, **kwargs) if self.count % 2 else False


@pytest.mark.parametrize("lr", [1e-3, 1e-6])
def test_a_step_that_learns_otherwise_than_the_adapter_is_not_captured(lr, monkeypatch):
    adapter = tta.wrap(tiny("bn"), "tent.cifar10", lr=lr)
    adapter(BATCHES[0])
    monkeypatch.setattr(adapter.update, "__class__", EverySecond)
    before = adapter.state()
    with pytest.raises(NotCapturedError, match=r"what it learns then differs|nothing is learned"):
        Captured(adapter, BATCHES[1], StandIn())
    assert same(adapter.state(), before)


def test_an_interrupted_replay_leaves_counts_as_weights() -> None:
    class Interrupted(StandIn):
        armed = False

        def replay(self) -> None:
            super().replay()
            if self.armed:
                raise KeyboardInterrupt

    one, other = (make({"update": "tent.cifar10"}, tiny("bn")) for _ in range(2))
    one(BATCHES[0]), other(BATCHES[0])
    graph = Interrupted()
    captured = Captured(one, BATCHES[1], graph)
    graph.armed = True
    with pytest.raises(KeyboardInterrupt):
        captured.serve(BATCHES[1])
    other(BATCHES[1])
    assert difference(one.state(), other.state()) <= CLOSE


def test_an_update_that_trains_nothing_is_not_captured():
    adapter = tta.wrap(tiny("ln"), "pea", source=source_batches(), mean=0.5, std=0.5)
    images = torch.rand(4, 3, 32, 32)
    adapter(images)
    with pytest.raises(NotCapturedError, match="pea moves tensors of its own, and trains nothing"):
        Captured(adapter, images, StandIn())


def plain() -> list[nn.Module]:
    torch.manual_seed(0)
    return [nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)]


def test_state_on_another_device_would_be_a_constant(monkeypatch):
    adapter = tta.wrap(tiny("bn"), "neo")
    adapter(BATCHES[0])
    elsewhere = {"x": torch.zeros(3, device="meta")}
    monkeypatch.setattr(Step, "places", lambda self: [(elsewhere, "x")])
    with pytest.raises(NotCapturedError, match="on another device"):
        Captured(adapter, BATCHES[1], StandIn())


def test_a_graph_that_fails_leaves_the_adapter_as_it_is():
    class Broken(StandIn):
        def ready(self, call):
            super().ready(call)
            raise RuntimeError("no memory on the device")

    adapter, other = tta.wrap(tiny("bn"), "unmix_tns"), tta.wrap(tiny("bn"), "unmix_tns")
    adapter(BATCHES[0]), other(BATCHES[0])
    with pytest.raises(NotCapturedError, match="RuntimeError: no memory on the device"):
        Captured(adapter, BATCHES[1], Broken())
    assert same(adapter.state(), other.state())
    assert torch.equal(adapter(BATCHES[1]), other(BATCHES[1]))


# In a pipeline


def run(recipe: Any, frames: Any, **more: Any) -> tuple[Pipeline, list, tta.Adapter]:
    """A pipeline with what stands in for graphs."""
    adapter = make(recipe, tiny("bn")) if isinstance(recipe, dict) else recipe
    with standing_in():
        pipeline = Pipeline(adapter, frames, batch_size=4, graphs=True, **more)
        return pipeline, list(pipeline), adapter


def without(
    recipe: dict[str, Any], frames: Any, size: int = 4
) -> tuple[Pipeline, list, tta.Adapter]:
    adapter = make(recipe, tiny("bn"))
    pipeline = Pipeline(adapter, frames, batch_size=size)
    return pipeline, list(pipeline), adapter


def rows(results: list) -> Tensor:
    return torch.stack([result.probabilities for result in results])


@pytest.mark.parametrize(
    "recipe", [{"norm": "unmix_tns"}, {"output": "neo"}, {"recipe": "source"}, LEARNS], ids=named
)
def test_a_pipeline_with_graphs_gives_what_it_gives_without(recipe, caplog):
    with caplog.at_level(logging.INFO, "tta.runtime"):
        pipeline, results, one = run(recipe, FRAMES[:26])  # the last batch has two
    other, expected, own = without(recipe, FRAMES[:26])
    assert (rows(results) - rows(expected)).abs().max() <= (0 if "output" in recipe else CLOSE)
    assert difference(one.state(), own.state()) <= (0 if "output" in recipe else CLOSE)
    for ours, theirs in zip(results, expected, strict=True):
        assert (ours.index, ours.label, ours.learned) == (
            theirs.index,
            theirs.label,
            theirs.learned,
        )
    assert pipeline.counts == other.counts
    assert pipeline.counts["learned"] == (0 if "recipe" in recipe else 26)
    assert str(one.report) == str(own.report) and one._serving.taken == own._serving.taken == 26
    assert (
        pipeline._replaying is not None and pipeline._replaying.replayed == 5
    )  # all but the first and the last
    assert pipeline.graphs == "steps of images (4, 3, 16, 16) are captured"
    assert caplog.text.count("are captured") == 1


@pytest.mark.parametrize("recipe", [{"norm": "unmix_tns"}, LEARNS], ids=named)
def test_bad_frames_are_served_by_the_adapter(recipe):
    """NaN rows, and images of which features overflow: as without, and nothing is learned twice."""
    frames = FRAMES.clone()
    frames[9] = math.nan
    frames[14] = 3e38
    pipeline, results, one = run(recipe, frames)
    other, expected, own = without(recipe, frames)
    assert [r.index for r in results] == [r.index for r in expected]
    assert pipeline.counts == other.counts and pipeline.counts["failed"] == 2
    assert (rows(results) - rows(expected)).abs().max() < CLOSE
    assert difference(one.state(), own.state()) < CLOSE
    assert pipeline._replaying is not None and pipeline._replaying.replayed == 4


@pytest.mark.parametrize("recipe", [{"norm": "unmix_tns"}, LEARNS], ids=named)
def test_whoever_reads_or_changes_the_adapter_meanwhile_sees_the_stream(recipe):
    """State, report, freeze, reset and a state that is loaded, between replays."""
    one, own = make(recipe, tiny("bn")), make(recipe, tiny("bn"))
    changes: dict[int, Any] = {
        3: lambda adapter: adapter.freeze(),
        4: lambda adapter: adapter.unfreeze(),
        5: lambda adapter: adapter.reset(),
        6: lambda adapter: adapter.load_state(kept),
        7: lambda adapter: move(adapter),
    }

    def move(adapter: tta.Adapter) -> None:
        """Let tensors be others, as where a component makes a new one."""
        rule = (
            adapter.norm_layers["bn1"].rule
            if "bn1" in adapter.norm_layers
            else next(iter(adapter.norm_layers.values())).rule
        )
        for key, value in rule._buffers.items():
            rule._buffers[key] = value.clone()

    kept = own.state()
    frames = torch.cat([FRAMES, FRAMES])[:40]
    with standing_in():
        pipeline = Pipeline(one, frames, batch_size=4, graphs=True)
        for number, (results, images) in enumerate(
            zip(pipeline.batches(), frames.split(4), strict=True)
        ):
            expected = torch.log_softmax(own(images), 1).exp()
            assert (rows(results) - expected).abs().max() < CLOSE
            assert all(result.learned == own.session.learning for result in results)
            assert difference(one.state(), own.state()) < CLOSE
            assert str(one.report) == str(own.report)
            if number in changes:
                changes[number](one), changes[number](own)
    assert pipeline._replaying is not None and pipeline._replaying.replayed == 10 - 1 - 1
    assert one.norm_layers.keys() == own.norm_layers.keys()
    weights = tiny("bn").state_dict()
    assert all(torch.equal(v, weights[k]) for k, v in one.unwrap().state_dict().items())


def test_late_batches_and_autocast_are_served_by_the_adapter():
    one = make({"norm": "unmix_tns"}, tiny("bn"))
    server = Replaying(one, 4, StandIn)
    for images in BATCHES[:3]:
        server.serve("x", images, True, 0)
    assert server.replayed == 2
    before = one.state()
    found = server.serve("x", BATCHES[3], False, 0)
    assert not found.learned and same(one.state(), before) and server.replayed == 2
    with torch.autocast("cpu", torch.bfloat16):
        server.serve("x", BATCHES[3], True, 0)
    assert server.replayed == 2
    with torch.inference_mode():
        server.serve("x", BATCHES[4], True, 0)
    assert server.replayed == 3 and all(not t.is_inference() for t in one.state().values())
    one.unwrap()
    with pytest.raises(RuntimeError, match="unwrapped"):
        server.serve("x", BATCHES[3], True, 0)


def test_where_nothing_is_captured_the_pipeline_goes_on_and_says_why_once(caplog):
    pipeline, results, one = run({"recipe": "sar"}, FRAMES)
    _, expected, own = without({"recipe": "sar"}, FRAMES)
    assert torch.equal(rows(results), rows(expected)) and same(one.state(), own.state())
    why = "steps are not captured: it waits for values, by _local_scalar_dense"
    assert pipeline.graphs == why and caplog.text.count(why) == 1

    caplog.clear()
    pipeline, results, _ = run(make({"norm": "bn"}, tiny("bn")), FRAMES, staleness=1)
    assert pipeline.graphs == "steps are not captured: learning may lag behind by 1 batch"
    assert len(results) == 28 and caplog.text.count("are not captured") == 1

    with StreamPool(make({"norm": "unmix_tns"}, tiny("bn"))) as pool:
        pipeline, results, _ = run(pool, FRAMES)
    assert "the streams of a pool take turns" in pipeline.graphs and len(results) == 28


def test_graphs_need_a_gpu():
    adapter = make({"norm": "bn"}, tiny("bn"))
    with pytest.raises(ValueError, match="`graphs` must be False on cpu, got True"):
        Pipeline(adapter, FRAMES, graphs=True)
    assert Pipeline(adapter, FRAMES).graphs == ""
    pipeline, results, _ = run(adapter, FRAMES[:3])
    assert pipeline.graphs == "no full batch has come twice yet" and len(results) == 3
