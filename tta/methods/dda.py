"""DDA: a diffusion model projects test images onto the source before they are classified.

Gao, Zhang, Liu, Darrell, Shelhamer, Wang: Back to the Source: Diffusion-Driven Adaptation to
Test-Time Corruption, CVPR 2023, arXiv 2207.03442.

Instead of the model, the images are adapted: noise is added to them and a denoiser that was trained
on the source takes it out, guided so that low frequencies stay those of the image. The model itself
learns nothing, so that nothing can collapse, images do not depend on each other, and their order
does not matter. Both the image and its projection are classified, and the predictions are joined.

    x_N = sqrt(abar_N) x + sqrt(1 - abar_N) n,
    x_{i-1} ~ p(x_{i-1} | x_i) - w d/dx_i || LP(x) - LP(x0(x_i)) ||,   z = f(x) + f(x_0)

The denoiser is the caller's: ``input=tta.Diffusion(denoiser, betas)``; for CIFAR-10 a small one is
bundled in ``models``. The noise is that of step N of the short chain, and the first step back takes
it for that of step N - 1, as in the authors' code. LP, a bicubic resize to 1/D and back, has zeros
outside of the image, as there.

The authors' norm is one over the whole batch, by which each image's guidance depends on the others;
``official=True`` has it. The norm of each image is the default here. Their code writes the
projections to files of 8 bits in between; here they stay as they are, outside [0, 1] too.

An update in the adapter learns from the projections; the images as they came are classified beside,
without learning.
"""

from __future__ import annotations

from dataclasses import dataclass

from tta.core.registry import register
from tta.methods._projection import Projection, ProjectionConfig

__all__ = ["Dda", "DdaConfig"]


@dataclass(frozen=True, kw_only=True)
class DdaConfig(ProjectionConfig):
    """Fields of ``dda``."""


@register("dda")
class Dda(Projection):
    """Images projected onto the source by a diffusion model."""

    Config = DdaConfig
