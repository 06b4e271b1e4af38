"""RoTTA against its definition: statistics, memory, teacher, and when an update is due."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

import tta
from tests.helpers.batches import images, source_batches
from tests.helpers.nets import tiny
from tta.parts.memory import Cstu

# What the keys of its traces are, see `tests/helpers/trace_keys.py`.
TRACE_KEYS = {
    "set-e": {
        "arrays": {
            "memory_labels": "state: update/bank.labels",
            "memory_ages": "state: update/bank.ages",
            "memory_entropy": "state: update/bank.entropies",
            "memory_image": "state: update/memory",
            "updates_after": "call: when loss has a new entry",
        },
        "hparams": {
            r"params\.(memory_size|update_every)": "field: of the same name",
            "params.nu": "field: 1 - teacher_momentum",
            "params.lambda_t": "field: timeliness",
            "params.lambda_u": "field: uncertainty",
        },
    },
}

RAW = {"mean": (0.0,), "std": (1.0,)}
close = torch.testing.assert_close


def _pixels(seed: int, count: int = 8) -> Tensor:
    """Images that 8 bits hold exactly."""
    return (images(seed, count) * 255).round() / 255


def _view(x: Tensor, index: int = 0) -> Tensor:
    return x.roll(1 + index, dims=3) * 0.9


def _rotta(net: nn.Module | None = None, **fields) -> tta.Adapter:
    config = tta.get_config("rotta.cifar10", **{"lr": 0.02, "teacher_momentum": 0.9} | fields)
    return tta.wrap(net or tiny("bn"), update=config, augment=_view, **RAW)


# The norm rule -----------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["rotta", "petta", "note"])
def test_an_official_memory_brings_official_layers(method: str) -> None:
    """Without it the rule for bad images went on acting under ``official=True``."""
    given = {} if method == "note" else RAW
    for official in (True, False):
        source = source_batches() if method == "petta" else None
        adapter = tta.wrap(tiny("bn"), method, official=official, source=source, **given)
        assert adapter.config.norm is not None and adapter.config.norm.official is official
    named = tta.get_config("bn")
    adapter = tta.wrap(tiny("bn"), norm=named, update=tta.get_config("note", official=True))
    assert adapter.config.norm == named


def test_an_official_rotta_takes_in_bad_images() -> None:
    """As the formula has it: each layer a twentieth of the way to the statistics of the batch."""
    net, x = tiny("bn"), 300 * images(1)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    adapter = _rotta(net, official=True, memory_size=len(x), update_every=len(x))
    adapter(x)
    name = next(k for k in before if k.endswith("running_mean")).removesuffix(".running_mean")
    moved = adapter.state()[f"update/teacher.{name}.mean"] - before[f"{name}.running_mean"]
    assert (moved.abs() > 0.1).all()


def test_statistics_move_and_normalise() -> None:
    """(1 - a) old + a batch, biased, in use at once; frozen as they are."""
    net = nn.Sequential(nn.Flatten(2), nn.BatchNorm1d(3), nn.Flatten(), nn.Linear(6, 2)).eval()
    bn = net[1]
    assert isinstance(bn, nn.BatchNorm1d) and bn.running_mean is not None
    bn.running_mean.copy_(torch.tensor([0.5, -0.5, 0.0]))
    bn.weight.data.fill_(2.0)
    adapter = tta.wrap(net, norm=tta.get_config("robust_bn", batch_weight=0.25))
    mean, var = [0.5, -0.5, 0.0], [1.0, 1.0, 1.0]
    head = copy.deepcopy(net[3])
    for seed in range(2):
        x = torch.randn(4, 3, 2, generator=torch.Generator().manual_seed(seed))
        y = torch.empty_like(x)
        for c in range(3):
            values = x[:, c].flatten().tolist()
            m = sum(values) / 8
            v = sum((value - m) ** 2 for value in values) / 8
            mean[c], var[c] = 0.75 * mean[c] + 0.25 * m, 0.75 * var[c] + 0.25 * v
            y[:, c] = 2.0 * (x[:, c] - mean[c]) / math.sqrt(var[c] + 1e-5)
        close(adapter(x), head(y.flatten(1)).detach())
        close(adapter.state()["norm/1.mean"], torch.tensor(mean))
        close(adapter.state()["norm/1.var"], torch.tensor(var))
    with adapter.frozen():
        x = torch.randn(4, 3, 2, generator=torch.Generator().manual_seed(9))
        y = torch.stack(
            [2 * (x[:, c] - mean[c]) / math.sqrt(var[c] + 1e-5) for c in range(3)], dim=1
        )
        close(adapter(x), head(y.flatten(1)).detach())


def test_gradients_flow_through_the_batch_part() -> None:
    class Probe(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn = nn.BatchNorm2d(2)
            self.fc = nn.Linear(2, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.bn(x).square().mean(dim=(2, 3)))

    net = Probe().eval()
    adapter = tta.wrap(net, norm="robust_bn")
    x = torch.randn(3, 2, 4, 4, requires_grad=True)
    adapter.model(x)[:, 0].sum().backward()
    found = x.grad
    other = x.detach().clone().requires_grad_()
    m = 0.05 * other.mean(dim=(0, 2, 3))
    v = 0.95 + 0.05 * other.var(dim=(0, 2, 3), correction=0)
    y = (other - m.view(1, -1, 1, 1)) / (v.view(1, -1, 1, 1) + 1e-5).sqrt()
    net.fc(y.square().mean(dim=(2, 3)))[:, 0].sum().backward()
    close(found, other.grad)


def test_one_value_per_channel_moves_nothing() -> None:
    net = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2)).eval()
    expected = copy.deepcopy(net)(torch.ones(1, 4)).detach()
    adapter = tta.wrap(net, norm="robust_bn")
    before = adapter.state()
    with pytest.warns(UserWarning, match="at least 2 images"):
        close(adapter(torch.ones(1, 4)), expected)
    assert all(torch.equal(v, before[k]) for k, v in adapter.state().items())


# The memory --------------------------------------------------------------------------------


class Plain:
    """The memory as lists of (age, entropy, position) by class."""

    def __init__(self, capacity: int, classes: int, w_t: float, w_u: float) -> None:
        self.capacity, self.classes, self.w_t, self.w_u = capacity, classes, w_t, w_u
        self.lists: list[list[list]] = [[] for _ in range(classes)]

    def score(self, age: int, entropy: float) -> float:
        timely = 1 / (1 + math.exp(-age / self.capacity))
        return self.w_t * timely + self.w_u * entropy / math.log(self.classes)

    def offer(self, label: int, entropy: float, position: int) -> None:
        total, mine = sum(map(len, self.lists)), len(self.lists[label])
        if mine < self.capacity / self.classes and total < self.capacity:
            wanted = True
        else:
            largest = max(map(len, self.lists))
            full = mine >= self.capacity / self.classes
            where = (
                [label]
                if full
                else [c for c in range(self.classes) if len(self.lists[c]) == largest]
            )
            worst = max((self.score(i[0], i[1]), c, i) for c in where for i in self.lists[c])
            wanted = worst[0] > self.score(0, entropy)
            if wanted:
                self.lists[worst[1]].remove(worst[2])
        if wanted:
            self.lists[label].append([0, entropy, position])
        for items in self.lists:
            for item in items:
                item[0] += 1

    def contents(self) -> list[tuple]:
        return sorted((c, *item) for c, items in enumerate(self.lists) for item in items)


@pytest.mark.parametrize("capacity", [1, 6, 9, 16])
@pytest.mark.parametrize("classes", [3, 4, 100])
@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.0, 1.0), (2.0, 0.5)])
def test_the_memory_holds_what_lists_hold(
    capacity: int, classes: int, weights: tuple[float, float]
) -> None:
    """Skewed labels, so that quotas fill; offered in pieces of any length."""
    generator = torch.Generator().manual_seed(capacity)
    labels = (torch.rand(90, generator=generator).square() * classes).long().tolist()
    entropies = (torch.rand(90, generator=generator) * math.log(classes)).tolist()
    bank, plain, positions = (
        Cstu(capacity, classes, *weights),
        Plain(capacity, classes, *weights),
        {},
    )
    start = 0
    for length in [1, 5, 30, 2, 52]:
        part = slice(start, start + length)
        for slot, position in bank.offer(labels[part], entropies[part]).items():
            positions[slot] = start + position
        for position in range(start, start + length):
            plain.offer(labels[position], entropies[position], position)
        start += length
        kept = [i for i in range(capacity) if int(bank.labels[i]) >= 0]
        found = [
            (int(bank.labels[i]), int(bank.ages[i]), float(bank.entropies[i]), positions[i])
            for i in kept
        ]
        assert sorted(found) == plain.contents()
    assert start == 90 and 0 < len(kept) <= capacity


def test_scores_by_hand() -> None:
    bank = Cstu(64, 10, 1.0, 1.0)
    assert bank.score(0, 0.0) == 0.5
    assert bank.score(0, math.log(10)) == pytest.approx(1.5)
    assert bank.score(64, 0.0) == pytest.approx(1 / (1 + math.exp(-1)))
    assert Cstu(64, 10, 2.0, 0.5).score(64, math.log(10)) == pytest.approx(
        2 / (1 + math.exp(-1)) + 0.5
    )


def test_only_a_better_newcomer_replaces() -> None:
    """Without age, an equal score is not better; classes below their quota take free slots."""
    bank = Cstu(2, 2, 0.0, 1.0)  # one slot for each class
    assert bank.offer([0, 0], [0.25, 0.25]) == {0: 0}
    assert bank.offer([0], [0.125]) == {0: 0}
    assert bank.offer([1], [0.625]) == {1: 0}
    assert bank.offer([1], [0.5]) == {1: 0} and bank.labels.tolist() == [0, 1]
    assert bank.ages.tolist() == [3, 1]


def test_a_full_memory_takes_from_those_with_most() -> None:
    bank = Cstu(3, 2, 0.0, 1.0)  # 1.5 slots for each class, so up to two
    bank.offer([0, 0], [0.125, 0.5])
    bank.offer([1], [0.625])
    assert bank.labels.tolist() == [0, 0, 1]
    assert bank.offer([1], [0.5]) == {}  # no better than the worst of class 0
    assert bank.offer([1], [0.25]) == {1: 0}
    assert bank.labels.tolist() == [0, 1, 1]
    assert bank.offer([1], [0.5]) == {2: 0}  # at its quota, class 1 gives up its own worst


# The method --------------------------------------------------------------------------------


class PlainNorm(nn.Module):
    """The paper's layer, with torch's train and eval modes."""

    def __init__(self, bn: nn.BatchNorm2d) -> None:
        super().__init__()
        assert bn.running_mean is not None and bn.running_var is not None
        self.weight, self.bias = nn.Parameter(bn.weight.data.clone()), nn.Parameter(bn.bias.data)
        self.mean, self.var = bn.running_mean.clone(), bn.running_var.clone()

    def forward(self, x: Tensor) -> Tensor:
        mean, var = self.mean, self.var
        if self.training:
            mean = 0.95 * mean + 0.05 * x.mean(dim=(0, 2, 3))
            var = 0.95 * var + 0.05 * x.var(dim=(0, 2, 3), correction=0)
            self.mean, self.var = mean.detach(), var.detach()
        scaled = (x - mean.view(1, -1, 1, 1)) / (var.view(1, -1, 1, 1) + 1e-5).sqrt()
        return scaled * self.weight.view(1, -1, 1, 1) + self.bias.view(1, -1, 1, 1)


def _plain_net() -> nn.Module:
    net = tiny("bn")
    for stage in (net.layer1, net.layer2):
        assert isinstance(stage, nn.Sequential) and isinstance(stage[1], nn.BatchNorm2d)
        stage[1] = PlainNorm(stage[1])
    return net.eval()


def test_updates_in_the_middle_of_batches_are_those_of_the_definition() -> None:
    """Batches of 8, an update after every 6 images, room for 5: four updates in three batches."""
    batches = [_pixels(t) for t in range(3)]
    net = _plain_net()
    teacher = copy.deepcopy(net)
    theta = [p for m in net.modules() if isinstance(m, PlainNorm) for p in m.parameters()]
    averaged = [p for m in teacher.modules() if isinstance(m, PlainNorm) for p in m.parameters()]
    adam = torch.optim.Adam(theta, lr=0.02)
    memory, everything = Plain(5, 10, 1.0, 1.0), torch.cat(batches)
    outputs, losses, offered = [], [], 0
    for x in batches:
        with torch.no_grad():
            z = teacher(x)
        outputs.append(z)
        p = z.softmax(1)
        h = -(p * p.log()).sum(1)
        for label, entropy in zip(z.argmax(1).tolist(), h.tolist(), strict=True):
            memory.offer(label, entropy, offered)
            offered += 1
            if offered % 6:
                continue
            kept = memory.contents()
            raw = everything[[position for *_, position in kept]]
            age = torch.tensor([item[1] for item in kept]) / 5
            net.train(), teacher.train()
            with torch.no_grad():
                target = teacher(raw).softmax(1)
            z_s = net(_view(raw, offered // 6 - 1))
            w = torch.exp(-age) / (1 + torch.exp(-age))
            loss = (w * -(target * z_s.log_softmax(1)).sum(1)).mean()
            net.eval(), teacher.eval()
            adam.zero_grad()
            loss.backward()
            adam.step()
            losses.append((loss.item(), len(kept)))
            with torch.no_grad():
                for a, s in zip(averaged, theta, strict=True):
                    a.copy_(0.9 * a + 0.1 * s)

    adapter = _rotta(memory_size=5, update_every=6)
    done = 0
    for t, x in enumerate(batches):
        close(adapter(x), outputs[t], atol=1e-5, rtol=1e-5)
        done = (t + 1) * 8 // 6
        assert adapter.report.loss == pytest.approx(losses[done - 1][0], abs=1e-5)
        assert adapter.report.selected == losses[done - 1][1] and adapter.report.stepped
    assert done == len(losses) == 4
    state = adapter.state()
    for prefix, one in (("param/", net), ("update/teacher.", teacher)):
        for layer in ("layer1.1", "layer2.1"):
            norm = one.get_submodule(layer)
            assert isinstance(norm, PlainNorm)
            for key in ("weight", "bias"):
                close(state[f"{prefix}{layer}.{key}"], getattr(norm, key).data, atol=2e-5, rtol=0)
            where = "norm/" if one is net else prefix
            for key in ("mean", "var"):
                close(state[f"{where}{layer}.{key}"], getattr(norm, key), atol=1e-5, rtol=1e-5)
    assert not torch.equal(state["norm/layer2.1.mean"], state["update/teacher.layer2.1.mean"])


def test_nothing_moves_before_enough_images_came() -> None:
    adapter = _rotta()
    start = adapter.state()
    for t in range(7):
        adapter(_pixels(t))
        assert not adapter.report.stepped and adapter.report.selected == 0
    state = adapter.state()
    assert int(state["update/offered"]) == 56 and 0 < adapter.report.remembered <= 56
    bank = ("update/bank.", "update/memory", "update/offered")
    assert all(torch.equal(v, start[k]) for k, v in state.items() if not k.startswith(bank))
    adapter(_pixels(7))
    assert adapter.report.stepped and adapter.report.selected == adapter.report.remembered
    adapter(_pixels(8, 130))  # two updates within one batch
    assert int(adapter.update.optimizer.state_dict()["state"][0]["step"]) == 3  # type: ignore


def test_the_memory_keeps_pixels_in_8_bits() -> None:
    """What comes from such pixels, through a mean and a deviation, comes back exactly."""
    config = tta.get_config("rotta", memory_size=8, update_every=8)
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
    adapter = tta.wrap(tiny("bn"), update=config, mean=mean, std=std)
    pixels = _pixels(0)
    shape = (1, 3, 1, 1)
    adapter((pixels - torch.tensor(mean).view(shape)) / torch.tensor(std).view(shape))
    memory = adapter.state()["update/memory"]
    assert memory.dtype == torch.uint8 and memory.shape == (8, 3, 32, 32)
    labels = adapter.state()["update/bank.labels"]
    stored = memory[labels >= 0].float() / 255
    assert len(stored) > 0
    assert all(any(torch.equal(image, other) for other in pixels) for image in stored)


def test_the_memory_keeps_other_pixels_as_they_came() -> None:
    config = tta.get_config("rotta", memory_size=8, update_every=8)
    adapter = tta.wrap(tiny("bn"), update=config, mean=(0.4,), std=(0.2,))
    exact = (_pixels(0) - 0.4) / 0.2
    adapter(exact)
    assert adapter.state()["update/memory"].dtype == torch.uint8
    other = 3 * images(0) - 1  # beyond the pixels' range too
    adapter(other)
    state = adapter.state()
    held = state["update/memory"][state["update/bank.labels"] >= 0]
    assert held.dtype == torch.float32
    came = torch.cat([exact, other])
    distances = torch.cdist(held.flatten(1), came.flatten(1), p=torch.inf)
    assert distances.min(1).values.max() < 1e-5
    found = distances.argmin(1)
    later = [i for i, k in enumerate(found) if k >= 8]
    assert later and all(torch.equal(held[i], came[found[i]]) for i in later)
    # Either kind is loaded into an adapter that has seen nothing, or images of the other kind.
    fresh = tta.wrap(tiny("bn"), update=config, mean=(0.4,), std=(0.2,))
    for first in (None, exact):
        if first is not None:
            fresh.reset()
            fresh(first)
        fresh.load_state(state)
        assert torch.equal(fresh(exact), adapter(exact))
        adapter.load_state(state)
    adapter.reset()
    adapter(exact)
    assert adapter.state()["update/memory"].dtype == torch.uint8


def test_a_guard_goes_back_to_a_memory_of_either_kind() -> None:
    config = tta.get_config("rotta", memory_size=8, update_every=8)
    adapter = tta.wrap(tiny("bn"), update=config, guard="steady", **RAW)
    for x in (_pixels(0), images(1), _pixels(2), images(3)):
        assert adapter(x).isfinite().all()
    state = adapter.state()
    other = tta.wrap(tiny("bn"), update=config, guard="steady", **RAW)
    other.load_state(state)
    assert torch.equal(other(images(4)), adapter(images(4)))


def test_the_shape_of_the_memory_is_known_from_the_first_batch() -> None:
    adapter = _rotta()
    assert adapter.state()["update/memory"].shape == (64, 0)
    adapter(_pixels(0))
    full = adapter.state()
    with pytest.raises(ValueError, match=r"size of those in the memory, \(3, 32, 32\)"):
        adapter(torch.rand(4, 3, 16, 16))
    assert all(torch.equal(v, adapter.state()[k]) for k, v in full.items())
    with pytest.raises(ValueError, match="must have shape"):
        adapter.load_state({"update/memory": torch.zeros(64, 3, 16, 16, dtype=torch.uint8)})
    adapter.reset()
    assert adapter.state()["update/memory"].shape == (64, 0)
    adapter(torch.rand(4, 3, 16, 16))
    assert adapter.state()["update/memory"].shape == (64, 3, 16, 16)
    adapter.reset()
    adapter.load_state(full)
    assert all(torch.equal(v, adapter.state()[k]) for k, v in full.items())


def test_memories_of_two_slots_grow_apart(tmp_path) -> None:
    """The official AdaNPC grows as well, and by another number of rows."""

    def make() -> tta.Adapter:
        return tta.wrap(
            tiny("bn"),
            update=tta.get_config("rotta.cifar10", update_every=8),
            output=tta.get_config("adanpc", official=True, confidence_threshold=0.0),
            source=source_batches(),
            **RAW,
        )

    adapter = make()
    adapter(_pixels(0))
    tta.save(adapter, tmp_path)
    other, third = make(), tta.load(tiny("bn"), tmp_path)
    other.load_state(adapter.state())
    expected = adapter(_pixels(1))
    assert torch.equal(other(_pixels(1)), expected) and torch.equal(third(_pixels(1)), expected)


def test_with_another_rule_the_teacher_has_its_own_state_of_it() -> None:
    adapter = tta.wrap(
        tiny("bn"),
        norm=tta.get_config("unmix_tns", components=4),
        update=tta.get_config("rotta.cifar10", update_every=8),
        **RAW,
    )
    start = adapter.state()
    assert torch.equal(start["update/teacher.layer1.1.means"], start["norm/layer1.1.means"])
    adapter(_pixels(0))
    state = adapter.state()
    for key in ("update/teacher.layer1.1.means", "norm/layer1.1.means"):
        assert not torch.equal(state[key], start[key])
    assert not torch.equal(state["update/teacher.layer1.1.means"], state["norm/layer1.1.means"])


def test_a_memory_of_another_length_is_refused() -> None:
    adapter = tta.wrap(tiny("bn"), "rotta", memory_size=8, update_every=8, mean=(0.0,), std=(1.0,))
    for rows in (2, 20):
        with pytest.raises(ValueError, match=r"'update/memory'\] must have shape \(8, 0\)"):
            adapter.load_state({"update/memory": torch.zeros(rows, 3, 16, 16, dtype=torch.uint8)})
    with pytest.raises(ValueError, match=r"must be torch\.uint8 or convert to it"):
        adapter.load_state({"update/memory": torch.zeros(8, 3, 16, 16).cfloat()})


def test_keywords_reach_the_norm_rule_that_it_brings() -> None:
    adapter = tta.wrap(tiny("bn"), "rotta.cifar10", batch_weight=0.25, official=True, **RAW)
    assert adapter.config.norm == tta.get_config("robust_bn", batch_weight=0.25, official=True)
    assert adapter.config.update is not None and adapter.config.update.official
    for norm in ("source", "bn"):
        with pytest.raises(ValueError, match="`batch_weight` is not a field of"):
            tta.wrap(tiny("bn"), "rotta.cifar10", norm=norm, batch_weight=0.25, **RAW)


# Spread updates -----------------------------------------------------------------------------


def _alike(one: dict[str, Tensor], other: dict[str, Tensor], start: str) -> float:
    return max(float((v - other[k]).abs().max()) for k, v in one.items() if k.startswith(start))


def test_a_whole_batch_at_once_is_no_part() -> None:
    plain, spread = _rotta(), _rotta(spread=True)
    for t in range(3):
        x = _pixels(t, 64)
        assert torch.equal(plain(x), spread(x))
    state = spread.state()
    assert all(torch.equal(v, state[k]) for k, v in plain.state().items())
    assert float(state["update/gradients.layer1.1.weight"].abs().sum()) == 0


def test_parts_sum_to_the_gradient_of_the_whole() -> None:
    """Where no image affects another and the memory stays, the parts are the plain update."""

    def make(**fields) -> tta.Adapter:
        # Every class gets what comes first: after 8 images, later ones are no better.
        fields = {"memory_size": 8, "update_every": 8, "uncertainty": 0.0, "timeliness": 0.0}
        config = tta.get_config("rotta.cifar10", lr=0.02, **fields, **more)
        return tta.wrap(tiny("gn"), update=config, norm="source", augment=lambda x, _: x, **RAW)

    more: dict = {}
    plain = make()
    more = {"spread": True}
    spread = make()
    first = _pixels(3, 8)
    for adapter in (plain, spread):  # fills the memory: the update on it is a whole one
        adapter(first)
    assert _alike(plain.state(), spread.state(), "param/") == 0
    later = _pixels(4, 8)
    plain(later)
    stepped = []
    for i in range(0, 8, 2):
        spread(later[i : i + 2])
        stepped.append(spread.report.stepped)
        assert spread.report.selected <= 2
    assert stepped == [False, False, False, True]
    assert spread.report.loss > 0
    # Images age while the update is under way, which is all that differs.
    moved = max(float(v.std()) for k, v in plain.state().items() if k.startswith("param/"))
    assert 0 <= _alike(plain.state(), spread.state(), "param/") < 0.2 * max(moved, 0.02)


def test_statistics_move_in_parts_as_far_as_in_one() -> None:
    """Parts of constant statistics: one move of share a, or eight of its eighth parts."""
    one, parts = (tta.wrap(tiny("bn"), "robust_bn") for _ in range(2))
    from tta.core.norm_layers import part_of_batch

    x = _pixels(0, 1)
    with torch.no_grad():
        one.model.layer1(x)
        with part_of_batch(parts.norm_layers.values(), 1 / 8):
            for _ in range(8):
                parts.model.layer1(x)
    key = "norm/layer1.1.mean"
    close(one.state()[key], parts.state()[key], atol=1e-6, rtol=1e-5)


def test_a_spread_update_goes_on_from_a_state_between_its_parts() -> None:
    fields = {"spread": True, "update_every": 6, "memory_size": 6}
    adapter, other = (tta.wrap(tiny("bn"), "rotta.cifar10", **fields, **RAW) for _ in range(2))
    for t in range(4):
        adapter(_pixels(t, 1))
    state = adapter.state()
    assert int(state["update/swept"]) == 4 and 0 < int(state["update/summed"]) <= 4
    assert float(state["update/gradients.layer1.1.weight"].abs().sum()) > 0
    other.load_state(state)
    for t in range(4, 9):
        assert torch.equal(adapter(_pixels(t, 1)), other(_pixels(t, 1)))
    assert all(torch.equal(v, other.state()[k]) for k, v in adapter.state().items())
    adapter.reset()
    assert int(adapter.state()["update/swept"]) == 0
