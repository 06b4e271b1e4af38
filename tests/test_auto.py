"""`auto` and its parts, `steady`: what they do on streams that are made to need it."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tta
from tests.helpers.batches import images, source_batches, surroundings
from tests.helpers.nets import tiny
from tta.core import registry
from tta.core.component import Context
from tta.core.prediction import Prediction
from tta.methods._label_filter import filtered
from tta.methods.steady import EARLIEST
from tta.parts.confidence_gap import ConfidenceGap
from tta.parts.label_runs import LabelRuns
from tta.parts.spread import SpreadGap, spread

CLASSES = 10


def labels_of(stay: float, count: int = 4000, seed: int = 0) -> Tensor:
    """Labels that stay with a probability and are else drawn anew."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(0, CLASSES, (count,), generator=generator)
    stays = torch.rand(count, generator=generator) < stay
    for t in range(1, count):
        drawn[t] = drawn[t - 1] if stays[t] else drawn[t]
    return drawn


def noisy_logits(labels: Tensor) -> Tensor:
    """Logits of a classifier that is right on half of the images, and surer where it is right."""
    noise = torch.randn(len(labels), CLASSES, generator=torch.Generator().manual_seed(1))
    return 3 * (noise + 1.5 * nn.functional.one_hot(labels, CLASSES))


def runs() -> LabelRuns:
    return LabelRuns(CLASSES, horizon=256, recent=96, doubt=3.0)


@pytest.mark.parametrize("size", [1, 10, 64])
def test_persistence_is_found_whatever_the_batch_size(size: int) -> None:
    found = runs()
    for part in labels_of(0.8).split(size):
        found.watch(part)
    assert 0.5 < found.persistence() < 0.85


def test_runs_are_seen_among_few_images_of_many_classes() -> None:
    runs, early = LabelRuns(1000), LabelRuns(1000, early=True)
    for found in (runs, early):
        found.watch(torch.arange(8).repeat_interleave(4))
    repeats = 24 / 31
    assert runs.persistence(0.0) == pytest.approx((repeats - 1 / 8) / (7 / 8), abs=1e-9)
    chance = (1 / 8 - 1 / 32) / (1 - 1 / 32)  # two of the 32 images are the same one in 1 of 32
    assert early.persistence(0.0) == pytest.approx((repeats - chance) / (1 - chance), abs=2e-3)
    early.forget()
    early.watch(torch.arange(40))
    assert early.persistence(0.0) == 0


@pytest.mark.parametrize("size", [1, 64])
def test_no_persistence_is_found_in_random_order_however_few_classes_are_predicted(
    size: int,
) -> None:
    found = runs()
    generator = torch.Generator().manual_seed(0)
    shares = torch.tensor([0.7, 0.2, 0.1, *[0.0] * 7])  # of a model that predicts few classes
    labels = torch.multinomial(shares, 4000, replacement=True, generator=generator)
    largest = 0.0
    for part in labels.split(size):
        found.watch(part)
        largest = max(largest, found.persistence())
    assert largest < 0.12 and found.persistence() < 0.02


def test_runs_end_soon_after_the_stream_has_changed() -> None:
    """Of the averages the short one counts, so that a stream of one class leaves nothing behind."""
    found = runs()
    found.watch(torch.zeros(2000, dtype=torch.int64))
    assert found.persistence() == 0  # one class alone says nothing
    worst = 0.0
    for part in labels_of(0.0, 1000).split(10):
        found.watch(part)
        worst = max(worst, found.persistence())
    assert found.persistence() < 0.02 and worst < 0.5


def test_the_filter_is_the_forward_backward_algorithm() -> None:
    """Against the sum over all sequences of labels."""
    generator = torch.Generator().manual_seed(0)
    probs = torch.rand(4, 3, generator=generator, dtype=torch.float64).softmax(1)
    before, stay = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64), 0.6
    total = torch.zeros(4, 3, dtype=torch.float64)
    for path in itertools.product(range(3), repeat=5):  # from the image before on
        weight = before[path[0]]
        for t, (old, new) in enumerate(itertools.pairwise(path)):
            weight = weight * (stay * (old == new) + (1 - stay) / 3) * probs[t, new]
        for t, label in enumerate(path[1:]):
            total[t, label] += weight
    messages, belief = filtered(probs.numpy(), before.numpy(), stay)
    posterior = probs * torch.from_numpy(messages)
    posterior = posterior / posterior.sum(1, keepdim=True)
    assert torch.allclose(posterior, total / total.sum(1, keepdim=True), atol=1e-12)
    assert torch.allclose(torch.from_numpy(belief), posterior[-1], atol=1e-12)


def rule(name: str = "persistence") -> Any:
    context = Context(num_classes=CLASSES)
    return tta.core.registry.component(name)(tta.get_config(name), context)  # type: ignore[attr-defined]


def test_predictions_lean_on_their_neighbours_where_labels_stay() -> None:
    output, labels = rule(), labels_of(0.9, 2000)
    plain, better = 0, 0
    for part, logits in zip(labels.split(50), noisy_logits(labels).split(50), strict=True):
        scores = output.correct(Prediction(logits))
        plain += int((logits.argmax(1) == part).sum())
        better += int((scores.argmax(1) == part).sum())
    assert better > plain + 150


def test_logits_stay_as_they_are_in_random_order() -> None:
    output, labels = rule(), labels_of(0.0, 2000)
    changed = 0
    for logits in noisy_logits(labels).split(50):
        changed += not torch.equal(output.correct(Prediction(logits)), logits)
    assert changed <= 2  # of 40, where chance looked like a run


class _Scaled(nn.Module):
    """A stream's domain: scale and offset of the pixels."""

    def __call__(self, x: Tensor) -> Tensor:
        return 3 * x + 1


def test_statistics_stay_at_the_source_for_images_like_the_sources() -> None:
    net = tiny("bn")
    with torch.no_grad():  # statistics of these images, so that they are the source's
        net.train()
        for seed in range(60):
            net(images(1000 + seed, 64))
        net.eval()
    adapter = tta.wrap(net, norm="adaptive_bn", tolerance=3.0)
    shares = {"same": [], "other": []}
    for kind, change in (("same", lambda x: x), ("other", _Scaled())):
        for seed in range(6):
            adapter(change(images(seed, 64)))
            found = [float(w.rule.share(1e-5)) for w in adapter.norm_layers.values()]  # type: ignore[operator]
            shares[kind].append(sum(found) / len(found))
    assert max(shares["same"][1:]) < 0.5
    assert min(shares["other"][1:]) > 0.95


def test_adaptive_statistics_do_not_depend_on_how_images_are_batched() -> None:
    """Horizons are counted in images; single images and batches end near the same averages."""
    ends = []
    for size in (1, 32):
        adapter = tta.wrap(tiny("bn"), norm="adaptive_bn")
        for part in (2 * images(0, 256) + 1).split(size):
            adapter(part)
        ends.append(adapter.state())
    for key in ends[0]:
        if key.endswith(".mean"):
            assert torch.allclose(ends[0][key], ends[1][key], rtol=0.1, atol=0.1)


def test_a_camera_that_hangs_moves_no_statistics() -> None:
    adapter = tta.wrap(tiny("bn"), norm="adaptive_bn")
    adapter(images(0, 64))
    adapter(images(1, 1))
    before = adapter.state()
    for _ in range(5):
        adapter(images(1, 1).expand(32, -1, -1, -1))
    after = adapter.state()
    for key in before:
        if key.endswith((".mean", ".var")):
            assert torch.allclose(before[key], after[key], atol=1e-4), key


def test_auto_brings_what_suits_the_network() -> None:
    source = source_batches()
    names = {
        family: [
            getattr(tta.wrap(tiny(family), "auto", source=source).config, slot)
            for slot in ("norm", "update", "output", "guard")
        ]
        for family in ("bn", "gn")
    }
    assert [c and c.name for c in names["bn"]] == ["adaptive_bn", None, "drift", "auto"]
    assert [c and c.name for c in names["gn"]] == [None, None, "drift", "auto"]
    assert "auto" in tta.list_methods() and "auto" in tta.list_methods(slot="guard")
    other = tta.wrap(tiny("bn"), "auto", norm="bn", budget=1.0)
    assert other.config.norm.name == "bn" and other.config.guard.budget == 1.0
    with pytest.raises(ValueError, match="`budget` must be"):
        tta.wrap(tiny("bn"), "auto", budget=5)


@pytest.mark.parametrize("family", ["bn", "gn", "ln"])
def test_auto_without_source_data_runs_and_does_not_shift(family: str) -> None:
    adapter = tta.wrap(tiny(family), "auto")
    plain = tiny(family)
    for seed in range(3):
        answer = adapter(images(seed))
        assert answer.shape == (8, CLASSES)
    assert not bool(adapter.constants()["output/shifts"])
    if family != "bn":  # nothing moves, and no runs are seen
        assert torch.equal(answer, plain(images(2)))


def test_drift_gives_back_the_source_where_features_have_moved() -> None:
    """A constant that is added to all features is found and taken off."""
    net = tiny("gn")
    source = [(images(seed, 64), torch.zeros(64, dtype=torch.int64)) for seed in range(4)]
    adapter = tta.wrap(net, output="drift", source=source)
    plain = tiny("gn")
    features: list[Tensor] = []
    plain.fc.register_forward_pre_hook(lambda _, args: features.append(args[0]))  # type: ignore[union-attr]
    moved = torch.linspace(-1, 1, plain.fc.in_features)  # type: ignore[union-attr,arg-type]
    net.fc.register_forward_pre_hook(lambda _, args: (args[0] + moved,), prepend=True)  # type: ignore[union-attr]
    for seed in range(60):
        answer = adapter(images(100 + seed, 64))
    right = plain(images(159, 64))
    off = plain.fc(features[-1] + moved)  # type: ignore[operator]
    assert float((answer - right).abs().mean()) < 0.1 * float((off - right).abs().mean())


def test_the_spread_gap_is_averaged_over_images() -> None:
    gap = SpreadGap(4)
    even, one = torch.eye(4) * 50, torch.zeros(4, 4) + torch.tensor([50.0, 0, 0, 0])
    assert spread(even) > 1.38 and spread(one) < 0.01
    gap.see(one, even)
    assert gap.mean() == 0 == gap.last()  # four images are few
    for _ in range(11):
        gap.see(one, even)
    assert gap.mean() == pytest.approx(-1.386, abs=0.01)
    gap.see(even.repeat(48, 1), one.repeat(48, 1))  # of as many images as the average goes back
    assert gap.mean() == pytest.approx(1.386, abs=0.01) == gap.last()


@pytest.mark.parametrize("size", [4, 10, 48])
def test_surer_predictions_of_the_same_classes_show_as_many_whatever_the_batch(size: int) -> None:
    """The mean of a few sure predictions has less entropy than that of a few unsure ones."""
    labels = torch.randint(0, CLASSES, (480,), generator=torch.Generator().manual_seed(0))
    sure = 20 * nn.functional.one_hot(labels, CLASSES).float()
    gap, one_by_one = SpreadGap(CLASSES), 0.0
    for part in sure.split(size):
        gap.see(part, 0.1 * part)
        one_by_one += float(spread(part) - spread(0.1 * part)) / (480 / size)
    assert -0.11 < gap.mean() < 0
    assert size > 10 or one_by_one < -0.3


class _Named(nn.Module):
    """Shows the class that the first pixel names, under whatever statistics."""

    def __init__(self, norm: nn.Module, sure: float) -> None:
        super().__init__()
        self.norm = norm
        self.fc = nn.Linear(CLASSES + 3, CLASSES)
        with torch.no_grad():
            self.fc.weight.copy_(
                torch.linspace(-1, 1, self.fc.weight.numel()).sin().view(CLASSES, -1)
            )
            self.fc.weight[:, :CLASSES] = sure * torch.eye(CLASSES)
            self.fc.weight[:, CLASSES:] *= 3 - torch.arange(CLASSES)[:, None]

    def forward(self, x: Tensor) -> Tensor:
        label = (x[:, 0, 0, 0] * CLASSES).long().clamp(0, CLASSES - 1)
        shown = nn.functional.one_hot(label, CLASSES).to(x.dtype)
        return self.fc(torch.cat([shown, self.norm(x).mean((2, 3))], 1))


def named(labels: Tensor) -> Tensor:
    x = torch.rand(len(labels), 3, 4, 4, generator=torch.Generator().manual_seed(0))
    x[:, 0, 0, 0] = (labels + 0.5) / CLASSES
    return x


def steady_on(net: nn.Module, **fields: Any) -> tta.Adapter:
    return tta.wrap(net, "tent", lr=0.05, guard=tta.get_config("steady", **fields), batch_size=64)


def test_steady_goes_back_where_an_update_loses_classes() -> None:
    """With a learning rate that ruins the network: without a guard it ends with few classes."""
    plain = tta.wrap(_Named(nn.GroupNorm(1, 3), 2.0).eval(), "tent", lr=0.05, batch_size=64)
    guarded = steady_on(_Named(nn.GroupNorm(1, 3), 2.0).eval(), pause=4)
    right = {"plain": 0, "guarded": 0}
    labels = labels_of(0.0, 64 * 60).split(64)
    for part in labels:
        for name, adapter in (("plain", plain), ("guarded", guarded)):
            right[name] += int((adapter(named(part)).argmax(1) == part).sum())
    source = sum(
        int((_Named(nn.GroupNorm(1, 3), 2.0)(named(p)).argmax(1) == p).sum()) for p in labels
    )
    resets = [e["step"] for e in guarded.events if e["action"] == "reset"]
    assert resets and any(e["action"] == "skip" for e in guarded.events)
    assert right["guarded"] > source - 0.08 * 64 * 60
    assert right["plain"] < source - 0.2 * 64 * 60


def test_an_update_that_falls_behind_at_first_goes_on_beside_the_source(monkeypatch) -> None:
    """Its parameters are far from the source's for 16 batches, and better than these afterwards."""
    monkeypatch.setattr(registry, "_COMPONENTS", dict(registry._COMPONENTS))

    @dataclass(frozen=True, kw_only=True)
    class SwingConfig(tta.UpdateConfig):
        """Fields of ``swing``."""

        lr: float = 1.0
        momentum: float = 0.0

    class Swing(tta.Update):
        Config = SwingConfig

        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            self.register_buffer("count", torch.zeros((), dtype=torch.int64))

        def adapt(self, x: Tensor) -> Prediction:
            prediction = self.network(x)
            target = 4.0 if int(self.count) < 16 else 0.0
            bias = self.context.parameters["norm.bias"]
            self.step((bias - target).square().sum() / 2)
            self.count += 1
            return prediction

    tta.register("swing")(Swing)
    net = _Named(nn.GroupNorm(1, 3), 2.0).eval()
    nn.init.constant_(net.norm.bias, 1.0)
    adapter = tta.wrap(net, "swing", guard="steady", batch_size=64)
    answers = []
    for part in labels_of(0.0, 64 * 60).split(64):
        adapter(named(part))
        answers.append(adapter.health["action"])
    assert "reset" not in answers and answers[-1] == "learn"
    beside = answers.count("source")
    assert 16 < beside < 40  # longer than it was behind, since a trend must show that it is not
    assert float(adapter.state()["param/norm.bias"].abs().max()) == 0.0  # it went on learning


def test_steady_takes_back_a_step_that_was_made_of_few_images() -> None:
    adapter = steady_on(tiny("gn"))
    before = adapter.state()
    adapter(images(0, 2))
    after = adapter.state()
    moved = {k for k in before if not torch.equal(before[k], after[k])}
    assert not any(key.startswith(("param/", "optim/")) for key in moved)
    assert adapter.health["action"] == "skip" and "2 images" in adapter.health["reason"]


class _Mixed(nn.Module):
    """Tells classes by three channels that BatchNorm sees; a batch of few classes hides them."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.norm = nn.BatchNorm2d(8)
        self.centres = nn.Parameter(torch.randn(CLASSES, 8, generator=generator))
        self.norm.running_mean.copy_(self.centres.detach().mean(0))
        self.norm.running_var.copy_(self.centres.detach().var(0) + 0.25)
        self.fc = nn.Linear(8, CLASSES)
        with torch.no_grad():  # the nearest of the centres
            seen = self.norm.eval()(self.centres[:, :, None, None])[:, :, 0, 0]
            self.fc.weight.copy_(4 * seen)
            self.fc.bias.copy_(-2 * seen.square().sum(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.norm(x).mean((2, 3)))

    def images(self, labels: Tensor) -> Tensor:
        noise = torch.randn(len(labels), 8, 1, 1, generator=torch.Generator().manual_seed(1))
        return self.centres.detach()[labels][:, :, None, None] + 0.5 * noise


def test_the_source_answers_while_runs_do_harm_under_batch_statistics() -> None:
    net = _Mixed().eval()
    images = net.images
    adapter = tta.wrap(net, "bn", guard="steady", batch_size=16)
    for part in labels_of(0.95, 16 * 24).split(16):
        adapter(images(part))
    assert adapter.health["action"] == "source" and "runs" in adapter.health["reason"]
    for part in labels_of(0.0, 16 * 80).split(16):
        adapter(images(part))
    assert adapter.health["action"] == "learn"
    assert any("no runs" in event["reason"] for event in adapter.events)


@pytest.mark.parametrize("size", [16, 64])
def test_the_source_answers_while_one_class_is_seen_from_the_first_image_on(size: int) -> None:
    """Labels that never change show no runs; batch statistics of one class are less sure."""
    net = _Mixed().eval()
    adapter = tta.wrap(net, "bn", guard="steady", batch_size=size)
    for part in torch.zeros(size * 12, dtype=torch.int64).split(size):
        adapter(net.images(part))
        assert adapter.health["action"] == "source"
    for part in labels_of(0.0, 512).split(size):
        adapter(net.images(part))
    assert adapter.health["action"] == "learn"


def test_a_norm_rule_that_makes_predictions_surer_is_put_aside_on_more_evidence() -> None:
    adapter = tta.wrap(tiny("bn"), "tent.cifar10", guard="steady")
    guard: Any = adapter.guard
    _shows(guard.runs, 0.8)
    _shows(guard.own, 0.5)
    assert guard._harmful(32, 0.0)
    sure, unsure = torch.eye(CLASSES) * 4, torch.eye(CLASSES)
    guard.surer.see(sure, unsure)
    assert not guard._harmful(32, 0.0)
    guard.own.forget()
    _shows(guard.own, 0.1)
    assert guard._harmful(32, 0.0)


def test_the_source_answers_beside_frames_of_a_broken_camera() -> None:
    """One image in eight of values that spoil the statistics of the batch for the seven others."""
    net = _Mixed().eval()
    adapter = tta.wrap(net, "bn", guard="steady", batch_size=64)
    for part in labels_of(0.0, 64 * 8).split(64):
        x = net.images(part)
        x[::8] *= 255
        right = adapter(x).argmax(1) == part
        assert right[torch.arange(64) % 8 > 0].double().mean() > 0.9
    assert {event["action"] for event in adapter.events} <= {"source", "reset"}
    for part in labels_of(0.0, 64 * 40).split(64):
        adapter(net.images(part))
    assert adapter.health["action"] == "learn"


def test_predictions_that_are_unsure_and_differ_from_the_source_are_not_given() -> None:
    adapter = tta.wrap(tiny("bn"), "tent", guard="steady", batch_size=64)
    guard: Any = adapter.guard
    _shows(guard.runs, 0.0)
    sure, unsure = torch.eye(CLASSES) * 8, torch.eye(CLASSES)
    guard.surer.see(unsure, sure)  # less sure, but the same labels
    assert not guard._in_doubt() and not guard._harmful(64, 4.0)
    guard.surer.forget()
    guard.surer.see(unsure.roll(1, 0), sure)
    assert guard._in_doubt() and guard._harmful(64, 4.0)
    assert "nonsense" in guard._why()


def test_the_source_answers_in_a_pause_after_it_was_ahead() -> None:
    """The norm rule goes on to do harm while nothing is learned."""
    adapter = tta.wrap(tiny("bn"), "tent", guard="steady", batch_size=64)
    guard: Any = adapter.guard
    adapter(images(0, 64))
    poor, rich = torch.zeros(64, CLASSES), torch.eye(CLASSES).repeat(16, 1)[:64] * 20
    poor[:, 0] = 20.0
    guard.source_gap.see(poor, rich)
    adapter(images(1, 64))
    assert adapter.health["action"] == "reset"
    source = tiny("bn").eval()(images(2, 64))
    assert torch.equal(adapter(images(2, 64)), source)
    assert adapter.health["action"] == "source" and "pause" in adapter.health["reason"]


def test_how_much_surer_predictions_are_is_averaged_over_images() -> None:
    gap = ConfidenceGap(span=64)
    assert gap.mean() == 0.0
    sure, unsure = torch.tensor([[50.0, 0.0]]).expand(48, 2), torch.zeros(48, 2)
    gap.see(sure, unsure)
    assert gap.mean() == pytest.approx(0.5)
    gap.see(unsure, sure)  # of at most 64 images, 48 are these
    assert gap.mean() == pytest.approx(-0.25)
    assert gap.agreement() == 1.0  # all say the first class
    gap.forget()
    assert gap.mean() == 0.0
    gap.see(sure, torch.tensor([[0.0, 1.0]]).expand(48, 2))
    assert gap.agreement() == 0.0


def test_the_adapted_model_is_tried_again_while_the_source_answers() -> None:
    """Runs go on, in batches that are large enough for them."""
    net = _Mixed().eval()
    images = net.images
    adapter = tta.wrap(net, "bn", guard="steady", batch_size=16)
    for part in labels_of(0.9, 16 * 24).split(16):
        adapter(images(part))
    assert adapter.health["action"] == "source"
    before = adapter.state()
    actions = []
    for part in labels_of(0.9, 480 * 32, seed=1).split(480):
        adapter(images(part))
        actions.append(adapter.health["action"])
    assert "learn" in actions[actions.index("reset") :]
    assert not adapter.guard.runs_seen  # each batch is answered by the one that shows more
    assert any("shows the runs too" in event["reason"] for event in adapter.events)
    assert before.keys() == adapter.state().keys()


def test_the_adapted_model_answers_while_runs_do_no_harm() -> None:
    net = _Named(nn.BatchNorm2d(3), 20.0).eval()
    adapter = tta.wrap(net, "tent.cifar10", guard="steady", batch_size=16)
    for part in labels_of(0.95, 16 * 24).split(16):
        assert torch.equal(adapter(named(part)).argmax(1), part)
    assert {event["reason"] for event in adapter.events} == {EARLIEST}


@pytest.mark.parametrize(("size", "early"), [(16, 3), (48, 0)])
def test_the_source_answers_until_runs_would_have_been_seen(size: int, early: int) -> None:
    adapter = tta.wrap(tiny("bn"), "tent", lr=1e-3, guard="steady", batch_size=size)
    plain = tta.wrap(tiny("bn"), "tent", lr=1e-3, batch_size=size)
    source = tiny("bn").eval()
    for step in range(6):
        x = images(step, size)
        answer, expected = adapter(x), plain(x)  # the update learns all the same
        assert torch.equal(answer, source(x) if step < early else expected)
        assert adapter.health["action"] == ("source" if step < early else "learn")
    assert len(adapter.events) == early


def test_a_guard_that_does_nothing_leaves_every_bit_as_it_was() -> None:
    plain = tta.wrap(tiny("bn"), "tent", batch_size=64)
    guarded = tta.wrap(tiny("bn"), "tent", guard=True, batch_size=64)
    assert guarded.config.guard.name == "steady"
    for seed in range(6):
        assert torch.equal(plain(images(seed, 64)), guarded(images(seed, 64)))
    assert guarded.events == []


@pytest.mark.parametrize("recipe", ["auto", "steady"])
def test_nothing_depends_on_interruptions_of_a_stream(recipe: str) -> None:
    """Saved half-way and resumed, the rest of a stream gives the same, bit for bit."""
    build: Any = {
        "auto": lambda: tta.wrap(tiny("bn"), "auto", **surroundings()),
        "steady": lambda: tta.wrap(tiny("bn"), "tent", lr=0.5, guard="steady"),
    }[recipe]
    whole, first, second = build(), build(), build()
    answers = [whole(images(seed, 32)) for seed in range(24)]
    for seed in range(12):
        first(images(seed, 32))
    second.load_state(first.state())
    for seed in range(12, 24):
        assert torch.equal(second(images(seed, 32)), answers[seed])


def test_auto_recovers_from_statistics_of_one_class() -> None:
    """A stream that begins with a stretch of one class makes its own predictions look mixed."""
    net = _Named(nn.BatchNorm2d(3), 20.0).eval()
    adapter = tta.wrap(net, "auto")
    guard: Any = adapter.guard
    watched: Any = adapter.output
    generator = torch.Generator().manual_seed(0)
    for part in labels_of(0.9, 10 * 40).split(10):
        # What the adapted model says is random, as under statistics of one class.
        if not bool(guard.runs_seen):
            watched.runs.watch(torch.randint(0, CLASSES, (300,), generator=generator))
        adapter(named(part))
    assert bool(guard.runs_seen)
    assert [e["action"] for e in adapter.events] == ["reset"]
    assert adapter._context.signs.persistence == 1.0
    for part in labels_of(0.0, 64 * 30).split(64):
        adapter(named(part))
    assert not bool(guard.runs_seen)


@pytest.mark.parametrize("size", [16, 64])
def test_auto_takes_slow_averages_where_one_class_is_seen(size: int) -> None:
    net = _Mixed().eval()
    adapter, plain = tta.wrap(net, "auto"), tta.wrap(_Mixed().eval(), norm="adaptive_bn")
    right, alone = 0, 0
    for part in torch.zeros(512, dtype=torch.int64).split(size):
        right += int((adapter(net.images(part)).argmax(1) == part).sum())
        alone += int((plain(net.images(part)).argmax(1) == part).sum())
    assert right > 512 * 0.8 and right > alone + 512 * 0.2
    assert any("one class" in event["reason"] for event in adapter.events)
    for part in labels_of(0.0, 1024).split(size):
        answer = adapter(net.images(part))
    assert not bool(adapter.guard.runs_seen)  # type: ignore[union-attr]
    assert (answer.argmax(1) == part).double().mean() > 0.8


def test_a_source_that_says_one_class_of_everything_is_not_taken_for_one() -> None:
    """Its labels look the same, but what has adapted is the surer."""
    net = _Mixed().eval()
    with torch.no_grad():
        net.norm.running_mean += 40.0 * net.centres[0]
        net.fc.bias[0] += 20.0
    adapter = tta.wrap(net, "auto")
    labels = labels_of(0.0, 64 * 12)
    source = net(net.images(labels)).argmax(1)
    assert (source == source.mode().values).double().mean() > 0.5
    for part in labels.split(64):
        adapter(net.images(part))
        assert adapter.health["action"] == "learn"


def _shows(runs: LabelRuns, share: float, count: int = 2000) -> None:
    """Have seen predictions of which so many come in runs."""
    for part in labels_of(share, count).split(50):
        runs.watch(part)


def test_steady_wants_more_evidence_against_an_update_that_has_gone_well() -> None:
    """Of a young update too little is left of the runs; later, or in runs, enough."""
    adapter = tta.wrap(tiny("bn"), "tent.cifar10", guard="steady")
    guard: Any = adapter.guard
    _shows(guard.runs, 0.8)
    _shows(guard.own, 0.5)
    assert guard._harmful(32, 0.0)
    guard.age.fill_(30)  # of 32 images each
    assert not guard._harmful(32, 0.0)
    guard.own.forget()
    _shows(guard.own, 0.1)
    assert guard._harmful(32, 0.0)
    guard.age.zero_()
    guard.own.forget()
    _shows(guard.own, 0.5)
    guard.runs_seen.fill_(True)
    assert not guard._harmful(32, 0.0)
