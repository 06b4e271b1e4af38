"""Bad arguments of wrap, configs and names: one sentence each, and nothing changed."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch

import tta
from tests.helpers.batches import images
from tests.helpers.nets import tiny
from tests.helpers.refusals import refused, state_of
from tta.core.registry import config_from_dict

NAN, INF = float("nan"), float("inf")


WRAP = [
    (ValueError, r"`batch_size` must be a whole number of at least 1, got 0", {"batch_size": 0}),
    (ValueError, r"`batch_size` .* got -4", {"batch_size": -4}),
    (TypeError, r"`batch_size` .* got 'a'; pass an int", {"batch_size": "a"}),
    (TypeError, r"`batch_size` .* got True", {"batch_size": True}),
    (TypeError, r"`seed` must be a whole number, got 'a'; pass an int", {"seed": "a"}),
    (TypeError, r"`seed` .* got 1\.5", {"seed": 1.5}),
    (TypeError, r"`seed` .* got None", {"seed": None}),
    (TypeError, r"`seed` .* got False", {"seed": False}),
    (ValueError, r"`seed` .* at most 64 bits, got 1180591620717411303424", {"seed": 2**70}),
    (
        TypeError,
        r"`mean` must be a list of numbers.* got True; pass a tuple",
        {"mean": True, "std": 1},
    ),
    (ValueError, r"`std` .* above 0.*got \(0\.0,\)", {"mean": 0, "std": 0}),
    (TypeError, r"`mean` .* got 'abc'", {"mean": "abc", "std": (1.0,)}),
    (TypeError, r"`mean` .* got \('a',\)", {"mean": ("a",), "std": (1.0,)}),
    (ValueError, r"`mean` and `std` must be given together.*std=None", {"mean": (0.0,)}),
    (ValueError, r"`mean` and `std` must be given together.*mean=None", {"std": (1.0,)}),
    (ValueError, r"`mean` .* got \(nan,\)", {"mean": (NAN,), "std": (1.0,)}),
    (ValueError, r"`std` .* above 0.*got \(nan,\)", {"mean": (0.0,), "std": (NAN,)}),
    (ValueError, r"`std` .* above 0.*got \(0\.0,\)", {"mean": (0.0,), "std": (0,)}),
    (ValueError, r"`mean` .* got \(\)", {"mean": (), "std": (1.0,)}),
    (ValueError, r"`mean` and `std` .* got 3 and 2", {"mean": (0.0,) * 3, "std": (1.0,) * 2}),
    (TypeError, r"`params` must be a string, got 3", {"params": 3}),
    (TypeError, r"`optimizer` must be a string, got None", {"optimizer": None}),
    (ValueError, r"`optimizer` must be one of .* got 'lion'", {"optimizer": "lion"}),
    (TypeError, r"`official` must be True or False, got 'yes'", {"official": "yes"}),
    (TypeError, r"`nesterov` must be True or False, got 1", {"nesterov": 1}),
    (TypeError, r"`lr` must be a number", {"lr": "fast"}),
    (ValueError, r"`lr` must be a number", {"lr": 10**400}),
    (TypeError, r"`betas` must be a pair", {"betas": 0.9}),
    (ValueError, r"`betas` must be a pair", {"betas": (0.9,)}),
    (TypeError, r"`norm` must be a name or a config, got int", {"norm": 3}),
    (TypeError, r"`augment` must be callable, got int: pass", {"augment": 3}),
    (TypeError, r"`restore_mask` must be callable, got str", {"restore_mask": "all"}),
    (ValueError, r"`augment` must belong to a component that takes it", {"augment": images}),
]


@pytest.mark.parametrize(("error", "words", "arguments"), WRAP)
def test_wrap(error, words, arguments) -> None:
    net = tiny("bn").train()
    before = state_of(net)
    refused(error, words, lambda: tta.wrap(net, "tent.cifar10", **arguments))
    after = state_of(net)
    assert all(map(torch.equal, before[0], after[0])) and before[1:] == after[1:]
    tta.wrap(net, "source")


@pytest.mark.parametrize("name", [n for n in tta.list_methods() if n != "source"])
def test_flags_and_words_of_every_config(name: str) -> None:
    config = tta.get_config(name)
    for key, value in config.to_dict().items():
        if isinstance(value, bool):
            refused(TypeError, f"`{key}` must be True", lambda k=key: config.replace(**{k: "yes"}))
        elif isinstance(value, str) and key != "name":
            refused(TypeError, f"`{key}` must be", lambda k=key: config.replace(**{k: 3}))


def test_whole_numbers_of_numpy_are_whole_numbers() -> None:
    config = tta.wrap(
        tiny("bn"), "tent.cifar10", batch_size=np.int64(8), seed=np.int32(3), mean=np.zeros(3),
        std=torch.ones(3),
    ).config  # fmt: skip
    assert tta.AdapterConfig.from_json(config.to_json()) == config
    assert (config.batch_size, config.seed, config.std) == (8, 3, (1.0, 1.0, 1.0))


def test_the_config_called_source_empties_a_slot() -> None:
    source = tta.get_config("source")
    assert tta.wrap(tiny("bn"), "tent.cifar10", norm=source).config.norm is None
    assert tta.wrap(tiny("bn"), source).config == tta.wrap(tiny("bn"), "source").config
    assert tta.wrap(tiny("bn"), "bn", update=source).config.update is None


TENT = tta.get_config("tent").to_dict()
ADAPTER = [
    (TypeError, r"`update` must be a component's config or None, got 'tent'", {"update": "tent"}),
    (ValueError, r"`norm` .* got 'tent', which belongs to update", {"norm": TENT}),
    (ValueError, r"`norm` .* got 'source'.*pass norm=None", {"norm": {"name": "source"}}),
    (TypeError, r"`batch_size` must be a whole number", {"batch_size": "64"}),
    (TypeError, r"`seed` must be a whole number", {"seed": None}),
    (ValueError, r"`mean` and `std` must be given together", {"mean": [0.5]}),
    (ValueError, r"`std` .* above 0", {"mean": [0.5], "std": [-1]}),
    (TypeError, r"`source` must be a string", {"source": 3}),
    (ValueError, r"`updaet` is not a key .*'update'", {"updaet": None}),
    (ValueError, r"`3` is not a key", {3: None}),
    (ValueError, r"`name` must be a key .* got the keys lr", {"update": {"lr": 0.1}}),
    (ValueError, r"`name` must be a key .* got the keys none", {"update": {}}),
    (TypeError, r"`name` must be a string, got 3", {"update": {"name": 3}}),
    (ValueError, r"`lrr` is not a field of tent.*'lr'", {"update": TENT | {"lrr": 1}}),
    (TypeError, r"`lr` must be a number", {"update": TENT | {"lr": "1"}}),
    (TypeError, r"`steps` must be a whole number", {"update": TENT | {"steps": 1.0}}),
    (TypeError, r"`data` must be a dict of an adapter's config, got list", []),
]


def test_a_slot_of_an_adapter_config_is_no_array() -> None:
    words = r"`input` must be a component's config or None, got"
    refused(TypeError, words, lambda: tta.AdapterConfig.from_dict({"input": np.zeros(2)}))


@pytest.mark.parametrize(("error", "words", "data"), ADAPTER)
def test_adapter_configs(error, words, data) -> None:
    refused(error, words, lambda: tta.AdapterConfig.from_dict(data))
    if 3 not in data:
        refused(error, words, lambda: tta.AdapterConfig.from_json(json.dumps(data)))


def test_configs_from_text_and_by_component() -> None:
    refused(ValueError, r"`text` must be JSON", lambda: tta.AdapterConfig.from_json("{"))
    refused(TypeError, r"`text` .* got int", lambda: tta.AdapterConfig.from_json(3))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"unknown method 'tnet': did you mean 'tent'"):
        tta.AdapterConfig.from_dict({"update": {"name": "tnet"}})
    assert config_from_dict(TENT) == tta.get_config("tent")
    refused(TypeError, r"`data` .* got str", lambda: config_from_dict("tent"))  # type: ignore[arg-type]


def test_states_that_are_none() -> None:
    adapter: Any = tta.wrap(tiny("bn"), "tent.cifar10")
    for state in ([1], None, 3):
        refused(TypeError, r"`state` must be a dict", lambda s=state: adapter.load_state(s))
    refused(ValueError, r"`state`.*'3'", lambda: adapter.load_state({3: torch.ones(2)}))


def test_registry() -> None:
    get: Any = tta.get_config
    for call in (get, tta.register, tta.list_methods):
        argument = "pattern" if call is tta.list_methods else "name"
        refused(TypeError, f"`{argument}` must be a string, got 3", lambda c=call: c(3))
    refused(ValueError, r"`slot` must be one of .*got 'x'", lambda: tta.list_methods(slot="x"))
    refused(TypeError, r"`slot` must be one of .*got 3", lambda: tta.list_methods(slot=3))  # type: ignore[arg-type]
    refused(ValueError, r"`name` must be an identifier", lambda: tta.register("a-b"))
    refused(TypeError, r"`mine` must be a class with a slot", lambda: tta.register("mine")(dict))  # type: ignore[type-var]
    assert "mine" not in tta.list_methods()
