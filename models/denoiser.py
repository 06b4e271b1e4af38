"""A small diffusion network for 32 x 32 images: what noise is in them.

Ho, Jain, Abbeel: Denoising Diffusion Probabilistic Models, NeurIPS 2020, arXiv 2006.11239, sections
3 and 4: noise prediction by a U-Net whose residual blocks know the step. It is much smaller than
theirs: three resolutions, one block at each on the way down and on the way up, no attention.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

import tta
from models.bundled import FOLDER
from tta.core.checks import string
from tta.core.input_rule import DEFAULT_INPUT

__all__ = ["BETAS", "DENOISER", "UNet", "is_trained", "load_diffusion"]

DENOISER = "cifar10_denoiser"
BETAS = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)  # section 4 of the paper
EMBEDDING = 128  # numbers that tell a block its step


class Block(nn.Module):
    """Two 3 x 3 convolutions that know the step, and a shortcut."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(8, inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, 1, 1)
        self.step = nn.Linear(EMBEDDING, outputs)
        self.norm2 = nn.GroupNorm(8, outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1)
        self.shortcut = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()
        nn.init.zeros_(self.conv2.weight)  # each block begins as its shortcut

    def forward(self, x: Tensor, step: Tensor) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x))) + self.step(step)[:, :, None, None]
        return self.shortcut(x) + self.conv2(F.silu(self.norm2(y)))


class UNet(nn.Module):
    """Noisy images (B, 3, 32, 32) on the scale [-1, 1], steps (B,) int64 -> their noise.

    Args:
        widths: Channels at 32, 16 and 8 pixels; multiples of 8.
    """

    rates: Tensor  # (EMBEDDING / 2,), of the waves that tell the step

    def __init__(self, widths: Sequence[int] = (32, 64, 96)) -> None:
        super().__init__()
        half = EMBEDDING // 2
        rates = torch.exp(torch.arange(half) * (-math.log(10000) / (half - 1)))
        self.register_buffer("rates", rates, persistent=False)
        self.embed = nn.Sequential(
            nn.Linear(EMBEDDING, EMBEDDING), nn.SiLU(), nn.Linear(EMBEDDING, EMBEDDING), nn.SiLU()
        )
        self.first = nn.Conv2d(3, widths[0], 3, 1, 1)
        before = (widths[0], *widths[:-1])
        self.down = nn.ModuleList(Block(a, b) for a, b in zip(before, widths, strict=True))
        self.shrink = nn.ModuleList(nn.Conv2d(w, w, 3, 2, 1) for w in widths[:-1])
        self.middle = Block(widths[-1], widths[-1])
        # Each block on the way up also sees what the one beside it, on the way down, has found.
        after = (widths[-1], *reversed(widths[1:]))
        sides = tuple(reversed(widths))
        self.up = nn.ModuleList(Block(a + b, b) for a, b in zip(after, sides, strict=True))
        self.norm = nn.GroupNorm(8, widths[0])
        self.last = nn.Conv2d(widths[0], 3, 3, 1, 1)
        nn.init.zeros_(self.last.weight)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        angles = t[:, None].to(x.dtype) * self.rates.to(x.dtype)
        step = self.embed(torch.cat([angles.sin(), angles.cos()], 1))
        y, seen = self.first(x), []
        for i, block in enumerate(self.down):
            y = block(y, step)
            seen.append(y)
            if i < len(self.shrink):
                y = self.shrink[i](y)
        y = self.middle(y, step)
        for i, block in enumerate(self.up):
            y = block(torch.cat([y, seen.pop()], 1), step)
            if i + 1 < len(self.up):
                y = F.interpolate(y, scale_factor=2.0, mode="nearest")
        return self.last(F.silu(self.norm(y)))


def is_trained() -> bool:
    """Whether the weights of the bundled diffusion model are there."""
    return _file().is_file()


def _file() -> Path:
    return FOLDER / DENOISER / "weights.safetensors"


def load_diffusion(
    config: str | None = None, *, classifier: nn.Module | None = None, **fields: Any
) -> tta.Diffusion:
    """The bundled diffusion model of CIFAR-10, as ``wrap(..., input=)`` takes it.

    Args:
        config: Name of an input rule; None for `dda`.
        classifier: Of the images as they came, as for `tta.Diffusion`.
        **fields: Of the rule, in place of its defaults.

    Returns:
        The network in eval mode, with the noise of its training.

    Raises:
        TypeError: When ``config`` is no string.
        ValueError: For an unknown rule or field, or a damaged file.
        FileNotFoundError: When its weights are not there: ``models.train`` makes them.

    Example:
        >>> load_diffusion("dda", steps=10, respacing=50).config.steps
        10
    """
    rule = tta.get_config(string("config", config or DEFAULT_INPUT), **fields)
    if not is_trained():
        raise FileNotFoundError(
            f"`{_file().name}` of {DENOISER} is not there: run python -m models.train {DENOISER} "
            "--data PATH."
        )
    network = UNet()
    try:
        network.load_state_dict({k: v.float() for k, v in load_file(str(_file())).items()})
    except (SafetensorError, RuntimeError) as error:
        raise ValueError(
            f"`{_file()}` must hold weights of {DENOISER}, but cannot be read: fetch it again"
        ) from error
    return tta.Diffusion(network.eval().requires_grad_(False), BETAS, rule, classifier=classifier)
