"""Adapters as programs of ``torch.export``, and what AOTInductor and ExecuTorch make of them."""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import tta
from tests.helpers import compositions
from tests.helpers.batches import images
from tests.helpers.compositions import suiting
from tests.helpers.exported import make, stream
from tests.helpers.nets import FAMILIES, tiny
from tta.core.registry import component

SHAPE = (3, 16, 16)
EXAMPLE = torch.rand(4, *SHAPE, generator=torch.Generator().manual_seed(0))
FREE = torch.export.Dim.DYNAMIC
BOUNDED = torch.export.Dim("batch", min=1, max=16)
RECIPES: dict[str, dict[str, Any]] = {
    "robust_bn+neo": {"norm": "robust_bn", "output": "neo"},
    "bn+prior_correction": {"norm": "bn", "output": "prior_correction"},
    "alpha_bn+foa_shift": {"norm": "alpha_bn", "output": "foa_shift"},
    "iabn+adanpc": {"norm": "iabn", "output": tta.get_config("adanpc", capacity=20)},
    "unmix_tns": {"norm": "unmix_tns"},
    "bn_ema+persistence": {"norm": "bn_ema", "output": "persistence"},
    "adaptive_bn+drift": {"norm": "adaptive_bn", "output": "drift"},
    "robust_bn+periodic": {"norm": "robust_bn", "guard": tta.get_config("periodic", every=3)},
    "t3a": {"output": tta.get_config("t3a", filter_size=3)},
    "lame": {"output": "lame"},
    "frozen tent": {"update": "tent"},
}
SORTING = ("t3a", "lame")  # ExecuTorch has no operator for it
Program = Callable[[Tensor, Tensor, list[Tensor]], Any]


def _marked(chosen: str | None = None, without: tuple[str, ...] = ()) -> list[Any]:
    return [
        pytest.param(name, marks=pytest.mark.slow if name == chosen else pytest.mark.soak)
        for name in RECIPES
        if name not in without
    ]


def _adapter(name: str) -> tta.Adapter:
    adapter = make(RECIPES[name], tiny("bn"))
    if adapter.update is not None:
        for batch in stream(2, [8], SHAPE):
            adapter(batch)
        adapter.freeze()
    return adapter


def _record(adapter: tta.Adapter, batch: Any) -> tuple[Any, Any]:
    """The call with the state going in and out, and it as a program for a size of batch."""
    step = tta.export.to_function(adapter, EXAMPLE)
    inputs = (EXAMPLE, torch.tensor([True]), step.start())
    free = ({0: batch}, None, [None] * len(step.keys))
    with torch.no_grad():
        program = torch.export.export(step, inputs, dynamic_shapes=free, strict=False)
    return step, program


@torch.no_grad()
def _check(adapter: tta.Adapter, step: Any, run: Program) -> None:
    """A program answers as the adapter does, and its state moves as the adapter's."""
    state = [torch.full_like(value, 7) for value in step.start()]  # the first batch resets
    moved = False
    for t, batch in enumerate(stream(6, [1, 4, 3], SHAPE)):
        own = adapter(batch)
        logits, *after = (v.clone() for v in run(batch, torch.tensor([t == 0]), state))
        assert torch.allclose(logits, own, atol=1e-5), t
        moved = moved or any(not torch.equal(a, b) for a, b in zip(state, after, strict=True))
        state = after
    now = adapter.state()
    for key, value in zip(step.keys, state, strict=True):
        if key in now:  # a guard counts its batches elsewhere
            held = now[key].reshape(value.shape)
            assert torch.allclose(value, held, atol=1e-5, equal_nan=True), key
    assert moved == bool(step.keys)


def test_a_call_as_a_function_of_state() -> None:
    adapter = _adapter("robust_bn+neo")
    step, start = tta.export.to_function(adapter, EXAMPLE), adapter.state()
    assert set(step.keys) == set(start) - {"rng"}
    for key, value in zip(step.keys, step.start(), strict=True):
        assert torch.equal(value, start[key].reshape(value.shape))
        value.fill_(5)  # a copy
    assert all(not (value == 5).all() for value in step.start())
    assert all(torch.equal(value, start[key]) for key, value in adapter.state().items())


def test_rules_that_run_the_model_are_refused() -> None:
    """Their draws would be the same in every batch."""
    adapter = tta.wrap(tiny("bn"), output="ttaug", mean=(0.0,) * 3, std=(1.0,) * 3)
    with pytest.raises(ValueError, match="`output` must take the model's prediction as it is"):
        tta.export.to_function(adapter, EXAMPLE)
    adapter.freeze()
    with pytest.raises(ValueError, match="`output` must take the model's prediction as it is"):
        torch.export.export(adapter, (EXAMPLE,), strict=False)


@pytest.mark.parametrize("name", _marked("bn_ema+persistence"))
def test_torch_export_with_state(name) -> None:
    """Batches of 1 to 16 images, by what was recorded of 4."""
    adapter = _adapter(name)
    step, program = _record(adapter, BOUNDED)
    _check(adapter, step, program.module())


COMPONENTS = [
    name
    for slot in ("norm", "output", "update")
    for name in tta.list_methods(slot=slot)
    if slot != "output" or component(name).answer is tta.Output.answer
]
CHOSEN = ("lsa", "foa", "dpcore")  # of those that decide by their state


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(n, marks=pytest.mark.slow if n in CHOSEN else pytest.mark.soak)
        for n in COMPONENTS
    ],
)
def test_torch_export_of_every_frozen_component(name) -> None:
    """As it was wrapped, and after it has learned."""
    family = next(family for family in FAMILIES if name in suiting(family))
    free = {"args": ({0: FREE},)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _, adapter = compositions.make(family, {component(name).slot: name})
        for learned in (0, 2):
            for t in range(learned):
                adapter(images(t))
            with adapter.frozen():
                program = torch.export.export(
                    adapter, (images(3),), dynamic_shapes=free, strict=False
                ).module()
                for size in (2, 7):
                    own = adapter(images(4, size))
                    limit = 1e-4 * max(1.0, float(own.abs().max()))
                    assert torch.allclose(program(images(4, size)), own, rtol=0, atol=limit)


@pytest.mark.parametrize("name", _marked())
def test_compiled_by_aot_inductor(name, tmp_path) -> None:
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        pytest.skip("AOTInductor needs a C++ compiler, and there is none")
    adapter = _adapter(name)
    step, program = _record(adapter, FREE)
    package = str(tmp_path / "adapter.pt2")
    torch._inductor.aoti_compile_and_package(program, package_path=package)
    _check(adapter, step, torch._inductor.aoti_load_package(package))


@pytest.mark.parametrize("name", _marked("robust_bn+neo", without=SORTING))
def test_lowered_to_executorch(name) -> None:
    exir = pytest.importorskip("executorch.exir", reason="needs the package executorch")
    runtime = pytest.importorskip("executorch.runtime", reason="needs the package executorch")
    adapter = _adapter(name)
    step, program = _record(adapter, BOUNDED)
    with torch.no_grad():
        lowered = exir.to_edge_transform_and_lower(program).to_executorch()
    method = runtime.Runtime.get().load_program(lowered.buffer).load_method("forward")
    _check(adapter, step, lambda batch, reset, state: method.execute((batch, reset, *state)))
