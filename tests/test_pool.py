"""Many streams on one adapter: each as if it had it alone, one owner at a time."""

from __future__ import annotations

import copy
import random
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn

import tta
from tests.helpers.batches import images
from tests.helpers.compositions import ALONE, GUARDED, Case, given, label, make
from tests.helpers.faults import Counting, Fault, same
from tests.helpers.nets import tiny
from tests.helpers.refusals import refused
from tta.runtime import StreamPool

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
NAMES = ("a", "b", "c")


def pool(*args: Any, method: str = "tent.cifar10", **kwargs: Any) -> StreamPool:
    return StreamPool(tta.wrap(tiny("bn"), method), *args, **kwargs)


def pixels(method: str, **extra: Any) -> tta.Adapter:
    return tta.wrap(tiny("bn"), method, mean=(0.0,) * 3, std=(1.0,) * 3, **extra)


def alone(case: Case, **extra: Any) -> tta.Adapter:
    return make(*case, **extra)[1]


def seen(one: Any) -> str:
    """What an adapter or a view says of its last batch, NaN included, and of what it trains."""
    asking = [p.requires_grad for p in one.model.parameters()]
    return repr((one.report, one.health, one.events, list(one.parameters_adapted), asking))


def interleave(case: Case, steps: int, folder: Any, seed: int = 0) -> StreamPool:
    """Serve streams in a random order and check that each gives what it gives alone."""
    chance = random.Random(seed)
    shared = StreamPool(alone(case), 2 if folder else 3, folder, interval=None)
    own = {name: alone(case) for name in NAMES}
    for number in range(steps):
        name = chance.choice(NAMES)
        what = chance.choice(["call"] * 6 + ["reset", "freeze", "unfreeze", "load", "as source"])
        with shared.stream(name, create=True) as view:
            for one in (view, own[name]):
                if what in ("reset", "freeze", "unfreeze"):
                    getattr(one, what)()
                elif what != "call":
                    one.load_state(one.state(), as_source=what == "as source", allow_nonfinite=True)
            batch = images(number, chance.randrange(1, 9))
            got, expected = view(batch), own[name](batch)
            assert torch.equal(got.nan_to_num(7), expected.nan_to_num(7)), (number, name, what)
            assert seen(view) == seen(own[name]), (number, name)
    for name in set(shared.streams()):
        with shared.stream(name) as view:
            assert same(view.state(), own[name].state())
            assert same(view.reset_point(), own[name].reset_point())
            view.reset(), own[name].reset()
            assert torch.equal(view(images(0)), own[name](images(0)))
    return shared


@pytest.mark.parametrize("case", ALONE[::5] + GUARDED[::13], ids=label)
def test_interleaved_streams_are_bitwise_those_served_alone(case: Case) -> None:
    shared = interleave(case, 12, None)
    shared.close()
    assert same(shared.adapter.state(), alone(case).state())


@pytest.mark.slow
@pytest.mark.parametrize("case", ALONE + GUARDED, ids=label)
def test_interleaved_streams_over_a_disk_are_bitwise_those_served_alone(
    case: Case, tmp_path
) -> None:
    shared = interleave(case, 24, tmp_path / "pool", seed=1)
    assert shared.counts["restored"] > 4 and shared.counts["failed"] == 0
    shared.close()
    again = StreamPool.open(tiny(case[0]), tmp_path / "pool", interval=None, **given(case[1]))
    assert sorted(again.streams()) == sorted(shared.streams())


class _Counts(nn.Module):
    """A network that counts in its forward pass: from the start, and some time later."""

    def __init__(self) -> None:
        super().__init__()
        self.net = tiny("bn")
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("late", torch.zeros(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        if self.calls > 5:
            self.late.data[0] += 1  # without a sign in its version
        return self.net(x) + self.late.sum() + self.calls


@pytest.mark.parametrize("method", ["source", "tent.cifar10", "lame"])
def test_buffers_that_the_model_moves_belong_to_the_stream(method: str, tmp_path) -> None:
    shared = StreamPool(tta.wrap(_Counts(), method), 2, tmp_path / "pool", interval=None)
    own = {name: tta.wrap(_Counts(), method) for name in NAMES}
    for number in range(24):
        name = NAMES[number % 3 if number > 10 else 0]
        with shared.stream(name, create=True) as view:
            assert torch.equal(view(images(number)), own[name](images(number))), number
    for name in NAMES:  # not before, since who asks for a state looks for such buffers
        assert same(shared.stream(name).state(), own[name].state())
    adapter = shared.adapter
    shared.close()
    assert same(dict(adapter.unwrap().state_dict()), dict(_Counts().state_dict()))


def test_draws_and_views_are_counted_by_stream(tmp_path) -> None:
    asked: list[tuple[Any, ...]] = []

    def augment(x: torch.Tensor, n: int) -> torch.Tensor:
        asked.append(("view", n))
        return x.flip(3)

    def served(call: Any, numbers: range) -> list[Any]:
        asked.clear()
        for number in numbers:
            call(images(number))
        return list(asked)

    single = pixels("cotta.cifar10", augment=augment)
    expected = served(single, range(2)), served(single, range(2, 4))
    shared = StreamPool(
        pixels("cotta.cifar10", augment=augment), 1, tmp_path / "pool", interval=None
    )
    for part, numbers in zip(expected, (range(2), range(2, 4)), strict=True):
        for name in NAMES:
            with shared.stream(name, create=True) as view:
                assert served(view, numbers) == part
    assert shared.counts["restored"] >= 3


def test_other_draws_are_counted_by_stream() -> None:
    asked: dict[str, list[int]] = {name: [] for name in NAMES}

    def draws(name: str, shape: torch.Size, call: int) -> None:
        asked[current].append(call)

    guard = tta.get_config("aetta", passes=2)
    shared = StreamPool(tta.wrap(tiny("bn"), "tent.cifar10", guard=guard, draws=draws))
    for current in "abacab":
        with shared.stream(current, create=True) as view:
            view(images(0))
    assert {name: sorted(set(calls)) for name, calls in asked.items()} == {
        "a": [0, 1, 2], "b": [0, 1], "c": [0]
    }  # fmt: skip


class _Backwards(nn.Module):
    """Layers that are called in another order than they are defined."""

    def __init__(self) -> None:
        super().__init__()
        norms = [nn.BatchNorm2d(3) for _ in range(4)]
        self.first, self.second, self.third, self.fourth = norms
        self.fc = nn.Linear(3, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.second(self.fourth(self.first(self.third(x))).relu())
        return self.fc(x.mean((2, 3)))


def test_each_stream_finds_out_which_layers_come_last() -> None:
    torch.manual_seed(0)
    net = _Backwards().eval()
    own = tta.wrap(copy.deepcopy(net), "sar.cifar10")
    shared = StreamPool(tta.wrap(net, "sar.cifar10"))
    for number in range(2):
        expected = own(images(number))
        for name in NAMES:
            with shared.stream(name, create=True) as view:
                assert torch.equal(view(images(number)), expected) and seen(view) == seen(own)
    assert {name.partition(".")[0] for name in own.parameters_adapted} == {
        "third",
        "first",
        "fourth",
    }


def test_a_mixed_batch_is_its_streams_one_by_one() -> None:
    shared, single = pool(), pool()
    shared.batched = False
    rows = ["b", "a", "b", "c", "a", "b", "c", "a"]
    for number in range(3):
        logits = shared(images(number), rows, create=number == 0)
        for name in NAMES:
            mine = [i for i, row in enumerate(rows) if row == name]
            with single.stream(name, create=True) as view:
                assert torch.equal(logits[mine], view(images(number)[mine]))
    assert shared.one_by_one == "`batched` is False" and sorted(shared.streams()) == sorted(NAMES)


@pytest.mark.parametrize("batched", [True, False])
def test_a_mixed_batch_that_fails_has_not_happened(batched: bool) -> None:
    shared = pool()
    shared.batched = batched
    rows = ["a", "a", "b", "b", "b", "c", "c", "c"]
    shared(images(0), rows[:5] + ["a"] * 3, create=True)

    def states() -> dict[str, Any]:
        return {name: shared.stream(name).state() for name in shared.streams()}

    before = states()
    for _ in range(2):  # the first batch of three streams may take preparations
        with Counting() as counting:
            expected = shared(images(1), rows, create=True)
        shared.drop("c")
        for name in "ab":
            shared.stream(name).load_state(before[name])
    for at in range(counting.count // 2, counting.count, 97):
        with pytest.raises(Fault), Counting(at):
            shared(images(1), rows, create=True)
        after = states()
        assert after.keys() == before.keys(), at
        assert all(same(after[name], before[name]) for name in before), at
    assert torch.equal(shared(images(1), rows, create=True), expected)


def test_a_mixed_batch_that_is_refused_creates_no_stream() -> None:
    shared = pool(2)
    refused(RuntimeError, "`capacity`", lambda: shared(images(0), list("aaabbbcc"), create=True))
    with shared.stream("b", create=True):
        refused(RuntimeError, "`stream`", lambda: shared(images(0), list("aaaabbbb"), create=True))
    assert shared.streams() == ["b"]


def test_a_switch_that_fails_harms_no_stream() -> None:
    shared, own = StreamPool(pixels("rotta.cifar10")), {}
    for name in "ab":
        own[name] = pixels("rotta.cifar10")
        with shared.stream(name, create=True) as view:
            view(images(0)), own[name](images(0))
    for at in range(1, 40):
        name = "ab"[at % 2]
        with shared.stream(name) as view:
            try:
                with Counting(at):
                    shared._store.run(shared._store.streams[name], lambda adapter: None)
            except Fault:
                pass
            assert torch.equal(view(images(at)), own[name](images(at))), at
            assert same(view.state(), own[name].state()), at


def test_unknown_streams_and_full_pools_are_refused() -> None:
    shared = pool(2)
    text = str(refused_key(lambda: shared.stream("door")))
    assert "create=True" in text
    shared.stream("door", create=True)
    assert "door" in str(refused_key(lambda: shared.health("doors")))
    with shared.stream("yard", create=True) as yard:
        yard(images(0))
    text = refused(RuntimeError, "`capacity`", lambda: shared.stream("third", create=True))
    assert "`folder`" in text and shared.streams() == ["door", "yard"]
    refused_key(lambda: shared(images(0, 2), ["door", "x"]))
    refused(ValueError, "`streams`", lambda: shared(images(0, 2), ["door"]))
    refused(ValueError, "`streams`", lambda: shared(images(0, 4), "door"))
    refused(TypeError, "`streams`", lambda: shared(images(0, 2), ["door", 3]))
    refused(TypeError, "`images`", lambda: shared("images", ["door"]))
    refused(TypeError, "`stream`", lambda: shared.stream(7))
    refused(RuntimeError, "`folder`", shared.snapshot)
    shared.drop("door")
    refused_key(lambda: shared.reset("door"))
    shared.stream("third", create=True)


def refused_key(call: Any) -> KeyError:
    with pytest.raises(KeyError, match="`stream`") as caught:
        call()
    assert len(str(caught.value)) < 300
    return caught.value


@pytest.mark.parametrize(
    ("error", "arguments"),
    [
        (TypeError, {"adapter": None}),
        (TypeError, {"capacity": 1.5}),
        (ValueError, {"capacity": 0}),
        (TypeError, {"folder": 3}),
        (ValueError, {"interval": 0}),
        (TypeError, {"interval": "1"}),
    ],
)
def test_bad_arguments_of_a_pool_are_refused(error: Any, arguments: dict[str, Any]) -> None:
    adapter = tta.wrap(tiny("bn"), "bn")
    with pytest.raises(error, match=f"`{next(iter(arguments))}`"):
        StreamPool(**{"adapter": adapter, **arguments})
    assert adapter(images(0)).shape == (8, 10)


def test_the_adapter_is_the_pools_until_it_is_closed() -> None:
    adapter = tta.wrap(tiny("bn"), "tent.cifar10")
    adapter(images(0))
    before, report = adapter.state(), adapter.report
    with StreamPool(adapter) as shared:
        for call in (lambda: adapter(images(0)), adapter.state, adapter.freeze, adapter.unwrap,
                     lambda: adapter.report, lambda: StreamPool(adapter)):  # fmt: skip
            refused(RuntimeError, "`adapter` must not be used", call)
        with shared.stream("a", create=True) as view:
            assert same(view.state(), before)  # it begins where the adapter was
            view(images(1))
    assert same(adapter.state(), before) and adapter.report == report
    with pytest.raises(RuntimeError, match="closed"):
        shared.stream("a")
    with pytest.raises(RuntimeError, match="given back"):
        view(images(0))
    shared.close()  # again: nothing happens
    adapter.unwrap()
    with pytest.raises(RuntimeError, match="unwrapped"):
        StreamPool(adapter)


def test_a_view_is_an_adapter_without_unwrap() -> None:
    shared = pool()
    with shared.stream("a", create=True) as view:
        assert not hasattr(view, "unwrap") and view.num_classes == 10
        assert view.train() is view and view.config == shared.adapter.config
        assert set(view.parameters_adapted) and set(view.norm_layers) and view.fingerprint
        with view.frozen() as frozen:
            assert frozen is view
            before = view.state()
            view(images(0))
            assert same(view.state(), before)
        view(images(0))
        assert not same(view.state(), before)
        view.load_state_dict(view.state_dict())
    shared.freeze("a"), shared.stream("b", create=True)
    with shared.stream("a") as a, shared.stream("b") as b:
        before = a.state()
        for view in (a, b, a):
            view(images(1))
        assert same(a.state(), before) and not same(b.state(), before)
        shared.unfreeze("a")
        a(images(1))
        assert not same(a.state(), before)
        shared.reset("a")
        assert same(a.state(), a.reset_point())
    with pytest.raises(RuntimeError, match="given back"):
        a(images(0))


@contextmanager
def another_owner(shared: StreamPool, name: str) -> Iterator[threading.Event]:
    """A thread that has a stream until it is told to give it back."""
    got, done = threading.Event(), threading.Event()

    def own() -> None:
        with shared.stream(name, create=True):
            got.set()
            done.wait(30)

    thread = threading.Thread(target=own)
    thread.start()
    got.wait(30)
    try:
        yield done
    finally:
        done.set()
        thread.join(30)


def test_one_owner_at_a_time() -> None:
    shared = pool()
    with another_owner(shared, "a") as done:
        refused(RuntimeError, "another owner", lambda: shared.stream("a", wait=False))
        refused(RuntimeError, "must be free", lambda: shared.drop("a"))
        with shared.stream("b", create=True) as b:  # another stream goes on
            b(images(0))
        shared.reset("a"), shared.health("a")
        threading.Timer(0.2, done.set).start()
        begun = time.monotonic()
        with shared.stream("a") as a:  # waits
            assert time.monotonic() - begun > 0.1
            refused(RuntimeError, "this thread", lambda: shared.stream("a").state())
            a(images(0))
    a = shared.stream("a")  # without a block, each call is an owner by itself
    with shared.stream("a", wait=False):
        refused(RuntimeError, "this thread", lambda: a(images(0)))
    a(images(0))


def test_a_stream_that_was_dropped_while_it_was_waited_for(monkeypatch: Any) -> None:
    """Also where another one has its name by then, whose owner would be passed over."""
    shared = pool()
    shared(images(0), list("aaaabbbb"), create=True)
    wanted = [
        lambda: shared(images(1), list("bbbbaaaa"), create=True),
        lambda: shared.stream("a").__enter__(),
        lambda: shared.drop("a"),
    ]
    for ask in wanted:
        with monkeypatch.context() as patch:

            def claim(stream: Any, wait: bool) -> None:
                if stream.name == "a" and shared._store.streams["a"] is stream:
                    shared._store.drop(stream)
                    shared._store.make("a")

            patch.setattr(shared._store, "claim", claim)
            refused(KeyError, "'a' was dropped: ask the pool for it again", ask)
    for name in "ab":
        shared.stream(name, wait=False)


def test_who_waits_for_a_pool_that_closes_is_told() -> None:
    shared = pool()
    said: list[str] = []

    def wait() -> None:
        try:
            shared.stream("a")(images(0))
        except RuntimeError as error:
            said.append(str(error))

    with another_owner(shared, "a"):
        waiting = threading.Thread(target=wait)
        waiting.start()
        time.sleep(0.05)
        shared.close()
        waiting.join(30)
    assert said and "closed" in said[0]


def test_the_pool_is_refused_within_a_call() -> None:
    shared = pool()
    shared.stream("b", create=True)
    said: list[BaseException] = []

    def hook(*_: Any) -> None:
        for call in (lambda: shared.reset("b"), shared.close):
            try:
                call()
            except RuntimeError as error:
                said.append(error)

    handle = shared.adapter.model.register_forward_pre_hook(hook)
    with shared.stream("a", create=True) as view:
        view(images(0))
    handle.remove()
    assert len(said) >= 2 and all("within a call" in str(error) for error in said)


@pytest.mark.parametrize(
    ("threads", "calls"), [(4, 10), pytest.param(16, 60, marks=pytest.mark.slow)]
)
def test_threads_with_streams_of_their_own(threads: int, calls: int, tmp_path) -> None:
    """Each gets its rows, while snapshots are made and streams come and go from memory."""
    shared = pool(max(2, threads // 2), tmp_path / "pool", interval=0.05)
    failures: list[Any] = []
    owns = [tta.wrap(tiny("bn"), "tent.cifar10") for _ in range(threads)]

    def serve(number: int) -> None:
        own = owns[number]
        for call in range(calls):
            batch = images(number * calls + call, 4)
            with shared.stream(str(number), create=True) as view:
                if not torch.equal(view(batch), own(batch)):
                    failures.append((number, call))

    callers = [threading.Thread(target=serve, args=(n,)) for n in range(threads)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    shared.close()
    assert not failures and shared.counts["snapshots"] >= threads


def test_a_thousand_streams() -> None:
    """In memory: as small as what moves, and each where it was left."""
    shared = pool(1000, method="tent.cifar10")
    own = tta.wrap(tiny("bn"), "tent.cifar10")
    batch = images(0, 2)
    for number in range(1000):
        with shared.stream(f"camera {number}", create=True) as view:
            if number % 97 == 0:
                view(batch)
    assert len(shared.streams()) == 1000
    expected = own(batch), own(batch)
    for number in range(0, 1000, 97):
        with shared.stream(f"camera {number}") as view:
            assert torch.equal(view(batch), expected[1]), number
    refused(RuntimeError, "`capacity`", lambda: shared.stream("one more", create=True))


def test_one_stream_is_saved_by_run(tmp_path) -> None:
    adapter = tta.wrap(tiny("bn"), "robust_bn")
    with tta.runtime.StreamPool(adapter) as pool:
        view = pool.stream("a", create=True)
        view(images(0))
        view.run(lambda one: tta.save(one, tmp_path / "saved"), changes=False)
        expected = view.state()
    found = tta.load(tiny("bn"), tmp_path / "saved").state()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], value) for key, value in expected.items())
