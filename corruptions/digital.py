"""Digital corruptions of single pixels and blocks: contrast, saturate, pixelate, jpeg_compression.

Source: Hendrycks & Dietterich, ICLR 2019, arXiv 1903.12261.
"""

from __future__ import annotations

import io
import math
from functools import lru_cache

import numpy as np
import PIL.Image
import torch
import torchvision.io  # noqa: F401 - registers the codec
from torch import Tensor

from corruptions.filters import Band, exact_float, levels
from corruptions.hsv import through_hsv
from corruptions.setting import Params, Setting, scalar

__all__ = [
    "apply_contrast", "apply_jpeg_compression", "apply_pixelate", "apply_saturate",
    "sample_contrast", "sample_jpeg_compression", "sample_pixelate", "sample_saturate",
]  # fmt: skip

_TORCHVISION_CODEC = hasattr(torch.ops.image, "encode_jpeg")


def sample_contrast(setting: Setting) -> Params:
    """Constants of contrast: `factor`."""
    return {"factor": scalar(setting.constants()["factor"])}


def apply_contrast(images: Tensor, params: Params) -> Tensor:
    """Shrink each channel towards its own mean over the image."""
    factor = float(params["factor"])
    batch, channels, height, width = images.shape
    place = images.flatten(2).to(torch.int32)
    integer = torch.int32 if height * width * 255 < 2**31 else torch.int64
    total = place.sum(2, dtype=integer).double()
    # Division by a tensor: by a plain number, torch multiplies with the reciprocal on a GPU.
    mean = (total / torch.full_like(total, 255 * height * width))[:, :, None]
    level = (torch.arange(256, dtype=torch.float64) / 255).to(images.device)
    table = levels((level - mean).mul_(factor).add_(mean).clamp_(0, 1).mul_(255))
    row = torch.arange(batch * channels, dtype=torch.int32, device=images.device).mul_(256)
    place += row.view(batch, channels, 1)
    return table.flatten().index_select(0, place.flatten()).view(images.shape)


def sample_saturate(setting: Setting) -> Params:
    """Constants of saturate: `factor` and `shift` of the HSV saturation."""
    return {key: scalar(value) for key, value in setting.constants().items()}


def apply_saturate(images: Tensor, params: Params) -> Tensor:
    """Change the HSV saturation to clip(factor S + shift, 0, 1). Grey has the hue of red."""
    factor, shift = float(params["factor"]), float(params["shift"])
    return through_hsv(images, lambda s, v: ((s * factor + shift).clamp(0, 1), v))


def sample_pixelate(setting: Setting) -> Params:
    """Constants of pixelate: `factor`, inner size over outer size."""
    return {"factor": scalar(setting.constants()["factor"])}


def apply_pixelate(images: Tensor, params: Params) -> Tensor:
    """Shrink and enlarge again by Pillow's BOX filter, 8 bits after each direction."""
    factor = float(params["factor"])
    height, width = images.shape[-2:]
    rows, columns = max(1, int(height * factor)), max(1, int(width * factor))
    source = images.flatten(0, 1).to(exact_float(images.device))
    out = _box_band(width, columns).along(source).add_(0.5).floor_()
    out = _box_band(height, rows).along(out).add_(0.5).to(torch.uint8)
    out = out.permute(2, 0, 1).unflatten(0, images.shape[:2]).contiguous()
    # Enlarging by BOX repeats the nearest sample.
    for axis, size, inner in ((-1, width, columns), (-2, height, rows)):
        nearest = (torch.arange(size, device=images.device) * 2 + 1) * inner // (2 * size)
        out = out.index_select(axis, nearest)
    return out


@lru_cache(maxsize=32)
def _box_band(size: int, inner: int) -> Band:
    """Pillow's BOX filter from `size` down to `inner` samples, (inner, size) float64.

    A sample is the mean of whole pixels, never of parts of them: a result is a half or well away
    from one, so rounding is safe in any order of summation.
    """
    scale = size / inner
    support = max(scale, 1.0) / 2
    matrix = torch.zeros(inner, size, dtype=torch.float64)
    for i in range(inner):
        centre = (i + 0.5) * scale
        low = max(math.floor(centre - support + 0.5), 0)
        high = min(math.floor(centre + support + 0.5), size)
        inside = [k for k in range(low, high) if -support < k + 0.5 - centre <= support]
        matrix[i, inside] = 1 / len(inside)
    return Band.of(matrix)


def sample_jpeg_compression(setting: Setting) -> Params:
    """Constants of jpeg_compression: `quality`, 1 to 100."""
    return {"quality": scalar(setting.constants()["quality"])}


def apply_jpeg_compression(images: Tensor, params: Params) -> Tensor:
    """Encode and decode (4:2:0 chroma), one image at a time on the CPU."""
    if len(images) == 0:
        return images.clone()
    quality = int(params["quality"])
    through_codec = _through_torchvision if _TORCHVISION_CODEC else _through_pillow
    # Channels go last, as codecs want them; numpy copies planes in a third of torch's time.
    planes = images.cpu().numpy()
    pixels = np.empty((*planes.shape[:1], *planes.shape[2:], 3), np.uint8)
    for channel in range(3):
        pixels[..., channel] = planes[:, channel]
    source = torch.from_numpy(pixels).movedim(-1, 1).unbind()
    coded = [through_codec(image, quality).movedim(0, -1) for image in source]
    pixels, out = torch.stack(coded).numpy(), np.empty_like(planes)
    for channel in range(3):
        out[:, channel] = pixels[..., channel]
    return torch.from_numpy(out).to(images.device)


def _through_torchvision(image: Tensor, quality: int) -> Tensor:
    """JPEG of one image (3, H, W) uint8: libjpeg without the interpreter lock, and no files."""
    # Not torchvision.io: its functions announce that they will move to another package.
    return torch.ops.image.decode_jpeg(torch.ops.image.encode_jpeg(image, quality), 0)


def _through_pillow(image: Tensor, quality: int) -> Tensor:
    """Give the same levels by Pillow, three times slower on small images."""
    with io.BytesIO() as file:
        PIL.Image.fromarray(image.movedim(0, -1).numpy()).save(file, "jpeg", quality=quality)
        with PIL.Image.open(file, formats=("JPEG",)) as decoded:
            return torch.from_numpy(np.array(decoded)).movedim(-1, 0)
