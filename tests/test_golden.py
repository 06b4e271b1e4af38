"""Replaying traces of the official implementations; the README beside them gives tolerances."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.helpers.trace_keys import figures
from tests.helpers.traces import TRACES, Trace
from tests.helpers.update_traces import check_source

LOGITS = {"atol": 5e-5, "rtol": 1e-5}
SECOND_ORDER = {"atol": 1e-9, "rtol": 1e-4}  # Adam's exp_avg_sq and Fisher values: relative
FIGURES = figures("set-a")  # of each step: the trace's key and the report's figure


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("path", TRACES, ids=lambda p: p.stem)
def test_source_outputs(path: Path) -> None:
    check_source(Trace(path))


@pytest.mark.parametrize("path", TRACES, ids=lambda p: p.stem)
def test_trace(path: Path) -> None:
    """Outputs, decisions, losses, averages, parameters, optimiser and norm state, step by step."""
    trace = Trace(path)
    for key, adapter in trace.adapters():
        _replay(trace, key, adapter)


def tolerance(trace: Trace) -> dict[str, float]:
    """The README's limits: wider for ten large steps and a recovery."""
    return LOGITS | {"atol": 2e-4} if trace.name == "sar_gn_cnn_reset" else LOGITS


def _replay(trace: Trace, key: str, adapter) -> None:
    expected, resets = trace.tensor(key), trace.params.get("reset_before", [])
    if trace.group("fisher"):
        constants = adapter.constants()
        for name, value in trace.group("fisher").items():
            torch.testing.assert_close(constants[f"update/fisher.{name}"], value, **SECOND_ORDER)
    before = 0  # resets so far
    for t, x in enumerate(trace.tensor("inputs")):
        if trace.params.get("episodic") or t in resets:
            adapter.reset()
        y = adapter(x)
        if trace.hparams["method"] == "lame":
            y = y.exp()
        torch.testing.assert_close(y, expected[t], **tolerance(trace))
        _check_step(trace, t, adapter)
        for key in ("resets", "reset_before_batch"):
            if key in trace.arrays:
                assert adapter.report.resets - before == int(trace.arrays[key][t])
        before = adapter.report.resets
    state = adapter.state()
    if "param_names" in trace.arrays:
        assert list(adapter.parameters_adapted) == [str(n) for n in trace.arrays["param_names"]]
    for name, value in trace.group("adapted").items():
        torch.testing.assert_close(state[f"param/{name}"], value, **tolerance(trace))
    for name, value in trace.group("opt").items():
        parameter, _, slot = name.rpartition("/")
        limits = SECOND_ORDER if slot == "exp_avg_sq" else LOGITS
        torch.testing.assert_close(
            state[f"optim/{parameter}.{slot}"], value, **limits, check_dtype=False
        )
    if trace.hparams["method"] == "unmixtns":
        for name, value in trace.group("final").items():
            torch.testing.assert_close(state[f"norm/{name}"], value, **LOGITS)
        rates = [layer.rule.rate for layer in adapter.norm_layers.values()]
        np.testing.assert_allclose(rates, trace.arrays["momentum"], rtol=1e-6)


def _check_step(trace: Trace, t: int, adapter) -> None:
    report = adapter.report
    for key, figure in FIGURES.items():
        if key in trace.arrays and (report.stepped or key != "ewc_term"):
            expected, limit = trace.arrays[key][t], 0 if key.startswith("n_") else 5e-5
            np.testing.assert_allclose(report.get(figure, 0.0), expected, atol=limit)
    if "loss" in trace.arrays:
        assert report.stepped == bool(np.isfinite(trace.arrays["loss"][t]))
    if "ema" in trace.arrays:
        np.testing.assert_allclose(adapter.state()["update/ema"], trace.arrays["ema"][t], atol=5e-5)
    if "ema_probs" in trace.arrays:
        average = adapter.state()["update/ema_probs"]
        np.testing.assert_allclose(average, trace.arrays["ema_probs"][t], atol=5e-5)
