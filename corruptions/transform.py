"""`Corrupt`: a corruption as a transform, for data pipelines and as a module."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional

from corruptions import api, check
from corruptions.severity import ParameterSet

__all__ = ["Corrupt"]


def _like(out: Tensor, given: Tensor) -> Tensor:
    """Give back a torchvision image where one came in."""
    return tv_tensors.Image(out) if isinstance(given, tv_tensors.TVTensor) else out


class Corrupt(v2.Transform):
    """A corruption as a torchvision v2 transform, which is also an `nn.Module`.

    Takes what v2 transforms take: a Pillow image, an image tensor (3, H, W) or (B, 3, H, W), or a
    structure such as (images, labels), of which the images are corrupted. Every image gets draws
    of its own.

    Args:
        name: One of `list_corruptions(extra=True)`.
        severity: 0 (clean) to 5.
        generator: Draws the seeds; without it every call is different. Copies of one generator in
            several data-loader workers would repeat each other, so leave it out there.
        parameters: See `corrupt`.
        frost_pictures: See `corrupt`.

    >>> Corrupt("fog", 3)(torch.zeros(3, 32, 32)).shape
    torch.Size([3, 32, 32])
    """

    def __init__(
        self,
        name: str,
        severity: float,
        *,
        generator: torch.Generator | np.random.Generator | None = None,
        parameters: ParameterSet = "auto",
        frost_pictures: str | Path | None = None,
    ) -> None:
        super().__init__()
        check.name(name, api.list_corruptions(extra=True))
        check.severity(severity)
        check.parameters(parameters)
        self.name = name
        self.severity = severity
        self.generator = generator
        self.parameters_from: ParameterSet = parameters
        self.frost_pictures = check.folder(frost_pictures)

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Corrupt one image or batch; called by torchvision for each image of the input."""
        if isinstance(inpt, PIL.Image.Image):
            image = functional.pil_to_tensor(inpt.convert("RGB"))
            return functional.to_pil_image(self._corrupted(image))
        return _like(self._corrupted(inpt.as_subclass(Tensor)), inpt)

    def _corrupted(self, images: Tensor) -> Tensor:
        batch = images[None] if images.ndim == 3 else images
        out = api.corrupt(
            batch,
            self.name,
            self.severity,
            generator=self.generator,
            parameters=self.parameters_from,
            frost_pictures=self.frost_pictures,
        )
        return out.view(images.shape)

    def extra_repr(self) -> str:
        """Name and severity, for print."""
        return f"{self.name!r}, {self.severity}"
