"""Sets of values for the same tensors, and everything else that an adapter holds."""

from __future__ import annotations

from collections import deque
from typing import Any

import pytest
import torch

import tta
from tests.helpers.batches import images
from tests.helpers.compositions import ALONE, Case, label, make
from tests.helpers.faults import same
from tests.helpers.nets import tiny
from tta.core import parameter_sets
from tta.core.adapter_sets import AdapterSets
from tta.core.parameter_sets import ParameterSets
from tta.core.plain_data import PlainReader, PlainWriter
from tta.core.prediction import Report

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.mark.parametrize("small", [0, 1 << 22])
def test_sets_are_switched_in_place(small: int, monkeypatch) -> None:
    monkeypatch.setattr(parameter_sets, "SMALL", small)
    held: dict[str, Any] = {
        "weight": torch.nn.Parameter(torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last)),
        "count": torch.tensor(3),
        "mask": torch.tensor([True, False]),
        "half": torch.randn(5).bfloat16(),
        "empty": torch.zeros(0, 7),
        "none": torch.tensor(float("nan")),
        "bank": torch.arange(6.0).view(2, 3),
    }
    objects, strides = dict(held), held["weight"].stride()
    places = {name: (held, name) for name in held if name != "bank"}
    sets = ParameterSets(places, {"bank": (held, "bank")})
    first = sets.take().copy()
    values = {name: t.detach().clone() for name, t in first.named().items()}
    with torch.no_grad():
        for t in held.values():
            t.copy_(t.logical_not() if t.dtype == torch.bool else t + 1)
    second = sets.take()
    assert not same(second.named(), values)
    bank = held["bank"]
    sets.put(first)
    assert same({name: held[name].detach() for name in values}, values)
    assert all(held[name] is objects[name] for name in places)  # the very tensors
    assert held["weight"].stride() == strides and held["weight"].requires_grad
    held["bank"].zero_()
    sets.put(second)
    assert held["bank"] is bank and float(bank.sum()) == 15 + 6


def test_a_set_of_other_shapes_brings_tensors_of_its_own() -> None:
    held: dict[str, Any] = {"a": torch.zeros(0), "b": torch.ones(2)}
    sets = ParameterSets({name: (held, name) for name in held})
    empty = sets.take()
    held["a"] = torch.arange(3.0)
    grown = sets.take()
    sets.put(empty)
    assert held["a"].shape == (0,)
    sets.put(grown)
    assert held["a"].tolist() == [0, 1, 2] and held["b"].tolist() == [1, 1]


@pytest.mark.parametrize("case", ALONE, ids=label)
def test_sets_hold_all_that_a_state_holds(case: Case) -> None:
    _, adapter = make(*case)
    adapter(images(0))
    sets = AdapterSets(adapter)
    state = adapter.state()
    found = sets.take().tensors.named() | {"rng": state["rng"]}
    assert same({key: found[key].detach() for key in state}, dict(state))
    assert found.keys() == state.keys()


def test_a_set_keeps_little_that_equals_the_beginning() -> None:
    sets = AdapterSets(tta.wrap(tiny("bn"), "sar.cifar10", guard="watch"))
    one = sets.take()
    assert one.reset_point == {} and not any(one.attributes)
    assert sum(len(held) for held in sets.new().attributes) < 8


def test_plain_data_comes_back() -> None:
    p = torch.nn.Parameter(torch.ones(2))
    data = {
        "report": Report(loss=torch.tensor(2.5), stepped=True, n=3),
        "nested": [1, (2.5, None), {"x": {3}}, "text", -(10**30)],
        "last": deque([{"step": 1}, float("inf")], maxlen=5),
        5: {"p": p},
    }
    writer = PlainWriter({"w": p})
    written = writer.write(data)
    found = PlainReader({"w": p}, writer.tensors).read(written)
    assert repr(found) == repr(data) and found[5]["p"] is p
    assert type(found["report"]) is Report and found["last"].maxlen == 5
    nan = PlainReader({}, []).read(PlainWriter({}).write(float("nan")))
    assert nan != nan
    for strange in (object(), torch.nn.Linear(1, 1), {"f": len}, [torch.nn.Parameter(p)]):
        with pytest.raises(TypeError):
            PlainWriter({"w": p}).write(strange)
    for hostile in ({"call": "x"}, {"tensor": 4}, {"parameter": "v"}, {"list": 3}, {}, [1],
                    {"dict": [[1]]}, {"deque": [1]}, {"float": "x"}, {"set": [[1]]}):  # fmt: skip
        with pytest.raises(ValueError):
            PlainReader({"w": p}, []).read(hostile)
