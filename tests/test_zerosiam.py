"""ZeroSiam: its divergence by hand, both learning rates, and what it does not train."""

from __future__ import annotations

import math

import pytest
import torch

import tta
from tests.helpers.batches import images
from tests.helpers.nets import tiny
from tests.helpers.wild import Cosine
from tta.methods.zerosiam import symmetric_divergence

# What the keys of its traces are, see `tests/helpers/trace_keys.py`.
TRACE_KEYS = {
    "set-e": {
        "arrays": {
            "entropy_online": "report.entropy",
            "alignment": "report.alignment",
            "predictor_after": "state: update/predictor.weight",
        },
        "hparams": {
            "params.alignment_weight": "field: of the same name",
            "params.lr_predictor": "field: predictor_lr",
            "params.episodic": "none: always False",
        },
    },
}

pytestmark = pytest.mark.filterwarnings("ignore:.*preset, made for:UserWarning")


def test_divergence_by_hand() -> None:
    one, other = [2.0, 0.0, -1.0], [0.0, 1.0, 0.0]
    p, q = ([math.exp(v) / sum(map(math.exp, row)) for v in row] for row in (one, other))
    expected = sum(a * math.log(a / b) + b * math.log(b / a) for a, b in zip(p, q, strict=True))
    found = symmetric_divergence(torch.tensor([one]), torch.tensor([other]))
    assert found.tolist() == pytest.approx([expected], abs=1e-6)


def test_the_first_step_is_that_of_entropy_alone() -> None:
    """The predictor is the identity, where the divergence and its gradient are 0."""
    fields = {"lr": 0.05, "optimizer": "sgd"}
    one = tta.wrap(tiny("bn"), "zerosiam", alignment_weight=5.0, predictor_lr=0.1, **fields)
    plain = tta.wrap(tiny("bn"), "tent", **fields)
    torch.testing.assert_close(one(images(0)), plain(images(0)))
    for name, p in plain.parameters_adapted.items():
        torch.testing.assert_close(one.parameters_adapted[name], p, atol=1e-6, rtol=1e-5)
    assert one.report.alignment == pytest.approx(0, abs=1e-6)
    one(images(0))
    assert one.report.alignment > 1e-6
    nats = one.report.entropy
    assert one.report.loss == pytest.approx(nats + 5 * one.report.alignment, rel=1e-5)


@pytest.mark.parametrize(
    ("preset", "batch_size", "lr", "predictor_lr"),
    [
        ("imagenet", None, 2.5e-3, 2.5e-2),
        ("imagenet", 64, 2.5e-3, 2.5e-2),
        ("imagenet", 16, 2.5e-3 / 2, 2.5e-2 / 2),
        ("imagenet", 1, 2.5e-3 / 16, 2.5e-2 / 16),
        ("imagenet_vit", 16, 5e-3 / 4, 5e-3 / 4),
        ("imagenet_vit", 128, 1e-2, 1e-2),
        ("imagenet_swin", 1, 5e-4 / 32, 2.5e-3 / 32),
    ],
)
def test_rates_of_the_scripts(preset, batch_size, lr, predictor_lr) -> None:
    adapter = tta.wrap(tiny("gn"), f"zerosiam.{preset}", batch_size=batch_size)
    config = adapter.config.update.to_dict()  # type: ignore[union-attr]
    assert config["lr"] == pytest.approx(lr)
    assert config["predictor_lr"] == pytest.approx(predictor_lr)
    groups = adapter.update.optimizer.param_groups  # type: ignore[union-attr]
    rates = {len(g["params"]): g["lr"] for g in groups}
    assert rates[1 if len(groups) == 2 else 5] == pytest.approx(predictor_lr)
    again = tta.AdapterConfig.from_json(adapter.config.to_json())
    assert again == adapter.config


def test_a_rate_that_is_named_is_not_scaled() -> None:
    adapter = tta.wrap(tiny("gn"), "zerosiam.imagenet_vit", batch_size=16, predictor_lr=0.3)
    config = adapter.config.update.to_dict()  # type: ignore[union-attr]
    assert config["predictor_lr"] == 0.3 and config["lr"] == pytest.approx(5e-3 / 4)
    adapter = tta.wrap(tiny("gn"), "zerosiam.imagenet_vit", batch_size=16, lr=0.3)
    config = adapter.config.update.to_dict()  # type: ignore[union-attr]
    assert config["predictor_lr"] == pytest.approx(5e-3 / 4) and config["lr"] == 0.3


def test_the_linear_layer_stays_as_it_is() -> None:
    adapter = tta.wrap(tiny("gn"), "zerosiam", params="all", lr=0.01, predictor_lr=0.01)
    before = adapter.state()
    adapter(images(0))
    adapter(images(1))
    after = adapter.state()
    moved = {k for k in before if not torch.equal(before[k], after[k])}
    assert {"param/layer1.0.weight", "update/predictor.weight"} <= moved
    assert not {"param/fc.weight", "param/fc.bias"} & moved


def test_words() -> None:
    with pytest.raises(ValueError, match="must make its logits by a linear layer for zerosiam"):
        tta.wrap(Cosine(), update="zerosiam", num_classes=10, features="neck")
    with pytest.raises(ValueError, match="`predictor_lr` must be"):
        tta.get_config("zerosiam", predictor_lr=-1)
    with pytest.raises(ValueError, match="`predictor_lr_scaling` must be one of"):
        tta.get_config("zerosiam", predictor_lr_scaling="cubic")
