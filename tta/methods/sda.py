"""SDA: as DDA, with a model that was fine-tuned on images that the diffusion model has made.

Guo, Jia, Li, Ren, Kong, Ren, Wang: Everything to the Synthetic: Diffusion-driven Test-time
Adaptation via Synthetic-Domain Alignment, CVPR 2025, arXiv 2406.04295.

Projections of a diffusion model differ a little from real images, and a model trained on real ones
sees them as another domain. So a copy of it is fine-tuned, once, on labelled images that went
through the same projection. The fine-tuned model classifies the projections, the original one the
images as they came, and the predictions are joined.

    z = f(x) + g(x_0),   g = f fine-tuned on projected labelled images

Wrap the fine-tuned model and give the original one as ``tta.Diffusion(denoiser, betas,
classifier=...)``; without it the wrapped model classifies both. The authors draw the images of the
fine-tuning from a conditional generator; the labelled training images themselves do too (ours), as
in ``python -m models.train NAME --data PATH --sda``. The projection is that of ``dda``, which says
where it differs from the authors'.
"""

from __future__ import annotations

from dataclasses import dataclass

from tta.core.registry import register
from tta.methods._projection import Projection, ProjectionConfig

__all__ = ["Sda", "SdaConfig"]


@dataclass(frozen=True, kw_only=True)
class SdaConfig(ProjectionConfig):
    """Fields of ``sda``."""


@register("sda")
class Sda(Projection):
    """Images projected onto the source, for a model that was fine-tuned on projections."""

    Config = SdaConfig
