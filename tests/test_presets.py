"""Presets say what the papers' settings are, with learning rates for any batch size.

A method's test may have its lines of both tables, as literals ``PRESETS`` and ``DIVIDED_BY``.
"""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import numpy as np
import pytest

import tta
from experiments.run.method_strings import parse_method
from tests.helpers.declared import declared
from tests.helpers.nets import tiny
from tta.core.config import UpdateConfig
from tta.core.registry import component
from tta.core.resolve import Request, resolve

pytestmark = pytest.mark.filterwarnings("ignore:.*preset, made for:UserWarning")

SGD = {"optimizer": "sgd", "momentum": 0.9, "nesterov": False, "weight_decay": 0.0, "steps": 1}
NESTEROV = SGD | {"nesterov": True}
ADAM = {"optimizer": "adam", "lr": 1e-3, "betas": (0.9, 0.999), "weight_decay": 0.0, "steps": 1}
ADAM_200 = ADAM | {"lr_batch_size": 200}
RESNET = SGD | {"lr": 2.5e-4, "lr_batch_size": 64, "lr_scaling": "small_batch"}
VIT = SGD | {"lr": 1e-3, "lr_batch_size": 64, "lr_scaling": "linear"}
EATA = {"entropy_margin": 0.4}
COME = {"loss": "opinion", "opinion_classes": 1000}
SAR = {"entropy_margin": 0.4, "rho": 0.05, "reset_threshold": 0.2}
COTTA = {"teacher_momentum": 0.999, "views": 32}
COTTA_CIFAR = ADAM_200 | COTTA | {"restore_probability": 0.01, "symmetric_loss": False}
COTTA_IMAGENET = (
    NESTEROV
    | COTTA
    | {
        "lr": 0.01,
        "restore_probability": 0.001,
        "confidence_threshold": 0.1,
        "symmetric_loss": True,
    }
)
PETAL = {"damping": 1e-6, "restore": "fisher"}
PETAL_CIFAR = PETAL | {"prior_weight": 1e-9, "restore_quantile": 0.03}
RMT = {
    "teacher_momentum": 0.999,
    "temperature": 0.1,
    "projection_dim": 128,
    "weight_source": 1.0,
    "weight_target": 1.0,
    "weight_contrastive": 1.0,
    "warmup_samples": 50_000,
}
MEMO = {"optimizer": "sgd", "momentum": 0.0, "weight_decay": 0.0, "steps": 1, "params": "all"}
ADACONTRAST = NESTEROV | {
    "lr": 2e-4,
    "weight_decay": 1e-4,
    "params": "all",
    "queue_size": 16384,
    "bank_size": 16384,
    "neighbours": 10,
    "teacher_momentum": 0.999,
    "temperature": 0.07,
}
SPA = SGD | {"patch_size": 16, "low_fraction": 0.2, "alpha_lr": 1.0, "lr_batch_size": 64}
GTTA = ADAM_200 | {"lr": 1e-5, "params": "all", "mixup": 1 / 3, "start_confidence": 0.9}
DEYO = {"entropy_margin": 0.5, "weight_margin": 0.4, "patches": 4, "destroy": "patch"}
ITTA = {
    "optimizer": "adam",
    "lr": 5e-6,
    "weight_decay": 0.0,
    "block_depth": 5,
    "consistency_depth": 10,
    "coin": 0.5,
    "beta": 0.1,
}
ROTTA = {"memory_size": 64, "update_every": 64, "teacher_momentum": 0.999, "lr_batch_size": 64}
SANTA = {
    "weight_self_training": 1.0,
    "weight_contrastive": 1.0,
    "temperature": 0.1,
    "projection_dim": 128,
    "params": "norm",
}
SIAM = {"alignment_weight": 1.0}
SHOT = {"lr": 5e-5, "params": "body", "pseudo_threshold": 0.9, "lr_batch_size": 64}
RESERVOIR = {"clusters": 16, "buffer": 64, "quantile": 0.999, "sampling": "reservoir"}
NOTE = {"memory": "pbrs", "memory_size": 64, "update_every": 64, "epochs": 1, "lr": 1e-4}
NOTE_IID = {"memory": "fifo", "lr": 1e-3}
PETTA = {"memory_size": 64, "regulariser": "cosine", "regulariser_weight": 10.0}
PETTA |= {"teacher_rate": 1e-3, "anchor_weight": 1.0, "consistency_loss": "sce"}
PETTA |= {"prototype_rate": 0.05, "lr_batch_size": 64}
CMF = {"hidden_momentum": 0.99, "ensemble_momentum": 0.99, "probs_momentum": 0.9}
ROID = {"probs_momentum": 0.9, "source_momentum": 0.99, "temperature": 1 / 3}
SHEETS: dict[str, dict[str, Any]] = {
    "tent.imagenet": RESNET,
    "tent.imagenet_vit": VIT,
    "tent.come_imagenet": RESNET | COME,
    "tent.come_imagenet_vit": VIT | COME,
    "tent.cifar10": ADAM_200,
    "tent.cifar100": ADAM_200,
    "eata.imagenet": RESNET | EATA | {"redundancy_margin": 0.05, "fisher_weight": 2000.0},
    "eata.imagenet_vit": VIT | EATA | {"redundancy_margin": 0.05, "fisher_weight": 2000.0},
    "eata.come_imagenet": RESNET
    | EATA
    | COME
    | {"redundancy_margin": 0.05, "fisher_weight": 2000.0},
    "eata.come_imagenet_vit": VIT
    | EATA
    | COME
    | {"redundancy_margin": 0.05, "fisher_weight": 2000.0},
    "eata.cifar10": SGD | EATA | {"lr": 0.005, "redundancy_margin": 0.4, "fisher_weight": 1.0},
    "eata.cifar100": ADAM_200 | EATA | {"redundancy_margin": 0.1, "fisher_weight": 1.0},
    "eta.imagenet": RESNET | EATA | {"redundancy_margin": 0.05, "fisher_weight": 0.0},
    "eta.imagenet_vit": VIT | EATA | {"redundancy_margin": 0.05, "fisher_weight": 0.0},
    "eta.come_imagenet": RESNET | EATA | COME | {"redundancy_margin": 0.05, "fisher_weight": 0.0},
    "eta.come_imagenet_vit": VIT | EATA | COME | {"redundancy_margin": 0.05, "fisher_weight": 0.0},
    "eta.cifar10": SGD | EATA | {"lr": 0.005, "redundancy_margin": 0.4, "fisher_weight": 0.0},
    "eta.cifar100": ADAM_200 | EATA | {"redundancy_margin": 0.1, "fisher_weight": 0.0},
    "rdumb.imagenet": RESNET | EATA | {"redundancy_margin": 0.05, "reset_every": 1000},
    "rdumb.cifar10": ADAM_200 | EATA | {"redundancy_margin": 0.4, "reset_every": 1000},
    "rdumb.cifar100": ADAM_200 | EATA | {"redundancy_margin": 0.4, "reset_every": 1000},
    "sar.imagenet": RESNET | SAR,
    "sar.imagenet_vit": VIT | SAR,
    "sar.come_imagenet": RESNET | SAR | COME,
    "sar.come_imagenet_vit": VIT | SAR | COME,
    "sar.cifar10": SGD | SAR | {"lr": 1e-3, "lr_batch_size": 200},
    "sar.cifar100": SGD | SAR | {"lr": 1e-3, "lr_batch_size": 200},
    "cotta.imagenet": COTTA_IMAGENET,
    "cotta.cifar10": COTTA_CIFAR | {"confidence_threshold": 0.92},
    "cotta.cifar100": COTTA_CIFAR | {"confidence_threshold": 0.72},
    "petal.imagenet": COTTA_IMAGENET | PETAL | {"prior_weight": 1e-11, "restore_quantile": 0.003},
    "petal.cifar10": COTTA_CIFAR | PETAL_CIFAR | {"confidence_threshold": 0.92},
    "petal.cifar100": COTTA_CIFAR | PETAL_CIFAR | {"confidence_threshold": 0.72},
    "rmt.imagenet": NESTEROV | RMT | {"lr": 0.01, "lr_batch_size": 64},
    "rmt.cifar10": ADAM_200 | RMT,
    "rmt.cifar100": ADAM_200 | RMT,
    "rmt.domainnet126": NESTEROV | RMT | {"lr": 0.01, "lr_batch_size": 128, "projection_dim": 0},
    "gtta.cifar10": GTTA,
    "gtta.cifar100": GTTA,
    "spa.imagenet": SPA
    | {"lr": 0.0025, "predictor_lr": 0.025, "noise_ratio": 0.1, "mask_ratio": 0.1},
    "spa.imagenet_vit": SPA
    | {"lr": 0.01, "predictor_lr": 0.05, "noise_ratio": 0.4, "mask_ratio": 0.2},
    "roid.imagenet": NESTEROV | ROID | {"lr": 2.5e-4, "lr_batch_size": 64},
    "roid.cifar10": ADAM_200 | ROID,
    "roid.cifar100": ADAM_200 | ROID,
    "rpl.imagenet": NESTEROV | {"lr": 5e-4, "q": 0.8, "lr_batch_size": 64},
    "rpl.cifar10": ADAM_200 | {"q": 0.8},
    "rpl.cifar100": ADAM_200 | {"q": 0.8},
    "shot_im": ADAM | SHOT | {"pseudo_weight": 0.0},
    "shot_im.pseudo": ADAM | SHOT | {"pseudo_weight": 0.1},
    "zerosiam.imagenet": RESNET | SIAM | {"lr": 2.5e-3, "predictor_lr": 2.5e-2},
    "zerosiam.imagenet_vit": VIT | SIAM | {"lr": 5e-3, "predictor_lr": 5e-3},
    "zerosiam.imagenet_vit_small": VIT | SIAM | {"lr": 1e-3, "predictor_lr": 1e-2},
    "zerosiam.imagenet_convnext": VIT | SIAM | {"lr": 2.5e-4, "predictor_lr": 2.5e-3},
    "zerosiam.imagenet_swin": VIT | SIAM | {"lr": 5e-4, "predictor_lr": 2.5e-3},
    "memo.imagenet": MEMO | {"lr": 2.5e-4, "views": 64, "prior_strength": 16},
    "memo.imagenet_vit": MEMO
    | {"optimizer": "adamw", "lr": 1e-5, "weight_decay": 0.01, "views": 64, "prior_strength": None},
    "memo.cifar10": MEMO | {"lr": 0.005, "views": 32, "prior_strength": None},
    "memo.cifar100": MEMO | {"lr": 0.005, "views": 32, "prior_strength": None},
    "santa.imagenet": NESTEROV | SANTA | {"lr": 0.01, "lr_batch_size": 64},
    "santa.cifar10": ADAM_200 | SANTA,
    "santa.cifar100": ADAM_200 | SANTA,
    "santa.domainnet126": NESTEROV | SANTA | {"lr": 0.01, "projection_dim": 0},
    "cmf.imagenet": NESTEROV
    | CMF
    | {"lr": 2e-4, "lr_batch_size": 64, "process_noise": 0.00025 * 53_120 / 38_400},
    "cmf.imagenet_vit": NESTEROV
    | CMF
    | {"lr": 2.5e-4, "lr_batch_size": 64, "process_noise": 0.005},
    "cmf.cifar10": ADAM_200 | CMF,
    "cmf.cifar100": ADAM_200 | CMF,
    "rotta.imagenet": ADAM | ROTTA,
    "rotta.cifar10": ADAM | ROTTA,
    "rotta.cifar100": ADAM | ROTTA,
    "petta.imagenet": ADAM | PETTA | {"consistency_loss": "ce"},
    "petta.cifar10": ADAM | PETTA,
    "petta.cifar100": ADAM | PETTA,
    "petta.domainnet126": ADAM | PETTA | {"consistency_loss": "ce", "regulariser_weight": 1.0},
    "reservoir.imagenet": RESNET | RESERVOIR,
    "reservoir.imagenet_vit": VIT | RESERVOIR | {"buffer": 1024},
    "reservoir.cifar10": ADAM_200 | RESERVOIR,
    "reservoir.cifar100": ADAM_200 | RESERVOIR,
    **{f"note.{data}": ADAM | NOTE for data in ("imagenet", "cifar10", "cifar100")},
    **{f"note.{data}_iid": ADAM | NOTE | NOTE_IID for data in ("imagenet", "cifar10", "cifar100")},
    "deyo.imagenet": RESNET | DEYO | {"plpd_threshold": 0.3},
    "deyo.imagenet_wild": RESNET | DEYO | {"plpd_threshold": 0.2},
    "deyo.imagenet_vit": VIT | DEYO | {"plpd_threshold": 0.2},
    "deyo.waterbirds": RESNET | DEYO | {"lr": 5 * 2.5e-4, "plpd_threshold": 0.5},
    "deyo.coloredmnist": RESNET
    | DEYO
    | {"lr": 5 * 2.5e-4, "plpd_threshold": 0.5, "entropy_margin": 1.0, "weight_margin": 1.0},
    "deyo.cifar10": ADAM_200 | DEYO | {"plpd_threshold": 0.2},
    "deyo.cifar100": ADAM_200 | DEYO | {"plpd_threshold": 0.2},
    "adacontrast.imagenet": ADACONTRAST | {"lr_batch_size": 64},
    "adacontrast.cifar10": ADACONTRAST | {"lr_batch_size": 200},
    "adacontrast.cifar100": ADACONTRAST | {"lr_batch_size": 200},
    "cafa.imagenet": SGD | {"lr": 2.5e-4, "shrinkage": 1e-3},
    "cafa.cifar10": ADAM_200,
    "cafa.cifar100": ADAM_200,
    "core.imagenet": SGD | {"lr": 2.5e-4},
    "core.cifar10": ADAM_200,
    "core.cifar100": ADAM_200,
    "unmix_tns.imagenet": {"components": 16, "batch_size_max": 16, "update_lr": 2.5e-6},
    "unmix_tns.cifar10": {"components": 16, "batch_size_max": 64, "update_lr": 1e-5},
    "unmix_tns.cifar100": {"components": 16, "batch_size_max": 64, "update_lr": 1e-5},
    "unmix_tns.domainnet126": {"components": 16, "batch_size_max": 64, "update_lr": None},
    "unmix_tns.imagenet_mixed": {"components": 128, "batch_size_max": 16, "update_lr": 2.5e-6},
    "unmix_tns.cifar10_mixed": {"components": 128, "batch_size_max": 64, "update_lr": 1e-5},
    "unmix_tns.cifar100_mixed": {"components": 128, "batch_size_max": 64, "update_lr": 1e-5},
    "alpha_bn": {"source_weight": 0.9, "unbiased": True},
    "robust_bn": {"batch_weight": 0.05, "official": False},
    "iabn": {"alpha": 4.0, "learned_statistics": True, "momentum": 0.01},
    "bn_ema": {"momentum": 0.1, "official": False},
    "neo": {"momentum": None, "use_source_mean": False, "balanced": False},
    "neo.continual": {"momentum": 0.1},
    "ttaug": {"views": 32, "plain": True, "source_weight": 0.9},
    "t3a": {"filter_size": 20, "official": False},
    "nhl.imagenet": RESNET | {"tau": 1.0, "eta": 1e-2, "normalise": "none", "modulator": "norm"},
    "nhl.cifar10": ADAM_200,
    "nhl.cifar100": ADAM_200,
    "itta": ITTA | {"loss_scale": 0.1},
    "itta.domainbed": ITTA | {"loss_scale": 1e-6},
    "itta.domainnet": ITTA | {"loss_scale": 0.1},
    "lame": {"affinity": "rbf", "neighbours": 5, "symmetric": False},
    "adanpc.domainbed": {"neighbours": 100, "temperature": 0.1, "confidence_threshold": 0.1},
}

SCALED_FROM_200 = [
    "reservoir",
    "tent",
    "rdumb",
    "sar",
    "cotta",
    "petal",
    "rmt",
    "roid",
    "rpl",
    "santa",
    "cmf",
    "deyo",
    "cafa",
    "core",
    "adacontrast",
    "gtta",
    "nhl",
]
# By how much `wrap(batch_size=1)` divides the rate of each preset.
DIVIDED_BY: dict[float, list[str]] = {
    1: [  # updates are as large whatever the batch size
        *(f"memo.{tag}" for tag in ("imagenet", "imagenet_vit", "cifar10", "cifar100")),
        *(f"note.{data}" for data in ("imagenet", "cifar10", "cifar100")),
        *(f"note.{data}_iid" for data in ("imagenet", "cifar10", "cifar100")),
    ],
    16: [  # twice the rule of the scripts, for single images
        "sar.imagenet",
        "sar.come_imagenet",
        "deyo.imagenet",
        "deyo.imagenet_wild",
        "deyo.waterbirds",
        "deyo.coloredmnist",
        "zerosiam.imagenet",
    ],
    32: [
        "tent.imagenet",
        "reservoir.imagenet",
        "eata.imagenet",
        "eta.imagenet",
        "tent.come_imagenet",
        "eata.come_imagenet",
        "eta.come_imagenet",
        "rdumb.imagenet",
        "nhl.imagenet",
        "sar.imagenet_vit",
        "sar.come_imagenet_vit",
        "deyo.imagenet_vit",
        "zerosiam.imagenet_vit",
        "zerosiam.imagenet_vit_small",
        "zerosiam.imagenet_convnext",
        "zerosiam.imagenet_swin",
    ],
    64: [
        "tent.imagenet_vit",
        "reservoir.imagenet_vit",
        "eata.imagenet_vit",
        "eta.imagenet_vit",
        "tent.come_imagenet_vit",
        "eata.come_imagenet_vit",
        "eta.come_imagenet_vit",
        "eata.cifar10",
        "eta.cifar10",
        "cotta.imagenet",
        "petal.imagenet",
        "rmt.imagenet",
        "roid.imagenet",
        "adacontrast.imagenet",
        "spa.imagenet",
        "spa.imagenet_vit",
        "rpl.imagenet",
        "santa.imagenet",
        "shot_im.pseudo",
        "cmf.imagenet",
        "cmf.imagenet_vit",
        "cafa.imagenet",
        "core.imagenet",
        "rotta.imagenet",
        "rotta.cifar10",
        "rotta.cifar100",
        "petta.imagenet",
        "petta.cifar10",
        "petta.cifar100",
        "petta.domainnet126",
    ],
    128: ["rmt.domainnet126", "santa.domainnet126"],
    200: [
        *(f"{name}.cifar10" for name in SCALED_FROM_200),
        *(f"{name}.cifar100" for name in (*SCALED_FROM_200, "eata", "eta")),
    ],
}

for _own in declared("PRESETS").values():
    SHEETS |= _own
for _own in declared("DIVIDED_BY").values():
    for _factor, _names in _own.items():
        DIVIDED_BY.setdefault(_factor, []).extend(_names)


@pytest.mark.parametrize("name", SHEETS)
def test_a_preset_is_what_the_sheet_says(name: str) -> None:
    config = tta.get_config(name).to_dict()
    expected = {k: list(v) if isinstance(v, tuple) else v for k, v in SHEETS[name].items()}
    assert {k: config[k] for k in expected} == expected


def test_every_preset_of_an_update_is_in_the_table() -> None:
    known = {f"{n}.{tag}" for n in tta.list_methods(slot="update") for tag in component(n).PRESETS}
    assert known == {n for n in SHEETS if "." in n and component(n.split(".")[0]).slot == "update"}


@pytest.mark.parametrize("method", ["tent", "eta", "rdumb", "sar", "deyo"])
@pytest.mark.parametrize("batch_size", [None, 64, 200, 32, 31, 16, 1])
def test_rates_of_resnets_follow_the_scripts(method: str, batch_size: int | None) -> None:
    """(2.5e-4 / 64) * B * 2 below 32 images; SAR's and DeYO's doubled again for one."""
    rate = 2.5e-4
    if batch_size is not None and batch_size < 32:
        rate = 2.5e-4 / 64 * batch_size * 2
    if batch_size == 1 and method in ("sar", "deyo"):
        rate *= 2
    assert _rate(f"{method}.imagenet", batch_size) == pytest.approx(rate)


@pytest.mark.parametrize("method", ["tent", "eta", "sar", "deyo"])
@pytest.mark.parametrize("batch_size", [None, 64, 128, 16, 1])
def test_rates_of_transformers_follow_the_scripts(method: str, batch_size: int | None) -> None:
    """(1e-3 / 64) * B; SAR's and DeYO's doubled for one."""
    rate = 1e-3 / 64 * (batch_size or 64)
    if batch_size == 1 and method in ("sar", "deyo"):
        rate *= 2
    assert _rate(f"{method}.imagenet_vit", batch_size) == pytest.approx(rate)


def test_rates_of_all_updates_for_single_images() -> None:
    """Every preset of every update divides its rate, and by how much."""
    updates = [component(n) for n in tta.list_methods(slot="update")]
    names = {f"{cls.name}.{tag}" for cls in updates if cls.trains_model for tag in cls.PRESETS}  # type: ignore[attr-defined]
    found = {}
    for name in names:
        config = tta.get_config(name)
        assert isinstance(config, UpdateConfig)
        found[name] = round(config.lr / config.for_batch_size(1).lr, 6)
    assert found == {name: factor for factor, group in DIVIDED_BY.items() for name in group}


@pytest.mark.parametrize("name", [*DIVIDED_BY[64], *DIVIDED_BY[128], *DIVIDED_BY[200]])
def test_rates_that_authors_do_not_scale_fall_below_the_batch_size_of_the_preset(
    name: str,
) -> None:
    config = tta.get_config(name)
    assert isinstance(config, UpdateConfig)
    if config.lr_scaling == "linear":
        return  # that of the scripts for transformers, tested above
    size = config.lr_batch_size
    for batch_size, share in ((None, 1), (size // 4, 0.25), (size, 1), (2 * size, 1)):
        assert config.for_batch_size(batch_size).lr == pytest.approx(config.lr * share)
    as_published = config.override(lr_scaling="none")
    assert as_published.for_batch_size(1).lr == config.lr
    assert config.override(lr=0.5).for_batch_size(1).lr == 0.5
    once = config.for_batch_size(1)
    assert once.for_batch_size(1).lr == once.lr


@pytest.mark.parametrize(
    ("norm", "batch_size", "rate"),
    [
        ("unmix_tns.cifar10", None, 1e-5),
        ("unmix_tns.cifar10", 64, 1e-5),
        ("unmix_tns.cifar10", 16, 1e-5 / 4),
        ("unmix_tns.cifar10", 1, 1e-5 / 64),
        ("unmix_tns.imagenet", 16, 2.5e-6),
        ("unmix_tns.imagenet", 1, 2.5e-6 / 16),
    ],
)
@pytest.mark.parametrize("update", ["tent.imagenet", "tent.imagenet_vit", "tent.cifar10"])
def test_rates_on_unmix_tns_fall_below_its_batch_size(
    norm: str, batch_size: int | None, rate: float, update: str
) -> None:
    found = tta.wrap(tiny("bn"), norm=norm, update=update, batch_size=batch_size)
    assert isinstance(found.config.update, UpdateConfig)
    assert found.config.update.lr == pytest.approx(rate)
    fixed = tta.wrap(tiny("bn"), norm=norm, update=update, batch_size=batch_size, lr_scaling="none")
    assert isinstance(fixed.config.update, UpdateConfig)
    assert fixed.config.update.lr == tta.get_config(norm).to_dict()["update_lr"]


def test_tables_keep_the_rates_of_the_authors() -> None:
    """The runner compares methods as published, unless a field says otherwise."""

    def rate(text: str, classes: int = 10) -> float:
        adapter = parse_method(text, classes).wrap(tiny("bn"), batch_size=16)
        assert isinstance(adapter.config.update, UpdateConfig)
        return adapter.config.update.lr

    assert rate("tent") == 1e-3
    assert rate("unmix_tns+tent") == 1e-5
    assert rate("tent[lr_scaling='linear_below']") == pytest.approx(1e-3 * 16 / 200)
    assert rate("tent[lr=0.5]") == 0.5
    assert rate("tent.imagenet") == pytest.approx(2.5e-4 / 2)  # theirs


def _rate(name: str, batch_size: int | None) -> float:
    update = tta.wrap(tiny("gn"), name, batch_size=batch_size).config.update
    assert isinstance(update, UpdateConfig) and math.isfinite(update.lr)
    return update.lr


@pytest.mark.parametrize("name", tta.list_methods())
def test_numbers_of_numpy_are_held_as_numbers_that_json_knows(name: str) -> None:
    config = tta.get_config(name)
    given: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if type(value) in (int, float):
            given[field.name] = (np.int64 if isinstance(value, int) else np.float64)(value)
    changed = config.replace(**given)
    for key in given:
        assert type(getattr(changed, key)) is type(getattr(config, key)), key
    json.dumps(changed.to_dict())


def test_a_number_of_numpy_where_the_default_is_none() -> None:
    for name, field in (("neo", "momentum"), ("unmix_tns", "momentum"), ("pea", "drift_limit")):
        assert type(getattr(tta.get_config(name, **{field: np.float32(0.5)}), field)) is float


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("cotta", {"momentum": 0.0, "nesterov": False}),
        ("reservoir", {"buffer": 4, "clusters": 2}),
        ("dda", {"steps": 150, "respacing": 200}),
    ],
)
def test_fields_that_are_checked_together_are_given_in_any_order(
    name: str, fields: dict[str, Any], turned: bool
) -> None:
    given = dict(reversed(fields.items())) if turned else fields
    config = resolve(tiny("bn"), Request(recipe=name, overrides=given, num_classes=10))
    (part,) = [p for p in config.components.values() if p.name == name]
    assert part.to_dict().items() >= fields.items()
