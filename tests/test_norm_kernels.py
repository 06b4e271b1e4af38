"""Gradients of normalisation equal those of single operations, and take fewer of them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from tta.core.norm_kernels import normalize_by
from tta.core.norm_layers import instance_stats, normalize


def plain_stats(x: Tensor) -> tuple[Tensor, Tensor]:
    axes = tuple(range(2, x.ndim))
    return x.mean(axes), x.var(axes, correction=0)


def plain_normal(x: Tensor, mean: Tensor, var: Tensor, base: nn.Module, eps: float) -> Tensor:
    shape = (-1, x.shape[1], *(1 for _ in x.shape[2:]))
    mean, scale = mean.view(shape), (var + eps).rsqrt().view(shape)
    y = (x - mean) * scale
    if base.affine:
        y = y * base.weight.view(1, *shape[1:]) + base.bias.view(1, *shape[1:])
    return y


def layer(x: Tensor, base: nn.Module, each: bool, plain: bool) -> Tensor:
    """Half of the images' own statistics, each image's or their mean."""
    mean, var = (plain_stats if plain else instance_stats)(x)
    if not each:
        mean, var = mean.mean(0), var.mean(0)
    mean, var = 0.5 * mean, 0.5 + 0.5 * var
    if plain:
        return plain_normal(x, mean, var, base, base.eps)
    return normalize(x, mean, var, base)


def net(affine: bool, dtype: torch.dtype = torch.float64) -> nn.Module:
    base = nn.BatchNorm2d(3, affine=affine).to(dtype)
    if affine:
        with torch.no_grad():
            base.weight.copy_(torch.tensor([0.5, 2.0, -1.0]))
            base.bias.copy_(torch.tensor([0.1, 0.0, -3.0]))
    return base


@pytest.mark.parametrize("each", [False, True])
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("shape", [(4, 3, 5, 5), (2, 3, 7), (1, 3, 2, 3, 4)])
def test_gradients_are_those_of_single_operations(
    shape: tuple[int, ...], affine: bool, each: bool
) -> None:
    base = net(affine)
    images = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    of_y = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found = []
    for plain in (False, True):
        x = images.clone().requires_grad_()
        y = layer(x, base, each, plain)
        inputs = [x, *base.parameters()]
        found.append([y, *torch.autograd.grad(y, inputs, of_y)])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("each", [False, True])
def test_second_gradients_are_right(each: bool) -> None:
    """As of methods that differentiate a step of learning."""
    base = net(True)
    x = torch.randn(2, 3, 3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    inputs = (x.requires_grad_(), base.weight, base.bias)
    assert torch.autograd.gradgradcheck(lambda x, *_: layer(x, base, each, False), inputs)


@pytest.mark.parametrize("offset", [0.0, 1e3])
def test_a_large_mean_costs_the_gradient_no_digits(offset: float) -> None:
    images = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)) + offset
    of_var = torch.ones(4, 3)
    x = images.clone().requires_grad_()
    (ours,) = torch.autograd.grad(instance_stats(x)[1], x, of_var)
    wide = images.double().requires_grad_()
    (theirs,) = torch.autograd.grad(plain_stats(wide)[1], wide, of_var.double())
    torch.testing.assert_close(ours.double(), theirs, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_has_gradients_of_its_own_type(dtype: torch.dtype) -> None:
    base, images = net(True, dtype), torch.randn(4, 3, 8, 8, dtype=dtype)
    x = images.requires_grad_()
    y = layer(x, base, False, False)
    y.float().square().sum().backward()
    assert y.dtype == x.grad.dtype == base.weight.grad.dtype == dtype
    wide = net(True, torch.float32)
    x = images.detach().float().requires_grad_()
    layer(x, wide, False, True).square().sum().backward()
    torch.testing.assert_close(base.weight.grad.float(), wide.weight.grad, rtol=0.05, atol=0.5)


class Large(TorchDispatchMode):
    """Counts operations that make a tensor as large as the images."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.count = size, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        found = result if isinstance(result, tuple) else (result,)
        large = any(isinstance(t, Tensor) and t.numel() == self.size for t in found)
        self.count += large and not func.is_view
        return result


@pytest.mark.parametrize("each", [False, True])
def test_the_way_back_goes_few_times_over_the_images(each: bool) -> None:
    """Once for the images, once for their statistics, and once for the sum of both."""
    base = net(True, torch.float32)
    x = torch.randn(4, 3, 8, 8).requires_grad_()
    y = layer(x, base, each, False)
    of_y = torch.randn_like(y)
    with Large(x.numel()) as passes:
        torch.autograd.grad(y, [x, *base.parameters()], of_y)
    assert passes.count <= 3


def test_statistics_of_another_type_are_taken() -> None:
    """No kernel takes images and statistics of such types together."""
    x = torch.randn(2, 3, 4, 4).requires_grad_()
    mean, var = (v.double().requires_grad_() for v in plain_stats(x.detach()))
    y = normalize_by(x, mean, var, None, None, 1e-5)
    torch.autograd.grad(y.sum(), [x, mean, var])
    assert y.dtype == torch.float32
