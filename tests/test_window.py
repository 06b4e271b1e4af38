"""`wrap(..., window=n)`: single images are predicted beside the last ones."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tta
from tests.helpers.batches import images, surroundings
from tests.helpers.nets import tiny

STREAM = images(0, 12)


def _wrap(recipe: str = "bn", window: int = 4, net: nn.Module | None = None, **more: Any):
    return tta.wrap(net or tiny("bn"), recipe, window=window, **more)


def _equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    same = one.keys() == other.keys()
    return same and all(torch.equal(v, other[k]) for k, v in one.items())


@pytest.mark.parametrize("sizes", [[1] * 9, [1, 2, 3, 1], [3, 5, 1, 2]])
def test_a_call_is_that_of_the_last_images(sizes: list[int]) -> None:
    """A frozen adapter without a window says what the model makes of the joined images."""
    adapter, plain = _wrap(), tta.wrap(tiny("bn"), "bn")
    start = 0
    for size in sizes:
        end = start + size
        whole = STREAM[max(0, min(start, end - 4)) : end]
        assert torch.equal(adapter(STREAM[start:end]), plain(whole)[-size:])
        assert adapter.report.seen == size
        start = end


def test_an_update_learns_from_the_window() -> None:
    adapter, plain = _wrap("tent", lr=0.01), tta.wrap(tiny("bn"), "tent", lr=0.01)
    for end in range(1, 8):
        adapter(STREAM[end - 1 : end])
        plain(STREAM[max(0, end - 4) : end])
    learned = {k: v for k, v in adapter.state().items() if not k.startswith("window/")}
    assert _equal(learned, plain.state())
    assert not torch.equal(learned["param/layer1.1.weight"], torch.ones(4))


def test_a_frozen_call_sees_the_window_and_leaves_it() -> None:
    adapter = _wrap()
    for i in range(5):
        adapter(STREAM[i : i + 1])
    before = adapter.state()
    with adapter.frozen():
        first = adapter(STREAM[9:10])
        assert torch.equal(first, adapter(STREAM[9:10]))
        assert _equal(before, adapter.state())
        x = STREAM[9:10].clone().requires_grad_()
        adapter(x).sum().backward()
        assert x.grad is not None and float(x.grad.abs().sum()) > 0
    assert torch.equal(first, adapter(STREAM[9:10]))
    assert not _equal(before, adapter.state())


def test_state_save_reset_and_unwrap(tmp_path) -> None:
    net = tiny("bn")
    weights = copy.deepcopy(net.state_dict())
    adapter = _wrap("tent", net=net, lr=0.01)
    start = adapter.state()
    assert start["window/images"].shape == (4, 0)
    for i in range(6):
        adapter(STREAM[i : i + 1])
    state = adapter.state()
    assert state["window/images"].shape == (4, 3, 32, 32) and int(state["window/count"]) == 4
    tta.save(adapter, tmp_path)
    other, third = tta.load(tiny("bn"), tmp_path), _wrap("tent", lr=0.01)
    assert other.config.window == 4
    third.load_state(state)
    expected = adapter(STREAM[6:8])
    assert torch.equal(other(STREAM[6:8]), expected) and torch.equal(third(STREAM[6:8]), expected)
    adapter.reset()
    assert _equal(adapter.state(), start)
    for key, value in ({"window/count": torch.tensor(5)}).items():
        with pytest.raises(ValueError, match="window/count"):
            adapter.load_state({key: value})
    assert all(torch.equal(v, weights[k]) for k, v in adapter.unwrap().state_dict().items())


def test_bad_images_stay_out_of_the_window() -> None:
    adapter, clean = _wrap(), _wrap()
    bad = STREAM[3:4].clone()
    bad[0, 0, 0, 0] = torch.nan
    for i in range(3):
        assert torch.equal(adapter(STREAM[i : i + 1]), clean(STREAM[i : i + 1]))
    with pytest.warns(UserWarning, match="NaN or infinite"):
        mixed = adapter(torch.cat([bad, STREAM[4:5]]))
    assert mixed[0].isnan().all()
    assert torch.equal(mixed[1:], clean(STREAM[4:5])) and _equal(adapter.state(), clean.state())


def test_another_size_is_refused_until_reset() -> None:
    adapter = _wrap()
    adapter(STREAM[:1])
    before = adapter.state()
    with pytest.raises(ValueError, match=r"those in the window, \(3, 32, 32\)"):
        adapter(torch.rand(1, 3, 16, 16))
    assert _equal(before, adapter.state())
    adapter.reset()
    assert adapter(torch.rand(1, 3, 16, 16)).shape == (1, 10)


def test_a_failed_call_leaves_the_window() -> None:
    adapter = _wrap("tent")
    for i in range(5):
        adapter(STREAM[i : i + 1])
    before = adapter.state()
    handle = adapter.model.fc.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        adapter(STREAM[5:6])
    handle.remove()
    assert _equal(before, adapter.state())


class Named(nn.Module):
    """Returns logits beside what has a row for each image, and what has none."""

    def __init__(self) -> None:
        super().__init__()
        self.net = tiny("bn")

    def forward(self, x: Tensor, mask: Tensor | None = None) -> dict[str, Any]:
        logits = self.net(x)
        return {"logits": logits, "means": [x.mean((1, 2, 3))], "scale": torch.ones(())}


def test_what_else_a_model_returns_is_that_of_the_new_images() -> None:
    adapter = _wrap(net=Named().eval())
    for i in range(5):
        found = adapter(STREAM[i : i + 1])
    assert found["logits"].shape == (1, 10) and found["scale"].shape == ()
    assert torch.equal(found["means"][0], STREAM[4:5].mean((1, 2, 3)))
    with pytest.raises(ValueError, match="without other tensors"):
        adapter(STREAM[:1], mask=torch.ones(1))


@pytest.mark.parametrize("recipe", ["rotta", "t3a", "note", "adanpc", "auto", "persistence"])
def test_what_counts_images_is_refused(recipe: str) -> None:
    net = tiny("bn")
    before = list(net.state_dict())
    with pytest.raises(ValueError, match="`window` must be left out for"):
        tta.wrap(net, recipe, window=8, **surroundings())
    assert list(net.state_dict()) == before and tta.wrap(net, "bn") is not None


@pytest.mark.parametrize(("value", "kind"), [(1, ValueError), (2.5, TypeError), ("4", TypeError)])
def test_other_values_are_refused(value: Any, kind: type[Exception]) -> None:
    with pytest.raises(kind, match=r"^`window` must"):
        tta.wrap(tiny("bn"), "bn", window=value)


def test_a_guard_that_goes_back_leaves_the_window() -> None:
    adapter = tta.wrap(tiny("bn"), "tent", guard=tta.get_config("periodic", every=3), window=4)
    for i in range(7):
        adapter(STREAM[i : i + 1])
    assert int(adapter.state()["window/count"]) == 4


def test_streams_of_a_pool_have_windows_of_their_own() -> None:
    pool = tta.runtime.StreamPool(_wrap("tent"))
    alone = {name: _wrap("tent") for name in "ab"}
    for i in range(6):
        x = STREAM[2 * i : 2 * i + 2]
        found = pool(x, ["a", "b"], create=True)
        expected = [alone[name](x[j : j + 1]) for j, name in enumerate("ab")]
        assert torch.equal(found, torch.cat(expected))
