"""Functions that the command line names as ``tests.helpers.own_models:NAME``."""

from __future__ import annotations

import time

import torch
from torch import Tensor, nn

from tests.helpers.nets import tiny

__all__ = ["NAMES", "broken", "half", "model", "named", "net", "number", "pair", "slow",
           "to_pixels"]  # fmt: skip

NAMES = tuple(f"kind {i}" for i in range(10))
number = 7


def net() -> nn.Module:
    """A model whose weights are the same at every call."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return tiny("bn")


def to_pixels(picture) -> Tensor:
    """Pixels in [0, 1], 16 x 16."""
    levels = torch.tensor(list(picture.resize((16, 16)).tobytes()), dtype=torch.float32)
    return levels.view(16, 16, 3).permute(2, 0, 1) / 255


def model():
    return net(), to_pixels


def named():
    return net(), to_pixels, NAMES


def half():
    return net().half(), to_pixels, NAMES


def pair():
    """As ``model``, of which nobody says where its logits are."""
    model = net()
    model.register_forward_hook(lambda module, args, y: (y, y))
    return model, to_pixels


def slow():
    """As ``named``, with a rest in every call."""
    model = net()
    model.register_forward_pre_hook(lambda *_: time.sleep(0.05))
    return model, to_pixels, NAMES


def broken():
    return "no model"


def raising() -> nn.Module:
    """Fails."""
    raise KeyError("gone")
