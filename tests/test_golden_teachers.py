"""Replaying traces of CoTTA, PETAL and RMT; the README beside them gives the tolerances."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import tta
from tests.helpers.trace_keys import figures
from tests.helpers.traces_teachers import FOLDER, TeacherTrace
from tta.parts import losses
from tta.parts.augment import View, jitter_colours, make_view
from tta.parts.posterior import Moments, prior
from tta.parts.teachers import OtherWeights, low_values

METHODS = ("cotta", "petal", "rmt")
TRACES = [p for p in sorted(FOLDER.glob("*.npz")) if p.stem.partition("_")[0] in METHODS]
LOGITS = {"atol": 5e-5, "rtol": 1e-4}
STUDENT = {"atol": 5e-5, "rtol": 0.0}
TEACHER = {"atol": 2e-6, "rtol": 0.0}
PIECES = {"atol": 2e-6, "rtol": 1e-5}
close = torch.testing.assert_close


@pytest.fixture(params=TRACES, ids=lambda p: p.stem)
def trace(request) -> TeacherTrace:
    return TeacherTrace(request.param)


def _parameters(adapter: tta.Adapter, trace: TeacherTrace, when: str) -> None:
    state = adapter.state()
    for who, prefix, limit in (
        ("student", "param/", STUDENT),
        ("teacher", "update/teacher.", TEACHER),
    ):
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


FIGURES = figures("set-b")
# Relative and absolute, where they are not those of logits and losses.
LIMITS = {
    "para_loss": (1e-4, 0),
    "fisher_threshold": (5e-3, 0),
    "used_aug": (0, 0),
    "fim_n_restored": (0, 0),
}


def _check_report(trace: TeacherTrace, u: int, report) -> None:
    for key, figure in FIGURES.items():
        if key in trace:
            expected, limits = trace.arrays[key][u], LIMITS.get(key, (1e-4, 5e-5))
            np.testing.assert_allclose(report[figure], expected, *limits)


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


class Piece(TeacherTrace):
    """A trace of single functions, which must be read to the last key."""

    def __init__(self, name: str) -> None:
        super().__init__(FOLDER / f"pieces_{name}.npz")
        provenance = {"hparams_json", "kind", "official_commit", "seeds_cotta", "seeds_roid"}
        self.unread = set(self.arrays) - provenance

    def tensor(self, key: str) -> Tensor:
        """An array, noted as read."""
        self.unread.discard(key)
        return super().tensor(key)


def test_pieces_of_losses() -> None:
    piece = Piece("losses")
    student, teacher = piece.tensor("logits_student"), piece.tensor("logits_teacher")

    def check(key: str, loss, reduction: str = "mean") -> None:
        z = student.clone().requires_grad_()
        values = loss(z)
        close(values.detach(), piece.tensor(f"{key}_per_sample"), **PIECES)
        getattr(values, reduction)().backward()
        close(z.grad, piece.tensor(f"{key}_grad"), **PIECES)

    check("ce_cifar", lambda z: losses.consistency(z, teacher, symmetric=False))
    check("ce_imagenet", lambda z: losses.consistency(z, teacher, symmetric=True))
    for i, alpha in enumerate(piece.tensor("sce_alpha").tolist()):
        check(f"sce_{i}", lambda z, a=alpha: losses.symmetric_cross_entropy(z, teacher, a))
    check("slr", losses.soft_likelihood_ratio, "sum")
    close(losses.entropy(student), piece.tensor("entropy_per_sample"), **PIECES)
    for i, momentum in enumerate(piece.tensor("ema_alpha").tolist()):
        weights = {"w": nn.Parameter(piece.tensor("ema_student"))}
        network = type("Network", (), {"names": lambda self, parameters: ["w"], "wrappers": []})()
        average = OtherWeights(network, weights)
        average.named()["w"].copy_(piece.tensor("ema_teacher"))
        average.follow(momentum)
        close(average.named()["w"], piece.tensor("ema_out")[i], **PIECES)
    projector = nn.Sequential(nn.Linear(32, 128), nn.ReLU(), nn.Linear(128, 128))
    projector.load_state_dict(piece.group("projector"))
    for i, temperature in enumerate(piece.tensor("con_temperature").tolist()):
        features = piece.tensor("con_features").requires_grad_()
        projector.zero_grad()
        loss = losses.contrastive(projector(features), temperature)
        loss.backward()
        close(loss.detach(), piece.tensor(f"con_{i}_loss"), **PIECES)
        close(features.grad, piece.tensor(f"con_{i}_grad_features"), **PIECES)
        grad = projector.get_parameter("0.weight").grad
        close(grad, piece.tensor(f"con_{i}_grad_proj0_weight"), **PIECES)
    assert not piece.unread


def test_pieces_of_petal() -> None:
    piece = Piece("petal")
    shares = piece.tensor("quantile_perc").tolist()
    for tail in ("", "_zeros"):
        for i, share in enumerate(shares):
            mask, threshold = low_values(piece.tensor("quantile_arr" + tail), share)
            close(threshold, piece.tensor("quantile_value" + tail)[i], **PIECES)
            assert int(mask.sum()) == int(piece.tensor("quantile_n_below" + tail)[i])
    snapshots = piece.group("snapshots")
    moments = Moments([s[0] for s in snapshots.values()])
    for i in range(4):
        moments.add(s[i] for s in snapshots.values())
    found = {
        "swa_mean": [m.float() for m in moments.mean],
        "swa_sqmean": [m.float() for m in moments.square],
        "swa_cov": moments.variance(),
    }
    for key, values in found.items():
        for name, value in zip(snapshots, values, strict=True):
            close(value, piece.group(key)[name], **PIECES)
    smallest = min(float(v.min()) for v in found["swa_cov"])
    np.testing.assert_allclose(smallest, float(piece.tensor("cov_min")), atol=2e-6)
    mean, cov = piece.group("swa_mean"), piece.group("swa_cov")
    value, pull = prior(
        [s[3] for s in snapshots.values()],
        [mean[n] for n in snapshots],
        [cov[n] for n in snapshots],
        piece.hparams["damp"],
    )
    close(value, piece.tensor("reg_loss"), **PIECES)
    for name, gradient in zip(snapshots, pull, strict=True):
        close(gradient, piece.group("reg_grad")[name], **PIECES)
    assert piece.unread == {k for k in piece.arrays if k.startswith("weights/")}  # the source model


@pytest.mark.parametrize("draw", ["cotta_0", "cotta_1", "cotta_2", "roid_0"])
def test_pieces_of_augmentation(draw: str) -> None:
    piece = Piece("aug")
    got = piece.group(draw)
    factors = [0.0] * 5
    for operation, factor in zip(got["colour_order"].tolist(), got["colour_factor"], strict=True):
        factors[operation] = float(factor)
    angle, right, down, scale = got["affine_angle_tx_ty_scale"].tolist()
    view = View(
        order=tuple(got["colour_order"].tolist()),
        factors=tuple(factors),
        angle=angle,
        shift=(int(right), int(down)),
        scale=scale,
        sigma=float(got.get("blur_sigma", 0.0)),
        flip=bool(got["flip"]),
    )
    images, padding = piece.tensor("inputs"), "reflect" if draw.startswith("roid") else "edge"
    close(jitter_colours(images, view), got["after_colour"], **PIECES)
    close(make_view(images, view._replace(flip=False), None, padding), got["after_crop"], **PIECES)
    noise = got.get("noise_standard_normal")
    close(make_view(images, view, noise, padding), got["final"], **PIECES)
    assert not {k for k in piece.unread if k.startswith(draw)}
