"""Models whose dry run shows nothing: of a rare size, that look at values, that hold locks."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tta

PLAIN: dict[str, Any] = {"batch_size": 4, "mean": [0.0] * 3, "std": [1.0] * 3}


class Flat(nn.Module):
    """Takes images of one size alone.

    Args:
        size: In pixels.
        kind: "value" looks at the images, "lock" holds a lock, "count" counts its passes.
    """

    n: Tensor

    def __init__(self, size: int, kind: str = "") -> None:
        super().__init__()
        self.kind = kind
        self.conv, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.fc = nn.Linear(8 * size * size, 5)
        self.register_buffer("n", torch.zeros(()))
        self.lock = threading.Lock() if kind == "lock" else None

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "value" and float(x.max()) > 1e3:
            raise ValueError("too bright")
        if self.lock is not None:
            with self.lock:
                pass
        if self.kind == "count":
            self.n += 1
        return self.fc(self.norm(self.conv(x)).relu().flatten(1))


class Outside(nn.Module):
    """Calls a part of itself by a function that a copy cannot know."""

    def __init__(self) -> None:
        super().__init__()
        inner = self.inner = Flat(10, "value")
        self.call = lambda x: inner(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.call(x)


MODELS = [
    pytest.param(lambda: Flat(10), 10, id="size 10"),
    pytest.param(lambda: Flat(18), 18, id="size 18"),  # not tried at wrap
    pytest.param(lambda: Flat(32, "value"), 32, id="looks at values"),
    pytest.param(lambda: Flat(32, "lock"), 32, id="lock"),
    pytest.param(lambda: Flat(18, "lock"), 18, id="lock, size 18"),
]


@pytest.mark.parametrize("recipe", ["cotta", "rotta"])
@pytest.mark.parametrize(("make", "size"), MODELS)
def test_the_parameters_of_the_caller_stay_in_the_model(make: Any, size: int, recipe: str) -> None:
    model = make().eval()
    weight, seen = model.fc.weight, []
    # Of the layer in a copy as well, which shares the hooks of the one in the model.
    model.fc.register_forward_hook(lambda *_: seen.append(model.fc.weight is weight))
    adapter = tta.wrap(model, recipe, **PLAIN)
    for _ in range(2):
        adapter(torch.rand(4, 3, size, size))
    assert seen and all(seen)
    assert adapter.unwrap() is model and model.fc.weight is weight


def test_master_copies_do_not_replace_the_parameters() -> None:
    model = Flat(18).eval().bfloat16()
    weight, seen = model.norm.weight, []
    adapter: Any = tta.wrap(model, "tent", norm="robust_bn", **PLAIN)
    model.fc.register_forward_hook(lambda *_: seen.append(adapter.model.norm.base.weight is weight))
    for _ in range(2):
        adapter(torch.rand(4, 3, 18, 18).bfloat16())
    assert seen and all(seen)


@pytest.mark.parametrize("size", [18, 32])
def test_what_the_first_pass_finds_out_leaves_no_trace(size: int) -> None:
    """The same as with a model of which the dry run shows everything."""
    torch.manual_seed(0)
    model = Flat(size, "value").eval()
    adapter = tta.wrap(model, "cotta", seed=0, **PLAIN)
    before, state = torch.random.get_rng_state(), adapter.state()
    with pytest.raises(ValueError, match="too bright"):
        adapter(torch.full((4, 3, size, size), 1e4))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(v, state[k]) for k, v in adapter.state().items())
    x = torch.rand(4, 3, size, size)
    before = torch.random.get_rng_state()
    found = adapter(x)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(0)
    plain = tta.wrap(Flat(size).eval(), "cotta", seed=0, **PLAIN)
    assert torch.equal(found, plain(x))


def test_a_copy_that_refers_to_the_model_is_not_used() -> None:
    """Else a teacher's pass would be one with the student's weights."""
    torch.manual_seed(0)
    model, x = Outside().eval(), torch.rand(4, 3, 10, 10)
    plain = Flat(10, "value").eval()
    plain.load_state_dict(model.inner.state_dict())
    weight = model.inner.fc.weight
    adapters = [tta.wrap(m, "cotta", lr=0.1, seed=0, **PLAIN) for m in (model, plain)]
    for _ in range(3):
        found, want = (adapter(x) for adapter in adapters)
        torch.testing.assert_close(found, want)
    assert model.inner.fc.weight is weight


class Fixed(Mapping):
    """What a model returns, which nobody can write to."""

    def __init__(self, items: Mapping) -> None:
        self._items = dict(items)

    def __getitem__(self, key: Any) -> Any:
        return self._items[key]

    def __iter__(self) -> Iterator[Any]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)


class Unmade(Fixed):
    """One that is not made of a mapping."""

    def __init__(self, logits: Any, kind: str) -> None:
        super().__init__({"logits": logits, "kind": kind})


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (lambda z: Fixed({"logits": z, "kind": "a"}), Fixed),
        (lambda z: MappingProxyType({"logits": z, "kind": "a"}), MappingProxyType),
        (lambda z: Unmade(z, "a"), dict),
    ],
)
def test_a_mapping_that_cannot_be_written_to_keeps_its_type(make: Any, kind: type) -> None:
    class Answers(Flat):
        def forward(self, x: Tensor) -> Any:
            return make(super().forward(x))

    adapter, x = tta.wrap(Answers(32).eval(), "tent", **PLAIN), torch.rand(4, 3, 32, 32)
    found = adapter(x)
    assert type(found) is kind and found["kind"] == "a" and found["logits"].shape == (4, 5)


def test_the_state_has_all_its_keys_from_the_first_on() -> None:
    adapter = tta.wrap(Flat(10, "count").eval(), "tent", **PLAIN)
    keys = list(adapter.state())
    adapter(torch.rand(4, 3, 10, 10))
    assert list(adapter.state()) == keys and "model/n" in keys
