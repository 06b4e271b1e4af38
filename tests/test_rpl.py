"""RPL's loss by hand, and what a config refuses; its traces are in test_golden_updates."""

from __future__ import annotations

import math

import pytest
import torch

import tta
from tests.helpers.batches import images
from tests.helpers.nets import tiny
from tta.methods.rpl import generalized_cross_entropy


@pytest.mark.parametrize("q", [0.01, 0.8, 1.0])
def test_loss_and_gradient_by_hand(q: float) -> None:
    rows = [[2.0, 0.0, -1.0], [0.0, 0.1, 0.0]]
    logits = torch.tensor(rows, requires_grad=True)
    losses = generalized_cross_entropy(logits, q)
    losses.sum().backward()
    assert logits.grad is not None
    for row, loss, gradient in zip(rows, losses.tolist(), logits.grad.tolist(), strict=True):
        total = sum(math.exp(v) for v in row)
        p = [math.exp(v) / total for v in row]
        y = p.index(max(p))
        assert loss == pytest.approx((1 - p[y] ** q) / q, abs=1e-6)
        # d p_y^q / dz_k = q p_y^q ([k = y] - p_k)
        expected = [-(p[y] ** q) * ((k == y) - p[k]) for k in range(3)]
        assert gradient == pytest.approx(expected, abs=1e-6)


def test_the_own_label_becomes_more_probable() -> None:
    adapter = tta.wrap(tiny("bn"), "rpl.cifar10")
    losses = [(adapter(images(0)), adapter.report.loss)[1] for _ in range(4)]
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0]
    assert adapter.report.selected == 8 and adapter.report.stepped


def test_extreme_logits_have_a_finite_loss_and_gradient() -> None:
    logits = torch.tensor([[1e4, 0.0], [0.0, -1e4]], requires_grad=True)
    generalized_cross_entropy(logits, 0.8).sum().backward()
    assert logits.grad is not None and logits.grad.isfinite().all()


@pytest.mark.parametrize("q", [0.0, -1.0, float("nan")])
def test_q_must_be_above_0(q: float) -> None:
    with pytest.raises(ValueError, match="`q` must be a number greater than 0"):
        tta.get_config("rpl", q=q)
