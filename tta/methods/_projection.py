"""What DDA and SDA have in common: images are projected onto the source by a diffusion model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from tta.core import random
from tta.core.backbone import Backbone
from tta.core.checks import LARGE, number, whole_number
from tta.core.component import Context
from tta.core.config import ComponentConfig
from tta.core.denoiser import Diffusion
from tta.core.source import SourceStatistics
from tta.methods._joined_input import JoinedInput, check_join
from tta.parts.augment import pixel_space
from tta.parts.diffusion import project, shorten

__all__ = ["Projection", "ProjectionConfig"]


@dataclass(frozen=True, kw_only=True)
class ProjectionConfig(ComponentConfig):
    """Fields of ``dda`` and ``sda``."""

    steps: int = 50  # N, steps of the short chain by which noise is added and taken out
    respacing: int = 100  # R, steps of the short chain
    scale: float = 4.0  # D, by which the low-pass filter shrinks images
    guidance: float = 6.0  # w, weight of the low frequencies
    join: str | None = "sum"  # with the prediction for the images as they came; None = without it
    per_image: bool = True  # the guidance is normalised in each image; False with ``official``
    official: bool = False  # it is normalised over the batch, as in the authors' code

    def __post_init__(self) -> None:
        super().__post_init__()
        whole_number("steps", self.steps, 1, 10**4)
        whole_number("respacing", self.respacing, 2, 10**4)
        if self.steps >= self.respacing:
            raise ValueError(
                f"`steps` must be below respacing, {self.respacing}, got {self.steps}: the noise "
                "is that of step number `steps`, counted from 0."
            )
        number("scale", self.scale, 1, LARGE)
        number("guidance", self.guidance, 0, LARGE)
        check_join(self.join)


class Projection(JoinedInput):
    """Projects images by a diffusion model; see :mod:`tta.parts.diffusion`."""

    Config = ProjectionConfig
    takes_draws: ClassVar[bool] = True
    needs_given: ClassVar[bool] = True
    cost: ClassVar[float] = 100.0
    uses_labels: ClassVar[bool] = False

    def __init__(self, config: Any, network: Backbone, context: Context) -> None:
        super().__init__(config, network, context)
        self._space = pixel_space(network.model, context.mean, context.std)
        self._diffusion: list[Diffusion] = []  # one, when it is known; copied with its modules

    def attach(self, source: SourceStatistics) -> None:
        """Take the denoiser.

        Raises:
            ValueError: When there is none, or it was trained with fewer steps than are asked for.
        """
        diffusion = source.denoiser
        if diffusion is None:
            raise ValueError(
                f"`source` must give {self.name} its denoiser, got {source.contents or 'nothing'}: "
                "pass input=tta.Diffusion(denoiser, betas), or SourceStatistics(denoiser=...)."
            )
        if len(diffusion.betas) < self.config.respacing:
            raise ValueError(
                f"`respacing` must be at most the denoiser's {len(diffusion.betas)} steps, got "
                f"{self.config.respacing}: set it, and steps below it."
            )
        if diffusion.classifier is not None and self.config.join is None:
            raise ValueError(
                "`classifier` must have a join= that its prediction goes into, got join=None: "
                "leave one of them out."
            )
        self._diffusion.append(diffusion)
        self.hold(diffusion.modules)
        self.source_used = "denoiser as given"

    def transform(self, images: Tensor) -> Tensor:
        """Project images (B, C, H, W).

        Raises:
            ValueError: When they have another number of axes.
        """
        if images.ndim != 4:
            raise ValueError(
                f"`images` must be (B, C, H, W) to be projected, got shape {tuple(images.shape)}: "
                "use them without an input rule."
            )
        config, shape = self.config, images.shape
        (diffusion,) = self._diffusion
        mean, std = self._moments(images)
        x = (images.float() / 255 if images.dtype == torch.uint8 else images.float()) * std + mean
        fork: list[random.CountedDraws] = []

        def noise(name: str) -> Tensor:
            draw = self.context.draws.ask(name, shape, torch.float32, images.device)
            if draw is None:
                if not fork:
                    fork.append(random.fork(self.context.generator, images.device))
                draw = fork[0].normals(*shape)
            return draw

        with torch.autocast(images.device.type, enabled=False):
            found = project(
                self._denoise,
                x * 2 - 1,
                shorten(diffusion.betas, config.respacing),
                steps=config.steps,
                scale=config.scale,
                guidance=config.guidance,
                per_image=config.per_image and not config.official,
                noise=noise,
                follow=torch.is_grad_enabled() and images.requires_grad,
            )
        found = (found + 1) / 2
        if images.dtype == torch.uint8:
            return (found * 255).round().clamp(0, 255).to(torch.uint8)
        return ((found - mean) / std).to(images.dtype)

    def classify(self, images: Tensor) -> Tensor | None:
        """Logits of the images as they came, by a classifier that was given for them."""
        classifier = self._diffusion[0].classifier
        return None if classifier is None else self.network.reader.read(classifier(images))

    def _denoise(self, x: Tensor, times: Tensor) -> Tensor:
        """What the denoiser says, in the precision of its own weights."""
        denoiser = self._diffusion[0].denoiser
        parameters = denoiser.parameters() if isinstance(denoiser, torch.nn.Module) else ()
        dtype = next((p.dtype for p in parameters if p.is_floating_point()), x.dtype)
        return denoiser(x.to(dtype), times).to(x.dtype)

    def _moments(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and deviation that turn what the model takes into pixels in [0, 1]."""
        space = self._space
        if images.dtype == torch.uint8:
            space = (0.0,), (1.0,)
        if space is None:
            self.network.session.warn_once(
                "pixels",
                "nothing says how pixels become what the model takes, so images are given to the "
                "denoiser as they are, in [-1, 1]: pass wrap(..., mean=..., std=...).",
            )
            space = (0.5,), (0.5,)
        mean, std = (torch.tensor(v, dtype=torch.float32, device=images.device) for v in space)
        return mean.view(1, -1, 1, 1), std.view(1, -1, 1, 1)
