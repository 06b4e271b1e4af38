"""Projection of images onto what a diffusion model was trained on, guided by low frequencies.

Noise is added to an image as in N steps of a shortened chain, and taken out again. After each step
the image moves so that the low frequencies of what the denoiser sees in it come nearer to its own,

    x_{i-1} = s - w d/dx_i || LP(x) - LP(x0(x_i)) ||,

with s drawn as in any diffusion model and LP a bicubic resize to 1/D and back.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

__all__ = ["Chain", "lowpass_matrix", "project", "shorten"]


@dataclass(frozen=True)
class Chain:
    """A shortened chain of R steps.

    Args:
        times: Each step's number in the training (R,).
        kept: Share of the image's variance that is left after each step, abar (R,).
    """

    times: tuple[int, ...]
    kept: tuple[float, ...]

    def before(self, i: int) -> float:
        """``kept`` of the step before step ``i``, 1 for the first."""
        return self.kept[i - 1] if i else 1.0

    def beta(self, i: int) -> float:
        """The variance of the noise that step ``i`` adds."""
        return 1 - self.kept[i] / self.before(i)

    def posterior(self, i: int) -> float:
        """The variance of the step back, given the image without noise."""
        return self.beta(i) * (1 - self.before(i)) / (1 - self.kept[i])


def shorten(betas: Tensor, count: int) -> Chain:
    """Take ``count`` steps of a chain, equally far apart, the first and the last among them.

    Args:
        betas: (T,) in float64.
        count: From 2 to T.
    """
    last = len(betas) - 1
    times = tuple(round(i * last / (count - 1)) for i in range(count))
    kept = torch.cumprod(1 - betas.double(), 0)
    return Chain(times, tuple(float(kept[t]) for t in times))


@lru_cache(maxsize=16)
def lowpass_matrix(size: int, scale: float) -> Tensor:
    """Resize by 1 / scale and back, along one axis of images, as one matrix (size, size).

    Both ways are bicubic (a = -0.5); the kernel is stretched where pixels get fewer. Weights are
    those of the whole window, and zeros lie outside of the image, so that borders get darker.
    """
    small = math.ceil(size / scale)
    return (_resize(small, size, scale) @ _resize(size, small, 1 / scale)).float()


def _resize(before: int, after: int, ratio: float) -> Tensor:
    """Weights (after, before); ``ratio`` is how many new pixels there are for an old one."""
    stretch = min(1.0, ratio)
    # The centre of new pixel k in the old grid, with pixels as squares around whole numbers.
    centres = (torch.arange(after, dtype=torch.float64) + 0.5) / ratio - 0.5
    centres += (before - after / ratio) / 2
    reach = math.ceil(4 / stretch) + 2
    first = (centres - reach / 2).floor()[:, None]
    places = first + torch.arange(reach + 1, dtype=torch.float64)
    weights = _cubic((places - centres[:, None]) * stretch)
    weights /= weights.sum(1, keepdim=True)
    matrix = torch.zeros(after, before, dtype=torch.float64)
    inside = (places >= 0) & (places < before)
    rows = torch.arange(after)[:, None].expand_as(places)
    matrix.index_put_((rows[inside], places[inside].long()), weights[inside], accumulate=True)
    return matrix


def _cubic(x: Tensor) -> Tensor:
    x = x.abs()
    near = 1.5 * x**3 - 2.5 * x**2 + 1
    far = -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    return torch.where(x <= 1, near, torch.where(x < 2, far, torch.zeros_like(x)))


def project(
    denoiser: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    chain: Chain,
    *,
    steps: int,
    scale: float,
    guidance: float,
    per_image: bool,
    noise: Callable[[str], Tensor],
    follow: bool = False,
) -> Tensor:
    """Project images.

    Args:
        denoiser: Images and steps (B,) int64 of the training to noise, or noise and variance.
        x: (B, C, H, W) in [-1, 1].
        chain: The shortened chain.
        steps: N, below its length.
        scale: D, by which LP shrinks.
        guidance: w.
        per_image: Whether the norm is of each image, or of the whole batch.
        noise: Name -> standard normal numbers of the images' shape: ``noise_q`` once, ``noise_p``
            for every step back but the last.
        follow: Whether gradients flow to ``x``.

    Returns:
        (B, C, H, W), about in [-1, 1]; nothing is cut off in the end.
    """
    rows, columns = (lowpass_matrix(n, scale).to(x.device) for n in x.shape[2:])
    low = rows @ x @ columns.T
    kept = chain.kept[steps]
    found = math.sqrt(kept) * x + math.sqrt(1 - kept) * noise("noise_q")
    for i in reversed(range(steps)):
        with torch.enable_grad():
            start = found if follow else found.detach().requires_grad_()
            if not start.requires_grad:
                start = start.requires_grad_()
            clean, sample = _back(denoiser, start, chain, i, noise)
            gap = (low - rows @ clean @ columns.T).flatten(1)
            distance = torch.linalg.vector_norm(gap, dim=1) if per_image else gap.norm()
            (pull,) = torch.autograd.grad(distance.sum(), start, create_graph=follow)
        found = sample - guidance * pull
    return found if follow else found.detach()


def _back(
    denoiser: Any, x: Tensor, chain: Chain, i: int, noise: Callable[[str], Tensor]
) -> tuple[Tensor, Tensor]:
    """One step back from ``x``: the image that the denoiser sees in it, and the next one."""
    times = torch.full((len(x),), chain.times[i], dtype=torch.int64, device=x.device)
    said = denoiser(x, times)
    channels = x.shape[1]
    if said.shape[1:] not in (x.shape[1:], (2 * channels, *x.shape[2:])):
        raise ValueError(
            f"`denoiser` must return {channels} or {2 * channels} channels for images of shape "
            f"{tuple(x.shape)}, got {tuple(said.shape)}: pass the one of such images."
        )
    kept, before, beta = chain.kept[i], chain.before(i), chain.beta(i)
    clean = (x - math.sqrt(1 - kept) * said[:, :channels]) / math.sqrt(kept)
    clean = clean.clamp(-1, 1)
    alpha = kept / before
    mean = beta * math.sqrt(before) / (1 - kept) * clean
    mean = mean + (1 - before) * math.sqrt(alpha) / (1 - kept) * x
    if i == 0:
        return clean, mean
    if said.shape[1] > channels:  # between the two variances, on a scale of logarithms
        share = (said[:, channels:] + 1) / 2
        spread = share * math.log(beta) + (1 - share) * math.log(chain.posterior(i))
        deviation = (spread / 2).exp()
    else:
        deviation = math.sqrt(beta)
    return clean, mean + deviation * noise("noise_p")
