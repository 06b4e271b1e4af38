"""Mixed batches in one pass: what each stream gets and learns is what it gets and learns alone."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import tta
from tests.helpers.batches import images
from tests.helpers.compositions import ALONE, GUARDED, SAMPLED_PAIRS, Case, label, make
from tests.helpers.faults import Fault, interrupted, same, shots
from tests.helpers.nets import tiny
from tta.core import registry
from tta.core.prediction import Prediction
from tta.runtime import StreamPool
from tta.runtime.side_by_side import SideBySide

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
NAMES = ("a", "b", "c")
ROWS = ["b", "a", "b", "c", "a", "b", "c", "a"]  # streams of 3, 3 and 2 images
TOLERANCE = 1e-4
OF_STATES = 1e-3  # losses with a small temperature multiply the rounding of logits
Make = Callable[[], tta.Adapter]


@pytest.fixture(autouse=True)
def _forget(monkeypatch: Any) -> None:
    """What a test registers is gone after it."""
    monkeypatch.setattr(registry, "_COMPONENTS", dict(registry._COMPONENTS))


def close(one: Tensor, other: Tensor, tolerance: float = TOLERANCE) -> bool:
    """Whether numbers agree, relative to the largest where that is above 1."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    if not one.is_floating_point():
        return torch.equal(one, other)
    if not torch.equal(one.isnan(), other.isnan()):
        return False
    one, other = one.double().nan_to_num(0.0), other.double().nan_to_num(0.0)
    largest = max(1.0, float(other.abs().max())) if other.numel() else 1.0
    return bool(((one - other).abs() <= tolerance * largest).all())


def both(make_one: Make, **kwargs: Any) -> tuple[StreamPool, StreamPool]:
    """Pools of which the first serves mixed batches in one pass, the second one by one."""
    together, alone = (StreamPool(make_one(), **kwargs) for _ in range(2))
    alone.batched = False
    return together, alone


def compare(
    pools: tuple[StreamPool, StreamPool],
    batches: list[Tensor],
    rows: list[str] = ROWS,
    states: bool = True,
) -> None:
    """Serve batches, and compare logits, decisions, states, reports and resets."""
    for number, batch in enumerate(batches):
        one, other = (pool(batch, rows, create=True) for pool in pools)
        assert close(one, other), (number, float((one - other).abs().max()))
        assert torch.equal(one.nan_to_num().argmax(1), other.nan_to_num().argmax(1)), number
    for name in sorted(set(rows)):
        with pools[0].stream(name) as view, pools[1].stream(name) as single:
            one, other = view.state(), single.state()
            assert one.keys() == other.keys()
            wrong = [key for key in one if not close(one[key], other[key], OF_STATES)]
            assert not (wrong and states), (name, wrong[:5])
            assert torch.equal(one["rng"], other["rng"])
            for key in ("seen", "selected", "stepped", "resets", "rejected"):
                assert view.report[key] == single.report[key], (name, key)
            assert [e["action"] for e in view.events] == [e["action"] for e in single.events]
            view.reset()
            assert same(view.state(), view.reset_point())


def served(case: Case) -> None:
    pools = both(lambda: make(*case)[1])
    compare(pools, [images(number) for number in range(3)])


@pytest.mark.parametrize("case", ALONE[::8] + GUARDED[::29], ids=label)
def test_a_mixed_batch_equals_its_streams_one_by_one(case: Case) -> None:
    served(case)


@pytest.mark.soak
@pytest.mark.parametrize("case", ALONE + GUARDED + SAMPLED_PAIRS, ids=label)
def test_every_mixed_batch_equals_its_streams_one_by_one(case: Case) -> None:
    served(case)


class _Convolutions(TorchDispatchMode):
    """Counts convolutions forward and backward, and the images in them."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = self.images = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "convolution" in str(func):
            self.calls += 1
            self.images += len(args[0])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "method",
    [
        "source",
        "bn",
        "unmix_tns",
        "tent.cifar10",
        "sar.cifar10",
        "tent.cifar10+lame",
        "roid.cifar10",
    ],
)
def test_convolutions_run_once_for_all_streams(method: str) -> None:
    name, _, output = method.partition("+")
    extra = {"output": output} if output else {}

    def one() -> tta.Adapter:
        return tta.wrap(tiny("bn"), name, mean=(0.0,) * 3, std=(1.0,) * 3, **extra)

    together, alone = both(one)
    found = []
    for pool in (together, alone):
        pool(images(0), ROWS, create=True)
        with _Convolutions() as count:
            pool(images(1), ROWS)
        found.append((count.calls, count.images))
    assert together.one_by_one is None and together._beside.passes > 0
    assert found[1][0] == 3 * found[0][0] and found[1][1] == found[0][1], found


def of_timm(name: str, method: str, **extra: Any) -> Make:
    def make_one() -> tta.Adapter:
        torch.manual_seed(0)
        net = timm.create_model(name, num_classes=10).eval()
        return tta.wrap(net, method, lr=1e-3, batch_size=4, **extra)

    return make_one


@pytest.mark.parametrize(
    ("network", "method"),
    [
        ("test_resnet", "tent.cifar10"),
        ("test_efficientnet", "tent.cifar10"),
        ("test_vit", "sar.imagenet_vit"),
        ("test_convnext", "eta.cifar10"),
    ],
)
def test_networks_of_timm(network: str, method: str) -> None:
    extra: dict[str, Any] = {"entropy_margin": 5.0} if "tent" not in method else {}
    pools = both(of_timm(network, method, **extra))
    generator = torch.Generator().manual_seed(1)
    batches = [torch.rand(9, 3, 64, 64, generator=generator) for _ in range(2)]
    # A bias before batch statistics has a gradient of rounding alone, which Adam makes a step of.
    compare(pools, batches, ["x", "y", "z"] * 3, states="efficient" not in network)
    assert pools[0].one_by_one is None and pools[0]._beside.passes > 0


def test_streams_with_other_numbers_of_images_and_a_single_one() -> None:
    rows = [*"aaaaabbbbcddd", *"effgg", "a"]
    for method in ("tent.cifar10", "bn", "robust_bn", "unmix_tns"):
        pools = both(lambda method=method: tta.wrap(tiny("bn"), method))
        compare(pools, [images(number, len(rows)) for number in range(3)], rows)
        assert pools[0]._beside.passes >= 3


def test_frozen_streams_and_bad_images_beside_others() -> None:
    together, alone = pools = both(lambda: tta.wrap(tiny("bn"), "tent.cifar10", guard="watch"))
    for pool in pools:
        pool(images(0), ROWS, create=True)
        pool.freeze("b")
    before = together.stream("b").state()
    batch = images(1)
    batch[3, 0, 0, 0] = float("nan")  # one of c's two
    batch[0] = 1e30  # one of b's, whose features overflow
    compare(pools, [batch, images(2)])
    alone.reset("b"), together.reset("b")
    assert same(before, together.stream("b").state()) is False  # it had learned before


def test_a_stream_learns_from_the_rest_of_images_one_of_which_overflows() -> None:
    """Without batch statistics it shows in the features, which others' gradients go through."""

    def one() -> tta.Adapter:
        return tta.wrap(tiny("ln"), "tent", lr=1e-3)

    for bad in ([0], [0, 3], [0, 2]):  # of b, of b and c, of b
        pools = both(one)
        batch = images(1)
        batch[bad] = 1e30
        for pool in pools:
            pool(batch, ROWS, create=True)
        assert all(pools[0].stream(name).report["stepped"] for name in NAMES)
        compare(pools, [images(2), batch])
        assert pools[0].one_by_one is None and pools[0]._beside.passes >= 3


@pytest.mark.parametrize("told", [True, False])
def test_streams_with_prompts_and_without(told: bool, monkeypatch: Any) -> None:
    """The frozen one has no prompts yet, so that its sequences are shorter."""
    if not told:  # as of a component that does not say what it puts into sequences
        monkeypatch.setattr(SideBySide, "_kind", lambda self, wish: repr(wish.kind))
    parts: dict[str, Any] = {"update": "foa"}
    pools = both(lambda: make("ln", parts, shadow=True)[1])
    for pool in pools:
        pool.stream("b", create=True)
        pool.freeze("b")
    compare(pools, [images(number) for number in range(2)])
    assert ("gives streams other shapes" in (pools[0].one_by_one or "")) != told
    assert not told or pools[0]._beside.passes > 0


@pytest.mark.parametrize("kind", ["no_grad", "inference", "bfloat16", "half"])
def test_modes_of_torch_and_half_weights(kind: str) -> None:
    def one() -> tta.Adapter:
        net = tiny("bn")
        return tta.wrap(net.bfloat16() if kind == "half" else net, "tent.cifar10")

    pools = both(one)
    modes: dict[str, Any] = {
        "no_grad": torch.no_grad(),
        "inference": torch.inference_mode(),
        "bfloat16": torch.autocast("cpu", torch.bfloat16),
    }
    with modes.get(kind, torch.enable_grad()):
        for number in range(3):
            batch = images(number)
            batch = batch.bfloat16() if kind == "half" else batch
            got, expected = (pool(batch, ROWS, create=True) for pool in pools)
            assert got.dtype == expected.dtype
            assert (got - expected).abs().max() <= (0.05 if kind in ("half", "bfloat16") else 1e-4)
            assert torch.is_autocast_enabled("cpu") == (kind == "bfloat16")
    assert pools[0]._beside.passes == 3


class _TokensFirst(nn.Module):
    """Norm layers that are given (tokens, B, D)."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.fc = nn.Conv2d(3, 8, 8, 8), nn.LayerNorm(8), nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.embed(x).flatten(2).permute(2, 0, 1)
        return self.fc(self.norm(tokens).mean(0))


class _Mixing(nn.Module):
    """A model that subtracts the mean of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.net = tiny("ln")

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x - x.mean(0))


class _Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = tiny("bn")
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.net(x) + self.calls


@pytest.mark.parametrize(
    ("net", "words"),
    [
        (_TokensFirst, "'norm' does not have a row for each image"),
        (_Mixing, "changes the logits of others"),
        (_Counting, "changes its own buffers"),
    ],
)
def test_models_that_do_not_keep_rows_apart_are_served_one_by_one(net: Any, words: str) -> None:
    def one() -> tta.Adapter:
        torch.manual_seed(0)
        return tta.wrap(net().eval(), "tent.cifar10", lr=1e-3)

    pools = both(one)
    compare(pools, [images(0)])
    assert words in (pools[0].one_by_one or "") and pools[0]._beside.passes == 0


@pytest.mark.parametrize("method", ["cotta.cifar10", "shot_im"])
def test_recipes_that_train_the_model_are_served_one_by_one(method: str) -> None:
    pool = StreamPool(tta.wrap(tiny("bn"), method, mean=(0.0,) * 3, std=(1.0,) * 3, lr=1e-4))
    assert "most of the model is trained" in (pool.one_by_one or "")  # known before the first image
    pool.batched = False
    assert pool.one_by_one == "`batched` is False"


@dataclass(frozen=True, kw_only=True)
class _OwnConfig(tta.UpdateConfig):
    lr: float = 1e-3


class _Own(tta.Update):
    """An update that back-propagates without its session."""

    Config = _OwnConfig

    def adapt(self, x: Tensor) -> Prediction:
        prediction = self.network(x)
        prediction.logits.logsumexp(1).mean().backward()
        with torch.no_grad():
            for p in self.parameters_adapted.values():
                p -= self.config.lr * p.grad
                p.grad = None
        return prediction


def test_a_component_that_takes_gradients_itself() -> None:
    tta.register("own_gradients")(_Own)
    pools = both(lambda: tta.wrap(tiny("bn"), "own_gradients"))
    compare(pools, [images(0), images(1)])
    assert "takes gradients itself" in (pools[0].one_by_one or "")


def test_callbacks_that_use_the_adapter_or_the_pool() -> None:
    seen: list[Any] = []
    guard = tta.get_config("periodic", every=1)

    def wrapped(act: Any) -> StreamPool:
        adapter = tta.wrap(
            tiny("bn"), "tent.cifar10", guard=guard, on_event=lambda event: seen.append(act())
        )
        return StreamPool(adapter)

    pool = wrapped(lambda: pool.adapter.health["action"])
    for number in range(2):
        pool(images(number), ROWS, create=True)
    assert seen and "calls the adapter" in (pool.one_by_one or "")
    pool = wrapped(lambda: pool.health("a"))
    with pytest.raises(RuntimeError, match="`pool` must not be used by a function"):
        for number in range(2):
            pool(images(number), ROWS, create=True)


def test_more_streams_than_fit_side_by_side(tmp_path: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr("tta.runtime.side_by_side.MOST", 3)
    rows = [name for name in "abcdefgh" for _ in range(2)]
    together, alone = both(lambda: tta.wrap(tiny("bn"), "tent.cifar10"))
    compare((together, alone), [images(number, 16) for number in range(3)], rows)
    small = StreamPool(tta.wrap(tiny("bn"), "tent.cifar10"), 2, tmp_path / "pool", interval=None)
    alone = StreamPool(tta.wrap(tiny("bn"), "tent.cifar10"))
    alone.batched = False
    compare((small, alone), [images(number, 16) for number in range(3)], rows)
    assert small.counts["restored"] > 8 and small._beside.passes > 8
    small.close()
    assert sorted(StreamPool.open(tiny("bn"), tmp_path / "pool").streams()) == sorted(set(rows))


def test_a_stream_with_a_seat_is_not_put_away_for_another_of_its_batch(tmp_path: Any) -> None:
    """As many streams as fit in memory, the least recently used of them first."""
    small = StreamPool(tta.wrap(tiny("bn"), "tent.cifar10"), 3, tmp_path / "pool", interval=None)
    alone = StreamPool(tta.wrap(tiny("bn"), "tent.cifar10"))
    alone.batched = False
    for rows in ("aabbcc", "ddaabb", "ccaadd"):  # the first is new, and takes the place of another
        for pool in (small, alone):
            pool(images(len(rows), 6), list(rows), create=True)
    compare((small, alone), [images(1, 6)], list("bbddcc"))
    assert small._beside.passes == 4 and small.counts["restored"] <= 3


def test_streams_go_from_mixed_batches_to_calls_of_their_own_and_back(tmp_path: Any) -> None:
    method = "rotta.cifar10"

    def one() -> tta.Adapter:
        return tta.wrap(tiny("bn"), method, mean=(0.0,) * 3, std=(1.0,) * 3, update_every=8)

    together, alone = both(one)
    for number in range(6):
        for pool in (together, alone):
            pool(images(number), ROWS, create=True)
            with pool.stream("abc"[number % 3]) as view:
                view(images(number + 10))
    compare((together, alone), [images(9)])
    adapter = together.adapter
    together.close()
    assert same(adapter.state(), one().state())


@dataclass(frozen=True, kw_only=True)
class _FailsConfig(tta.UpdateConfig):
    lr: float = 1e-2


def test_a_stream_that_fails_fails_the_batch() -> None:
    class Fails(tta.Update):
        """Raises on images that are bright."""

        Config = _FailsConfig

        def adapt(self, x: Tensor) -> Prediction:
            prediction = self.network(x)
            self.step(prediction.logits.logsumexp(1).mean())
            if bool(x.mean() > 2):
                raise Fault
            return prediction

    tta.register("fails")(Fails)
    pool = StreamPool(tta.wrap(tiny("bn"), "fails"))
    pool(images(0), ROWS, create=True)
    before = {name: pool.stream(name).state() for name in NAMES}
    for name in NAMES:
        batch = images(1)
        batch[[i for i, row in enumerate(ROWS) if row == name]] += 9
        with pytest.raises(Fault):
            pool(batch, ROWS)
        assert all(same(pool.stream(n).state(), before[n]) for n in NAMES), name
    with pytest.raises(ValueError, match="`images`"):
        pool(torch.rand(8, 5, 16, 16), ROWS)
    pool(images(2), ROWS)
    assert pool.one_by_one is None and pool._beside.passes >= 2


def test_an_interrupted_mixed_batch_has_happened_wholly_or_not_at_all() -> None:
    pool = StreamPool(tta.wrap(tiny("bn"), "tent.cifar10"))
    pool(images(0), ROWS, create=True)

    def states() -> dict[str, dict[str, Tensor]]:
        return {name: pool.stream(name).state() for name in NAMES}

    def are(found: dict[str, dict[str, Tensor]], wanted: dict[str, dict[str, Tensor]]) -> bool:
        return all(same(found[name], wanted[name]) for name in NAMES)

    before = states()
    begun = time.perf_counter()
    pool(images(1), ROWS)
    took, after, undone = time.perf_counter() - begun, states(), 0
    for shot in shots(0, took, 40):
        for name in NAMES:
            pool.stream(name).load_state(before[name])
        with contextlib.suppress(Fault), interrupted(shot):
            pool(images(1), ROWS)
        found = states()
        undone += are(found, before)
        assert are(found, before) or are(found, after), shot
    assert undone > 3
    pool(images(1), ROWS)
