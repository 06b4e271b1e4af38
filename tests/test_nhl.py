"""NHL: replaying the traces of our reading and of SoftHebb's rule, and what it does beyond them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import tta
from tests.helpers.batches import images
from tests.helpers.nets import tiny
from tests.helpers.recorded import Recorded
from tests.helpers.traces_sheet import FOLDER, SheetTrace
from tta.core.first_input import first_input
from tta.parts.hebbian import delta

# What the keys of its traces are, see `tests/helpers/trace_keys.py`.
TRACE_KEYS = {
    "set-c": {
        "arrays": {
            "outputs_before": "output: of the pass whose entropy is minimised",
            "usage": "report.usage",
            "param_names": "report: list(adapter.update.optimized())",
        },
        "hparams": {
            r"strides|steps|tau|eta|normalise|modulator|momentum": "field: of the same name",
        },
    },
}

LIMIT = {"atol": 2e-5, "rtol": 0.0}
TRACES = sorted(FOLDER.glob("nhl_*.npz"))
close = torch.testing.assert_close


@pytest.mark.parametrize("path", TRACES, ids=lambda p: p.stem)
def test_trace(path: Path) -> None:
    trace = SheetTrace(path)
    p = trace.hparams
    names = ("tau", "eta", "normalise", "modulator", "optimizer", "lr", "momentum", "steps")
    fields = {name: p[name] for name in names if name in p}
    net, x = trace.model(), trace.tensor("inputs")
    with torch.no_grad():
        close(net(x[0]), trace.tensor("source_outputs")[0], **LIMIT)
    adapter = tta.wrap(net, update=tta.get_config("nhl", **fields))
    update = adapter.update
    assert update is not None
    before = []
    handle = net.register_forward_hook(lambda *seen: before.append(seen[2].detach()))
    for t in range(len(x)):
        if t in p.get("reset_before", []):
            adapter.reset()
        before.clear()
        close(adapter(x[t]), trace.tensor("outputs")[t], **LIMIT)
        close(before[-2], trace.tensor("outputs_before")[t], **LIMIT)  # stopped passes give nothing
        close(torch.tensor(adapter.report.loss), trace.tensor("loss")[t], **LIMIT)
        close(adapter.report.usage, trace.tensor("usage")[t], **LIMIT)
        if t == 0:
            state, first = adapter.state(), trace.group("first")
            for name in trace.group("weights"):
                if name in first:
                    close(state[f"param/{name}"], first[name], **LIMIT)
    handle.remove()
    assert list(update.optimized()) == [str(n) for n in trace.arrays["param_names"]]
    state = adapter.state()
    for name, value in trace.group("adapted").items():
        close(state[f"param/{name}"], value, **LIMIT)


@pytest.mark.parametrize("path", TRACES, ids=lambda p: p.stem)
def test_first_step_of_the_trace(path: Path) -> None:
    """The delta itself, as far as it is taken before eta."""
    trace = SheetTrace(path)
    x, weight = trace.tensor("inputs")[0], trace.tensor("weights/conv1.weight")
    stride = trace.hparams["strides"][0]
    found, _ = delta(x, weight, stride=stride, padding=1, tau=trace.hparams["tau"])
    if trace.hparams["normalise"] == "max":
        found = found / found.abs().max()
    close(found, trace.tensor("first/hebbian_delta"), **LIMIT)


def test_the_rule_is_that_of_softhebb() -> None:
    trace = Recorded(FOLDER / "pieces_softhebb.npz")
    for i, case in enumerate(trace.hparams["cases"]):
        x, weight = trace.tensor(f"{i}/x"), trace.tensor(f"{i}/weight")
        shape = {"stride": case["stride"], "padding": case["padding"]}
        found, usage = delta(x, weight, tau=1 / case["t_invert"], **shape)
        limit = {"atol": 5e-6, "rtol": 0.0}
        close(found, trace.tensor(f"{i}/delta_sum") / case["positions"], **limit)
        close(found / found.abs().max(), trace.tensor(f"{i}/delta_normalised"), **limit)
        close(usage, trace.tensor(f"{i}/y").mean((0, 2, 3)), **limit)


def test_filters_are_state_and_go_back() -> None:
    net = tiny("bn")
    start = net.get_parameter("layer1.0.weight").detach().clone()
    adapter = tta.wrap(net, "nhl", lr=1e-3)
    adapter(images(0))
    assert "param/layer1.0.weight" in adapter.state()
    assert "optim/layer1.0.weight.momentum_buffer" not in adapter.state()
    assert not torch.equal(net.get_parameter("layer1.0.weight"), start)
    assert all(p.grad is None for p in net.parameters())
    adapter.reset()
    assert torch.equal(net.get_parameter("layer1.0.weight"), start)
    adapter(images(1))
    assert torch.equal(adapter.unwrap().get_parameter("layer1.0.weight"), start)


def test_without_a_rate_it_is_tent_after_its_step() -> None:
    adapter = tta.wrap(tiny("bn"), "nhl", eta=0.0, lr=1e-2)
    tent = tta.wrap(tiny("bn"), "tent", lr=1e-2)
    y = adapter(images(0))
    tent(images(0))
    with tent.frozen():
        close(y, tent(images(0)))


def test_the_first_norm_layer_is_the_modulator() -> None:
    adapter = tta.wrap(tiny("ln"), "nhl", modulator="first_norm")
    names = set(adapter.parameters_adapted)
    assert names == {"blocks.0.norm1.weight", "blocks.0.norm1.bias", "patch_embed.proj.weight"}


def test_the_first_input_is_what_the_layer_gets() -> None:
    seen = []
    net = nn.Sequential(nn.Upsample(scale_factor=2.0), tiny("bn"))
    adapter = tta.wrap(net, "tent")
    handle = (
        net[1]
        .get_submodule("layer1.0")
        .register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    )
    before = adapter.state()
    found = first_input(adapter.network, images(0))
    handle.remove()
    assert found.shape == (8, 3, 64, 64) and torch.equal(found, net[0](images(0)))
    after = adapter.state()
    assert all(torch.equal(value, after[key]) for key, value in before.items())


def test_other_paddings_and_reflection() -> None:
    net = tiny("bn")
    net.layer1[0] = nn.Conv2d(3, 4, 5, padding="same", padding_mode="reflect", bias=False)  # type: ignore[union-attr,index]
    adapter = tta.wrap(net, "nhl", eta=1.0)
    before = adapter.state()["param/layer1.0.weight"]
    adapter(images(0))
    padded = nn.functional.pad(images(0), (2, 2, 2, 2), "reflect")
    expected, usage = delta(padded, before)
    close(adapter.state()["param/layer1.0.weight"], before + expected)
    close(adapter.report.usage, usage)


def test_refusals_and_warnings() -> None:
    flat = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(12), nn.Linear(12, 10))
    with pytest.raises(ValueError, match=r"`model` must begin with a plain nn.Conv2d"):
        tta.wrap(flat, "nhl")
    grouped = tiny("bn")
    grouped.layer1[0] = nn.Conv2d(3, 3, 3, padding=1, groups=3)  # type: ignore[union-attr,index]
    with pytest.raises(ValueError, match=r"`model` must begin with a plain nn.Conv2d"):
        tta.wrap(grouped, "nhl")
    with pytest.warns(UserWarning, match="running statistics do not undo"):
        tta.wrap(tiny("bn"), norm="source", update=tta.get_config("nhl"))
    with pytest.raises(ValueError, match="`tau` must be"):
        tta.get_config("nhl", tau=0.0)
