"""ITTA: replaying the traces of the authors' code, and what it does beyond them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import tta
from tests.helpers.batches import images, source_batches
from tests.helpers.nets import tiny
from tests.helpers.traces_sheet import FOLDER, IttaTrace
from tta.core.draws import Draws
from tta.core.random import CountedDraws
from tta.parts import itta as parts

# What the keys of its traces are, see `tests/helpers/trace_keys.py`.
TRACE_KEYS = {
    "set-c": {
        "arrays": {
            "consistency": "source: consistency",
            "draw": "wrap: draws=",
            r"theta_(after1|final)": "state: update/block<k>.weight and .bias",
            r"consistency_(init|after1|final)|net_(after1|final)": "piece: itta.learn",
            r"loss_(cla|reg|reg_step)|penalty": "piece: itta.learn",
            "grad1": "none: the penalty and what follows depend on it",
        },
        "hparams": {
            r"f32_vs_f64\..*|subseed|accuracy|max_(output|theta)_change|domains": "none: "
            "provenance",
            "widths": "model: see tests.helpers.traces_sheet",
            r"consistency_depth|block_depth|loss_scale": "field: of the same name",
            "test_lr": "field: lr",
            r"weight_decay|consistency_lr|penalty_factor": "piece: itta.learn",
        },
    },
}

OUTPUTS = {"atol": 5e-5, "rtol": 0.0}
NET = {"atol": 2e-5, "rtol": 0.0}
TEST = sorted(FOLDER.glob("itta_test_*.npz"))
TRAIN = sorted(FOLDER.glob("itta_train_*.npz"))
close = torch.testing.assert_close


class Rows:
    """Answers draws by the rows of a trace, in the order in which they are asked for."""

    def __init__(self, trace: IttaTrace) -> None:
        self.trace, self.asked = trace, dict.fromkeys(("coin", "lam", "perm"), 0)

    def __call__(self, name: str, shape: torch.Size, call: int) -> torch.Tensor:
        row = self.trace.tensor(f"draw/{name}")[self.asked[name]]
        self.asked[name] += 1
        assert row.shape == shape
        return row


def _source(width: int = 8) -> tta.SourceStatistics:
    return tta.SourceStatistics(consistency=parts.identity(3, width))


@pytest.mark.parametrize("path", TEST, ids=lambda p: p.stem)
def test_trace(path: Path) -> None:
    trace = IttaTrace(path)
    p, rows = trace.hparams, Rows(trace)
    config = tta.get_config(
        "itta",
        lr=p["test_lr"],
        loss_scale=p["loss_scale"],
        block_depth=p["block_depth"],
        consistency_depth=p["consistency_depth"],
    )
    w = torch.stack([trace.tensor("consistency/weight"), trace.tensor("consistency/bias")])
    source = tta.SourceStatistics(consistency=w)
    net, x = trace.model(), trace.tensor("inputs")
    with torch.no_grad():
        close(net(x[0]), trace.tensor("source_outputs")[0], **OUTPUTS)
    adapter = tta.wrap(net, update=config, source=source, draws=rows)
    start = adapter.state()
    for t in range(len(x)):
        close(adapter(x[t]), trace.tensor("outputs")[t], **OUTPUTS)
        close(adapter.report.loss, float(trace.arrays["loss"][t]), **OUTPUTS)
        assert adapter.report.stepped == (len(x[t]) > 1)
        state = adapter.state()
        assert list(state) == list(start)
        if t == 0:
            for name, value in trace.group("theta_after1").items():
                close(state[f"update/{name.replace('/', '.')}"], value, **OUTPUTS)
    for name, value in trace.group("theta_final").items():
        close(state[f"update/{name.replace('/', '.')}"], value, **OUTPUTS)
    asked = 0 if len(x[0]) == 1 else len(x)
    assert set(rows.asked.values()) == {asked}
    adapter.reset()
    assert all(torch.equal(value, adapter.state()[key]) for key, value in start.items())


@pytest.mark.parametrize("path", TRAIN, ids=lambda p: p.stem)
def test_learning_on_the_source_replays_the_trace(path: Path) -> None:
    trace = IttaTrace(path)
    p, rows, net = trace.hparams, Rows(trace), trace.model()
    w = torch.stack([trace.tensor(f"consistency_init/{n}") for n in ("weight", "bias")])
    batches = list(zip(trace.tensor("inputs"), trace.tensor("labels"), strict=True))
    fields = {n: p[n] for n in ("lr", "weight_decay", "consistency_lr", "penalty_factor")}
    found: dict[str, Any] = {}
    for t, found in enumerate(parts.learn(net, w, batches, draws=rows, **fields)):
        for key, limit in (("loss_cla", 1e-5), ("loss_reg", 1e-5), ("loss_reg_step", 1e-5)):
            close(float(found[key]), float(trace.arrays[key][t]), atol=limit, rtol=0.0)
        close(float(found["penalty"]), float(trace.arrays["penalty"][t]), atol=1e-4, rtol=0.0)
        if t == 0:
            _check_net(net, found, trace, "after1")
    _check_net(net, found, trace, "final")
    assert set(rows.asked.values()) == {2 * len(batches)}


def _check_net(net: nn.Module, found: dict[str, Any], trace: IttaTrace, when: str) -> None:
    state = net.state_dict()
    for name, value in trace.group(f"net_{when}").items():
        close(state[name], value, **NET)
    for row, name in enumerate(("weight", "bias")):
        expected = trace.tensor(f"consistency_{when}/{name}")
        close(found["consistency"][row], expected, **OUTPUTS)


def test_mixed_styles_by_hand() -> None:
    u = torch.randn(2, 3, 4, 4)
    mixing = parts.Mixing(0, torch.tensor([1.0, 0.25]), torch.tensor([1, 0]))
    found = parts.mix_style(u, mixing)
    close(found[0], u[0])  # its own style alone
    mean, deviation = u.mean((2, 3)), u.std((2, 3))
    close(found.mean((2, 3))[1], 0.25 * mean[1] + 0.75 * mean[0])
    close(found.std((2, 3))[1], 0.25 * deviation[1] + 0.75 * deviation[0], atol=1e-4, rtol=1e-4)


def test_shares_have_a_beta_distribution() -> None:
    numbers = CountedDraws(0)
    found = parts.draw_mixing(Draws(), 4000, torch.device("cpu"), lambda: numbers, 0.5, 0.1)
    lam = found.lam
    assert abs(float(lam.mean()) - 0.5) < 0.03
    assert abs(float(lam.var()) - 0.25 / 1.2) < 0.01  # ab / ((a + b)^2 (a + b + 1))
    assert sorted(found.perm.tolist()) == list(range(4000))


def test_theta_has_the_shape_of_the_first_batch_until_a_reset() -> None:
    adapter = tta.wrap(tiny("bn"), "itta", lr=0.01, source=_source())
    start = adapter.state()
    assert start["update/block1.weight"].shape == (5, 0, 0, 0)
    assert start["optim/update.block1.weight.exp_avg"].shape == (5, 0, 0, 0)
    adapter(images(0))
    assert adapter.state()["update/block2.bias"].shape == (5, 8, 16, 16)
    with pytest.raises(ValueError, match="`images` must have the size of the first batch"):
        adapter(torch.rand(4, 3, 48, 48))
    adapter.reset()
    assert all(torch.equal(value, adapter.state()[key]) for key, value in start.items())
    adapter(torch.rand(4, 3, 48, 48))
    assert adapter.state()["update/block1.weight"].shape == (5, 4, 48, 48)
    assert adapter.state()["optim/update.block1.weight.exp_avg"].shape == (5, 4, 48, 48)


def test_a_first_call_that_fails_has_not_happened() -> None:
    net = tiny("bn")
    adapter = tta.wrap(net, "itta", lr=0.01, source=_source())
    start, expected = adapter.state(), None
    calls = []

    def fail(*_: object) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt

    handle = net.get_submodule("fc").register_forward_pre_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        adapter(images(0))
    handle.remove()
    assert all(torch.equal(value, adapter.state()[key]) for key, value in start.items())
    expected = tta.wrap(tiny("bn"), "itta", lr=0.01, source=_source())
    for t in range(2):
        assert torch.equal(adapter(images(t)), expected(images(t)))


def test_streams_files_and_guards_take_theta_along(tmp_path: Path) -> None:
    def make() -> tta.Adapter:
        return tta.wrap(tiny("bn"), "itta", lr=0.01, source=_source())

    alone = make()
    expected = [alone(images(t)) for t in range(3)]
    other = make()
    sizes = [torch.rand(4, 3, 48, 48) for _ in range(3)]
    wide = [other(x) for x in sizes]
    pool = tta.runtime.StreamPool(make(), capacity=1, folder=tmp_path / "pool", interval=None)
    for t in range(3):
        with pool.stream("a", create=True) as a:
            assert torch.equal(a(images(t)), expected[t])
        with pool.stream("b", create=True) as b:
            assert torch.equal(b(sizes[t]), wide[t])
    pool.close()
    one = make()
    one(images(0))
    tta.save(one, tmp_path / "saved")
    again = tta.load(tiny("bn"), tmp_path / "saved")
    assert torch.equal(again(images(1)), expected[1])
    again.reset()
    assert torch.equal(again(images(0)), expected[0])
    twin = copy.deepcopy(one)
    assert torch.equal(twin(images(1)), one(images(1)))
    guarded = tta.wrap(
        tiny("bn"), update=tta.get_config("itta", lr=0.01), source=_source(), guard="periodic",
        every=1,
    )  # fmt: skip
    guarded(images(0))
    assert guarded.report.resets == 1
    assert guarded.state()["update/block1.weight"].shape == (5, 0, 0, 0)
    guarded(images(1))


def test_the_artefact_is_learned_and_kept(tmp_path: Path) -> None:
    net = tiny("bn")
    before = copy.deepcopy(net.state_dict())
    made = tta.collect_source(net, source_batches(), for_methods=["itta"])
    assert made.contents == ["consistency"] and made.consistency is not None
    assert made.consistency.shape == (2, 10, 8)
    assert not torch.equal(made.consistency, parts.identity(10, 8))
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    made.save(tmp_path / "source.safetensors")
    read = tta.SourceStatistics.load(tmp_path / "source.safetensors")
    assert torch.equal(read.consistency, made.consistency)  # type: ignore[arg-type]


def test_no_consistency_is_learned_from_no_batch() -> None:
    with pytest.raises(ValueError, match="`source` must hold at least one batch, got none"):
        tta.collect_source(tiny("bn"), [], for_methods=["itta"])


def test_the_model_itself_never_moves_and_is_free_of_hooks() -> None:
    net = tiny("bn")
    before = copy.deepcopy(net.state_dict())
    adapter = tta.wrap(net, "itta", lr=0.1, source=_source(), shadow=True)
    with torch.no_grad():
        plain = tiny("bn")(images(1))
    adapter(images(0))
    assert torch.equal(adapter(images(1)), plain)  # the source, without Theta
    assert adapter.report.stepped and adapter.parameters_adapted == {}
    assert not any(module._forward_hooks for module in net.modules())
    after = adapter.unwrap().state_dict()
    assert all(torch.equal(value, before[key]) for key, value in after.items())


def test_stages_are_found() -> None:
    assert parts.stages(tiny("bn")) == ["layer1", "layer2"]
    assert parts.stages(nn.Sequential(nn.Identity(), tiny("gn"))) == ["1.layer1", "1.layer2"]
    assert parts.stages(tiny("ln")) == []


def test_refusals() -> None:
    with pytest.raises(ValueError, match="`blocks` must name two stages or more"):
        tta.wrap(tiny("ln"), "itta", source=_source(16))
    with pytest.raises(ValueError, match="`source` must give itta its consistency loss"):
        tta.wrap(tiny("bn"), "itta")
    with pytest.raises(ValueError, match=r"`source.consistency` must be weights and biases"):
        tta.wrap(tiny("bn"), "itta", source=_source(9))
    with pytest.raises(ValueError, match="`blocks` must name at least two modules"):
        tta.get_config("itta", blocks=("layer1",))
    for blocks in ("layer1", 2):
        with pytest.raises(TypeError, match="`blocks` must be names of modules"):
            tta.get_config("itta", blocks=blocks)
    adapter = tta.wrap(tiny("bn"), "itta", blocks=("layer1", "fc"), source=_source())
    with pytest.raises(ValueError, match=r"`blocks` must name modules that give maps"):
        adapter(images(0))
    net = tiny("bn")
    net.layer1.add_module("hard", nn.Hardsigmoid())
    inner = net.layer1.forward
    net.layer1.forward = lambda x: net.layer1.hard(inner(x))
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(ValueError, match=r"got batches \(hardsigmoid_backward has none\)"):
        tta.wrap(net, "itta", source=source_batches())
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    adapter = tta.wrap(net, "itta", source=_source())  # needs no second derivative
    assert adapter(images(0)).isfinite().all() and adapter.report.stepped


def test_reentrant_checkpoints_are_refused_where_a_consistency_is_learned() -> None:
    net: Any = tiny("bn")
    forward = net.layer2.forward
    net.layer2.forward = lambda x: checkpoint(forward, x, use_reentrant=True)
    with pytest.raises(ValueError, match="`model` must have no reentrant checkpoints"):
        tta.wrap(net, "itta", source=source_batches())
    assert tta.wrap(net, "itta", source=_source())(images(0)).isfinite().all()
