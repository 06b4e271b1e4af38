"""Toy denoisers: that of the traces of DDA, and one for images of any kind."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import tta

__all__ = ["Sharp", "Toy", "diffusion"]


class Toy(nn.Module):
    """Two convolutions with an embedding of the step between them.

    Args:
        width: Channels in between.
        outputs: 3 for noise alone, 6 for noise and variance.
    """

    def __init__(self, width: int = 4, outputs: int = 6) -> None:
        super().__init__()
        self.c1 = nn.Conv2d(3, width, 3, padding=1)
        self.t = nn.Linear(4, width)
        self.c2 = nn.Conv2d(width, outputs, 3, padding=1)
        self.times: list[int] = []

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.times.append(int(t[0]))
        f = (t / 1000).to(x.dtype)
        embedded = torch.stack([f, f * f, (6 * f).sin(), (6 * f).cos()], 1)
        return self.c2(nn.functional.silu(self.c1(x) + self.t(embedded)[:, :, None, None]))


class Sharp(nn.Module):
    """Takes what differs from the neighbours for noise; any number of channels."""

    def __init__(self) -> None:
        super().__init__()
        self.share = nn.Parameter(torch.tensor(0.7))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        rough = x - nn.functional.avg_pool2d(x, 3, 1, 1)
        return torch.cat([self.share * rough, (rough + 0.01 * t.view(-1, 1, 1, 1)).tanh()], 1)


def diffusion(name: str = "dda", **fields: Any) -> tta.Diffusion:
    """A small diffusion model with few steps."""
    short = {"steps": 2, "respacing": 4, "scale": 2.0}
    config = tta.get_config(name, **short | fields)
    return tta.Diffusion(Sharp(), torch.linspace(0.01, 0.3, 8), config)
