"""Values that no argument should be: of other kinds, out of range, huge, nested, damaged."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tests.fuzz.oracle import Planted

__all__ = ["NUMBERS", "bent", "junk", "spoilt", "tensor", "words"]

NUMBERS: tuple[Any, ...] = (
    0,
    1,
    -1,
    2,
    3,
    -0.0,
    0.5,
    1.0,
    1.5,
    -0.5,
    1e-300,
    5e-324,
    -1e-12,
    1 + 1e-12,
    1e9,
    -1e9,
    1e30,
    1e308,
    -1e308,
    math.inf,
    -math.inf,
    math.nan,
    2**31,
    2**32,
    2**53,
    2**63 - 1,
    2**63,
    2**64,
    -(2**63),
    -(2**63) - 1,
    10**30,
    10**400,
    -(10**400),
    True,
    False,
)
TEXTS = (
    "",
    " ",
    "0",
    "1",
    "nan",
    "None",
    "true",
    "source",
    "bn",
    "tent",
    "tent.",
    ".tent",
    "..",
    "/",
    "a.b.c",
    "\0",
    "\n",
    "a\nb",
    "é",
    "\ud800",
    "%s%n",
    "{x!r}",
    "*",
    "[",
    "(((",
    "../../etc",
    "a" * 300,
    "x" * 10_000,
    "`",
    '"',
    "--help",
    "-",
    "--",
    "=",
    "a=",
    "=b",
    "1e400",
)


class Sulky:
    """An object that raises whatever is asked of it."""

    def __repr__(self) -> str:
        raise Planted("repr")

    def __len__(self) -> int:
        raise Planted("len")

    def __iter__(self) -> Any:
        raise Planted("iter")

    def __bool__(self) -> bool:
        raise Planted("bool")

    def __getitem__(self, key: Any) -> Any:
        raise Planted("item")

    def __call__(self, *_: Any, **__: Any) -> Any:
        raise Planted("call")


class Endless:
    """A sequence that says it is as long as can be."""

    def __len__(self) -> int:
        return 2**62

    def __getitem__(self, key: Any) -> Any:
        return None


class Lie(int):
    """A whole number whose text is another."""

    def __repr__(self) -> str:
        return "seven " * 500


def nested(depth: int) -> Any:
    """A list in a list in a list ..."""
    value: Any = []
    for _ in range(depth):
        value = [value]
    return value


def tensor(rng: Random, shape: Sequence[int], low: float = 0.0, high: float = 1.0) -> Tensor:
    """A tensor of uniform numbers, from the generator of the case."""
    generator = torch.Generator().manual_seed(rng.getrandbits(62))
    return torch.rand(tuple(shape), generator=generator) * (high - low) + low


def junk(rng: Random) -> Any:
    """Any value at all."""
    return rng.choice(KINDS)(rng)


def words(rng: Random) -> str:
    """A text that means nothing."""
    return rng.choice(TEXTS)


def bent(rng: Random, value: Any) -> Any:
    """What is nearly a right value, of its kind but out of range or misspelt; or junk."""
    if rng.random() < 0.25:
        return junk(rng)
    if isinstance(value, bool):
        return rng.choice([not value, 0, 1, "True", "no", None, np.True_, torch.tensor(True), 2])
    if isinstance(value, (int, float)):
        number = rng.choice(NUMBERS)
        return rng.choice(
            [
                number,
                number,
                -value,
                value * 2,
                float(value),
                str(value),
                [value],
                np.float32(value),
                np.int64(3),
                torch.tensor(value),
                complex(1, 1),
            ]
        )
    if isinstance(value, str):
        letters = list(value)
        rng.shuffle(letters)
        return rng.choice(
            [
                words(rng),
                "".join(letters),
                value.upper(),
                value + "x",
                value[:-1],
                value.encode(errors="replace"),
                [value],
                f" {value}",
                value * 50,
            ]
        )
    if isinstance(value, (list, tuple)):
        items = list(value)
        change = rng.randrange(6)
        if items and change == 0:
            items[rng.randrange(len(items))] = junk(rng)
        elif items and change == 1:
            place = rng.randrange(len(items))
            items[place] = bent(rng, items[place])
        elif change == 2:
            items = items[:-1]
        elif change == 3:
            items = items * 50
        elif change == 4:
            items = [items]
        else:
            return set(map(repr, items))
        return list(items) if isinstance(value, list) else tuple(items)
    if isinstance(value, dict):
        return bent_dict(rng, value)
    if isinstance(value, Tensor):
        return spoilt(rng, value)
    return junk(rng)


def bent_dict(rng: Random, value: dict[Any, Any]) -> Any:
    """A dict with one thing wrong."""
    items = dict(value)
    key = rng.choice(list(items)) if items else None
    change = rng.randrange(6)
    if change == 0 or key is None:
        items[rng.choice([words(rng), 3, None, (1, 2), "made_by"])] = junk(rng)
    elif change == 1:
        del items[key]
    elif change == 2:
        items[words(rng)] = items.pop(key)
    elif change == 3:
        items[key] = junk(rng)
    elif change == 4:
        return list(items.items())
    else:
        items[key] = bent(rng, items[key])
    return items


def spoilt(rng: Random, value: Tensor) -> Any:
    """A tensor with one thing wrong: kind, shape, layout, device, values, or no tensor at all."""
    try:
        return rng.choice(SPOILT)(rng, value)
    except (TypeError, ValueError, RuntimeError, AttributeError):  # torch has no such tensor
        return torch.zeros(())


def _holes(rng: Random, value: Tensor) -> Tensor:
    if not value.is_floating_point() or not value.numel():
        return value
    value = value.clone()
    share = rng.choice([0.01, 0.3, 1.0])
    mask = tensor(rng, value.shape) < share
    value[mask] = rng.choice([math.nan, math.inf, -math.inf, 1e38, -1e38, 1e-45, 1e20])
    return value


def _row(rng: Random, value: Tensor) -> Tensor:
    if not value.is_floating_point() or value.ndim == 0 or not len(value):
        return value
    value = value.clone()
    value[rng.randrange(len(value))] = rng.choice([math.nan, math.inf, 1e38])
    return value


def _whole(rng: Random, value: Tensor) -> Tensor:
    if value.is_floating_point() or not value.numel() or value.dtype == torch.bool:
        return _holes(rng, value)
    value = value.clone()
    value.view(-1)[rng.randrange(value.numel())] = rng.choice([-1, 99, 255, 127, -128])
    return value


def _sparse(rng: Random, value: Tensor) -> Tensor:
    return value.to_sparse() if value.ndim else value


def _csr(rng: Random, value: Tensor) -> Tensor:
    return value.to_sparse_csr() if value.ndim == 2 else _sparse(rng, value)


def _quantized(rng: Random, value: Tensor) -> Tensor:
    return torch.quantize_per_tensor(value.float(), 0.1, 0, torch.quint8)


class Sub(Tensor):
    """A subclass that changes nothing."""


SPOILT: list[Callable[[Random, Tensor], Any]] = [
    lambda rng, t: t.to(
        rng.choice(
            [
                torch.float64,
                torch.float16,
                torch.bfloat16,
                torch.int64,
                torch.int8,
                torch.uint8,
                torch.bool,
                torch.complex64,
            ]
        )
    ),
    lambda rng, t: t.to(rng.choice([torch.float64, torch.float16, torch.bfloat16])),
    _holes,
    _holes,
    _row,
    _row,
    _whole,
    _sparse,
    _csr,
    _quantized,
    lambda rng, t: t.to("meta"),
    lambda rng, t: t[None],
    lambda rng, t: t[0] if t.ndim and len(t) else t[None],
    lambda rng, t: t[:0] if t.ndim else t[None][:0],
    lambda rng, t: t[..., :0] if t.ndim else t,
    lambda rng, t: t[:1] if t.ndim else t,
    lambda rng, t: torch.cat([t, t]) if t.ndim else t,
    lambda rng, t: t.reshape(-1),
    lambda rng, t: t.transpose(0, -1) if t.ndim else t,
    lambda rng, t: t.sum(),
    lambda rng, t: t.new_ones(()).expand(rng.choice([2**20, 2**40, 2**62])),
    lambda rng, t: t.new_ones(()).expand(t.shape),
    lambda rng, t: t.flip(0) if t.ndim else t,
    lambda rng, t: t * rng.choice([-1, 255, 1e4, 1e30, 0]),
    lambda rng, t: t.numpy() if not t.requires_grad else t.detach().numpy(),
    lambda rng, t: t.tolist() if t.numel() < 5000 else None,
    lambda rng, t: t.as_subclass(Sub),
    lambda rng, t: nn.Parameter(t.float()),
    lambda rng, t: torch.complex(t.float(), t.float()).conj(),
    lambda rng, t: t.float().clone().requires_grad_(),
    lambda rng, t: _inference(t),
    lambda rng, t: (
        t.to(memory_format=torch.channels_last) if t.ndim == 4 else t.t() if t.ndim == 2 else t
    ),
    lambda rng, t: torch.nested.nested_tensor([t.float()]),
    lambda rng, t: junk(rng),
]


def _inference(value: Tensor) -> Tensor:
    with torch.inference_mode():
        return value.clone()


KINDS: list[Callable[[Random], Any]] = [
    lambda rng: None,
    lambda rng: rng.choice(NUMBERS),
    lambda rng: rng.choice(NUMBERS),
    lambda rng: words(rng),
    lambda rng: words(rng),
    lambda rng: words(rng).encode("utf-8", "replace"),
    lambda rng: [],
    lambda rng: {},
    lambda rng: (),
    lambda rng: set(),
    lambda rng: [rng.choice(NUMBERS)] * rng.choice([1, 2, 3, 1000]),
    lambda rng: {words(rng): rng.choice(NUMBERS)},
    lambda rng: {3: None, None: 3},
    lambda rng: nested(rng.choice([3, 100, 5000])),
    lambda rng: object(),
    lambda rng: object,
    lambda rng: Sulky(),
    lambda rng: Endless(),
    lambda rng: Lie(rng.choice([0, 3, 2**70])),
    lambda rng: len,
    lambda rng: lambda *a, **k: None,
    lambda rng: complex(rng.choice([0, 1]), 1),
    lambda rng: range(rng.choice([0, 3, 2**62])),
    lambda rng: (x for x in (1, 2, 3)),
    lambda rng: np.float64(rng.choice([math.nan, 0.5, 1e300])),
    lambda rng: np.int64(-1),
    lambda rng: np.str_("tent"),
    lambda rng: np.array(["a", None]),
    lambda rng: np.zeros(rng.choice([(), (0,), (3,), (2, 3, 4)])),
    lambda rng: np.array([1, 2, 3], dtype=np.uint16),
    lambda rng: torch.tensor(rng.choice([0.0, 0.5, math.nan, 1e30])),
    lambda rng: tensor(rng, rng.choice([(0,), (3,), (10,), (2, 3), (4, 3, 8, 8)])),
    lambda rng: spoilt(rng, tensor(rng, (2, 3))),
    lambda rng: torch.zeros(3, dtype=torch.int64),
    lambda rng: torch.empty(2, 2, device="meta"),
    lambda rng: torch.float32,
    lambda rng: torch.device("cpu"),
    lambda rng: torch.Generator(),
    lambda rng: torch.Size([2, 3]),
    lambda rng: nn.Linear(2, 2, device="meta"),
    lambda rng: nn.ReLU(),
    lambda rng: nn.ModuleList(),
    lambda rng: Path(words(rng).replace("\0", "_")),
    lambda rng: Path("/proc/self/mem"),
    lambda rng: Path("/dev/null"),
    lambda rng: ValueError("x"),
    lambda rng: NotImplemented,
    lambda rng: ...,
]
