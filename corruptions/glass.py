"""glass_blur: blur, let pixels copy random neighbours, blur again.

Source: Hendrycks & Dietterich, ICLR 2019, arXiv 1903.12261. The published line looks like a swap
of two pixels but copies one over the other, and visits pixels one after the other, so that a copy
may read a pixel that was rewritten before. Here all copies of a pass are one gather.
"""

from __future__ import annotations

import torch
from torch import Tensor

from corruptions.filters import levels, separable
from corruptions.setting import Params, Setting, scalar

__all__ = ["apply_glass_blur", "sample_glass_blur"]


def sample_glass_blur(setting: Setting) -> Params:
    """Draw for glass_blur.

    Returns:
        `sigma` in pixels; `reach` d; `offsets`, (B, passes, H - 2d, W - 2d, 2) int8, uniform on
        -d..d-1, x before y, in visiting order: from row H - d up to d + 1 and from column W - d
        left to d + 1.
    """
    values = setting.constants()
    _, _, height, width = setting.shape
    reach, passes = int(values["reach"]), int(values["passes"])
    draw = setting.uniforms("offsets", passes, height, width, 2)
    draw = draw[:, :, : height - 2 * reach, : width - 2 * reach]
    offsets = (draw * (2 * reach)).to(torch.int8).sub_(reach)
    return {"sigma": scalar(values["sigma"]), "reach": scalar(reach), "offsets": offsets}


def apply_glass_blur(images: Tensor, params: Params) -> Tensor:
    """Blur, shuffle, blur."""
    sigma = float(params["sigma"])
    source = _source_pixels(params["offsets"], int(params["reach"]), *images.shape[-2:])
    blurred = levels(separable(images, sigma)).flatten(2)
    shuffled = blurred.gather(2, source[:, None].expand_as(blurred)).view(images.shape)
    return levels(separable(shuffled, sigma))


def _source_pixels(offsets: Tensor, reach: int, height: int, width: int) -> Tensor:
    """Source of each pixel's value after all passes, (B, H W) int64."""
    batch, passes = offsets.shape[:2]
    start = torch.arange(height * width, device=offsets.device)
    total = start.expand(batch, -1)
    # Turned by 180 degrees, visiting order is raster order.
    moves = offsets.flip((2, 3)).long()
    rows = slice(reach + 1, height - reach + 1)
    columns = slice(reach + 1, width - reach + 1)
    visited = torch.zeros(height, width, dtype=torch.bool, device=offsets.device)
    visited[rows, columns] = True
    visited = visited.flatten()
    for i in range(passes):
        move = start.new_zeros(batch, height, width)
        move[:, rows, columns] = moves[:, i, :, :, 1] * width + moves[:, i, :, :, 0]
        source = start + move.flatten(1)
        if reach > 1:
            # A source further on in raster order was rewritten before: follow the chain to the
            # first one that was not, doubling the length of the jumps.
            jump = torch.where((source > start) & visited[source], source, start)
            while True:
                further = jump.gather(1, jump)
                if torch.equal(further, jump):
                    break
                jump = further
            source = source.gather(1, jump)
        total = total.gather(1, source)
    return total
