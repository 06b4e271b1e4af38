"""Replaying traces of CoTTA, PETAL and RMT; the README beside them gives the tolerances."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import tta
from tests.traces_teachers import FOLDER, KEYS, TeacherTrace

TRACES = [p for p in sorted(FOLDER.glob("*.npz")) if p.stem.split("_")[0] in ("cotta", "petal", "rmt")]
LOGITS = {"atol": 5e-5, "rtol": 1e-4}
STUDENT = {"atol": 5e-5, "rtol": 0.0}
TEACHER = {"atol": 2e-6, "rtol": 0.0}
PIECES = {"atol": 2e-6, "rtol": 1e-5}
close = torch.testing.assert_close


@pytest.fixture(params=TRACES, ids=lambda p: p.stem)
def trace(request) -> TeacherTrace:
    return TeacherTrace(request.param)


def test_every_key_is_accounted_for(trace: TeacherTrace) -> None:
    assert {key.partition("/")[0] for key in trace.arrays} <= set(KEYS)


def _parameters(adapter: tta.Adapter, trace: TeacherTrace, when: str) -> None:
    state = adapter.state()
    for who, prefix, limit in (("student", "param/", STUDENT), ("teacher", "update/teacher.", TEACHER)):
        for name, value in trace.group(f"{who}_{when}").items():
            close(state[prefix + name], value, **limit)


def test_trace(trace: TeacherTrace, monkeypatch) -> None:
    """Outputs, decisions, losses, students and teachers, update by update."""
    adapter = trace.adapter()
    assert adapter.update is not None
    seen = _watch_restoration(monkeypatch)
    _parameters(adapter, trace, "after_warmup")
    if "prototypes" in trace:
        close(adapter.constants()["update/prototypes"], trace.tensor("prototypes"), **LOGITS)
    for t, x in enumerate(trace.tensor("inputs")):
        if trace.hparams.get("episodic") or t in trace.hparams["reset_before"]:
            adapter.reset()
        with torch.no_grad():
            before = adapter.update.network(x)
            teacher = adapter.update.teacher.predict(x)  # type: ignore[union-attr]
        y = adapter(x)
        close(y, trace.tensor("outputs")[t], **LOGITS)
        correct = (y.argmax(1) == trace.tensor("labels")[t]).sum()
        assert int(correct) == int(trace.tensor("correct")[t])
        if t == 0:
            _parameters(adapter, trace, "after_step0")
        for key, value in (("student_logits", before.logits), ("teacher_logits", teacher.logits)):
            if key in trace and trace.hparams["steps"] == 1:
                close(value, trace.tensor(key)[t], **LOGITS)
        if "prototype_index" in trace:
            nearest = adapter.update.nearest(before.features)  # type: ignore[union-attr]
            assert torch.equal(nearest, trace.tensor("prototype_index")[t])
        _check_report(trace, (t + 1) * trace.hparams["steps"] - 1, adapter.report)
    _parameters(adapter, trace, "final")
    for name, value in trace.group("projector_final").items():
        close(adapter.state()[f"update/projector.{name}"], value, **STUDENT)
    _check_fisher(trace, seen)


FIGURES = {
    "loss_ent": "consistency",
    "loss_total": "loss",
    "loss_contrastive": "contrastive",
    "loss_sce_orig": "self_training",
    "loss_sce_aug": "self_training_view",
    "loss_ce_src": "source",
    "anchor_conf": "anchor_confidence",
}


def _check_report(trace: TeacherTrace, u: int, report) -> None:
    for key, figure in FIGURES.items():
        if key in trace:
            np.testing.assert_allclose(report[figure], trace.arrays[key][u], 1e-4, 5e-5)
    if "used_aug" in trace:
        assert report.augmented == bool(trace.arrays["used_aug"][u])
    if "para_loss" in trace:
        np.testing.assert_allclose(report.prior, trace.arrays["para_loss"][u], rtol=1e-4)
    if "fisher_threshold" in trace:
        expected = trace.arrays["fisher_threshold"][u]
        np.testing.assert_allclose(report.fisher_threshold, expected, rtol=5e-3)
        assert report.restored == trace.arrays["fim_n_restored"][u]


def _watch_restoration(monkeypatch) -> list[tuple[Tensor, Tensor]]:
    """Record (Fisher values, mask) of every update of PETAL."""
    from tta.methods import petal

    seen, original = [], petal.low_values

    def low_values(values: Tensor, share: float) -> tuple[Tensor, Tensor]:
        mask, threshold = original(values, share)
        seen.append((values.clone(), mask))
        return mask, threshold

    monkeypatch.setattr(petal, "low_values", low_values)
    return seen


def _check_fisher(trace: TeacherTrace, seen: list[tuple[Tensor, Tensor]]) -> None:
    if "fisher_threshold" not in trace:
        assert not seen
        return
    close(seen[0][0], trace.tensor("fisher_flat_first"), rtol=1e-3, atol=1e-9)
    close(seen[-1][0], trace.tensor("fisher_flat_last"), rtol=1e-3, atol=1e-9)
    for (_, mask), expected in zip(seen, trace.tensor("fim_restore_mask_flat"), strict=True):
        assert int((mask != expected).sum()) <= 3


def _piece(name: str) -> TeacherTrace:
    return TeacherTrace(FOLDER / f"pieces_{name}.npz")
