"""Averages over batches that a guard keeps for the source's parameters, beside the learned ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import tta
from tests.helpers.batches import images
from tests.helpers.nets import tiny

LEARNED: dict[str, Any] = {"lr": 0.5, "params": "norm"}
RULES = ["robust_bn", "bn_ema", "unmix_tns"]


def learned(norm: str, **fields: Any) -> Any:
    """An adapter that learns fast, whose guard takes no batch statistics for harm."""
    adapter: Any = tta.wrap(tiny("bn"), "tent", norm=norm, guard="steady", **LEARNED, **fields)
    adapter.guard._harmful = lambda count, doubt: False
    return adapter


def averages_of(adapter: Any) -> dict[str, Tensor]:
    """State of the norm rules, by layer and buffer."""
    held = adapter.state()
    return {
        key.removeprefix("norm/").replace("/", "."): value
        for key, value in held.items()
        if key.startswith("norm/")
    }


@pytest.mark.parametrize("norm", RULES)
def test_they_are_those_of_the_source_parameters(norm: str) -> None:
    """On batches that are all compared they move as without an update."""
    adapter, alone = learned(norm), tta.wrap(tiny("bn"), norm)
    for t in range(5):
        adapter(images(t, 64))
        alone(images(t, 64))
    mine = {n: v.clone() for n, v in adapter.guard.averages.named().items()}
    want, moved = averages_of(alone), averages_of(adapter)
    assert mine.keys() == want.keys() and mine
    for name, value in mine.items():
        torch.testing.assert_close(value, want[name], rtol=1e-4, atol=1e-5)
    assert any(not torch.allclose(value, moved[name]) for name, value in mine.items())


def test_they_catch_up_on_batches_that_are_not_compared() -> None:
    """The first layer sees the same batch again and again, so it must be as far as its rule."""
    adapter, x = learned("robust_bn"), images(0, 64)
    for _ in range(25):  # the last one is compared, the seven before it are not
        adapter(x)
    assert int(adapter.guard.unseen) == 0
    name = next(n for n in adapter.guard.averages.named() if n.endswith("mean"))
    mine, moved = adapter.guard.averages.named()[name], averages_of(adapter)[name]
    start = averages_of(tta.wrap(tiny("bn"), "robust_bn"))[name]
    assert not torch.allclose(mine, start, atol=1e-3)
    torch.testing.assert_close(mine, moved, rtol=1e-4, atol=1e-5)


def test_they_go_back_and_stay_with_the_rest() -> None:
    adapter = learned("robust_bn")
    start = averages_of(adapter)
    for t in range(3):
        adapter(images(t, 64))
    held = adapter.state()
    with adapter.frozen():
        adapter(images(3, 64))
    assert all(torch.equal(v, held[k]) for k, v in adapter.state().items())
    adapter.guard.beside.fill_(1)  # the update is far behind, and this was its last batch
    adapter.guard.trend.gap.fill_(-1.0)
    adapter(images(4, 64))
    assert adapter.health["action"] == "reset"
    mine = adapter.guard.averages.named()
    assert all(torch.equal(value, start[name]) for name, value in mine.items())
    adapter.load_state(held)
    found = adapter.state()
    assert all(torch.equal(found[k], v) for k, v in held.items())


@pytest.mark.parametrize("norm", ["bn", "alpha_bn"])
def test_rules_without_averages_have_none(norm: str) -> None:
    assert learned(norm).guard.averages is None


def test_they_keep_their_precision_in_a_half_model() -> None:
    adapter = learned("robust_bn")
    adapter(images(0, 64))
    adapter.half()
    kinds = {v.dtype for v in adapter.guard.averages.named().values()}
    assert kinds == {v.dtype for v in averages_of(adapter).values()} == {torch.float32}
    adapter.double()
    kinds = {v.dtype for v in adapter.guard.averages.named().values()}
    assert kinds == {v.dtype for v in averages_of(adapter).values()} == {torch.float64}
