"""A call that fails, at whatever operation or instant, has not happened."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
import zlib
from typing import Any

import pytest
import torch
from torch import nn

import tta
from tests.helpers.batches import images, source_batches
from tests.helpers.compositions import (
    ALONE,
    SAMPLED_PAIRS,
    SAMPLED_TRIPLES,
    Case,
    label,
    make,
)
from tests.helpers.faults import Counting, Fault, Subject, at_places, interrupted, same, shots
from tests.helpers.nets import tiny

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
BATCHES = 2  # served before the call that fails
SAMPLED = (SAMPLED_PAIRS + SAMPLED_TRIPLES)[::10]
# These take the images of a batch one after the other, so that two of them have every operation.
SIZE = {"memo": 2, "ttaug": 2}


def fail_at_operations(case: Case, every: int, served: int, most: int | None = None) -> int:
    """Let a call fail before every n-th operation, and return how many failed.

    With `most`, no more often than that: some calls have ten times the operations of others, and
    each failure of them costs ten times as much.
    """
    subject = Subject(case, served, SIZE.get(case[1].get("recipe", "")))
    assert subject.counting.foreign == 0, "other weights were put into the caller's model"
    if most is not None:
        every = max(every, subject.counting.count // most)
    first = 1 + zlib.crc32(label(case).encode()) % every
    failed = 0
    for at in range(first, subject.counting.count + 1, every):
        try:
            with Counting(at):
                subject.adapter(subject.batch)
        except Fault:
            failed += 1
        assert subject.harm() is None, (at, subject.harm())
    assert subject.ends_as_it_should() is None, subject.ends_as_it_should()
    return failed


@pytest.mark.parametrize("case", ALONE[::3], ids=label)
def test_a_call_that_fails_at_some_operations_has_not_happened(case: Case) -> None:
    assert (
        fail_at_operations(case, every=47, served=BATCHES, most=30) > 0
        or case[1]["recipe"] == "source"
    )


@pytest.mark.slow
@pytest.mark.parametrize("case", ALONE, ids=label)
def test_a_call_that_fails_at_every_20th_operation_has_not_happened(case: Case) -> None:
    fail_at_operations(case, every=20, served=BATCHES, most=60)


@pytest.mark.slow
@pytest.mark.parametrize("case", SAMPLED, ids=label)
def test_a_call_of_a_composition_that_fails_has_not_happened(case: Case) -> None:
    fail_at_operations(case, every=41, served=BATCHES, most=20)


@pytest.mark.soak
@pytest.mark.parametrize("served", [0, BATCHES])
@pytest.mark.parametrize("case", ALONE, ids=label)
def test_a_call_that_fails_at_any_operation_has_not_happened(
    case: Case, served: int, record_property: Any
) -> None:
    record_property("operations", fail_at_operations(case, every=1, served=served))


def fail_by_signals(case: Case, count: int, seed: int) -> int:
    """Interrupt calls at random instants, and return how many were."""
    subject = Subject(case, BATCHES)
    start = time.perf_counter()
    for _ in range(3):
        subject.adapter(subject.batch)
    duration = (time.perf_counter() - start) / 3
    subject.adapter.load_state(subject.before)
    failed = 0
    for seconds in shots(seed, duration, count):
        try:
            with interrupted(seconds):
                subject.adapter(subject.batch)
        except Fault:
            failed += 1
        problem = subject.harm()
        assert problem is None, problem
    problem = subject.ends_as_it_should()
    assert problem is None, problem
    return failed


@pytest.mark.slow
@pytest.mark.parametrize("case", [c for c in ALONE if c[0] == "bn"], ids=label)
def test_a_call_that_a_signal_ends_has_not_happened(case: Case) -> None:
    fail_by_signals(case, count=20, seed=0)


@pytest.mark.soak
@pytest.mark.parametrize("case", ALONE, ids=label)
def test_calls_that_signals_end_have_not_happened(
    case: Case, soak_seed: int, record_property: Any
) -> None:
    record_property("signals", fail_by_signals(case, count=500, seed=soak_seed))


HOOKED = ("bn-itta", "bn-reservoir", "bn-nhl")  # which put hooks on in a call


class Registering:
    """Puts hooks on, and raises after the n-th of them, before anybody has its handle."""

    def __init__(self, kind: str, at: int) -> None:
        self.register, self.at, self.count = getattr(nn.Module, kind), at, 0

    def __get__(self, module: nn.Module, owner: type) -> Any:
        return lambda *args, **kwargs: self._put_on(module, *args, **kwargs)

    def _put_on(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        handle = self.register(module, *args, **kwargs)
        self.count += 1
        if self.count == self.at:
            raise Fault
        return handle


@pytest.mark.parametrize("case", [c for c in ALONE if label(c) in HOOKED], ids=label)
def test_a_hook_whose_handle_was_never_noted_goes_with_its_call(case: Case) -> None:
    """As where a signal comes right after the line that puts it on."""
    subject = Subject(case, BATCHES)
    kind = "register_forward_pre_hook" if label(case) == "bn-nhl" else "register_forward_hook"
    for at in (1, 2) if kind == "register_forward_hook" else (1,):
        with pytest.MonkeyPatch.context() as patch, pytest.raises(Fault):
            patch.setattr(nn.Module, kind, Registering(kind, at))
            subject.adapter(subject.batch)
        assert subject.harm() is None
    assert subject.ends_as_it_should() is None


def test_gradients_of_a_failed_backward_pass_are_no_part_of_the_next_step() -> None:
    """As when memory runs out there, which no later step may notice."""
    subject = Subject(("bn", {"recipe": "tent"}), BATCHES)
    weight = next(iter(subject.adapter.parameters_adapted.values()))

    def fail(*_: Any) -> None:
        raise torch.OutOfMemoryError("no memory")

    handle = weight.register_hook(fail)
    with pytest.raises(torch.OutOfMemoryError):
        subject.adapter(subject.batch)
    handle.remove()
    assert all(p.grad is None for p in subject.net.parameters())
    assert same(subject.adapter.state(), subject.before)
    assert subject.ends_as_it_should() is None


def test_what_fails_while_a_call_is_taken_back_is_taken_back_later() -> None:
    """Where the undoing is interrupted too, the next use of the adapter goes on with it."""
    subject = Subject(("bn", {"recipe": "cotta"}), BATCHES)

    class Failing(Counting):
        def __torch_dispatch__(self, *args: Any, **kwargs: Any) -> Any:
            if self.count >= self.at:  # from then on every operation fails
                raise Fault
            return super().__torch_dispatch__(*args, **kwargs)

    with pytest.raises(Fault), Failing(subject.counting.count - 30):
        subject.adapter(subject.batch)
    assert subject.harm() is None
    assert subject.ends_as_it_should() is None


def test_a_state_or_a_reset_that_fails_half_way_changes_nothing() -> None:
    subject = Subject(("bn", {"recipe": "rmt"}), BATCHES)
    adapter = subject.adapter
    for action in (adapter.reset, lambda: adapter.load_state(subject.after)):
        counting = Counting()
        with counting:
            action()
        adapter.load_state(subject.before)
        for at in range(1, counting.count, 7):
            with pytest.raises(Fault), Counting(at):
                action()
            assert same(adapter.state(), subject.before)


def test_a_hook_may_ask_the_adapter_for_its_state_during_a_call() -> None:
    net, adapter = make("bn", {"recipe": "tent"})
    seen: list[dict[str, torch.Tensor]] = []
    net.fc.register_forward_hook(lambda *_: seen.append(adapter.state()))  # type: ignore[union-attr]
    adapter(images(0))
    _, other = make("bn", {"recipe": "tent"})
    other(images(0))
    assert len(seen) == 1 and same(adapter.state(), other.state())


def test_a_model_whose_function_refers_to_it_from_outside_is_adapted_too() -> None:
    """Its copy would use the student's weights in place of the teacher's."""

    class Closed(nn.Module):
        def __init__(self, net: nn.Module) -> None:
            super().__init__()
            self.net = net
            self.call = lambda x: net(x)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.call(x)

    pixels: dict[str, Any] = {"mean": (0.5,) * 3, "std": (0.5,) * 3}
    plain = tta.wrap(tiny("bn"), "rotta", lr=0.1, update_every=8, **pixels)
    closed = tta.wrap(Closed(tiny("bn")), "rotta", lr=0.1, update_every=8, **pixels)
    for number in range(4):
        assert torch.equal(plain(images(number)), closed(images(number)))


@pytest.mark.parametrize("name", ["dda", "tent"])
def test_a_signal_between_a_context_and_its_block_leaves_no_mode(name: str) -> None:
    """The context ends when the traceback goes, and must not turn gradients off then."""
    subject, left, before = Subject(("bn", {"recipe": name}), BATCHES), 0, sys.gettrace()

    def trace(frame: Any, event: str, _: Any) -> Any:
        nonlocal left
        if frame.f_code is not contextlib._GeneratorContextManager.__enter__.__code__:
            return None
        left -= event == "return"
        if event == "return" and left == 0:
            sys.settrace(before)
            raise Fault
        return trace

    for number in range(1, 1000):
        left = number
        with contextlib.suppress(Fault):
            sys.settrace(trace)
            subject.adapter(subject.batch)
        sys.settrace(before)
        assert torch.is_grad_enabled(), number
        assert subject.harm() is None, number
        if left > 0:
            break
    assert number > 2


POOL = tuple(f"runtime/{name}.py" for name in ("pool", "ownership", "stream_view", "stream_store"))
POOL += ("runtime/side_by_side.py", "/contextlib.py", "/threading.py")


def test_a_signal_at_any_place_of_a_pool_leaves_no_stream_owned_and_no_lock_held() -> None:
    shared = tta.runtime.StreamPool(tta.wrap(tiny("bn"), "tent.cifar10"))
    rows = images(0)[:4]
    shared(rows, list("abab"), create=True)

    def states() -> dict[str, Any]:
        return {name: shared.stream(name).state() for name in "ab"}

    before = states()
    shared(rows, list("abab"))
    after = states()

    def enter() -> None:
        with shared.stream("a"):
            pass

    def make() -> None:
        shared.stream("c", create=True)
        shared.drop("c")

    held = shared.stream("a")
    uses = [lambda: shared(rows, list("abab")), enter, make, lambda: held(rows[:2])]
    uses += [lambda: held.state(), lambda: shared.stream("a", wait=False)]
    for use in uses:
        for place in at_places(POOL, most=2000):
            for name in "ab":
                shared.stream(name).load_state(before[name])
            with contextlib.suppress(Fault), place:
                use()
            assert free_for_others(shared, place.where)
            for name in shared.streams():
                shared.stream(name, wait=False)
            if use is uses[0]:
                found = states()
                assert any(
                    all(same(found[name], wanted[name]) for name in "ab")
                    for wanted in (before, after)
                ), place.where
        assert 20 < place.number < 2000
    shared.close()


BESIDE = (*POOL, "core/files.py", "core/adapter_sets.py", "tta/saving.py", "stream_files.py")


def test_a_signal_while_a_pool_is_made_leaves_the_adapter_to_its_owner(tmp_path) -> None:
    adapter = tta.wrap(tiny("bn"), "tent.cifar10")
    before = adapter.state()
    for place in at_places(BESIDE, 7):
        shared = None
        with contextlib.suppress(Fault), place:
            shared = tta.runtime.StreamPool(
                adapter, folder=tmp_path / str(place.number), interval=None
            )
        if shared is not None:
            shared.close()
        assert same(adapter.state(), before), place.where
    assert 100 < place.number < 10_000


def test_a_pool_whose_closing_a_signal_has_ended_is_closed_by_the_next_call() -> None:
    adapter = tta.wrap(tiny("bn"), "tent.cifar10")
    before = adapter.state()
    for place in at_places(BESIDE, 3):
        shared = tta.runtime.StreamPool(adapter)
        shared.stream("a", create=True)(images(0))
        with contextlib.suppress(Fault), place:
            shared.close()
        shared.close()
        assert shared.closed and same(adapter.state(), before), place.where
    assert 30 < place.number < 10_000


def test_a_signal_while_an_adapter_is_saved_leaves_one_of_both_states(tmp_path) -> None:
    adapter = tta.wrap(tiny("bn"), "tent.cifar10")
    before = adapter.state()
    adapter(images(0))
    after = adapter.state()
    for place in at_places(("core/files.py",), most=1000):
        adapter.load_state(before)
        tta.save(adapter, tmp_path)
        assert len(list(tmp_path.iterdir())) == 2, place.number  # what is left over goes then
        adapter.load_state(after)
        with contextlib.suppress(Fault), place:
            tta.save(adapter, tmp_path)
        found = tta.load(tiny("bn"), tmp_path).state()
        assert same(found, before) or same(found, after), place.where
    assert 20 < place.number < 1000


def free_for_others(shared: tta.runtime.StreamPool, where: str) -> bool:
    """Whether another thread may use a pool at once."""
    found = []

    def use() -> None:
        found.append(shared.stream("b", wait=False).state())

    other = threading.Thread(target=use, name=where, daemon=True)
    other.start()
    other.join(30)
    return bool(found)


@pytest.mark.parametrize("method", ["rotta.cifar10", "adacontrast.cifar10", "adanpc.cifar10"])
@pytest.mark.parametrize("by", ["load_state", "reset"])
def test_a_signal_while_a_state_is_put_in_leaves_the_former_or_the_new(method, by) -> None:
    files = tuple(f"core/{name}.py" for name in ("state", "state_dict", "masters", "transaction"))
    pixels: Any = {"mean": (0.0,), "std": (1.0,)}
    if method.startswith("adanpc"):
        pixels["source"] = source_batches()
    adapter = tta.wrap(tiny("bn"), method, **pixels)
    start = adapter.state()
    adapter(images(0))
    new = adapter.state() if by == "load_state" else start
    adapter(images(1))
    former = adapter.state()
    for place in at_places(files, 3):
        adapter.load_state(former)
        with contextlib.suppress(Fault), place:
            adapter.load_state(new) if by == "load_state" else adapter.reset()
        found = adapter.state()
        assert same(found, former) or same(found, new), place.where
    assert 30 < place.number < 10_000


AUGMENTING = ["adacontrast", "cotta", "rotta", "santa", "rmt", "memo", "spa", "roid"]


@pytest.mark.parametrize("method", AUGMENTING)
def test_no_signal_is_lost_in_a_generator_of_views(method: str) -> None:
    # An exception in a generator that is dropped half-way leaves nobody's frame: Python swallows
    # it, and torch.no_grad around the generator may go on for the rest of the call.
    subject = Subject(("bn", {"recipe": method}), BATCHES)
    for place in at_places(("torch/utils/_contextlib.py",), 3, most=3000):
        with contextlib.suppress(Fault), place:
            subject.adapter(subject.batch)
            assert not place.where, place.where
        problem = subject.harm()
        assert problem is None, f"{problem}: {place.where}"
    assert place.number > 0
