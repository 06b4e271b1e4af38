"""Cases of `wrap`, of calls, and of `load_state`."""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Callable
from functools import cache
from random import Random
from typing import Any

import torch
from torch import Tensor

import tta
from tests.fuzz.junk import bent, junk, spoilt, tensor, words
from tests.fuzz.nets import CLASSES, IMAGE, good, odd
from tests.fuzz.oracle import Case, Planted, model_of, unchanged
from tests.helpers.compositions import given
from tta.core.checks import shown

__all__ = [
    "adapter_of",
    "batches",
    "calls",
    "needed",
    "recipes",
    "source_of",
    "states",
    "wraps",
]


@cache
def recipes() -> list[str]:
    """All names, with and without a preset."""
    return [*tta.list_methods(), *tta.list_methods("*.*")]


def batches(rng: Random, count: int = 2, rows: int = 4) -> list[tuple[Tensor, Tensor]]:
    """Source batches."""
    labels = [torch.arange(rows) % CLASSES for _ in range(count)]
    return [(tensor(rng, (rows, *IMAGE)), y) for y in labels]


def needed(name: str, rng: Random) -> dict[str, Any]:
    """Arguments without which a recipe does not start on a small network."""
    found: dict[str, Any] = {"source": batches(rng), "mean": 0.0, "std": 1.0}
    fields = tta.get_config(name).to_dict()
    small = {
        "memory_size": 8,
        "update_every": 4,
        "views": 2,
        "capacity": 16,
        "warmup_samples": 4,
        "fisher_samples": 4,
        "source_samples": 8,
        "projection_dim": 4,
        "neighbours": 2,
        "queue_size": 8,
        "bank_size": 8,
    }
    found |= given({"recipe": name.partition(".")[0]})
    return found | {key: value for key, value in small.items() if key in fields}


def composed(rng: Random) -> tuple[str, dict[str, Any]]:
    """A recipe, or one in a composition, with what it needs."""
    name = rng.choice(recipes())
    arguments = needed(name, rng)
    for slot in ("norm", "output", "guard"):
        if rng.random() < 0.15:
            arguments[slot] = rng.choice([*tta.list_methods(slot=slot), "source"])
    return name, arguments


def adapter_of(rng: Random) -> tuple[tta.Adapter, str]:
    """An adapter, and how it was made."""
    while True:
        name, arguments = composed(rng)
        family = rng.choice(["bn", "bn", "gn"])
        try:
            adapter = tta.wrap(good(family), name, **arguments)
        except ValueError:  # such a composition is none
            continue
        more = {k: v for k, v in arguments.items() if k not in ("source", "mean", "std")}
        return adapter, f"wrap({family}, {name!r}, {more})"


def source_of(rng: Random) -> Any:
    """Something that is given as source."""
    good_batches: Any = batches(rng)
    change = rng.randrange(8)
    x, y = good_batches[1]
    if change == 0:
        return junk(rng)
    if change == 1:
        good_batches[1] = (spoilt(rng, x), y)
    elif change == 2:
        good_batches[1] = (x, spoilt(rng, y))
    elif change == 3:
        good_batches[1] = rng.choice([(x,), (x, y, y), x, None, {"image": x}, junk(rng)])
    elif change == 4:
        good_batches = bent(rng, good_batches)
    elif change == 5:
        good_batches = (pair for pair in good_batches)
    elif change == 6:
        good_batches = iter(())
    else:
        good_batches = [(x, junk(rng)), (junk(rng), y)]
    if change in (1, 2, 3) and rng.random() < 0.5:
        return _Loader(good_batches)
    return good_batches


class _Loader:
    """Batches that can be read in passes alone, as a data loader's."""

    def __init__(self, held: Any) -> None:
        self.held = held

    def __iter__(self) -> Any:
        return iter(self.held)


ARGUMENTS: dict[str, Callable[[Random], Any]] = {
    "norm": lambda rng: rng.choice([rng.choice(recipes()), words(rng), junk(rng)]),
    "update": lambda rng: rng.choice([rng.choice(recipes()), words(rng), junk(rng)]),
    "output": lambda rng: rng.choice([rng.choice(recipes()), words(rng), junk(rng)]),
    "source": source_of,
    "batch_size": lambda rng: bent(rng, 64),
    "seed": lambda rng: bent(rng, 3),
    "mean": lambda rng: bent(rng, rng.choice([0.5, (0.5, 0.5, 0.5)])),
    "std": lambda rng: bent(rng, rng.choice([0.5, (0.5, 0.5, 0.5)])),
    "guard": lambda rng: rng.choice([True, False, rng.choice(recipes()), words(rng), junk(rng)]),
    "health": lambda rng: bent(rng, True),
    "shadow": lambda rng: bent(rng, True),
    "on_event": junk,
    "draws": junk,
    "augment": junk,
    "restore_mask": junk,
    "logits": lambda rng: bent(rng, rng.choice(["logits", 0, "out"])),
    "num_classes": lambda rng: bent(rng, CLASSES),
    "features": lambda rng: bent(rng, rng.choice(["fc", "layer1"])),
    "activation": lambda rng: bent(rng, "softmax"),
}


def wraps(rng: Random) -> Case:
    """A call of `wrap`, and of the adapter if there is one; unwrapping gives the model back."""
    name, arguments = composed(rng)
    recipe: Any = name
    model: Any = good(rng.choice(["bn", "bn", "gn"]))
    fields = {k: v for k, v in tta.get_config(name).to_dict().items() if k != "name"}
    for _ in range(rng.choice([1, 1, 2, 3])):
        change = rng.randrange(10)
        if change < 4 and fields:
            key = rng.choice(list(fields))
            value = bent(rng, fields[key])
            long = key == "warmup_samples" and isinstance(value, int) and value > 100
            arguments[key] = 4 if long else value  # it would be done, at wrap
        elif change < 6:
            key = rng.choice(list(ARGUMENTS))
            arguments[key] = ARGUMENTS[key](rng)
        elif change < 8:
            model = odd(rng)
        elif change == 8:
            recipe = rng.choice([bent(rng, name), _config(rng, name)])
        else:
            arguments[words(rng)] = junk(rng)
    update = arguments.get("update")
    if isinstance(update, str) and update in recipes():  # which has the fields of its own preset
        fields = tta.get_config(update).to_dict()
        if "warmup_samples" in fields:
            arguments.setdefault("warmup_samples", 4)
    images = tensor(rng, (4, *IMAGE))
    pristine = model_of(model)

    def call() -> None:
        adapter = tta.wrap(model, recipe, **arguments)
        try:
            if all(p.numel() < 10**6 for p in adapter.parameters()) and _affordable(arguments):
                adapter(images)
        finally:
            back = adapter.unwrap()
        assert back is model
        assert model_of(model) == pristine or _may_move(model), "unwrap left traces"

    rest = {k: v for k, v in arguments.items() if k != "source"}
    told = f"wrap({_kind(model)}, {shown(recipe)}, {shown(rest)}), then one call"
    return Case(told, call, watched={"the model": lambda: model_of(model)})


def _may_move(model: Any) -> bool:
    """Whether a model is one that changes by itself, or whose gradients a call may clear."""
    return True


def _affordable(arguments: dict[str, Any]) -> bool:
    """Whether a call need not take long by what was asked for."""
    counts = [arguments.get(key) for key in ("steps", "views", "rounds")]
    return all(not isinstance(count, int) or count < 20 for count in counts)


def _config(rng: Random, name: str) -> Any:
    try:
        config = tta.wrap(good(), name, **needed(name, rng)).config
    except ValueError:
        return tta.get_config(name)
    data = bent(rng, config.to_dict())
    try:
        return tta.AdapterConfig.from_dict(data)
    except Exception:  # another surface looks at this
        return config


def _kind(model: Any) -> str:
    return type(model).__name__


CONTEXTS: list[Callable[[], Any]] = [
    *[contextlib.nullcontext] * 8,
    torch.no_grad,
    torch.inference_mode,
    lambda: torch.autocast("cpu", torch.bfloat16),
    lambda: torch.autocast("cpu", torch.float16),
]


def calls(rng: Random) -> Case:
    """A call of an adapter."""
    adapter, made = adapter_of(rng)
    images = tensor(rng, (4, *IMAGE))
    for _ in range(rng.randrange(2)):
        adapter(images)
    context = rng.choice(CONTEXTS)
    args: list[Any] = [spoilt(rng, images)]
    kwargs: dict[str, Any] = {}
    told = f"{made}({_about(args[0])})"
    change = rng.randrange(12)
    if change == 0:
        args, kwargs = [], {rng.choice(["x", "images", "pixel_values", "y"]): args[0]}
    elif change == 1:
        args.append(junk(rng))
    elif change == 2:
        kwargs[words(rng)] = junk(rng)
    elif change == 3:
        args = []
    told += f" {shown(args[1:])} {shown(kwargs)} in {getattr(context, '__name__', 'autocast')}"
    gone = rng.random() < 0.03
    frozen = rng.random() < 0.15
    model = adapter.model
    if frozen:
        adapter.freeze()
    if gone:
        adapter.unwrap()
    failing = rng.random() < 0.08
    if failing:
        _plant(rng, model)
        told += " in a model whose later layers raise"

    def call() -> None:
        with context():
            adapter(*args, **kwargs)

    watched: dict[str, Callable[[], Any]] = {"the model": lambda: model_of(model, wrapped=True)}
    if not gone:
        watched["the state"] = lambda: unchanged(adapter.state())
    return Case(told, call, watched=watched, unwrapped=gone)


def _plant(rng: Random, model: Any) -> None:
    """Let a forward pass of the model raise, not necessarily the first."""
    left = [rng.randrange(4)]

    def hook(*_: Any) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise Planted("in a layer")

    model.fc.register_forward_hook(hook)


def _about(value: Any) -> str:
    if isinstance(value, Tensor) and not value.is_nested:
        return f"{type(value).__name__} {tuple(value.shape)} {value.dtype} {value.layout}"
    return shown(value)


def states(rng: Random) -> Case:
    """A state that is loaded."""
    adapter, made = adapter_of(rng)
    images = tensor(rng, (4, *IMAGE))
    adapter(images)
    state: Any = adapter.state()
    told = []
    if rng.random() < 0.3:
        for _ in range(rng.randrange(2)):
            adapter(images)
    for _ in range(rng.choice([1, 1, 2])):
        if not isinstance(state, dict) or not state:
            break
        key = rng.choice(list(state))
        change = rng.randrange(10)
        if change < 6:
            value = spoilt(rng, state[key]) if isinstance(state[key], Tensor) else junk(rng)
            told.append(f"{key}: {_about(value)}")
            state[key] = value
        elif change == 6:
            told.append(f"without {key}")
            del state[key]
        elif change == 7:
            told.append("a key renamed")
            new = rng.choice([words(rng), f"{key}x", str(key).partition("/")[0], 3])
            state[new] = state.pop(key)
        elif change == 8:
            told.append("another fingerprint")
            state = OrderedDict(state)
            state.fingerprint = bent(rng, dict(adapter.fingerprint))
        else:
            told.append("no dict of tensors")
            state = bent(rng, dict(state))
    more: dict[str, Any] = {}
    if rng.random() < 0.2:
        more = rng.choice([{"as_source": True}, {"as_source": junk(rng)}, {"allow_nonfinite": True},
                           {"allow_nonfinite": junk(rng)}])  # fmt: skip
    how = rng.randrange(8)
    extra = {"fingerprint": adapter.fingerprint, "state": state}

    def call() -> None:
        if how == 0:
            adapter.load_state_dict(_other(rng, adapter, extra))
        elif how == 1:
            adapter.set_extra_state(bent(rng, extra))
        else:
            adapter.load_state(state, **more)

    def point() -> Any:
        return unchanged(adapter.reset_point())

    watched = {"the state": lambda: unchanged(adapter.state()), "the reset point": point,
               "the model": lambda: model_of(adapter.model, wrapped=True)}  # fmt: skip
    way = {0: "load_state_dict", 1: "set_extra_state"}.get(how, f"load_state {shown(more)}")
    return Case(f"{made}.{way}: {'; '.join(told)}", call, watched=watched)


def _other(rng: Random, adapter: Any, extra: Any) -> Any:
    held = dict(adapter.state_dict())
    held["_extra_state"] = rng.choice([extra, bent(rng, extra), junk(rng)])
    return held if rng.random() < 0.8 else bent(rng, held)
