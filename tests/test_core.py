"""Core against its definition: the correlation by loops, and two steps on alpha-BN."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import tta
from tests.helpers.batches import images
from tests.helpers.nets import tiny
from tta.parts.losses import class_correlation

close = torch.testing.assert_close


def _by_loops(p: Tensor, balanced: bool) -> Tensor:
    samples, classes = p.shape
    r = [
        [sum(p[b, i] * p[b, j] for b in range(samples)) / samples for j in range(classes)]
        for i in range(classes)
    ]
    total = torch.zeros(())
    for i in range(classes):
        off = sum(r[i][j] for j in range(classes) if j != i)
        total = total + (off / sum(r[i]) / classes if balanced else off)
    return total


@pytest.mark.parametrize("balanced", [False, True])
def test_the_loss_by_loops(balanced: bool) -> None:
    logits = torch.randn(5, 4, generator=torch.Generator().manual_seed(0)) * 2
    one, two = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    loss, expected = class_correlation(one, balanced), _by_loops(two.softmax(1), balanced)
    close(loss, expected)
    loss.backward(), expected.backward()
    close(one.grad, two.grad)


def test_ends_of_its_range() -> None:
    sure = 1e4 * torch.eye(4)
    for balanced in (False, True):
        assert float(class_correlation(sure, balanced)) == 0
        assert float(class_correlation(torch.zeros(6, 4), balanced)) == pytest.approx(0.75)


def test_balance_counts_a_rare_class_as_much() -> None:
    """Nine sure samples of one class and an unsure one between two others."""
    logits = torch.full((10, 3), -1e4)
    logits[:9, 0] = 0.0
    logits[9, 1:] = 0.0
    assert float(class_correlation(logits)) == pytest.approx(0.05)
    assert float(class_correlation(logits, balanced=True)) == pytest.approx(1 / 3)


class PlainNorm(nn.Module):
    """alpha-BN with a tenth of the batch, unbiased variance, gradients through the batch part."""

    def __init__(self, bn: nn.BatchNorm2d) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(bn.weight.data.clone()), nn.Parameter(bn.bias.data)
        self.mean, self.var = bn.running_mean, bn.running_var

    def forward(self, x: Tensor) -> Tensor:
        mean = 0.9 * self.mean + 0.1 * x.mean(dim=(0, 2, 3))
        var = 0.9 * self.var + 0.1 * x.var(dim=(0, 2, 3), correction=1)
        scaled = (x - mean.view(1, -1, 1, 1)) / (var.view(1, -1, 1, 1) + 1e-5).sqrt()
        return scaled * self.weight.view(1, -1, 1, 1) + self.bias.view(1, -1, 1, 1)


@pytest.mark.parametrize("balanced", [False, True])
def test_two_steps_are_those_of_the_definition(balanced: bool) -> None:
    net = tiny("bn")
    for stage in (net.layer1, net.layer2):
        assert isinstance(stage, nn.Sequential) and isinstance(stage[1], nn.BatchNorm2d)
        stage[1] = PlainNorm(stage[1])
    theta = [p for m in net.modules() if isinstance(m, PlainNorm) for p in m.parameters()]
    sgd = torch.optim.SGD(theta, lr=0.1, momentum=0.9)
    config = tta.get_config("core", lr=0.1, balanced=balanced)
    adapter = tta.wrap(tiny("bn"), update=config)
    assert adapter.config.norm is not None and adapter.config.norm.name == "alpha_bn"
    for t in range(2):
        z = net(images(t, 6))
        loss = _by_loops(z.softmax(1), balanced)
        sgd.zero_grad()
        loss.backward()
        sgd.step()
        close(adapter(images(t, 6)), z.detach(), atol=1e-5, rtol=1e-5)
        assert adapter.report.loss == pytest.approx(loss.item(), abs=1e-5)
        assert adapter.report.selected == 6 and adapter.report.stepped
    for p, value in zip(adapter.parameters_adapted.values(), theta, strict=True):
        close(p.detach(), value.detach(), atol=1e-5, rtol=1e-5)
        assert p.grad is None


def test_models_without_batch_norm_and_other_rules() -> None:
    assert tta.wrap(tiny("ln"), "core.cifar10").config.norm is None
    norm = tta.wrap(tiny("bn"), "core.cifar10", norm="bn").config.norm
    assert norm is not None and norm.name == "bn"
