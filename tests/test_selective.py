"""Leaving out what was not selected: RDumb's clock, and what rejected rows may cost."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import tta
from tests.helpers.batches import images
from tests.helpers.nets import tiny
from tta.parts.losses import entropy

LOOSE = {"lr": 0.05, "redundancy_margin": 10.0}


def _margin(x: torch.Tensor, family: str, kept: int) -> float:
    """The share of ln C that lets `kept` of the images through."""
    with torch.no_grad():
        values = entropy(tiny(family)(x)).sort().values / torch.tensor(10.0).log()
    return float((values[kept - 1] + values[kept]) / 2)


def _flops(adapter: tta.Adapter, x: torch.Tensor) -> int:
    with FlopCounterMode(display=False) as counter:
        adapter(x)
    return counter.get_total_flops()


@pytest.mark.parametrize("family", ["gn", "ln"])
@pytest.mark.parametrize(("name", "limit"), [("eta", 1.8), ("rdumb", 1.8), ("sar", 2.5)])
def test_rejected_rows_cost_one_forward(name: str, limit: float, family: str) -> None:
    """30 % kept: the forward of the batch, and forward and backward of what is kept (SAR: two)."""
    x = images(0, 20)
    fields = {"entropy_margin": _margin(x, family, 6)} | ({} if name == "sar" else LOOSE)
    adapter = tta.wrap(tiny(family), update=tta.get_config(name, **fields))
    plain = tta.wrap(tiny(family), "source")
    ratio = _flops(adapter, x) / _flops(plain, x)
    assert adapter.report.selected == 6
    assert ratio < limit


@pytest.mark.parametrize("kept", [5, 6, 15])
@pytest.mark.parametrize("name", ["eta", "sar"])
def test_rows_alone_give_the_gradient_of_the_batch(name: str, kept: int, monkeypatch) -> None:
    """Exact up to rounding: with the whole batch behind every loss the same step comes out."""
    x = images(0, 20)
    fields = {"lr": 0.05, "entropy_margin": _margin(x, "gn", kept)}
    fields |= LOOSE if name == "eta" else {}
    results = []
    for alone in (True, False):
        adapter = tta.wrap(tiny("gn"), update=tta.get_config(name, **fields))
        selector = adapter.update.selection_pass
        assert selector.rows_independent
        selector._rows_independent = alone
        adapter(x)
        assert adapter.report.selected == kept
        results.append({n: p.detach() for n, p in adapter.parameters_adapted.items()})
    for n, p in results[0].items():
        torch.testing.assert_close(p, results[1][n], atol=1e-6, rtol=1e-5)
        assert not torch.equal(p, dict(tiny("gn").named_parameters())[n])


def test_when_rows_depend_on_each_other_nothing_is_left_out() -> None:
    for norm, independent in (("bn", False), ("alpha_bn", False), ("source", True)):
        adapter = tta.wrap(tiny("bn"), "eta.cifar10", norm=norm)
        assert adapter.update.context.rows_independent == independent
    without = tiny("bn")
    without.layer1[1] = torch.nn.BatchNorm2d(4, track_running_stats=False)
    adapter = tta.wrap(without, "eta.cifar10", norm="source")
    assert not adapter.update.context.rows_independent


def test_rdumb_forgets_everything_but_its_clock() -> None:
    config = tta.get_config("rdumb", **LOOSE, entropy_margin=10.0, reset_every=2)
    adapter = tta.wrap(tiny("bn"), update=config)
    start, first = adapter.state(), adapter(images(0))
    adapter(images(1))
    assert adapter.report.resets == 0
    assert torch.equal(adapter(images(0)), first)  # the third batch is a first one again
    assert adapter.report.resets == 1
    other = tta.wrap(tiny("bn"), update=config)
    other(images(0))
    for key, value in other.state().items():
        if key not in ("update/batches", "update/resets"):
            assert torch.equal(value, adapter.state()[key])
    assert int(adapter.state()["update/batches"]) == 3
    adapter.reset()
    assert all(
        torch.equal(v.nan_to_num(9), adapter.state()[k].nan_to_num(9)) for k, v in start.items()
    )


def test_rdumb_counts_batches_that_teach_nothing_and_not_cycles() -> None:
    config = tta.get_config("rdumb", **LOOSE, entropy_margin=1e-9, reset_every=2, steps=3)
    adapter = tta.wrap(tiny("bn"), update=config)
    for _ in range(3):
        adapter(images(0))
    assert int(adapter.state()["update/batches"]) == 3 and adapter.report.resets == 1


@pytest.mark.parametrize("name", ["eta", "sar", "deyo"])
def test_the_first_pass_has_no_graph_where_the_last_batch_kept_few(name: str) -> None:
    """Nothing kept counts as few; on batch statistics there is always a graph."""
    nothing = tta.get_config(name, entropy_margin=1e-6)
    adapter = tta.wrap(tiny("gn"), update=nothing)
    graphs = _watch(adapter)
    for t in range(3):
        adapter(images(t))
        assert adapter.report.selected == 0
    assert graphs == [True, False, False]
    adapter = tta.wrap(tiny("bn"), update=nothing)
    graphs = _watch(adapter)
    adapter(images(0)), adapter(images(1))
    assert graphs == [True, True]


@pytest.mark.parametrize("kept", [5, 15])
@pytest.mark.parametrize("name", ["eta", "sar", "deyo"])
@pytest.mark.parametrize("family", ["gn", "ln"])
def test_no_result_depends_on_the_batch_before(family: str, name: str, kept: int) -> None:
    """Bit for bit, whatever the first pass expected."""
    x = images(0, 20)
    fields = {"lr": 0.05, "entropy_margin": _margin(x, family, kept)}
    fields |= {key: v for key, v in LOOSE.items() if key in tta.get_config(name).to_dict()}
    fields |= {"plpd_threshold": -1.0} if "plpd_threshold" in tta.get_config(name).to_dict() else {}
    results = []
    for expect_few in (True, False):
        adapter = tta.wrap(tiny(family), update=tta.get_config(name, **fields))
        adapter.update.selection_pass.expect_few = expect_few
        graphs = _watch(adapter)
        outputs = [adapter(x), adapter(x)]
        assert graphs[0] != expect_few and adapter.report.selected > 0
        results.append((outputs, adapter.state()))
    assert all(torch.equal(a, b) for a, b in zip(results[0][0], results[1][0], strict=True))
    assert all(torch.equal(v, results[1][1][k]) for k, v in results[0][1].items())


def test_models_that_compute_otherwise_without_a_graph_always_record_one() -> None:
    """Torch's attention takes another path where no gradient is asked for."""

    class Attending(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = torch.nn.LayerNorm(12)
            self.attention = torch.nn.MultiheadAttention(12, 2, batch_first=True)
            self.head = torch.nn.Linear(12, 10)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            tokens = self.norm(x.flatten(1).unflatten(1, (-1, 12)))
            return self.head(self.attention(tokens, tokens, tokens)[0].mean(1))

    adapter = tta.wrap(Attending(), update=tta.get_config("eta", entropy_margin=1e-6))
    graphs = _watch(adapter)
    adapter(images(0)), adapter(images(1))
    assert graphs == [True, True]


def test_states_of_the_first_version_load(tmp_path) -> None:
    """They hold a share of kept rows, on which nothing depends any more."""
    adapter = tta.wrap(tiny("gn"), "sar.cifar10")
    expected = adapter.state()
    adapter.load_state({**expected, "update/kept_share": torch.tensor(0.1)})
    assert list(adapter.state()) == list(expected)
    adapter.load_state({"update/kept_share": torch.tensor(0.1)}, as_source=True)
    assert "update/kept_share" not in adapter.reset_point()


def _watch(adapter: tta.Adapter) -> list[bool]:
    """Whether each batch's first pass was made with a graph."""
    found: list[bool] = []
    selection_pass = adapter.update.selection_pass

    def watched(x):
        selection = selection_pass(x)
        found.append(selection.prediction.logits.requires_grad)
        return selection

    adapter.update.selection_pass = watched
    return found
