"""Adapters on a GPU that is not there: shapes, devices and what waits for values are as on one."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import tta

__all__ = ["DEVICE", "on_fake_gpu"]

DEVICE = torch.device("cuda:0")


def on_fake_gpu(adapter: tta.Adapter, mode: FakeTensorMode) -> tta.Adapter:
    """A copy of an adapter whose tensors are on a GPU and have no values."""

    def convert(tensor: Any, memo: dict[int, Any]) -> Tensor:
        like = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
        fake: Any = FakeTensor(mode, like, DEVICE)
        is_parameter = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(fake, tensor.requires_grad) if is_parameter else fake
        return memo[id(tensor)]

    copiers: Any = copy._deepcopy_dispatch  # type: ignore[attr-defined]
    generator = adapter._context.generator
    try:
        copiers.update({Tensor: convert, nn.Parameter: convert})
        return copy.deepcopy(adapter, {id(generator): generator})
    finally:
        del copiers[Tensor], copiers[nn.Parameter]
