"""The guard slot: what a verdict does, what a guard is shown, health and events."""

from __future__ import annotations

import math
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import models
import tta
from experiments.data import open_data
from tests.helpers.batches import BATCH, images, source_batches
from tests.helpers.compositions import arguments, suiting
from tests.helpers.nets import tiny
from tta.core import registry
from tta.core.guard import LEARN
from tta.core.health import EVERY, Monitor, effective_rank
from tta.core.tracing import capturing
from tta.methods._statistics_watch import RUNS, STILL_SURE, SURE
from tta.parts.output_watch import OutputWatch
from tta.parts.spread import SpreadGap

pytestmark = pytest.mark.filterwarnings("ignore:.*preset, made for:UserWarning")

UPDATES = [name for name in tta.list_methods(slot="update") if name in suiting("bn")]
Script = Callable[[tta.Batch], tta.Verdict]


@dataclass(frozen=True, kw_only=True)
class ScriptedConfig(tta.ComponentConfig):
    """No fields."""


class Scripted(tta.Guard):
    """Does what a test tells it to."""

    Config = ScriptedConfig
    keeps_healthy = True
    before: Script = staticmethod(lambda batch: LEARN)
    after: Script = staticmethod(lambda batch: LEARN)

    def admit(self, batch: tta.Batch) -> tta.Verdict:
        return self.before(batch)

    def judge(self, batch: tta.Batch) -> tta.Verdict:
        return self.after(batch)


@pytest.fixture(autouse=True)
def _scripted(monkeypatch):
    """The guard is known for the length of a test."""
    monkeypatch.setattr(registry, "_COMPONENTS", dict(registry._COMPONENTS))
    know(Scripted)


def know(cls: type[tta.Guard]) -> None:
    """Register a guard in place of the scripted one."""
    registry._COMPONENTS.pop("scripted", None)
    registry.register("scripted")(cls)


def wrap(recipe: str = "tent", family: str = "bn", **more: Any) -> tuple[tta.Adapter, Any]:
    """An adapter with the scripted guard, and the guard."""
    adapter = tta.wrap(tiny(family), **arguments({"recipe": recipe}), guard="scripted", **more)
    return adapter, adapter.guard


def moving(adapter: tta.Adapter) -> dict[str, Tensor]:
    """The state without the guard's own part and the generator's."""
    return {k: v for k, v in adapter.state().items() if not k.startswith(("guard/", "rng"))}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Whether two states are equal, NaN included."""
    return a.keys() == b.keys() and all(
        torch.equal(a[k].nan_to_num(7), b[k].nan_to_num(7)) for k in a
    )


def say(action: str, **more: Any) -> Script:
    """A script that returns one verdict."""
    return lambda batch: tta.Verdict(action=action, reason="as told", **more)


def forgets(adapter: tta.Adapter) -> bool:
    """Whether the update puts back what it has learned before a call returns."""
    return adapter.update is not None and adapter.update.episodic


@pytest.mark.parametrize("recipe", [*UPDATES, *tta.list_methods(slot="norm"), "adanpc"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_skip_holds_back_whatever_moves(recipe: str, when: str) -> None:
    open_to_all = {"confidence_threshold": 0.0} if recipe == "adanpc" else {}
    adapter, _ = wrap(recipe, **open_to_all)
    adapter(images(0))
    before = moving(adapter)
    setattr(adapter.guard, when, say("skip"))
    answer = adapter(images(1))
    assert torch.isfinite(answer).all()
    assert same(moving(adapter), before)
    assert adapter.health["action"] == "skip" and adapter.health["reason"] == "as told"
    setattr(adapter.guard, when, say("learn"))
    for t in range(8):
        adapter(images(t))
    rules = [layer.rule for layer in adapter.norm_layers.values()]
    at_rest = adapter.update is None and any(rule.learns_apart for rule in rules)
    moved = not same(moving(adapter), before)
    assert not before or at_rest or moved or forgets(adapter)


def test_a_skipped_batch_is_answered_by_the_model_as_it_was() -> None:
    adapter, guard = wrap()
    adapter(images(0))
    with adapter.frozen():
        expected = adapter(images(1))
    guard.before = say("skip")
    assert torch.equal(adapter(images(1)), expected)


@pytest.mark.parametrize("when", ["before", "after"])
def test_source_answers_bit_for_bit(when: str) -> None:
    net = tiny("bn")
    adapter, guard = wrap()
    adapter(images(0))
    setattr(guard, when, say("source"))
    assert torch.equal(adapter(images(1)), net(images(1)))
    assert adapter.health["passes"] == 1 and adapter.health["agreement"] >= 0
    guard.before = guard.after = say("learn")
    assert not torch.equal(adapter(images(1)), net(images(1)))


def test_source_before_the_model_saves_its_pass_and_learns_nothing() -> None:
    adapter, guard = wrap()
    adapter(images(0))
    before = moving(adapter)
    guard.before = say("source")
    calls = []
    handle = adapter.model.register_forward_hook(lambda *_: calls.append(1))
    adapter(images(1))
    handle.remove()
    assert len(calls) == 1 and same(moving(adapter), before)
    assert not adapter.report.stepped


def test_an_answer_of_the_guards_own() -> None:
    adapter, guard = wrap()
    mine = torch.randn(BATCH, 10)
    guard.after = say("skip", answer=mine)
    assert torch.equal(adapter(images(0)), mine)
    guard.after = say("skip", answer=mine[:2])
    with pytest.raises(TypeError, match="`scripted` must answer with scores of shape"):
        adapter(images(0))


@pytest.mark.parametrize("recipe", UPDATES)
def test_reset_goes_to_the_reset_point(recipe: str) -> None:
    adapter, guard = wrap(recipe, output="adanpc")
    start = moving(adapter)
    adapter(images(0))
    guard.after = say("reset")
    adapter(images(1))
    after = moving(adapter)
    assert same(after | {"update/resets": start["update/resets"]}, start)
    assert adapter.report.resets == 1
    adapter.reset()
    assert adapter.report.resets == 0 and adapter.events == []


@pytest.mark.parametrize("recipe", UPDATES)
def test_restore_goes_to_the_healthy_snapshot(recipe: str) -> None:
    adapter, guard = wrap(recipe, output="adanpc")

    def remember(batch: tta.Batch) -> tta.Verdict:
        guard.remember()
        return LEARN

    guard.after = remember
    adapter(images(0))
    healthy = moving(adapter)
    guard.after = say("learn")
    for t in (1, 2):
        adapter(images(t))
    assert not same(moving(adapter), healthy) or forgets(adapter)
    saved = adapter.state()
    guard.after = say("restore")
    adapter(images(3))
    assert same(moving(adapter), healthy)
    twin, other = wrap(recipe, output="adanpc")
    twin.load_state(saved)
    other.after = say("restore")
    twin(images(3))
    assert same(moving(twin), healthy)


def test_restore_partly_towards_the_source() -> None:
    adapter, guard = wrap("tent", norm="robust_bn")
    start = moving(adapter)
    for t in range(3):
        adapter(images(t))
    guard.before = say("skip")
    before = moving(adapter)
    guard.after = say("restore", towards="source", share=0.25)
    adapter(images(3))
    after = moving(adapter)
    for key, value in before.items():
        if key.startswith(("param/", "norm/")) and value.is_floating_point():
            torch.testing.assert_close(after[key], value + 0.25 * (start[key] - value))
        else:
            assert torch.equal(after[key], value)


def test_restore_of_some_keys_alone() -> None:
    adapter, guard = wrap("tent")
    start = moving(adapter)
    adapter(images(0))
    chosen = "param/layer1.1.weight"
    guard.before = say("skip")
    before = moving(adapter)
    guard.after = say("reset", only=lambda key: key == chosen)
    adapter(images(1))
    after = moving(adapter)
    assert torch.equal(after[chosen], start[chosen]) and not torch.equal(
        before[chosen], start[chosen]
    )
    assert all(torch.equal(after[k], before[k]) for k in before if k != chosen)


def test_freeze_lasts_until_reset() -> None:
    adapter, guard = wrap()
    guard.after = say("freeze")
    adapter(images(0))
    guard.after = say("learn")
    before = moving(adapter)
    for t in (1, 2):
        adapter(images(t))
        assert adapter.health["action"] == "freeze"
    assert same(moving(adapter), before)
    assert [event["action"] for event in adapter.events] == ["freeze"]
    adapter.reset()
    adapter(images(1))
    assert not same(moving(adapter), before) and adapter.health["action"] == "learn"


def test_a_frozen_adapter_moves_nothing_of_the_guard() -> None:
    adapter, guard = wrap()
    adapter(images(0))
    before = adapter.state()
    guard.before, guard.after = say("reset"), say("source")
    net = tiny("bn")
    with adapter.frozen():
        assert torch.equal(adapter(images(1)), net(images(1)))
        x = images(1).requires_grad_()
        adapter(x).sum().backward()
    assert x.grad is not None and bool(x.grad.any())
    assert same(adapter.state(), before) and adapter.events == []


@pytest.mark.parametrize("why", ["runs", "pause", "beside", "auto"])
def test_the_source_goes_on_to_answer_where_an_adapter_is_frozen(why: str) -> None:
    guard = "auto" if why == "auto" else "steady"
    adapter = tta.wrap(tiny("bn"), **arguments({"update": "tent", "norm": "bn"}), guard=guard)
    for t in range(8):  # large, or the source would answer the first ones
        adapter(images(t, 64))
    x = images(9, 4)
    with adapter.frozen():
        own = adapter(x)
    assert adapter.health["action"] == "freeze"
    flags = {"runs": ["runs_seen"], "pause": ["hold", "source_ahead"], "beside": ["beside"]}
    for name in flags.get(why, ["hold"]):
        getattr(adapter.guard, name).fill_(True)
    source, start = tiny("bn"), tta.wrap(tiny("bn"), "bn")
    before = adapter.state()
    with adapter.frozen():
        found = adapter(x)
        assert torch.equal(found, (start if why == "beside" else source)(x))
        assert not torch.equal(found, own) and adapter.health["action"] == "source"
        with pytest.raises(ValueError, match="by which the source answers now"):
            tta.export.to_function(adapter, x)
        x.requires_grad_()
        adapter(x).sum().backward()
    assert x.grad is not None and bool(x.grad.any())
    assert same(adapter.state(), before)


def test_gradients_and_penalty() -> None:
    seen: list[dict[str, Tensor]] = []

    class Pulling(Scripted):
        def see_gradients(self, gradients):
            seen.append({k: g.clone() for k, g in gradients.items()})

        def penalty(self):
            return 3.0 * sum(p.square().sum() for p in self.context.parameters.values())

    know(Pulling)
    adapter, _ = wrap("tent", momentum=0.0)
    plain = tta.wrap(tiny("bn"), "tent", lr=0.05, momentum=0.0)
    start = plain.state()
    adapter(images(0))
    plain(images(0))
    after, moved = adapter.state(), plain.state()
    for name, gradient in seen[0].items():
        key = f"param/{name}"
        torch.testing.assert_close(moved[key], start[key] - 0.05 * gradient)
        pulled = start[key] - 0.05 * (gradient + 6 * start[key])
        torch.testing.assert_close(after[key], pulled)


def test_a_guard_predicts_with_other_models_and_leaves_no_trace() -> None:
    found: dict[str, Tensor] = {}

    def look(batch: tta.Batch) -> tta.Verdict:
        found.update(
            source=batch.source().logits, anchor=batch.anchor().logits, now=batch.predict().logits
        )
        assert batch.passes == 3 and batch.source() is batch.source()
        return LEARN

    adapter, guard = wrap("tent", norm="robust_bn")
    other, _ = wrap("tent", norm="robust_bn")
    guard.before = look
    for t in range(2):
        assert torch.equal(adapter(images(t)), other(images(t)))
    assert same(moving(adapter), moving(other))
    assert torch.equal(found["source"], tiny("bn")(images(1)))
    assert not torch.equal(found["anchor"], found["source"])
    assert not torch.equal(found["now"], found["anchor"])


@pytest.mark.parametrize(("trait", "verdict"), [("keeps_healthy", "restore"), ("", "dance")])
def test_what_a_guard_must_declare(trait: str, verdict: str) -> None:
    know(type("Own", (Scripted,), {trait: False} if trait else {}))
    adapter, guard = wrap()
    guard.after = say(verdict)
    with pytest.raises(TypeError, match="correct the component"):
        adapter(images(0))


def test_health_keys_and_averages() -> None:
    adapter = tta.wrap(tiny("bn"), "tent", health=True)
    plain = tta.wrap(tiny("bn"), "tent")
    entropies = []
    for t in range(3):
        answer = adapter(images(t))
        assert torch.equal(answer, plain(images(t)))
        probs = answer.softmax(1)
        entropies.append(float(-(probs * probs.log()).sum(1).mean()))
    health = adapter.health
    assert health["entropy"] == pytest.approx(entropies[-1], rel=1e-5)
    mean = probs.mean(0)
    assert health["concentration"] == pytest.approx(float((mean * mean.log()).sum()), rel=1e-5)
    assert health["entropy_average"] == pytest.approx(sum(entropies) / 3, rel=1e-2)
    assert health["action"] == "learn" and health["reason"] == ""
    assert health["agreement"] != health["agreement"] and health["distance"] > 0
    assert plain.health == {} and plain.events == []


@pytest.mark.parametrize("guard", ["steady", "asr", "periodic", "aetta", "watch"])
def test_every_guard_estimates_the_accuracy(guard: str) -> None:
    adapter = tta.wrap(tiny("bn"), "tent", guard=guard, source=source_batches())
    adapter(images(0))
    assert 0 <= adapter.health["estimated_accuracy"] <= 1
    assert adapter.health["estimator"] == ("aetta" if guard == "aetta" else "confidence")


def test_averages_outlive_a_figure_that_overflows() -> None:
    monitor = Monitor(10)
    for value in (1.0, math.inf, 1.0):
        monitor.move_averages({"distance": value}, 16)
    assert monitor.averaged()["distance"] == pytest.approx(1.0)


def test_health_has_its_keys_before_the_first_batch_and_when_none_can_be_used() -> None:
    adapter = tta.wrap(tiny("bn"), "tent", health=True)
    blank = adapter.health
    adapter(images(0))
    assert blank.keys() <= adapter.health.keys() and blank["action"] == "learn"
    before = adapter.state()
    with pytest.warns(UserWarning, match="NaN or infinite"):
        adapter(torch.full((2, 3, 32, 32), float("nan")))
    health = adapter.health
    assert blank.keys() == health.keys() and health["action"] == "skip"
    assert health["entropy"] != health["entropy"] and "NaN" in health["reason"]
    assert same(adapter.state(), before)


def test_the_source_is_asked_on_one_batch_in_twenty() -> None:
    adapter = tta.wrap(tiny("bn"), "tent", health=True)
    asked = []
    for t in range(2 * EVERY):
        adapter(images(t))
        asked.append(adapter.health["passes"])
    assert [t for t, passes in enumerate(asked) if passes] == [EVERY - 1, 2 * EVERY - 1]


def test_runs_of_predicted_labels_go_on_over_batches() -> None:
    monitor = tta.wrap(tiny("bn"), "tent", health=True).guard.monitor
    lengths = []
    for labels in ([1, 1, 2, 2], [2, 2], [2], [3, 4], [4]):
        scores = torch.nn.functional.one_hot(torch.tensor(labels), 10).float()
        lengths.append(float(monitor.measure(scores, None, scores, True)["run_length"]))
    assert lengths == [2, 4, 5, 1, 2]


def test_effective_rank_counts_directions() -> None:
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(12, 12, generator=generator))[0][:3]
    features = torch.randn(5000, 3, generator=generator) @ basis
    assert float(effective_rank(features)) == pytest.approx(3, abs=0.05)
    assert float(effective_rank(features[:2])) == pytest.approx(1)
    assert torch.isnan(effective_rank(features[:1]))


def _predicted(stay: float, shown: float, count: int = 2000) -> torch.Tensor:
    """Predictions of labels that stay with a probability; a share is right, the rest by chance."""
    generator = torch.Generator().manual_seed(3)
    labels, noise = torch.randint(0, 10, (2, count), generator=generator)
    stays, right = torch.rand(2, count, generator=generator)
    for t in range(1, count):
        labels[t] = labels[t - 1] if stays[t] < stay else labels[t]
    return torch.where(right < shown, labels, noise)


@pytest.mark.parametrize(
    ("stay", "own", "norm", "size", "harmful"),
    [
        (0.8, 0.2, "bn", 10, True),  # the batch's statistics hide the runs that the source shows
        (0.95, 0.2, "bn", 32, True),
        (0.8, 0.6, "bn", 32, False),  # the adapted model shows more of them
        (0.8, 0.2, "robust_bn", 10, True),
        (0.8, 0.1, "bn", 4, True),  # so few images hide many runs
        (0.0, 0.2, "bn", 10, False),  # there are no runs
    ],
)
def test_runs_do_harm_where_the_adapted_model_shows_less_of_them_than_the_source(
    stay: float, own: float, norm: str, size: int, harmful: bool
) -> None:
    guard: Any = tta.wrap(tiny("bn"), "tent", norm=norm, guard="steady").guard
    for mine, its in zip(
        _predicted(stay, own).split(size), _predicted(stay, 0.5).split(size), strict=True
    ):
        guard.runs.watch(its)
        guard.own.watch(mine)
    assert (guard.runs.persistence() > RUNS and guard._harmful(size, SURE)) is harmful


@pytest.mark.parametrize(
    ("stay", "own", "size", "hidden"),
    [(0.95, 0.1, 10, True), (0.95, 0.6, 10, False), (0.95, 0.1, 64, False), (0.0, 0.1, 10, False)],
)
def test_an_update_may_hide_runs_by_itself(
    stay: float, own: float, size: int, hidden: bool
) -> None:
    guard: Any = tta.wrap(tiny("gn"), "tent", guard="steady").guard
    both = (_predicted(stay, share).split(size) for share in (own, 0.7))
    for mine, its in zip(*both, strict=True):
        guard.runs.watch(its), guard.own.watch(mine)
    assert guard._hidden(size) is hidden


def test_runs_are_looked_for_in_small_batches_on_networks_without_batch_statistics() -> None:
    adapter = tta.wrap(tiny("gn"), "shot_im", guard="steady", mean=0.5, std=0.5)
    for seed in range(8):
        adapter(images(seed, 10))
    guard: Any = adapter.guard
    assert float(guard.runs.images()) > 0 and float(guard.own.images()) > 0
    for _ in range(40):  # one class after the other, of which the update shows none
        said, mine = torch.full((10,), 3), torch.arange(10)
        guard.runs.watch(said), guard.own.watch(mine)
        guard.runs.watch(said + 1), guard.own.watch(mine)
    guard.age.zero_()
    adapter(images(9, 10))
    assert adapter.health["action"] == "reset" and "runs" in adapter.health["reason"]
    start = adapter.reset_point()
    assert all(torch.equal(v, start[k]) for k, v in adapter.state().items() if "param/" in k)
    assert torch.equal(adapter(images(9, 10)), tiny("gn")(images(9, 10)))  # in the pause
    assert float(guard.runs.images()) == 0


def test_to_be_far_ahead_once_is_no_credit_for_later() -> None:
    even, one = torch.zeros(48, 4), torch.eye(4)[:1].repeat(48, 1) * 50
    bounded, free = SpreadGap(4, 768, 0.1), SpreadGap(4, 768)
    for _ in range(4):
        bounded.see(even, one), free.see(even, one)
    assert bounded.mean() == pytest.approx(0.1) and bounded.last() == pytest.approx(math.log(4))
    for _ in range(2):
        bounded.see(one, even), free.see(one, even)
    assert bounded.mean() < 0 < free.mean()


@pytest.mark.parametrize(
    ("kind", "stay", "own", "source", "share"),
    [
        ("bn", 0.8, 0.3, 0.7, 1.0),  # the source is the better of both
        ("bn", 0.8, 0.7, 0.3, 0.0),
        ("bn", 0.0, 0.3, 0.7, 0.0),  # there are no runs, in which both could be compared
        ("gn", 0.8, 0.3, 0.8, 1.0),
        ("gn", 0.8, 0.75, 0.8, 0.1),  # by too little to tell
    ],
)
def test_of_a_large_batch_in_runs_who_shows_more_of_them_answers(
    kind: str, stay: float, own: float, source: float, share: float
) -> None:
    guard: Any = tta.wrap(tiny(kind), "tent", guard="steady").guard
    asked, answered = [], []
    pairs = zip(_predicted(stay, own).split(64), _predicted(stay, source).split(64), strict=True)
    for mine, its in pairs:
        asked.append(guard._is_alert(mine))
        if asked[-1]:
            guard.runs.watch(its)
        answered.append(asked[-1] and guard._shows_less(mine, its))
    assert sum(asked[8:]) == (len(asked[8:]) if stay else 0)  # which costs a pass each
    assert abs(sum(answered[8:]) / len(answered[8:]) - share) < 0.15


@pytest.mark.parametrize(
    ("stay", "before", "after", "size", "held"),
    [
        (0.0, 0.7, 0.7, 64, True),  # no runs: whatever is corrected is not what the rule is for
        (0.8, 0.6, 0.9, 64, False),
        (0.8, 0.6, 0.3, 64, True),  # several classes were made one
        (0.8, 0.6, 0.9, 10, False),
        (0.8, 0.6, 0.3, 10, True),
        (0.9, 0.4, 1.0, 64, False),
    ],
)
def test_a_correction_of_skewed_labels_is_held_back_where_it_does_not_show_their_runs(
    stay: float, before: float, after: float, size: int, held: bool
) -> None:
    watch = OutputWatch(10, skew=True, mixes=False)
    both = (_predicted(stay, share).split(size) for share in (before, after))
    pairs = zip(*both, strict=True)
    found = [watch.holds_back(x, y, learning=True) for x, y in pairs]
    late = found[len(found) // 4 :]
    assert (sum(late) / len(late) > 0.5) is held
    state = {key: value.clone() for key, value in watch.state_dict().items()}
    watch.holds_back(torch.zeros(4, dtype=torch.int64), torch.ones(4, dtype=torch.int64), False)
    assert all(torch.equal(value, state[key]) for key, value in watch.state_dict().items())


@pytest.mark.parametrize("fewer", [True, False])
def test_an_output_rule_is_held_back_while_it_gives_fewer_classes(fewer: bool) -> None:
    watch = OutputWatch(10, skew=False, mixes=False)
    for all_ten in _predicted(0.0, 0.8).split(50):
        merged = torch.where(all_ten < 3, 0, all_ten)
        before, after = (all_ten, merged) if fewer else (merged, all_ten)
        assert watch.holds_back(before, after, learning=True) is fewer
        assert watch.holds_back(before, before, learning=False) is fewer


@pytest.mark.parametrize("skew", [True, False])
@pytest.mark.parametrize(("stay", "after"), [(0.0, 0.7), (0.8, 0.9), (0.8, 0.3), (0.99, 1.0)])
def test_a_graph_holds_an_output_rule_back_as_the_guard_does(
    stay: float, after: float, skew: bool
) -> None:
    watch = OutputWatch(10, skew, mixes=False)
    sizes = (64, 1, 2, 47, 48, 64, 10, 7, 64) * 4
    before, corrected = (
        _predicted(stay, share)[: sum(sizes)].split(sizes) for share in (0.6, after)
    )
    for x, y in zip(before, corrected, strict=True):
        with capturing(by_tensors=True):
            in_graph = watch.holds_back(x, y, learning=False)
        assert bool(in_graph) == watch.holds_back(x, y, learning=False)
        watch.holds_back(x, y, learning=True)


@pytest.mark.parametrize(
    ("update", "output"),
    [(None, "lame"), (None, "prior_correction"), ("tent", "lame"), ("roid", None)],
)
def test_the_guard_answers_without_an_output_rule_that_no_stream_calls_for(
    update: str | None, output: str | None
) -> None:
    def wrapped(output: str | None, guard: str | None) -> tta.Adapter:
        given = {} if output is None else {"output": output}
        scale: Any = {"mean": (0, 0, 0), "std": (1, 1, 1)}
        return tta.wrap(tiny("gn"), update, guard=guard, **given, **scale)

    guarded, corrected, plain = (
        wrapped(output, "steady"), wrapped(output, None), wrapped("source", None),
    )  # fmt: skip
    for seed in range(4):
        x = images(seed, 32)
        found = guarded(x)
        assert torch.equal(found, plain(x)) and not torch.equal(found, corrected(x))
        assert "output rule" in guarded.health["reason"]
    # Where nothing else moves, this is the source's answer.
    actions = [event["action"] for event in guarded.events]
    assert actions == (["source"] * 4 if update is None else [])
    state, x = guarded.state(), images(9, 32)
    for adapter in (guarded, plain):
        adapter.freeze()
    assert torch.equal(guarded(x), plain(x))
    assert all(torch.equal(v, state[k]) for k, v in guarded.state().items())


def test_of_large_batches_of_one_class_who_shows_it_answers() -> None:
    guard: Any = tta.wrap(tiny("bn"), "tent", guard="steady").guard
    labels = torch.arange(40).remainder(2).repeat_interleave(128)  # of two classes, each for long
    right = torch.rand(2, len(labels), generator=torch.Generator().manual_seed(0))
    mine, its = (torch.where(right[i] < p, labels, 1 - labels) for i, p in enumerate((0.5, 0.95)))
    answered = []
    for own, said in zip(mine.split(64), its.split(64), strict=True):
        guard._is_alert(own)
        guard.runs.watch(said)
        guard.own.watch(own)
        answered.append(guard._shows_less(own, said))
    assert sum(answered[8:]) > 0.9 * len(answered[8:])


def _told(labels: torch.Tensor) -> Any:
    """A batch of which both models say ``labels``, as a guard sees it."""
    logits = 5.0 * torch.nn.functional.one_hot(labels, 10)
    said = types.SimpleNamespace(logits=logits)
    return types.SimpleNamespace(
        images=labels, prediction=said, anchor=lambda: said, source=lambda: said,
        source_of_input=lambda: said, learning=True,
    )  # fmt: skip


def test_after_runs_the_source_answers_until_many_images_show_none() -> None:
    guard: Any = tta.wrap(tiny("bn"), "bn", guard="steady").guard
    guard.runs_seen.fill_(True)
    labels = torch.randint(0, 10, (800,), generator=torch.Generator().manual_seed(0)).split(10)
    over = [guard._in_runs(_told(part), _told(part).prediction.logits) for part in labels[:10]]
    assert bool(guard.runs_seen) and not any(v.action == "reset" for v in over)
    over = [
        guard._in_runs(_told(part), _told(part).prediction.logits).action
        for part in labels[10:]
        if bool(guard.runs_seen)
    ]
    assert over[-1] == "reset" and not bool(guard.runs_seen)


def test_runs_are_taken_for_runs_sooner_after_the_first() -> None:
    guard: Any = tta.wrap(tiny("bn"), "bn", guard="steady").guard
    asked: list[float] = []
    guard._asks, guard._in_doubt, guard._see = lambda *_: True, lambda: True, lambda *_: None
    guard._harmful = lambda count, doubt: bool(asked.append(doubt)) or True
    batch = _told(torch.zeros(10, dtype=torch.long))
    batch.report = types.SimpleNamespace(raw=dict)
    for _ in range(2):
        assert guard._judge(batch, batch.prediction.logits).action == "source"
        guard.runs_seen.fill_(False)
    assert asked == [SURE, STILL_SURE]


@pytest.mark.slow
@pytest.mark.parametrize(("recipe", "size"), [("bn", 10), ("tent", 4)])
@pytest.mark.parametrize("ordered", [True, False])
def test_the_source_answers_where_batches_are_of_one_class(
    ordered: bool, recipe: str, size: int
) -> None:
    net, _ = models.load("cifar10_resnet20_bn")
    data = open_data("bundled").clean
    assert data is not None
    x, y = (torch.stack([torch.as_tensor(data[i][k]) for i in range(1000)]) for k in (0, 1))
    order = y.argsort(stable=True) if ordered else torch.arange(1000)
    adapter = tta.wrap(net, recipe, guard="steady")
    for part in order.split(size):  # a step of four is taken back, and a pause begins
        adapter(x[part].float() / 255)
    answered = [event for event in adapter.events if event["reason"] == "labels come in runs"]
    assert len(answered) > 30 if ordered else not answered


@pytest.mark.slow
def test_the_guard_lets_an_output_rule_answer_where_labels_come_in_runs() -> None:
    data = open_data("bundled").clean
    assert data is not None
    x, y = (torch.stack([torch.as_tensor(data[i][k]) for i in range(1000)]) for k in (0, 1))
    order = y.view(5, 200).argsort(dim=1, stable=True) + 200 * torch.arange(5)[:, None]
    guarded, alone = (
        tta.wrap(models.load("cifar10_resnet20_gn")[0], "lame", guard=guard)
        for guard in ("steady", None)
    )
    same = []
    for part in order.flatten().split(64)[:-1]:
        shown = x[part].float() / 255
        same.append(torch.equal(guarded(shown), alone(shown)))
    assert sum(same) > len(same) / 2


@pytest.mark.parametrize("kind", ["bn", "gn"])
def test_an_input_rule_is_no_failure_of_the_update(kind: str) -> None:
    """The guard compares predictions of the same images, those that the rule has made."""
    dark = tta.Diffusion(lambda x, t: torch.ones_like(x), torch.full((50,), 0.5))
    config = tta.get_config("dda", steps=2, respacing=10, join=None)
    dark.config = config
    adapter = tta.wrap(
        tiny(kind), "tent", lr=0.0, norm="source" if kind == "bn" else None, input=dark,
        guard="steady", mean=(0, 0, 0), std=(1, 1, 1),
    )  # fmt: skip
    for seed in range(6):
        adapter(images(seed, 48))
    assert adapter.events == []


def test_shadow_answers_with_the_source_and_learns() -> None:
    net = tiny("bn")
    adapter = tta.wrap(tiny("bn"), "tent", lr=0.05, shadow=True)
    plain = tta.wrap(tiny("bn"), "tent", lr=0.05)
    for t in range(3):
        assert torch.equal(adapter(images(t)), net(images(t)))
        said = plain(images(t))
        agreement = (said.argmax(1) == net(images(t)).argmax(1)).float().mean()
        assert adapter.health["agreement"] == pytest.approx(float(agreement))
    assert same(moving(adapter), moving(plain))
    again = tta.AdapterConfig.from_json(adapter.config.to_json())
    assert again.shadow and torch.equal(tta.wrap(tiny("bn"), again)(images(0)), net(images(0)))


def test_events_are_kept_and_told() -> None:
    told: list[dict[str, Any]] = []
    periodic = tta.get_config("periodic", every=2)
    adapter = tta.wrap(tiny("bn"), "tent", guard=periodic, on_event=told.append)
    for t in range(5):
        adapter(images(t))
    assert [event["step"] for event in adapter.events] == [1, 3]
    assert adapter.events == told
    assert set(told[0]) == {"step", "action", "reason", "figures"}
    assert isinstance(told[0]["figures"]["entropy"], float)
    adapter.reset()
    assert adapter.events == []


@pytest.mark.parametrize("official", [False, True])
def test_periodic_is_rdumb(official: bool) -> None:
    """The class average, which an official host's own reset keeps, goes as well."""
    margin = 0.5 if official else 10.0  # what the average changes is which images are redundant
    wide = {"entropy_margin": 10.0, "redundancy_margin": margin, "lr": 0.05, "official": official}
    periodic = tta.get_config("periodic", every=3)
    adapter = tta.wrap(tiny("gn"), "eta", guard=periodic, **wide)
    rdumb = tta.wrap(tiny("gn"), "rdumb", reset_every=3, **wide)
    for t in range(8):
        assert torch.equal(adapter(images(t)), rdumb(images(t)))
    assert adapter.report.resets == 2


def test_a_reset_of_asr_clears_the_class_average_of_an_official_host() -> None:
    host = tta.get_config("eta", entropy_margin=10.0, redundancy_margin=10.0, official=True)
    guard = tta.get_config("asr", threshold=1.0)  # no mean prediction is above ln C
    adapter = tta.wrap(tiny("gn"), update=host, guard=guard)
    adapter(images(0))
    assert adapter.health["action"] == "reset"
    assert adapter.state()["update/ema_probs"].isnan().all()


@pytest.mark.parametrize(
    ("kind", "match", "given"),
    [
        (ValueError, "`guard` must be a component of that slot, got 'tent'", {"guard": "tent"}),
        (TypeError, "`on_event` must be callable", {"guard": "watch", "on_event": 3}),
        (TypeError, "`shadow` must be", {"shadow": "yes"}),
        (TypeError, "`health` must be", {"health": 1}),
        (ValueError, "`activation` must be 'softmax'", {"health": True, "activation": "sigmoid"}),
    ],
)
def test_what_is_refused(kind, match, given) -> None:
    with pytest.raises(kind, match=match):
        tta.wrap(tiny("bn"), "bn" if "activation" in given else "tent", **given)


def test_guards_by_every_form_of_a_name() -> None:
    chosen = [
        tta.wrap(tiny("bn"), "source", guard="watch"),
        tta.wrap(tiny("bn"), guard=tta.get_config("watch")),
        tta.wrap(tiny("bn"), "watch"),
        tta.wrap(tiny("bn"), "source", health=True),
    ]
    assert [adapter.config.label for adapter in chosen] == ["watch"] * 4
    net = tiny("bn")
    assert all(torch.equal(adapter(images(0)), net(images(0))) for adapter in chosen)
    for none in (None, False, "source"):
        assert tta.wrap(tiny("bn"), "tent", guard=none).config.guard is None
    assert {"watch", "periodic"} <= set(tta.list_methods(slot="guard"))


def test_the_recipe_asr_is_eta_with_a_guard() -> None:
    adapter = tta.wrap(tiny("bn"), "asr.cifar10", lr=0.01, flip_weight=0.5)
    config = adapter.config
    assert config.label == "bn+eta+asr" and config.guard.flip_weight == 0.5
    assert config.update == tta.get_config("eta.cifar10", lr=0.01).replace(nesterov=True)
    assert tta.wrap(tiny("bn"), "tent.cifar10", guard="asr").config.label == "bn+tent+asr"
    assert tta.wrap(tiny("bn"), guard="asr").config.label == "asr"
    with pytest.warns(UserWarning, match="'eta' uses the imagenet preset"):
        tta.wrap(tiny("bn"), "asr")


def test_asr_over_an_update_with_a_teacher_resets_the_same_tensors_of_both() -> None:
    adapter = tta.wrap(
        tiny("bn"),
        **arguments({"recipe": "rotta"}),
        guard=tta.get_config("asr", threshold=1.0, keep_share=0.5, keep_slope=0.0),
    )
    start = adapter.state()
    for t in range(3):
        adapter(images(t))
    assert adapter.health["action"] == "reset" and adapter.report.scope == 0.5
    after, names = adapter.state(), list(adapter.parameters_adapted)
    assert len(names) == 4
    for i, name in enumerate(names):
        for key in (f"param/{name}", f"update/teacher.{name}"):
            assert torch.equal(after[key], start[key]) == (i >= 2), key


def test_aetta_on_features_needs_one_pass() -> None:
    adapter = tta.wrap(tiny("bn"), "tent", guard="aetta", seed=1)
    plain = tta.wrap(tiny("bn"), "tent", seed=1)
    for t in range(2):
        assert torch.equal(adapter(images(t)), plain(images(t)))
    assert adapter.health["passes"] == 1
    assert 0 <= adapter.health["estimated_accuracy"] <= 1


@pytest.mark.parametrize(
    ("place", "match"),
    [("gives", "that give a tensor, but 'gives' gives tuple"), ("apart", "calls, got 'apart'")],
)
def test_places_without_an_activation_are_refused(place: str, match: str) -> None:
    class Pair(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, int]:
            return x, 0

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gives, self.apart, self.head = Pair(), nn.ReLU(), nn.Linear(3 * 8 * 8, 10)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.gives(x)[0].flatten(1))

    guard = tta.get_config("aetta", places=(place,))
    adapter = tta.wrap(Net().eval(), "source", guard=guard)
    before = adapter.state()
    with pytest.raises(ValueError, match=f"`places` must name modules .*{match}"):
        adapter(torch.rand(4, 3, 8, 8))
    for key, value in adapter.state().items():
        assert torch.equal(value.nan_to_num(), before[key].nan_to_num())


@pytest.mark.parametrize(
    ("match", "fields"),
    [
        ("`places` must name modules of the model, got 'layer9'", {"places": ("layer9",)}),
        ("`dropout` must be", {"dropout": 1.0}),
        ("`passes` must be", {"passes": 0}),
    ],
)
def test_what_aetta_refuses(match: str, fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=match):
        tta.wrap(tiny("bn"), "tent", guard=tta.get_config("aetta", **fields))


def test_injected_draws_are_checked() -> None:
    with pytest.raises(ValueError, match="`draws` must belong to a component that takes them"):
        tta.wrap(tiny("bn"), "tent", draws=lambda name, shape, call: None)
    calls = []

    def draws(name: str, shape: torch.Size, call: int) -> Tensor | None:
        calls.append((name, tuple(shape), call))
        return torch.ones(2, 2) if call else None

    guard = tta.get_config("aetta", passes=1)
    adapter = tta.wrap(tiny("bn"), "tent", guard=guard, draws=draws)
    adapter(images(0))
    adapter.reset()
    with pytest.raises(ValueError, match=r"`draws` must return shape \(8, 8\)"):
        adapter(images(1))
    assert calls == [("dropout_masks/0/features", (8, 8), call) for call in (0, 1)]
