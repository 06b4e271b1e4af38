"""One adapter in several threads: calls take turns, and every thread gets its own rows."""

from __future__ import annotations

import copy
import os
import pickle
import threading

import pytest
import torch

import tta
from tests.helpers.batches import images
from tests.helpers.compositions import make, suiting
from tests.helpers.nets import FAMILIES, tiny

# Each recipe on the first family that it can work on.
FAMILY = {name: family for family in reversed(FAMILIES) for name in suiting(family)}
RECIPES = [name for name in tta.list_methods() if not name.startswith("source")]


@pytest.mark.parametrize(
    ("threads", "calls"),
    [
        (4, 4),
        pytest.param(8, 20, marks=pytest.mark.slow),
        pytest.param(8, 1000, marks=[pytest.mark.soak, pytest.mark.timeout(7200)]),
    ],
)
@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.filterwarnings("ignore:.*preset, made for:UserWarning")
def test_calls_of_several_threads_are_served_one_after_the_other(
    name: str, threads: int, calls: int, soak_seed: int, record_property
) -> None:
    """In whatever order they come: a queue that is served alone in that order gives the same."""
    _, adapter = make(FAMILY[name], {"recipe": name})
    served: list[tuple[int, torch.Tensor]] = []
    failures: list[BaseException] = []
    barrier = threading.Barrier(threads)

    def serve(thread: int) -> None:
        barrier.wait()
        try:
            for call in range(calls):
                number = (soak_seed * threads + thread) * calls + call
                with adapter.turns.lock:  # the order is that of the turns
                    served.append((number, adapter(images(number))))
                adapter.report, adapter.state()
        except BaseException as error:
            failures.append(error)

    callers = [threading.Thread(target=serve, args=(n,)) for n in range(threads)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not failures and len(served) == threads * calls
    _, alone = make(FAMILY[name], {"recipe": name})
    exact = {"rtol": 0, "atol": 0, "equal_nan": True}
    for number, logits in served:
        torch.testing.assert_close(alone(images(number)), logits, **exact)
    torch.testing.assert_close(adapter.state(), alone.state(), **exact)
    record_property("calls", threads * calls)


def test_a_call_waits_for_the_one_that_is_going_on() -> None:
    adapter = tta.wrap(tiny("bn"), "tent.cifar10")
    order: list[str] = []
    begun, go_on = threading.Event(), threading.Event()

    def slow(*_: object) -> None:
        begun.set()
        go_on.wait(30)
        order.append("call")

    handle = adapter.model.register_forward_pre_hook(slow)
    caller = threading.Thread(target=lambda: adapter(images(0)))
    caller.start()
    begun.wait(30)
    handle.remove()
    reader = threading.Thread(target=lambda: (adapter.reset(), order.append("reset")))
    reader.start()
    reader.join(0.2)
    assert order == [] and reader.is_alive()
    go_on.set()
    caller.join(30), reader.join(30)
    assert order == ["call", "reset"]


def test_copies_and_children_have_turns_of_their_own() -> None:
    adapter = tta.wrap(tiny("bn"), "tent.cifar10")
    held, done = threading.Event(), threading.Event()

    def hold() -> None:
        with adapter.turns.lock:
            held.set()
            done.wait(30)

    holder = threading.Thread(target=hold)
    holder.start()
    held.wait(30)
    for twin in (copy.deepcopy(adapter), pickle.loads(pickle.dumps(adapter))):
        assert twin.turns is not adapter.turns and twin(images(0)).shape == (8, 10)
    child = os.fork()
    if child == 0:  # nobody holds anything here
        with adapter.turns.lock:
            os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    done.set()
    holder.join(30)


def test_who_looks_from_another_thread_takes_nothing_back() -> None:
    """A call that is going on in one thread is no interrupted one for another."""
    adapter, own = (make("bn", {"recipe": "tent"})[1] for _ in range(2))
    begun, go, seen = threading.Event(), threading.Event(), []

    def wait(*_: object) -> None:
        begun.set()
        go.wait(10)

    handle = adapter.model.register_forward_hook(wait)  # before the backward pass
    caller = threading.Thread(target=lambda: adapter(images(0)))
    caller.start()
    begun.wait(10)
    looks = [
        threading.Thread(target=lambda: seen.append(adapter.session.learning)),
        threading.Thread(target=lambda: seen.append(len(adapter.parameters_adapted))),
    ]
    for look in looks:
        look.start()
        look.join(0.1)
    go.set()
    for thread in (caller, *looks):
        thread.join()
    handle.remove()
    adapter(images(1))
    for number in (0, 1):
        own(images(number))
    assert all(map(torch.equal, adapter.state().values(), own.state().values()))
    assert len(seen) == 2
