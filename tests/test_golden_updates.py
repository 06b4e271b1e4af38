"""Replaying traces of single updates; the READMEs beside them give the tolerances."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import tta
from tests.helpers.recorded import recordings
from tests.helpers.traces import Trace
from tests.helpers.update_traces import (
    LOGITS,
    WEIGHTS,
    check_source,
    check_state,
    check_weights,
    replay,
)
from tta.parts.prototypes import nearest_class

ROID = recordings("set-e", "roid_*")
ROTTA = recordings("set-e", "rotta_*")
DEYO = recordings("set-e", "deyo_*")
RPL = recordings("set-e", "rpl_*")
SHOT = recordings("set-d", "shot_*")
ZEROSIAM = recordings("set-e", "zerosiam_*")
SANTA = recordings("set-e", "santa_*")
TTAUG = recordings("set-e", "ttaug_*")
RAW = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
close = torch.testing.assert_close


def _named(paths: list[Path]):
    return pytest.mark.parametrize("path", paths, ids=lambda p: p.stem)


@_named([*ROID, *ROTTA, *DEYO, *RPL, *SHOT, *ZEROSIAM, *SANTA, *TTAUG])
def test_source_outputs(path: Path) -> None:
    check_source(Trace(path))


@_named(DEYO)
def test_deyo(path: Path) -> None:
    trace = Trace(path)
    p = trace.params
    kinds = {"patch": "patch", "pixel": "pixel", "occ": "occlusion"}
    config = tta.get_config(
        "deyo",
        entropy_margin=p["entropy_margin"],
        weight_margin=p["weight_margin"],
        plpd_threshold=p["plpd_threshold"],
        destroy=kinds[p["aug_type"]],
        patches=p["patch_len"],
        occlusion=p["occlusion_size"] / trace.tensor("inputs").shape[-1],
        official=True,
        **trace.optimizer(),
    )

    def draws(name: str, shape: torch.Size, call: int) -> torch.Tensor:
        assert name == "patch_order"
        order = trace.tensor("patch_order")[call]
        return order[: shape[0]]

    adapter = tta.wrap(trace.model(), update=config, draws=draws)
    start = adapter.state()["rng"]
    figures = {"n_reliable": "reliable", "n_selected": "selected", "selected": "kept"}
    for _ in replay(trace, adapter, figures | {"loss": "loss"}):
        pass
    assert torch.equal(adapter.state()["rng"], start)  # nothing was drawn


@_named(ROID)
def test_roid(path: Path) -> None:
    trace = Trace(path)
    p = trace.params
    config = tta.get_config(
        "roid",
        temperature=p["temperature"],
        probs_momentum=p["probs_momentum"],
        source_momentum=p["source_momentum"],
        consistency=p["use_consistency"],
        **trace.optimizer(),
    )
    adapter = tta.wrap(
        trace.model(),
        update=config,
        output=None if p["use_prior_correction"] else "source",
        batch_size=p["configured_batch"],
        augment=trace.augment,
        **RAW,
    )
    limits = {"atol": 5e-5, "rtol": 2e-4}  # of the loss, whose logarithm magnifies rounding
    for t in replay(trace, adapter, {"kept": "kept", "loss": "loss"}, limits):
        close(adapter.state()["update/ema_probs"], trace.tensor("ema_probs")[t], **LOGITS)


@_named(ROTTA)
def test_rotta(path: Path) -> None:
    trace = Trace(path)
    p = trace.params
    config = tta.get_config(
        "rotta",
        memory_size=p["memory_size"],
        update_every=p["update_every"],
        teacher_momentum=1 - p["nu"],
        timeliness=p["lambda_t"],
        uncertainty=p["lambda_u"],
        **trace.optimizer(),
    )
    adapter = tta.wrap(
        trace.model(),
        norm=tta.get_config("robust_bn", batch_weight=p["alpha"]),
        update=config,
        augment=trace.augment,
        **RAW,
    )
    stream, before = trace.tensor("inputs").flatten(0, 1), 0
    for t in replay(trace, adapter, {}):
        state, updates = adapter.state(), int(trace.arrays["updates_after"][t])
        if updates > before:
            close(torch.tensor(adapter.report.loss), trace.tensor("loss")[updates - 1], **LOGITS)
        if before == 0 and updates == 1:
            check_weights(trace, adapter, "student_after_update0")
            teacher = trace.group("teacher_after_update0")
            check_state(adapter, _teacher(adapter, teacher), atol=1e-5, rtol=0)
        before = updates
        kept = trace.arrays["memory_labels"][t] >= 0
        images = stream[trace.arrays["memory_image"][t][kept]]
        theirs = _sorted(
            trace.tensor("memory_labels")[t][kept],
            trace.tensor("memory_ages")[t][kept],
            trace.tensor("memory_entropy")[t][kept],
            images.flatten(1).double().sum(1),
        )
        mine = state["update/bank.labels"] >= 0
        found = _sorted(
            *(state[f"update/bank.{key}"][mine] for key in ("labels", "ages", "entropies")),
            (state["update/memory"][mine].float() / 255).flatten(1).double().sum(1),
        )
        for one, other, limit in zip(found, theirs, (0, 0, 5e-5, 1e-4), strict=True):
            close(one, other, atol=limit, rtol=0)
    check_weights(trace, adapter, "student_final")
    check_state(adapter, _teacher(adapter, trace.group("teacher_final")), atol=1e-5, rtol=0)
    for whose, prefix in (("student", "norm/"), ("teacher", "update/teacher.")):
        for name, value in trace.group(f"bn_{whose}_final").items():
            layer, _, kind = name.rpartition(".running_")
            check_state(adapter, {f"{prefix}{layer}.{kind}": value}, atol=1e-5, rtol=0)


@_named(RPL)
def test_rpl(path: Path) -> None:
    trace = Trace(path)
    config = tta.get_config("rpl", q=trace.params["q"], **trace.optimizer())
    adapter = tta.wrap(trace.model(), update=config)
    for _ in replay(trace, adapter, {"loss": "loss"}):
        pass


@_named(SHOT)
def test_shot(path: Path) -> None:
    trace = Trace(path)
    p = trace.params
    config = tta.get_config(
        "shot_im",
        pseudo_weight=p["theta"] if trace.hparams["method"] == "shot_pl" else 0.0,
        pseudo_threshold=p["beta"],
        steps=p["steps"],
        **trace.optimizer(),
    )
    adapter = tta.wrap(trace.model(), update=config)
    assert not any(name.startswith("fc.") for name in adapter.parameters_adapted)
    figures = {"loss": "loss"} | ({"n_confident": "confident"} if "n_confident" in trace else {})
    for _ in replay(trace, adapter, figures, {"atol": 2e-4, "rtol": 1e-4}):
        pass


@_named(ZEROSIAM)
def test_zerosiam(path: Path) -> None:
    trace = Trace(path)
    p = trace.params
    config = tta.get_config(
        "zerosiam",
        alignment_weight=p["alignment_weight"],
        predictor_lr=p["lr_predictor"],
        steps=p["steps"],
        **trace.optimizer(),
    )
    adapter = tta.wrap(trace.model(), update=config)
    figures = {"loss": "loss", "entropy_online": "entropy", "alignment": "alignment"}
    predictors = []
    for _ in replay(trace, adapter, figures):
        predictors.append(adapter.state()["update/predictor.weight"])
    close(torch.stack([predictors[0], predictors[-1]]), trace.tensor("predictor_after"), **WEIGHTS)
    adapter.reset()
    start = adapter.state()["update/predictor.weight"]
    assert torch.equal(start, torch.eye(len(start)))


@_named(SANTA)
def test_santa(path: Path) -> None:
    trace = Trace(path)
    p = trace.params
    config = tta.get_config(
        "santa",
        weight_self_training=p["lambda_ce_trg"],
        weight_contrastive=p["lambda_cont"],
        temperature=p["temperature"],
        projection_dim=p["projection_dim"],
        **trace.optimizer(),
    )
    start = {f"projector_init/{n}": v for n, v in trace.group("projector_init").items()}
    adapter = tta.wrap(
        trace.model(),
        update=config,
        source=tta.SourceStatistics(prototypes=trace.tensor("prototypes")),
        augment=trace.augment,
        draws=lambda name, shape, call: start[name],
        **RAW,
    )
    assert torch.equal(adapter.constants()["update/prototypes"], trace.tensor("prototypes"))
    keys = ("loss_self_training", "loss_contrastive")
    figures = {"loss": "loss"} | {key: key.removeprefix("loss_") for key in keys}
    images, nearest = trace.tensor("inputs"), []
    adapter.network.model.get_submodule("fc").register_forward_pre_hook(
        lambda _, args: nearest.append(nearest_class(args[0], trace.tensor("prototypes")))
    )
    for t in replay(trace, adapter, figures):
        assert torch.equal(nearest[0], trace.tensor("prototype_index")[t])  # of the first pass
        nearest.clear()
    projector = {f"update/projector.{n}": v for n, v in trace.group("projector_final").items()}
    check_state(adapter, projector, **WEIGHTS)
    adapter.reset()
    close(adapter(images[0]), trace.tensor("outputs")[0], **LOGITS)


@_named(TTAUG)
def test_ttaug(path: Path) -> None:
    """As one batch, and image by image."""
    trace = Trace(path)
    p = trace.params
    images, expected = trace.tensor("inputs"), trace.tensor("outputs")
    fields = {"views": p["views"], "plain": False, "source_weight": 1 - p["alpha"]}
    for size in (len(images), 1, 5):
        adapter = tta.wrap(trace.model(), "ttaug", augment=trace.augment, **fields, **RAW)
        for x, y in zip(images.split(size), expected.split(size), strict=True):
            close(adapter(x), y, **LOGITS)


def _teacher(adapter: tta.Adapter, values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Keys of the state for a teacher's parameters; those that are not trained have none."""
    state = adapter.state()
    return {key: v for n, v in values.items() if (key := f"update/teacher.{n}") in state}


def _sorted(labels: torch.Tensor, ages: torch.Tensor, *more: torch.Tensor):
    """Entries of a memory by label and age, which no two images of a stream share."""
    order = (labels * 10**6 + ages).argsort()
    return [values[order] for values in (labels, ages, *more)]
