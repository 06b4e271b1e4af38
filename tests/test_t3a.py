"""T3A: replaying its traces, and what it does beyond them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import tta
from tests.helpers.batches import images, source_batches
from tests.helpers.nets import tiny
from tests.helpers.traces import GOLDEN, Trace
from tests.helpers.wild import Cosine
from tta.parts.losses import entropy

# What the keys of its traces are, see `tests/helpers/trace_keys.py`.
TRACE_KEYS = {
    "set-d": {
        "arrays": {
            "features": "output: what the classifier is fed",
            r"warmup_(supports|labels|entropy)": "state: output/support*, after wrap",
            "support_count": "state: output/support_labels, counted",
            r"support(s|_labels|_entropy)_final": "state: output/support*",
        },
        "hparams": {
            "params.filter_K": "field: filter_size, None for -1",
        },
    },
}

LOGITS = {"atol": 5e-5, "rtol": 1e-4}
TRACES = sorted((GOLDEN / "set-d").glob("t3a_*.npz"))
close = torch.testing.assert_close


def _entries(state: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """Supports, labels and entropies, by class and then by entropy."""
    labels, entropies = state["output/support_labels"], state["output/support_entropy"]
    order = torch.from_numpy(np.lexsort((entropies.numpy(), labels.numpy())))
    order = order[labels[order] >= 0]
    return state["output/supports"][order], labels[order], entropies[order]


@pytest.mark.parametrize("path", TRACES, ids=lambda p: p.stem)
def test_trace(path: Path) -> None:
    trace = Trace(path)
    size = trace.params["filter_K"]
    fields = {"filter_size": None, "official": True} if size == -1 else {"filter_size": size}
    norm = "bn" if trace.params["bn"] == "batch" else "source"
    adapter = tta.wrap(trace.model(), norm=norm, output=tta.get_config("t3a", **fields))
    start = adapter.state()
    rows = int((start["output/support_labels"] >= 0).sum())
    close(start["output/supports"][:rows], trace.tensor("warmup_supports"), **LOGITS)
    close(start["output/support_entropy"][:rows], trace.tensor("warmup_entropy"), **LOGITS)
    assert torch.equal(start["output/support_labels"][:rows], trace.tensor("warmup_labels"))
    for t, x in enumerate(trace.tensor("inputs")):
        with torch.no_grad():
            prediction = adapter.network(x)
        assert prediction.features is not None
        close(prediction.features, trace.tensor("features")[t], **LOGITS)
        close(entropy(prediction.logits), trace.tensor("entropy")[t], **LOGITS)
        close(adapter(x), trace.tensor("outputs")[t], **LOGITS)
        labels = adapter.state()["output/support_labels"]
        counts = torch.bincount(labels[labels >= 0], minlength=adapter.num_classes)
        assert torch.equal(counts, trace.tensor("support_count")[t])
        assert adapter.report["supports"] == counts.sum()
    supports, labels, entropies = _entries(adapter.state())
    assert torch.equal(labels, trace.tensor("support_labels_final"))
    close(entropies, trace.tensor("support_entropy_final"), **LOGITS)
    close(supports, trace.tensor("supports_final"), **LOGITS)
    adapter.reset()
    close(adapter(trace.tensor("inputs")[0]), trace.tensor("outputs")[0], **LOGITS)


def test_everything_is_kept_without_a_filter() -> None:
    net: Any = tiny("gn")
    adapter = tta.wrap(net, "t3a", filter_size=None)
    features = []
    for t in range(3):
        with adapter.frozen(), torch.no_grad():
            features.append(adapter.network(images(t)))
        y = adapter(images(t))
    assert (adapter.state()["output/support_labels"] >= 0).sum() == 10 + 24
    labels = torch.cat([p.logits.argmax(1) for p in features])
    rows = torch.cat([p.features for p in features])
    start = F.linear(net.fc.weight, net.fc.weight, net.fc.bias).argmax(1)
    total = torch.zeros(10, 8)
    for h, k in [*zip(rows, labels, strict=True), *zip(net.fc.weight, start, strict=True)]:
        total[k] += (h / h.norm()).detach()
    close(y, rows[-8:] @ F.normalize(total, dim=1).T)


def test_a_frozen_adapter_classifies_by_what_it_has() -> None:
    adapter = tta.wrap(tiny("gn"), "t3a", filter_size=2)
    adapter(images(0))
    centroids = adapter.output.centroids()  # type: ignore[union-attr]
    with adapter.frozen():
        y = adapter(images(1))
        features = adapter.network(images(1)).features
    assert features is not None
    close(y, (features @ centroids.T).detach())


def test_with_other_slots_and_from_a_file(tmp_path) -> None:
    adapter = tta.wrap(tiny("bn"), norm="bn_ema", update="tent.cifar10", output="t3a")
    adapter(images(0))
    tta.save(adapter, tmp_path)
    again = tta.load(tiny("bn"), tmp_path)
    assert torch.equal(again(images(1)), adapter(images(1)))
    with pytest.raises(ValueError, match="`keep` must be False for t3a"):
        adapter.unwrap(keep=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    adapter = tta.wrap(tiny("gn").to(dtype), "t3a")
    y = adapter(images(0, 1).to(dtype))
    assert y.dtype == dtype and y.isfinite().all()
    assert adapter.state()["output/supports"].dtype == torch.float32


def test_a_head_that_is_no_linear_layer_is_refused() -> None:
    with pytest.raises(ValueError, match="must make its logits by a linear layer for t3a"):
        tta.wrap(Cosine(), output="t3a", num_classes=10, features="neck", source=source_batches())
