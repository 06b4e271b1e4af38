"""`corrupt`, and its two halves `sample` and `apply`.

Draws and arithmetic are kept apart: `sample` turns seeds into parameters and never sees a pixel,
`apply` is a pure function of images and parameters. All arithmetic is on 8-bit levels, because
the published recipes are: they take 8-bit images and truncate their result to 8 bits.

The recipes are for RGB. A grey image (one channel) is treated as the RGB image of three such
channels. Where the three then differ, as under noise for each channel, the level of the result is
their luma (0.299 R + 0.587 G + 0.114 B, rounded), which is the common level where they are equal.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from corruptions import (
    blur,
    check,
    defocus,
    digital,
    draws,
    elastic,
    frost,
    glass,
    noise,
    spatter,
    weather,
)
from corruptions.chunks import in_parts, part_size
from corruptions.messages import shown, told
from corruptions.setting import Params, Setting
from corruptions.severity import BENCHMARK, EXTRA, ParameterSet

__all__ = ["apply", "corrupt", "list_corruptions", "sample"]


_TRACE = 1e-9  # a severity below which nothing is to be seen, and quotients of constants overflow


class _Operation(NamedTuple):
    sample: Callable[[Setting], Params]
    apply: Callable[[Tensor, Params], Tensor]


_OPERATIONS = {
    "gaussian_noise": _Operation(noise.sample_normal_noise, noise.apply_gaussian_noise),
    "shot_noise": _Operation(noise.sample_shot_noise, noise.apply_shot_noise),
    "impulse_noise": _Operation(noise.sample_impulse_noise, noise.apply_impulse_noise),
    "defocus_blur": _Operation(defocus.sample_defocus_blur, defocus.apply_defocus_blur),
    "glass_blur": _Operation(glass.sample_glass_blur, glass.apply_glass_blur),
    "motion_blur": _Operation(blur.sample_motion_blur, blur.apply_motion_blur),
    "zoom_blur": _Operation(blur.sample_zoom_blur, blur.apply_zoom_blur),
    "snow": _Operation(weather.sample_snow, weather.apply_snow),
    "frost": _Operation(frost.sample_frost, frost.apply_frost),
    "fog": _Operation(weather.sample_fog, weather.apply_fog),
    "brightness": _Operation(weather.sample_brightness, weather.apply_brightness),
    "contrast": _Operation(digital.sample_contrast, digital.apply_contrast),
    "elastic_transform": _Operation(
        elastic.sample_elastic_transform, elastic.apply_elastic_transform
    ),
    "pixelate": _Operation(digital.sample_pixelate, digital.apply_pixelate),
    "jpeg_compression": _Operation(digital.sample_jpeg_compression, digital.apply_jpeg_compression),
    "speckle_noise": _Operation(noise.sample_normal_noise, noise.apply_speckle_noise),
    "gaussian_blur": _Operation(blur.sample_gaussian_blur, blur.apply_gaussian_blur),
    "spatter": _Operation(spatter.sample_spatter, spatter.apply_spatter),
    "saturate": _Operation(digital.sample_saturate, digital.apply_saturate),
}


def list_corruptions(extra: bool = False) -> list[str]:
    """Names in the order of the benchmark.

    Args:
        extra: Append the four corruptions that the benchmark holds out for validation.

    Returns:
        15 names, or 19.

    >>> list_corruptions()[:2]
    ['gaussian_noise', 'shot_noise']
    """
    return [*BENCHMARK, *EXTRA] if extra else list(BENCHMARK)


def sample(
    name: str,
    shape: Sequence[int],
    severity: float,
    seeds: Tensor | Sequence[int],
    *,
    parameters: ParameterSet = "auto",
    frost_pictures: str | Path | None = None,
    device: str | torch.device = "cpu",
) -> Params:
    """Draw everything that `apply` needs.

    An image's draws depend on its seed alone: not on its batch, its place in it or the severity,
    so that the same seeds give the same noise, angle or flakes at every severity.

    Args:
        name: One of `list_corruptions(extra=True)`.
        shape: (B, 3, H, W) of the images; (B, 1, H, W) for grey ones gives the same draws.
        severity: 0 (clean) to 5; fractions interpolate the published constants, or average the
            discs of defocus_blur and the zooms of zoom_blur.
        seeds: (B,) int64, any values.
        parameters: "cifar" and "imagenet" force the constants published for 32x32 and 224x224
            images; "auto" chooses by the short side and interpolates in between.
        frost_pictures: Folder of pictures to use for frost in place of the synthetic texture.
        device: Where to draw: best where the images are (for Apple's GPUs the CPU draws). Draws are
            the same on every device, except frost's levels, which may differ by one.

    Returns:
        Name to tensor: draws start with a dimension B and lie on `device`, constants have none.
        Fields are described by the `sample_...` function of each corruption.

    Raises:
        TypeError: When an argument is of the wrong kind.
        ValueError: For an unknown name, a shape, severity or number of seeds that does not fit, or
            a folder of frost pictures that is not there or does not fit.

    >>> sample("contrast", (1, 3, 32, 32), 3, [0])
    {'factor': tensor(0.4000, dtype=torch.float64)}
    """
    check.name(name, _OPERATIONS)
    check.severity(severity)
    check.parameters(parameters)
    folder = check.folder(frost_pictures)
    batch, _, height, width = check.shape(shape)
    size = batch, 3, height, width
    seeds = check.seeds(seeds, size[0]).to(_capable(torch.device(device)))
    if severity < _TRACE:
        return {"clean": torch.tensor(True)}
    with torch.no_grad():
        setting = Setting(name, size, float(severity), seeds, parameters, folder)
        return _OPERATIONS[name].sample(setting)


def apply(images: Tensor, name: str, params: Params) -> Tensor:
    """Corrupt images with parameters from `sample`, or with your own.

    Args:
        images: (B, 3, H, W), or grey (B, 1, H, W), uint8 or floating point in [0, 1].
        name: The corruption that `params` were drawn for.
        params: From `sample`, or the same fields with other draws.

    Returns:
        Corrupted images of the same shape, dtype and device; see `corrupt` for floats.

    Raises:
        TypeError: When `images` are no tensor, or `params` no dict of tensors.
        ValueError: When `images` are not as above, or `params` are not for them.
    """
    check.name(name, _OPERATIONS)
    check.images(images)
    check.drawn(params, images)
    try:
        return _apply(images, name, params)
    except KeyError as error:
        raise ValueError(
            f"`params` must come from sample({shown(name)}, ...), got fields "
            f"{told(', '.join(map(str, params)))}: it lacks {told(error)}"
        ) from None
    except torch.OutOfMemoryError:
        raise
    except (
        TypeError,
        ValueError,
        IndexError,
        RuntimeError,
        ArithmeticError,
        AttributeError,
    ) as error:
        raise ValueError(
            f"`params` must come from sample({shown(name)}, ...) for images of shape "
            f"{tuple(images.shape)}, got tensors that do not fit ({told(error)}): "
            "call sample again"
        ) from error


def _apply(images: Tensor, name: str, params: Params) -> Tensor:
    device = _capable(images.device)
    # Sums must not be taken in half precision, whatever the caller's model runs in.
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        if "clean" in params:
            return images.clone()
        floating = images.is_floating_point()
        levels = _to_levels(images) if floating else images
        grey = images.shape[1] == 1
        levels = (levels.expand(-1, 3, -1, -1) if grey else levels).to(device).contiguous()
        local = {key: value.to(device) if value.ndim else value for key, value in params.items()}
        out = _OPERATIONS[name].apply(levels, local).to(images.device)
        out = _luma(out) if grey else out
        return out.to(images.dtype).div_(255) if floating else out


def _luma(images: Tensor) -> Tensor:
    """Grey levels of RGB ones, (B, 3, H, W) to (B, 1, H, W) uint8, as Pillow computes them."""
    red, green, blue = images.int().unbind(1)
    # Weights in units of 2^-16, which sum to one.
    total = red.mul_(19595).add_(green, alpha=38470).add_(blue, alpha=7471)
    return total.add_(1 << 15).bitwise_right_shift_(16).to(torch.uint8)[:, None]


def _capable(device: torch.device) -> torch.device:
    """Where to draw and compute: Apple's GPUs have no float64, which exact sums need."""
    return torch.device("cpu") if device.type == "mps" else device


def _to_levels(images: Tensor) -> Tensor:
    """Round to the nearest of the 256 levels, in a type that holds the sum before truncation."""
    wide = images.double() if images.dtype == torch.float64 else images.float()
    return (wide * 255).add_(0.5).to(torch.uint8)


def corrupt(
    images: Tensor,
    name: str,
    severity: float,
    *,
    generator: torch.Generator | np.random.Generator | None = None,
    seeds: Tensor | Sequence[int] | None = None,
    parameters: ParameterSet = "auto",
    frost_pictures: str | Path | None = None,
) -> Tensor:
    """Corrupt a batch of images as CIFAR-10-C and ImageNet-C were made.

    The recipes work on 8-bit images. Floating-point images are therefore rounded to the nearest
    of the 256 levels first, and the result's levels are divided by 255: an image that came from
    uint8 gives exactly the levels that its uint8 original gives.

    Args:
        images: (B, 3, H, W), RGB, or (B, 1, H, W), grey, uint8 or floating point in [0, 1], on
            any device. Grey images stay grey: each gets the luma of what the recipe makes of
            three equal channels.
        name: One of `list_corruptions(extra=True)`.
        severity: 1 to 5 as published; fractions interpolate the constants (defocus_blur and
            zoom_blur average the filters instead), 0 returns a copy.
        generator: Draws one seed for each image. With neither this nor `seeds`, seeds come from
            the operating system and no call repeats another. No global generator is used.
        seeds: (B,) int64: fixes each image's draws, whatever batch it is in.
        parameters: Which published constants to use: "auto" takes those for 32x32 up to a short
            side of 32 pixels, those for 224x224 from 224, and interpolates in between; "cifar" and
            "imagenet" force one set.
        frost_pictures: Folder of pictures to use for frost in place of the synthetic texture.

    Returns:
        Corrupted images of the same shape, dtype and device, without gradient.

    Raises:
        TypeError: When an argument is of the wrong kind.
        ValueError: For an unknown name, a severity or images out of range, seeds that do not fit
            the images, or both seeds and a generator.

    >>> images = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
    >>> corrupt(images, "brightness", 3, seeds=[0, 1]).unique()
    tensor([38], dtype=torch.uint8)
    """
    check.name(name, _OPERATIONS)
    check.images(images)
    if seeds is None:
        seeds = _drawn_seeds(generator, len(images))
    elif generator is not None:
        raise ValueError("`seeds` and `generator` must not both be given: drop one of them")
    seeds = check.seeds(seeds, len(images))
    out = torch.empty_like(images, memory_format=torch.contiguous_format, requires_grad=False)

    def work(rows: slice) -> None:
        piece = images[rows].detach()
        params = sample(
            name,
            piece.shape,
            severity,
            seeds[rows],
            parameters=parameters,
            frost_pictures=frost_pictures,
            device=images.device,
        )
        with torch.no_grad():
            out[rows] = _apply(piece, name, params)

    in_parts(work, len(images), part_size(name, images), images.device)
    return out


def _drawn_seeds(generator: torch.Generator | np.random.Generator | None, count: int) -> Tensor:
    if generator is None:
        return draws.entropy_seeds(count)
    bounds = -(2**63), 2**63 - 1
    if isinstance(generator, np.random.Generator):
        return torch.from_numpy(generator.integers(*bounds, size=count, dtype=np.int64))
    if isinstance(generator, torch.Generator):
        device = generator.device
        seeds = torch.randint(*bounds, (count,), generator=generator, device=device)
        return seeds.cpu()
    raise TypeError(
        "`generator` must be a torch.Generator or numpy.random.Generator, got "
        f"{type(generator).__name__}: make one by torch.Generator().manual_seed(0)"
    )
