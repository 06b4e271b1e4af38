"""Replaying traces of updates that remember more than weights; the README gives the tolerances."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import tta
from tests.helpers.recorded import recordings
from tests.helpers.traces import Trace
from tests.helpers.update_traces import check_source, check_state, check_weights, replay

CMF = recordings("set-d", "cmf_*")
LOGITS = {"atol": 1e-4, "rtol": 1e-4}
AVERAGES = {"atol": 1e-5, "rtol": 0.0}
RAW = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
close = torch.testing.assert_close


def _named(paths: list[Path]):
    return pytest.mark.parametrize("path", paths, ids=lambda p: p.stem)


def _trained(adapter: tta.Adapter, found: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of a copy of all parameters, those that can differ from the source."""
    return {name: found[name] for name in adapter.parameters_adapted}


@_named(CMF)
def test_source_outputs(path: Path) -> None:
    check_source(Trace(path))


@_named(CMF)
def test_cmf(path: Path) -> None:
    trace = Trace(path)
    p = trace.params
    config = tta.get_config(
        "cmf",
        hidden_momentum=p["alpha"],
        ensemble_momentum=p["gamma"],
        process_noise=p["q"],
        probs_momentum=p["momentum_probs"],
        temperature=p["temperature"],
        consistency=p["use_consistency"],
        official=True,
        **trace.optimizer(),
    )
    size, augment = p["configured_batch"], trace.augment
    adapter = tta.wrap(trace.model(), update=config, batch_size=size, augment=augment, **RAW)
    figures = {"n_kept": "selected", "beta": "gain", "loss": "loss"}
    for t in replay(trace, adapter, figures, LOGITS):
        state = adapter.state()
        close(state["update/ema_probs"], trace.tensor("ema_probs")[t], **AVERAGES)
        close(state["update/hidden_variance"], trace.tensor("hidden_var")[t], **AVERAGES)
        if t == 0:
            check_weights(trace, adapter, "model_after_step0")
            _check_hidden(adapter, trace.group("hidden_after_step0"))
    _check_hidden(adapter, trace.group("hidden_final"))


def _check_hidden(adapter: tta.Adapter, found: dict[str, Tensor]) -> None:
    expected = _trained(adapter, found)
    check_state(adapter, {f"update/hidden.{n}": v for n, v in expected.items()}, **AVERAGES)
