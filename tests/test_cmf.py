"""CMF: the filter by hand, and what reset puts back."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import tta
from tests.helpers.batches import images
from tests.helpers.nets import tiny
from tta.methods.cmf import gain

# What the keys of its traces are, see `tests/helpers/trace_keys.py`.
TRACE_KEYS = {
    "set-d": {
        "arrays": {
            "beta": "report.gain",
            "hidden_var": "state: update/hidden_variance",
            r"model_after_step0": "state: param/<name>",
            r"hidden_(after_step0|final)": "state: update/hidden.<name>",
        },
        "hparams": {
            "params.alpha": "field: hidden_momentum",
            "params.gamma": "field: ensemble_momentum",
            "params.q": "field: process_noise",
            r"params\.(Q|trainable)": "none: what process_noise was made of",
            "params.type": "none: both types are one",
            "params.momentum_probs": "field: probs_momentum",
            "params.precision": "none: float32 here",
            "params.use_consistency": "field: consistency",
            "params.use_prior_correction": "wrap: output, the one that the update brings",
        },
    },
}

RAW: dict[str, Any] = {"mean": (0.0,), "std": (1.0,)}
NAME = "layer1.1.weight"
close = torch.testing.assert_close


def _cmf(**fields) -> tta.Adapter:
    config = tta.get_config("cmf", **{"lr": 0.05, "process_noise": 0.08} | fields)
    return tta.wrap(tiny("bn"), update=config, **RAW)


def test_the_gain_by_hand() -> None:
    assert float(gain(torch.tensor(0.03), 0.01)) == pytest.approx(0.99 / 1.02)
    assert float(gain(torch.tensor(5.0), 0.01)) == pytest.approx(0.89)
    assert float(gain(torch.tensor(5e-5), 5e-5)) == 1.0
    assert float(gain(torch.tensor(1.0), 1.0)) == pytest.approx(0.89)


def test_two_steps_of_the_filter() -> None:
    """With a share of 1 the weights are those that the filter has seen."""
    adapter = _cmf(hidden_momentum=0.7, ensemble_momentum=1.0)
    source = adapter.state()[f"param/{NAME}"]
    hidden, variance = source.clone(), 0.0
    for t in range(2):
        adapter(images(t))
        weights = adapter.state()[f"param/{NAME}"]
        hidden = 0.7 * hidden + 0.3 * source
        variance = 0.49 * variance + 0.08
        share = max(0.92 / (variance + 0.92), 0.89)
        hidden = share * hidden + (1 - share) * weights
        variance *= share
        assert adapter.report.gain == pytest.approx(share, abs=1e-6)
        close(adapter.state()[f"update/hidden.{NAME}"], hidden, atol=1e-6, rtol=0)
        assert float(adapter.state()["update/hidden_variance"]) == pytest.approx(variance, abs=1e-6)
    assert not torch.equal(hidden, source)


def test_where_no_weight_moves_there_is_no_gain() -> None:
    adapter = _cmf(lr=0.0)
    adapter(images(0))
    assert math.isnan(adapter.report.gain) and not adapter.report.stepped


def test_weights_are_drawn_to_the_hidden_model() -> None:
    free, drawn = _cmf(ensemble_momentum=1.0), _cmf(ensemble_momentum=0.6)
    for adapter in (free, drawn):
        adapter(images(0))
    hidden = drawn.state()[f"update/hidden.{NAME}"]
    stepped = free.state()[f"param/{NAME}"]
    close(drawn.state()[f"param/{NAME}"], 0.6 * stepped + 0.4 * hidden, atol=1e-6, rtol=0)
    close(hidden, free.state()[f"update/hidden.{NAME}"])
    assert not torch.equal(stepped, hidden)


@pytest.mark.parametrize("official", [False, True])
def test_an_official_reset_keeps_variance_and_average(official: bool) -> None:
    adapter = _cmf(official=official)
    start = adapter.state()
    adapter(images(0))
    moved = adapter.state()
    adapter.reset()
    after = adapter.state()
    for key in ("update/hidden_variance", "update/ema_probs"):
        assert torch.equal(after[key], (moved if official else start)[key])
        assert not torch.equal(moved[key], start[key])
    for key in (f"param/{NAME}", f"update/hidden.{NAME}"):
        assert torch.equal(after[key], start[key])


@pytest.mark.parametrize("name", ["hidden_momentum", "ensemble_momentum", "process_noise"])
def test_shares_are_shares(name: str) -> None:
    with pytest.raises(ValueError, match=f"`{name}` must be"):
        tta.get_config("cmf", **{name: 1.5})
