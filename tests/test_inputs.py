"""The slot `input`: modules of the caller's in front of the model, in every verb of an adapter."""

from __future__ import annotations

import copy
import pickle
import threading
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import tta
from tests.helpers.batches import images
from tests.helpers.nets import tiny

close = torch.testing.assert_close


class Drift(nn.Module):
    """Adds a buffer that each batch moves, and a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.full((1,), 0.1))
        self.inner = nn.Module()
        self.inner.register_buffer("mean", torch.zeros(3))
        self.inner.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.inner.register_buffer("mask", torch.tensor([0.0, -float("inf")]))

    def forward(self, x: Tensor) -> Tensor:
        if x.isnan().any() or self.shift.isnan():
            raise RuntimeError("no numbers")
        self.inner.mean = 0.5 * self.inner.mean + 0.5 * x.detach().mean((0, 2, 3))
        self.inner.seen += len(x)
        return x + self.shift - self.inner.mean.view(3, 1, 1)


def _flip() -> nn.Module:
    return nn.Sequential(nn.ReflectionPad2d(0), nn.Hardtanh(0.2, 0.8))


def _same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return list(a) == list(b) and all(torch.equal(a[k], b[k]) for k in a)


def test_the_model_sees_what_the_module_makes() -> None:
    adapter = tta.wrap(tiny("bn"), "tent.cifar10", input=_flip())
    other = tta.wrap(tiny("bn"), "tent.cifar10")
    for t in range(2):
        assert torch.equal(adapter(images(t)), other(images(t).clamp(0.2, 0.8)))
    assert adapter.config.input == "given" and adapter.config.label == "given+bn+tent"
    assert adapter.config.to_dict()["input"] == "given"


def test_an_input_alone_and_the_slots_by_name() -> None:
    net = tiny("gn")
    with torch.no_grad():
        expected = net(images(0).clamp(0.2, 0.8))
    adapter = tta.wrap(net, input=_flip())
    assert torch.equal(adapter(images(0)), expected)
    assert tta.list_methods(slot="input") == ["dda", "prompt", "sda"]
    assert tta.AdapterConfig.from_json(adapter.config.to_json()) == adapter.config
    assert "input=given" in repr(adapter)


def test_buffers_are_state_and_go_back_with_it(tmp_path: Path) -> None:
    module = Drift()
    adapter = tta.wrap(tiny("bn"), "tent.cifar10", input=module)
    start = adapter.state()
    assert {"input/inner.mean", "input/inner.seen"} <= set(start)
    assert "input/shift" not in start and "input/inner.mask" not in start
    first = [adapter(images(t)) for t in range(2)]
    assert adapter.state()["input/inner.seen"] == 16
    saved = adapter.state()
    tta.save(adapter, tmp_path)
    expected = adapter(images(2))
    again = tta.load(tiny("bn"), tmp_path, input=Drift())
    assert torch.equal(again(images(2)), expected)
    adapter.load_state(saved)
    assert torch.equal(adapter(images(2)), expected)
    adapter.reset()
    assert _same(adapter.state(), start)
    assert all(torch.equal(adapter(images(t)), y) for t, y in enumerate(first))
    with pytest.raises(ValueError, match="`input` must be given again"):
        tta.load(tiny("bn"), tmp_path)


def test_a_config_takes_its_module_again() -> None:
    adapter = tta.wrap(tiny("gn"), "tent.cifar10", input=Drift())
    with pytest.raises(ValueError, match="`input` must be given again"):
        tta.wrap(tiny("gn"), adapter.config)
    other = tta.wrap(tiny("gn"), adapter.config, input=Drift())
    assert torch.equal(adapter(images(0)), other(images(0)))
    plain = tta.wrap(tiny("gn"), "tent.cifar10").config
    with pytest.raises(TypeError, match="`recipe` as an AdapterConfig takes no other slots"):
        tta.wrap(tiny("gn"), plain, input=Drift())


def test_frozen_changes_nothing() -> None:
    adapter = tta.wrap(tiny("bn"), "tent.cifar10", input=Drift())
    adapter(images(0))
    before = adapter.state()
    with adapter.frozen():
        first = adapter(images(1))
        assert torch.equal(first, adapter(images(1)))
    assert _same(adapter.state(), before)


def test_a_call_that_fails_has_not_happened() -> None:
    net = tiny("bn")
    adapter = tta.wrap(net, "tent.cifar10", input=Drift())
    adapter(images(0))
    before = adapter.state()

    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    handle = net.get_submodule("fc").register_forward_pre_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        adapter(images(1))
    handle.remove()
    assert _same(adapter.state(), before)
    bad = images(1)
    bad[1] = float("nan")
    with pytest.warns(UserWarning, match="1 of 8 with NaN"):
        y = adapter(bad)
    assert y[1].isnan().all() and adapter.state()["input/inner.seen"] == 8 + 7


def test_unwrap_gives_the_module_back_as_it_was_used() -> None:
    module, net = Drift().train(), tiny("bn")
    adapter = tta.wrap(net, input=module)
    assert not module.training and not module.shift.requires_grad
    with pytest.raises(ValueError, match="`keep` must be False for given"):
        adapter.unwrap(keep=True)
    adapter(images(0))
    assert adapter.unwrap() is net
    assert module.training and module.shift.requires_grad
    failing = Drift().train()
    with pytest.raises(ValueError, match="unknown method"):
        tta.wrap(tiny("bn"), "nothing", input=failing)
    with pytest.raises(ValueError, match="must give eata its Fisher"):
        tta.wrap(tiny("bn"), "eata.cifar10", input=failing)
    assert failing.training and failing.shift.requires_grad


def test_copies_go_on_alone() -> None:
    adapter = tta.wrap(tiny("bn"), "tent.cifar10", input=Drift())
    adapter(images(0))
    twins = [copy.deepcopy(adapter), pickle.loads(pickle.dumps(adapter))]
    before = adapter.state()
    answers = [twin(images(1)) for twin in twins]
    assert _same(adapter.state(), before)
    assert all(torch.equal(adapter(images(1)), y) for y in answers[:1])
    assert torch.equal(*answers)


def test_streams_have_their_own_buffers(tmp_path: Path) -> None:
    alone = {}
    for s in (0, 1):
        one = tta.wrap(tiny("bn"), "tent.cifar10", input=Drift())
        alone[s] = [one(images(10 * s + t)) for t in range(3)]
    adapter = tta.wrap(tiny("bn"), "tent.cifar10", input=Drift())
    pool = tta.runtime.StreamPool(adapter, capacity=1, folder=tmp_path, interval=None)
    for t in range(3):
        for s in (0, 1):
            with pool.stream(str(s), create=True) as stream:
                assert torch.equal(stream(images(10 * s + t)), alone[s][t])
    pool.close()
    again = tta.runtime.StreamPool.open(tiny("bn"), tmp_path, input=Drift(), interval=None)
    assert sorted(again.streams()) == ["0", "1"]
    again.close()


def test_threads_take_turns() -> None:
    adapter = tta.wrap(tiny("gn"), input=Drift())
    threads = [threading.Thread(target=adapter, args=(images(t),)) for t in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert adapter.state()["input/inner.seen"] == 64


def test_guards_ask_the_source_about_the_images_as_they_came() -> None:
    net = tiny("gn")
    with torch.no_grad():
        expected = net(images(0))
    adapter = tta.wrap(net, "tent.cifar10", input=_flip(), shadow=True)
    assert torch.equal(adapter(images(0)), expected)
    held = tta.wrap(tiny("bn"), "tent.cifar10", input=Drift(), guard=True)
    held(images(0, 48))
    assert held.health["action"] == "learn" and held.state()["input/inner.seen"] == 48


def test_gradients_flow_and_leave_none_behind() -> None:
    module = Drift()
    adapter = tta.wrap(tiny("gn"), input=module)
    x = images(0, 2).requires_grad_()
    with adapter.frozen():
        adapter(x).sum().backward()
    assert x.grad is not None and x.grad.abs().max() > 0 and module.shift.grad is None


def test_what_is_no_input_is_refused() -> None:
    with pytest.raises(TypeError, match="`input` must be a name or a config"):
        tta.wrap(tiny("gn"), input=lambda x: x)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="`input` must be a component of that slot, got 'tent'"):
        tta.wrap(tiny("gn"), input="tent.cifar10")
    adapter = tta.wrap(tiny("gn"), input=nn.Flatten(0))
    before = adapter.state()
    with pytest.raises(TypeError, match="`input` must return as many images as it is given, 8"):
        adapter(images(0))
    assert _same(adapter.state(), before)
