"""COME: replaying its traces in three hosts, and the opinion entropy on its own."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

import tta
from tests.helpers.batches import images
from tests.helpers.nets import tiny
from tests.helpers.traces import GOLDEN, Trace
from tests.helpers.wild import wrapped
from tta.parts.losses import opinion_entropy

# What the keys of its traces are, see `tests/helpers/trace_keys.py`.
TRACE_KEYS = {
    "set-d": {
        "arrays": {
            "entropy_second": "none: of the second pass, whose kept rows are counted",
            "ema": "state: update/ema",
            "n_reliable": "report.reliable; sar: report.selected",
        },
        "hparams": {
            "params.K": "field: opinion_classes",
            "params.uniform": "none: K in words",
        },
    },
}

TRACES = sorted((GOLDEN / "set-d").glob("come_*.npz"))
LOGITS = {"atol": 5e-5, "rtol": 1e-4}
WEIGHTS = {"atol": 5e-5, "rtol": 0.0}
HOSTS = ["tent", "eata", "eta", "sar", "deyo"]
close = torch.testing.assert_close


def _adapter(trace: Trace) -> tta.Adapter:
    p = trace.params
    fields: dict[str, Any] = trace.optimizer() | {"steps": p["steps"]}
    if "e_margin" in p:
        fields |= {"redundancy_margin": p["d_margin"], "fisher_weight": 0.0}
    if (margin := p.get("e_margin", p.get("margin_e0"))) is not None:
        fields |= {"entropy_margin": margin / trace.log_classes, "official": True}
    host = trace.hparams["method"].removesuffix("_come")
    config = tta.get_config(host, loss="opinion", opinion_classes=p["K"], **fields)
    return tta.wrap(trace.model(), update=config)


@pytest.mark.parametrize("path", TRACES, ids=lambda p: p.stem)
def test_trace(path: Path) -> None:
    trace = Trace(path)
    adapter = _adapter(trace)
    sharp = "ema" in trace.arrays
    figures = {"n_reliable": "reliable", "n_selected": "selected"}
    if sharp:
        figures = {"n_reliable": "selected", "n_selected": "selected_second"}
    for t, x in enumerate(trace.tensor("inputs")):
        y = adapter(x)
        close(y, trace.tensor("outputs")[t], **LOGITS)
        entropies = opinion_entropy(y, trace.params["K"])
        close(entropies, trace.tensor("entropy")[t], **LOGITS)
        for key, figure in figures.items():
            if key in trace.arrays:
                assert adapter.report[figure] == trace.arrays[key][t]
        for key in ("ema", "ema_probs"):
            if key in trace.arrays:
                close(adapter.state()[f"update/{key}"], trace.tensor(key)[t], **LOGITS)
    state = adapter.state()
    assert list(adapter.parameters_adapted) == [str(n) for n in trace.arrays["param_names"]]
    for name, value in trace.group("adapted").items():
        close(state[f"param/{name}"], value, **WEIGHTS)
    for name, value in trace.group("opt").items():
        close(state[f"optim/{name.replace('/', '.')}"], value, **WEIGHTS)


def test_the_opinion_entropy_of_the_authors() -> None:
    trace = Trace(GOLDEN / "set-d" / "pieces_come.npz")
    logits = trace.tensor("logits").requires_grad_()
    found = opinion_entropy(logits, trace.hparams["K"])
    close(found, trace.tensor("entropy"), atol=2e-6, rtol=1e-5)
    (gradient,) = torch.autograd.grad(found.mean(), logits)
    close(gradient, trace.tensor("grad_of_mean"), atol=2e-6, rtol=1e-5)
    close((gradient * logits.detach()).sum(1), torch.zeros(len(logits)), atol=1e-6, rtol=0.0)


@pytest.mark.parametrize("value", [0.0, 500.0])
def test_logits_of_any_length_have_an_opinion(value: float) -> None:
    logits = torch.full((2, 10), value)
    logits[1, 3] += 1
    logits.requires_grad_()
    entropies = opinion_entropy(logits, 10)
    (gradient,) = torch.autograd.grad(entropies.sum(), logits)
    assert entropies.isfinite().all() and gradient.isfinite().all()
    low, high = entropies.detach().aminmax()
    assert low >= 0 and high <= math.log(11) + 1e-4


@pytest.mark.parametrize("host", HOSTS)
def test_every_host_learns_by_the_opinion_of_its_classes(host: str) -> None:
    outputs = {}
    for loss, classes in (("entropy", None), ("opinion", None), ("opinion", 10), ("opinion", 99)):
        adapter = wrapped(tiny("bn"), f"{host}.cifar10", loss=loss, opinion_classes=classes)
        for t in range(3):
            outputs[loss, classes] = adapter(images(t))
        assert adapter.report.stepped and outputs[loss, classes].isfinite().all()
    assert torch.equal(outputs["opinion", None], outputs["opinion", 10])
    for other in (("entropy", None), ("opinion", 99)):
        assert not torch.equal(outputs["opinion", None], outputs[other])


def test_words() -> None:
    with pytest.raises(ValueError, match='`loss` must be one of "entropy", "opinion", got'):
        tta.get_config("tent", loss="come")
    with pytest.raises(ValueError, match="`opinion_classes` must be a whole number of at least 1"):
        tta.get_config("sar", loss="opinion", opinion_classes=0)
