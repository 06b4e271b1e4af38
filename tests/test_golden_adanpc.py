"""Replaying the official AdaNPC: votes, confidences, memory and affine part, step by step."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.helpers.trace_keys import figures
from tests.helpers.traces_adanpc import FOLDER, AdanpcTrace
from tta.parts.neighbours import vote

STREAMS = sorted(FOLDER.glob("adanpc_*.npz"))
LIMITS = {"atol": 1e-5, "rtol": 0.0}
PIECES = {"atol": 2e-6, "rtol": 1e-5}
FIGURES = figures("set-b")


@pytest.mark.parametrize("path", STREAMS, ids=lambda p: p.stem)
def test_stream(path: Path) -> None:
    trace = AdanpcTrace(path)
    arrays = trace.arrays
    adapter = trace.adapter()
    _check_source_part(trace, adapter)
    for t, x in enumerate(trace.tensor("inputs")):
        if t in trace.resets:
            adapter.reset()
        torch.testing.assert_close(
            _features(adapter, x), trace.tensor("test_features")[t], **LIMITS
        )
        scores = adapter(x).exp()
        torch.testing.assert_close(scores, trace.tensor("outputs")[t], **LIMITS)
        confidence = scores.softmax(1).amax(1)
        torch.testing.assert_close(confidence, trace.tensor("double_softmax_conf")[t], **LIMITS)
        for key, figure in FIGURES.items():
            if key in arrays:
                assert adapter.report[figure] == int(arrays[key][t])
        right = scores.argmax(1) == trace.tensor("labels")[t]
        assert int(right.sum()) == int(arrays["correct"][t])
    state, constants = adapter.state(), adapter.constants()
    torch.testing.assert_close(state["output/memory"], trace.tensor("memory_tail_final"), **LIMITS)
    labels = torch.cat([constants["output/source_labels"], state["output/memory_labels"]])
    assert torch.equal(labels, trace.tensor("memory_label_final"))
    if trace.hparams["algo"] == "adanpc_bn":
        for name in ("weight", "bias"):
            expected = trace.tensor(f"bn_final/{name}")
            torch.testing.assert_close(state[f"output/{name}"], expected, **LIMITS)
        assert not arrays["bn_final/running_mean"].any()
        assert (arrays["bn_final/running_var"] == 1).all()
        assert arrays["bn_final/num_batches_tracked"] == 0


def _features(adapter, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return adapter.network(x).features


def _check_source_part(trace: AdanpcTrace, adapter) -> None:
    constants = adapter.constants()
    features = constants["output/source_features"]
    expected = trace.tensor("source_features")
    torch.testing.assert_close(features[1:], expected, **LIMITS)  # given ones: bit for bit
    assert torch.equal(features[:1], trace.tensor("memory_init"))
    if "memory_after_source" in trace.arrays:
        rows = features * constants["output/source_scale"][:, None]
        torch.testing.assert_close(rows, trace.tensor("memory_after_source"), **LIMITS)
        labels = trace.tensor("memory_label_after_source")
        assert torch.equal(constants["output/source_labels"], labels)


@pytest.mark.parametrize("path", STREAMS, ids=lambda p: p.stem)
def test_reset_brings_the_first_scores_back(path: Path) -> None:
    trace = AdanpcTrace(path)
    adapter = trace.adapter()
    x = trace.tensor("inputs")[0]
    first = adapter(x)
    adapter(trace.tensor("inputs")[1])
    adapter.reset()
    assert torch.equal(adapter(x), first)


@pytest.mark.parametrize("path", sorted(FOLDER.glob("pieces_adanpc*.npz")), ids=lambda p: p.stem)
def test_pieces(path: Path) -> None:
    trace = AdanpcTrace(path)
    memory, labels = trace.tensor("memory"), trace.tensor("memory_label")
    unit = F.normalize(trace.tensor("queries"), dim=1)
    classes = trace.hparams["num_classes"]
    similarity = unit @ memory.t()
    nearest = similarity.amax(1)
    torch.testing.assert_close(nearest, trace.tensor("max_similarity"), **PIECES)

    def scores(k: int, t: float, radius: float = 1.1, rows=similarity, y=labels) -> torch.Tensor:
        return (vote(rows, y, classes, k, t, radius) + 1e-5).clamp_max(1)

    ks = [int(k) for k in trace.arrays["ks"]]
    temperatures = [float(t) for t in trace.arrays["temps"]]
    for i, k in enumerate(ks):
        for j, t in enumerate(temperatures):
            torch.testing.assert_close(scores(k, t), trace.tensor("scores")[i, j], **PIECES)
    k, t = ks[1], temperatures[1]
    for i, radius in enumerate(trace.arrays["eps_balls"]):
        expected = trace.tensor("scores_eps")[i]
        torch.testing.assert_close(scores(k, t, float(radius)), expected, **PIECES)
    plain = scores(k, t)
    confidence = plain.softmax(1).amax(1)
    torch.testing.assert_close(confidence, trace.tensor("conf_double_softmax"), **PIECES)
    np.testing.assert_array_equal(plain.argmax(1), trace.arrays["appended_labels"])
    more = unit @ torch.cat([memory, unit]).t()
    after = scores(k, t, rows=more, y=torch.cat([labels, plain.argmax(1)]))
    torch.testing.assert_close(after, trace.tensor("scores_after_append_all"), **PIECES)
