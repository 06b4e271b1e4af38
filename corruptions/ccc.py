"""The processing of CCC's images before and after their two corruptions.

Source: Press et al., "RDumb: A simple approach that questions our progress in continual test-time
adaptation", NeurIPS 2023, arXiv 2306.05401. Give these to `tta.streams.build("walk", ...)` as
``before`` and ``after``; every image is cropped and flipped at random first, and compressed as JPEG
at the end.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from corruptions.digital import apply_jpeg_compression
from corruptions.messages import shown

__all__ = ["CropAndFlip", "Jpeg"]

_TRIES = 10  # as torchvision's RandomResizedCrop, then the largest crop in the middle


class CropAndFlip:
    """Crop a random part of each image, resize it, and mirror it half of the time.

    Args:
        size: Side of the result in pixels.
        scale: Smallest and largest share of the image's area.
        ratio: Smallest and largest width over height, drawn on a logarithmic scale.

    >>> g = torch.Generator().manual_seed(0)
    >>> CropAndFlip(32)([torch.rand(3, 40, 50), torch.rand(3, 64, 48)], generator=g).shape
    torch.Size([2, 3, 32, 32])
    """

    def __init__(
        self,
        size: int,
        scale: tuple[float, float] = (0.08, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
    ) -> None:
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ValueError(f"`size` must be a number of pixels, got {shown(size)}: such as 224")
        for name, pair, most in (("scale", scale, 1.0), ("ratio", ratio, math.inf)):
            if not 0 < pair[0] <= pair[1] <= most:
                raise ValueError(
                    f"`{name}` must be the smallest and the largest value above 0, got {pair}: "
                    "such as (0.08, 1.0) for scale and (0.75, 1.33) for ratio"
                )
        self.size, self.scale, self.ratio = size, scale, ratio

    def __call__(self, images: Tensor | Sequence[Tensor], *, generator: torch.Generator) -> Tensor:
        """Crop and flip.

        Args:
            images: (B, 3, H, W) in [0, 1], or a sequence of B images (3, H, W) of any sizes.
            generator: Source of randomness, from which every image takes equally many numbers.

        Returns:
            (B, 3, size, size) in [0, 1], rounded to the 256 levels that an image file has.
        """
        out = []
        for image in images:
            draws = torch.rand(4 * _TRIES + 1, generator=generator, dtype=torch.float64).tolist()
            height, width = image.shape[-2:]
            top, left, tall, wide = self._box(height, width, draws[:-1])
            size = [self.size, self.size]
            part = F.resized_crop(image, top, left, tall, wide, size, antialias=True)
            out.append(part.flip(-1) if draws[-1] < 0.5 else part)
        return torch.stack(out).clamp_(0, 1).mul_(255).round_().div_(255)

    def _box(self, height: int, width: int, draws: list[float]) -> tuple[int, int, int, int]:
        """Top, left, height and width of a part of one image."""
        low, high = (math.log(value) for value in self.ratio)
        for k in range(0, len(draws), 4):
            area, shape, down, across = draws[k : k + 4]
            target = height * width * (self.scale[0] + area * (self.scale[1] - self.scale[0]))
            aspect = math.exp(low + shape * (high - low))
            wide, tall = round(math.sqrt(target * aspect)), round(math.sqrt(target / aspect))
            if 0 < wide <= width and 0 < tall <= height:
                top, left = int(down * (height - tall + 1)), int(across * (width - wide + 1))
                return top, left, tall, wide
        aspect = min(max(width / height, self.ratio[0]), self.ratio[1])
        wide, tall = min(width, round(height * aspect)), min(height, round(width / aspect))
        return (height - tall) // 2, (width - wide) // 2, tall, wide


class Jpeg:
    """JPEG compression of images in [0, 1] at a given quality.

    Args:
        quality: 1 to 100; CCC uses 85.
    """

    def __init__(self, quality: int = 85) -> None:
        if isinstance(quality, bool) or not isinstance(quality, int) or not 1 <= quality <= 100:
            raise ValueError(f"`quality` must be 1 to 100, got {shown(quality)}: CCC has 85")
        self.quality = quality

    def __call__(self, images: Tensor) -> Tensor:
        """Compress and decode (B, 3, H, W)."""
        levels = images.mul(255).round_().to(torch.uint8)
        coded = apply_jpeg_compression(levels, {"quality": torch.tensor(self.quality)})
        return coded.to(images.dtype).div_(255)
