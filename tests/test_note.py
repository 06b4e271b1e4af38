"""NOTE and its norm rule: pieces of the authors' code, formulas by hand, and what is refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

import tta
from tests.helpers.batches import images
from tests.helpers.nets import tiny
from tests.helpers.recorded import GOLDEN, Recorded
from tta.core.component import Context
from tta.core.norm_layers import learning_pass
from tta.methods.note import Iabn, IabnConfig
from tta.parts.statistics import instance_aware

PIECE = {"atol": 2e-6, "rtol": 2e-6}
close = torch.testing.assert_close


# The norm rule ------------------------------------------------------------------------------


def _layer(piece: Recorded) -> Any:
    base: Any = nn.BatchNorm2d(len(piece.tensor("weight")), eps=piece.hparams["eps"])
    with torch.no_grad():
        for name in ("running_mean", "running_var", "weight", "bias"):
            getattr(base, name).copy_(piece.tensor(name))
    return base


def test_the_recorded_layer() -> None:
    piece = Recorded(GOLDEN / "set-d" / "pieces_iabn.npz")
    base, h = _layer(piece), piece.hparams
    config = IabnConfig(alpha=h["iabn_k"], momentum=h["momentum"])
    rule = Iabn(config, base, Context(num_classes=2))
    close(rule(piece.tensor("x"), base), piece.tensor("y_eval"), **PIECE)
    x = piece.tensor("x").requires_grad_()
    y = rule.learn(x, base)
    close(y, piece.tensor("y_train"), **PIECE)
    (y * piece.tensor("probe")).sum().backward()
    close(x.grad, piece.tensor("grad_x_train"), **PIECE)
    close(base.weight.grad, piece.tensor("grad_weight_train"), atol=2e-4, rtol=0)
    close(rule.mean, piece.tensor("running_mean_after"), **PIECE)
    close(rule.var, piece.tensor("running_var_after"), **PIECE)


def test_statistics_of_an_image_by_hand() -> None:
    """One channel of 4 values: chance is 1 for the mean and about 1.63 for the variance."""
    x = torch.tensor([[[[1.0, 2.0], [3.0, 6.0]]]])  # mean 3, unbiased variance 14 / 3
    mean, variance = torch.tensor([0.5]), torch.tensor([2.0])
    y = instance_aware(x, mean, variance, None, None, alpha=math.sqrt(2), eps=0.0)
    m = 0.5 + (2.5 - math.sqrt(2) * math.sqrt(2 / 4))
    v = 2.0 + (14 / 3 - 2.0) - math.sqrt(2) * 2.0 * math.sqrt(2 / 3)
    close(y, (x - m) / math.sqrt(v))
    wide = instance_aware(x, mean, variance, None, None, alpha=10.0, eps=0.0)
    close(wide, (x - 0.5) / math.sqrt(2.0))


def test_one_value_has_the_given_statistics() -> None:
    x, mean, variance = torch.randn(5, 3), torch.randn(3), torch.rand(3) + 0.5
    weight, bias = torch.randn(3), torch.randn(3)
    expected = (x - mean) / (variance + 1e-5).sqrt() * weight + bias
    for given in (x, x[..., None, None]):
        y = instance_aware(given, mean, variance, weight, bias, alpha=4.0, eps=1e-5)
        close(y.flatten(1), expected)


def test_images_do_not_depend_on_each_other_and_statistics_are_at_rest() -> None:
    adapter = tta.wrap(tiny("bn"), norm="iabn")
    start = adapter.state()
    together = adapter(images(0))
    alone = torch.cat([adapter(x[None]) for x in images(0)])
    close(together, alone, atol=1e-5, rtol=1e-5)
    assert all(torch.equal(start[k], v) for k, v in adapter.state().items())
    adapter = tta.wrap(tiny("bn"), norm="iabn", update="tent.cifar10")
    adapter(images(0))
    state = adapter.state()
    assert all(torch.equal(start[k], state[k]) for k in start if k.startswith("norm/"))


def test_statistics_move_in_a_learning_pass_alone() -> None:
    adapter = tta.wrap(tiny("bn"), norm="iabn", momentum=0.25)
    rule: Any = adapter.norm_layers["layer1.1"].rule
    before, x = rule.mean.clone(), images(3)
    with torch.no_grad(), learning_pass(adapter.network.wrappers):
        adapter.network(x)
    expected = adapter.model.layer1[0](x).mean((0, 2, 3))
    close(rule.mean, 0.75 * before + 0.25 * expected, atol=1e-6, rtol=1e-5)
    assert rule.override is None


def test_statistics_of_the_batch() -> None:
    """A large alpha leaves batch statistics with the unbiased variance."""
    config = tta.get_config("iabn", learned_statistics=False, alpha=1e6)
    adapter = tta.wrap(tiny("bn"), norm=config)
    rule: Any = adapter.norm_layers["layer1.1"].rule
    x = torch.randn(4, len(rule.mean), 5, 5)
    y, base = rule(x, rule_base := adapter.norm_layers["layer1.1"].base), rule_base
    var, mean = torch.var_mean(x, (0, 2, 3), correction=1)
    expected: Any = nn.functional.batch_norm(x, mean, var, base.weight, base.bias, eps=base.eps)
    close(y, expected, atol=1e-5, rtol=1e-5)
    with pytest.warns(UserWarning, match="at least 2 images for batch statistics"):
        adapter(images(0, 1))


def test_what_a_plain_layer_cannot_hold_is_refused() -> None:
    adapter = tta.wrap(tiny("bn"), norm="iabn")
    with pytest.raises(ValueError, match="iabn"):
        adapter.unwrap(keep=True)
    with pytest.raises(ValueError, match="must find BatchNorm layers"):
        tta.wrap(tiny("ln"), norm="iabn")
    for field in ({"alpha": -1.0}, {"momentum": 1.5}, {"learned_statistics": 1}):
        with pytest.raises((TypeError, ValueError), match=f"`{next(iter(field))}` must be"):
            tta.get_config("iabn", **field)
