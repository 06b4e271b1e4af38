"""Replaying traces of ASR and AETTA; the READMEs beside them give the tolerances."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import tta
from tests.helpers.recorded import GOLDEN
from tests.helpers.trace_keys import figures
from tests.helpers.traces import Trace
from tests.helpers.update_traces import check_source
from tta.parts.estimates import dropout_error

close = torch.testing.assert_close
LIMIT = {"atol": 5e-5, "rtol": 1e-4}
WEIGHTS = {"atol": 5e-5, "rtol": 0.0}
ASR = sorted((GOLDEN / "set-d").glob("asr_*.npz"))


def _asr(trace: Trace, official: bool) -> tta.Adapter:
    p = trace.params
    host = tta.get_config(
        "eta",
        entropy_margin=p["e_margin"] / trace.log_classes,
        redundancy_margin=p["d_margin"],
        official=official,
        **trace.optimizer(),
    )
    guard = tta.get_config(
        "asr",
        flip_weight=p["m0"],
        penalty=p["p0"],
        threshold=p["a0"],
        keep_share=p["r0"],
        keep_slope=p["r1"],
    )
    return tta.wrap(trace.model(), update=host, guard=guard)


@pytest.mark.parametrize("official", [False, True])  # of the host, whose own reset it changes
@pytest.mark.parametrize("path", ASR, ids=lambda path: path.stem)
def test_asr(path, official: bool) -> None:
    """Outputs, resets, what stays of them, Fisher, means, penalties."""
    trace = Trace(path)
    check_source(trace)
    adapter, first = _asr(trace, official), int(trace.arrays["first_reset_after_batch"])
    resets = 0
    for t, x in enumerate(trace.tensor("inputs")):
        close(adapter(x), trace.tensor("outputs")[t], **LIMIT)
        report, state = adapter.report, adapter.state()
        for key, figure in figures("set-d").items():
            if key in trace.arrays:
                expected, found = trace.arrays[key][t], report.get(figure, np.nan)
                np.testing.assert_allclose(found, expected, atol=5e-5, rtol=1e-4, err_msg=key)
        close(state["guard/threshold"], trace.tensor("cum_entropy")[t], **LIMIT)
        assert (adapter.health["action"] == "reset") == bool(trace.arrays["reset"][t])
        resets += int(trace.arrays["reset"][t])
        assert report.resets == resets
        if t == first:
            for key, prefix in (
                ("params", "param/"),
                ("fisher", "guard/fisher."),
                ("mean", "guard/mean."),
            ):
                for name, value in trace.group(f"{key}_after_first_reset").items():
                    close(state[prefix + name], value, **WEIGHTS)
    assert list(adapter.parameters_adapted) == [str(n) for n in trace.arrays["param_names"]]
    for name, value in trace.group("adapted").items():
        close(adapter.state()[f"param/{name}"], value, **WEIGHTS)
    for name, value in trace.group("opt").items():
        parameter, _, slot = name.rpartition("/")
        close(adapter.state()[f"optim/{parameter}.{slot}"], value, **WEIGHTS)


def test_aetta() -> None:
    """The estimate along a model that does not adapt, with the recorded masks."""
    trace = Trace(GOLDEN / "set-e" / "aetta_bn_cnn.npz")
    p = trace.params
    stages = [f"bn{i}" for i in p["dropout_after_stages"]]  # before the ReLU, which is the same
    masks = np.unpackbits(trace.arrays["dropout_masks"], axis=1)
    used: dict[int, int] = {}

    def draws(name: str, shape: torch.Size, call: int) -> torch.Tensor:
        start = used.get(call, 0)
        used[call] = start + shape.numel()
        return torch.from_numpy(masks[call, start : used[call]]).bool().view(shape)

    guard = tta.get_config(
        "aetta",
        passes=p["passes"],
        dropout=p["dropout"],
        places=stages,
        momentum=p["ema"],
        official=True,
    )
    adapter = tta.wrap(trace.model(), "source", guard=guard, draws=draws)
    for t, x in enumerate(trace.tensor("inputs")):
        close(adapter(x), trace.tensor("logits")[t], **LIMIT)
        health = adapter.health
        assert health["dropout_agreement"] == pytest.approx(float(trace.arrays["agreement"][t]))
        close(health["dropout_entropy"], float(trace.arrays["entropy_of_mean"][t]), **LIMIT)
        estimate = float(trace.arrays["estimated_accuracy"][t])
        assert 100 * health["estimated_accuracy"] == pytest.approx(estimate, abs=1e-3)
        assert health["estimator"] == "aetta" and health["passes"] == p["passes"] + 1
    assert used == {t: masks.shape[1] for t in range(3)}


def test_the_estimate_and_the_resets_of_aetta(monkeypatch) -> None:
    """The estimate from given logits, through a collapse, and where it resets."""
    trace = Trace(GOLDEN / "set-e" / "pieces_aetta.npz")
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 10))
    config = tta.get_config("aetta", momentum=trace.params["ema"], official=True)
    adapter = tta.wrap(net, "source", guard=config)
    resets = []
    for t, logits in enumerate(trace.tensor("logits")):
        dropped = trace.tensor("dropout_logits")[t].movedim(1, 0)
        found = dropout_error(logits, dropped, rounded=True)
        assert float(found[0]) == pytest.approx(float(trace.arrays["agreement"][t]), abs=1e-6)
        close(float(found[1]), float(trace.arrays["entropy_of_mean"][t]), **LIMIT)
        monkeypatch.setattr(adapter.guard, "_estimate", lambda batch, found=found: found)
        adapter(torch.zeros(3, 4))
        estimate = float(trace.arrays["estimated_accuracy"][t])
        assert 100 * adapter.health["estimated_accuracy"] == pytest.approx(estimate, abs=1e-3)
        resets += [t] if adapter.health["action"] == "reset" else []
    assert resets == trace.arrays["reset_after"].tolist()
