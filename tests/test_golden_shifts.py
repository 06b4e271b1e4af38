"""Replaying traces of NEO, FOA's shift and BN-EMA; the READMEs beside them give the tolerances."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import tta
from tests.helpers.traces import GOLDEN, Trace
from tests.helpers.update_traces import check_source

LOGITS = {"atol": 5e-5, "rtol": 1e-4}
CENTRES = {"atol": 1e-5, "rtol": 0.0}
NEO = sorted((GOLDEN / "set-e").glob("neo_*.npz"))
FOA_SHIFT = sorted((GOLDEN / "set-d").glob("foa_shift_*.npz"))
BN_EMA = sorted((GOLDEN / "set-e").glob("bnema_*.npz"))
close = torch.testing.assert_close


def _batches(trace: Trace, adapter: tta.Adapter):
    """Place, images and length of each batch, with resets and freezing as recorded."""
    found = trace.tensor("inputs")
    for t, x in enumerate(found):
        if t in trace.params["reset_before"]:
            adapter.reset()
        if t == trace.params.get("frozen_from"):
            adapter.freeze()
        rows = trace.params.get("last_rows", 0) if t == len(found) - 1 else 0
        yield t, x[:rows] if rows else x


@pytest.mark.parametrize("path", [*NEO, *FOA_SHIFT, *BN_EMA], ids=lambda p: p.stem)
def test_source_outputs(path: Path) -> None:
    check_source(Trace(path))


@pytest.mark.parametrize("path", NEO, ids=lambda p: p.stem)
def test_neo(path: Path) -> None:
    _replay_neo(Trace(path), "outputs")


def test_neo_with_the_source_mean() -> None:
    _replay_neo(Trace(GOLDEN / "set-e" / "neo_ln_vit.npz"), "outputs_own_source_mean")


def _replay_neo(trace: Trace, key: str) -> None:
    own = key != "outputs"
    given = tta.SourceStatistics(feature_mean=trace.tensor("source_mean")) if own else None
    adapter = tta.wrap(
        trace.model(), "neo", momentum=trace.params["alpha"], use_source_mean=own, source=given
    )
    for t, x in _batches(trace, adapter):
        features = adapter.network(x).features
        close(features.detach(), trace.tensor("features")[t][: len(x)], **LOGITS)
        close(adapter(x), trace.tensor(key)[t][: len(x)], **LOGITS)
        state = adapter.state()
        close(state["output/centre"], trace.tensor("center_after")[t], **CENTRES)
        if trace.params["rule"] == "mean":
            assert state["output/count"] == trace.arrays["count_after"][t]


def test_the_source_mean_of_neo_is_that_of_the_trace() -> None:
    trace = Trace(GOLDEN / "set-e" / "neo_ln_vit.npz")
    batches = [(x, torch.zeros(len(x), dtype=torch.int64)) for x in trace.tensor("source_inputs")]
    found = tta.collect_source(trace.model(), batches, for_methods=["neo"])
    assert found.contents == ["feature_mean"] and found.feature_mean is not None
    close(found.feature_mean, trace.tensor("source_mean"), **CENTRES)


@pytest.mark.parametrize("path", FOA_SHIFT, ids=lambda p: p.stem)
def test_foa_shift(path: Path) -> None:
    trace = Trace(path)
    net = trace.model()
    mean = trace.tensor("source_mean")[-trace.hparams["model"]["dim"] :]  # of the last block
    images = trace.tensor("source_inputs")
    labels = torch.zeros(len(images), dtype=torch.int64)
    source = tta.collect_source(net, [(images, labels)], for_methods=["foa_shift"])
    assert source.feature_mean is not None
    close(source.feature_mean, mean, **CENTRES)
    adapter = tta.wrap(net, "foa_shift", source=tta.SourceStatistics(feature_mean=mean))
    assert adapter.state()["output/shift"].isnan().all()
    for t, x in _batches(trace, adapter):
        close(adapter(x), trace.tensor("outputs")[t], **LOGITS)
        expected = mean - trace.tensor("hist_after")[t]
        close(adapter.state()["output/shift"], expected, **CENTRES)


@pytest.mark.parametrize("path", BN_EMA, ids=lambda p: p.stem)
def test_bn_ema(path: Path) -> None:
    trace = Trace(path)
    config = tta.get_config("bn_ema", momentum=trace.params["momentum"], official=True)
    adapter = tta.wrap(trace.model(), norm=config)
    for t, x in _batches(trace, adapter):
        close(adapter(x), trace.tensor("outputs")[t], **LOGITS)
    state = adapter.state()
    for name, value in trace.group("bn_final").items():
        layer, _, kind = name.rpartition(".running_")
        close(state[f"norm/{layer}.{kind}"], value, **CENTRES)
