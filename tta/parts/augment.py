"""Augmented views of a batch (CoTTA, PETAL, RMT, RoTTA, ROID).

The recipe is the one that CoTTA took over: a colour jitter in random order, a small rotation, shift
and zoom, a faint blur, a flip, a little noise. One view is one draw of its parameters, shared by
the whole batch (only the noise is drawn for each pixel). Drawing and applying are separate, so that
any view can be made again.

Everything happens on pixels in [0, 1]; what the model takes is a channel-wise normalisation of
them, and :func:`pixel_space` finds out which.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tta.core.checks import shown
from tta.core.component import Context, Remembers
from tta.core.random import CountedDraws

__all__ = [
    "Augmenter",
    "Recipe",
    "View",
    "blur",
    "draw_view",
    "jitter_colours",
    "make_view",
    "pixel_space",
    "warp",
]

# Pixels (B, C, H, W) in [0, 1] to a view of the same shape, in a tensor of its own.
Recipe: TypeAlias = Callable[[Tensor, CountedDraws], Tensor]

BRIGHTNESS, CONTRAST, SATURATION, HUE, GAMMA = range(5)
# Ranges of the five operations in the order above: factors, and for hue a share of the colour
# circle.
RANGES = ((0.6, 1.4), (0.7, 1.3), (0.5, 1.5), (-0.06, 0.06), (0.7, 1.3))
ANGLE = 15.0  # degrees
SHIFT = 1 / 8  # of height and width
SCALE = (0.9, 1.1)
SIGMA = (0.001, 0.5)  # pixels
MARGIN = 2  # half of the blur's kernel of 5
NOISE = 0.005  # standard deviation
GREY = (0.2989, 0.587, 0.114)


class View(NamedTuple):
    """The parameters of one view."""

    order: tuple[int, ...]  # of the five colour operations
    factors: tuple[float, ...]  # by operation, not by order
    angle: float  # degrees, clockwise
    shift: tuple[int, int]  # pixels to the right and down
    scale: float
    sigma: float  # of the blur, pixels; 0 = none
    flip: bool


def draw_view(height: int, width: int, draws: CountedDraws) -> View:
    """Draw the parameters of a view of images of this size."""
    places, u = draws.numbers(5), draws.numbers(11)
    order = sorted(range(5), key=places.__getitem__)
    factors = tuple(low + (high - low) * r for (low, high), r in zip(RANGES, u, strict=False))
    right, down = (
        round((2 * r - 1) * SHIFT * n) for r, n in zip(u[5:7], (width, height), strict=True)
    )
    return View(
        order=tuple(order),
        factors=factors,
        angle=ANGLE * (2 * u[7] - 1),
        shift=(right, down),
        scale=SCALE[0] + (SCALE[1] - SCALE[0]) * u[8],
        sigma=SIGMA[0] + (SIGMA[1] - SIGMA[0]) * u[9],
        flip=u[10] < 0.5,
    )


def jitter_colours(pixels: Tensor, view: View) -> Tensor:
    """The five colour operations, in the view's order.

    Args:
        pixels: (B, C, H, W) in [0, 1]. Saturation and hue need C = 3 and are left out otherwise.
        view: Order and factors.

    Returns:
        (B, C, H, W) in [0, 1].
    """
    x = pixels.clone()
    for operation in view.order:
        factor = view.factors[operation]
        if operation == BRIGHTNESS:
            x = x.mul_(factor).clamp_(0, 1)
        elif operation == GAMMA:
            # exp(g log x) is vectorised on a CPU, a power with a fraction in the exponent is not.
            x = x.clamp_(1e-8, 1).log_().mul_(factor).exp_().clamp_(0, 1)
        elif operation == CONTRAST:
            mean = _grey(x).mean(dim=(1, 2, 3), keepdim=True)
            x = x.mul_(factor).add_((1 - factor) * mean).clamp_(0, 1)
        elif x.shape[1] == 3:
            if operation == SATURATION:
                grey = _grey(x)
                x = x.mul_(factor).add_(grey, alpha=1 - factor).clamp_(0, 1)
            else:
                x = _turn_hue(x, factor)
    return x


def _grey(x: Tensor) -> Tensor:
    """Luma (B, 1, H, W) of colour images; other images as they are."""
    if x.shape[1] != 3:
        return x
    r, g, b = x.split(1, dim=1)
    return (GREY[0] * r).add_(g, alpha=GREY[1]).add_(b, alpha=GREY[2])


def _turn_hue(x: Tensor, turn: float) -> Tensor:
    """Rotate the hue of (B, 3, H, W) by a share of the colour circle.

    A channel is ``value - chroma * clamp(min(k, 4 - k), 0, 1)`` with k the distance of the hue, in
    sixths of the circle, from that channel's own place.
    """
    r, g, b = x.unbind(1)
    value, low = x.amax(1), x.amin(1)
    chroma = value - low
    safe = torch.where(chroma == 0, 1.0, chroma)
    hue = torch.where(
        value == r,
        (g - b) / safe,
        torch.where(value == g, 2 + (b - r) / safe, 4 + (r - g) / safe),
    )
    hue = hue + 6 * turn
    places = x.new_tensor([5.0, 3.0, 1.0]).view(1, 3, 1, 1)
    k = torch.remainder(hue[:, None] + places, 6.0)
    share = torch.minimum(k, 4 - k).clamp_(0, 1)
    return value[:, None] - chroma[:, None] * share


def warp(pixels: Tensor, view: View, margin: int = MARGIN, padding: str = "edge") -> Tensor:
    """Rotate, zoom and shift about the centre, bilinear; flip if the view says so.

    Args:
        pixels: (B, C, H, W).
        view: Angle, shift, scale and flip.
        margin: Extra pixels on every side, for a filter that follows.
        padding: How the image continues beyond its border, "edge" or "reflect".

    Returns:
        (B, C, H + 2 margin, W + 2 margin).
    """
    b, c, h, w = pixels.shape
    if padding == "reflect":
        # No pixel farther out than half the image is ever read.
        pixels = F.pad(pixels, (w // 2, w // 2, h // 2, h // 2), mode="reflect")
    rows, columns = pixels.shape[2:]
    across = torch.arange(w + 2 * margin, dtype=torch.float64) - (w - 1) / 2 - margin
    down = torch.arange(h + 2 * margin, dtype=torch.float64) - (h - 1) / 2 - margin
    if view.flip:
        across = -across
    across, down = across - view.shift[0], (down - view.shift[1])[:, None]
    angle = math.radians(view.angle)
    cos, sin = math.cos(angle) / view.scale, math.sin(angle) / view.scale
    grid = torch.stack(
        [
            (cos * across + sin * down) * (2 / columns),
            (cos * down - sin * across) * (2 / rows),
        ],
        dim=-1,
    )
    # All channels of all images at once, so that the weights of the grid are made only once.
    flat = pixels.reshape(1, b * c, rows, columns)
    warped = F.grid_sample(
        flat, grid[None].to(flat), mode="bilinear", padding_mode="border", align_corners=False
    )
    return warped.view(b, c, *warped.shape[2:])


def blur(pixels: Tensor, sigma: float, margin: int = MARGIN) -> Tensor:
    """Gaussian blur without padding, which takes ``margin`` pixels off every side.

    Args:
        pixels: (B, C, H + 2 margin, W + 2 margin).
        sigma: In pixels, above 0.
        margin: Half of the length of the kernel, rounded down.

    Returns:
        (B, C, H, W).
    """
    taps = torch.arange(-margin, margin + 1, dtype=torch.float64)
    kernel = torch.exp(-0.5 * (taps / sigma).square())
    kernel = kernel / kernel.sum()
    # As two products with banded matrices: on a CPU many times faster than a convolution.
    down, across = (_band(kernel, n - 2 * margin).to(pixels) for n in pixels.shape[2:])
    return down.t() @ (pixels @ across)


def _band(kernel: Tensor, size: int) -> Tensor:
    """(size + n - 1, size), whose column j holds the n numbers of the kernel from row j on."""
    band = kernel.new_zeros(size + len(kernel) - 1, size)
    for i, weight in enumerate(kernel):
        band.diagonal(-i).fill_(float(weight))
    return band


def make_view(
    pixels: Tensor, view: View, noise: Tensor | None = None, padding: str = "edge"
) -> Tensor:
    """One view of a batch.

    Args:
        pixels: (B, C, H, W) in [0, 1].
        view: Its parameters.
        noise: Standard normal (B, C, H, W), or none.
        padding: As for :func:`warp`.

    Returns:
        (B, C, H, W) in [0, 1].

    Example:
        >>> view = draw_view(32, 32, CountedDraws(0))
        >>> make_view(torch.rand(2, 3, 32, 32), view).shape
        torch.Size([2, 3, 32, 32])
    """
    x = jitter_colours(pixels.clamp(0, 1), view)
    if view.sigma > 0:
        x = blur(warp(x, view, MARGIN, padding), view.sigma)
    else:
        x = warp(x, view, 0, padding)
    if noise is not None:
        x = x.add_(noise, alpha=NOISE)
    return x.clamp_(0, 1)


def pixel_space(
    model: nn.Module, mean: Sequence[float] | None, std: Sequence[float] | None
) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """The normalisation between pixels in [0, 1] and what a model takes.

    Args:
        model: Asked for ``pretrained_cfg`` or ``default_cfg``, timm's protocol, when no figures are
            given. Attributes that a wrapper forwards from a model inside it are not read, since the
            wrapper may normalise by itself.
        mean: Channel means.
        std: Channel standard deviations.

    Returns:
        Mean and standard deviation, or None when neither the caller nor the model gives them.

    Raises:
        ValueError: When only one of them is given, or a deviation is not above 0.
    """
    if mean is None and std is None:
        for cfg in _configs_of_data(model):
            read = cfg.get if isinstance(cfg, Mapping) else lambda key, cfg=cfg: _read(cfg, key)
            if read("mean") is not None and read("std") is not None:
                mean, std = read("mean"), read("std")
                break
        else:
            return None
    if mean is None or std is None:
        raise ValueError(
            f"`mean` and `std` must be given together, got mean={mean} and std={std}: pass both."
        )
    if any(s <= 0 for s in std):
        raise ValueError(f"`std` must be above 0 in every channel, got {tuple(std)}.")
    return tuple(float(m) for m in mean), tuple(float(s) for s in std)


def _configs_of_data(model: nn.Module) -> Iterator[Any]:
    """The configs that the model itself holds, not those forwarded from a module inside it."""
    model = model._modules.get("_orig_mod") or model  # of a compiled one
    for name in ("pretrained_cfg", "default_cfg"):
        if name in vars(model):
            yield vars(model)[name]


def _read(cfg: Any, key: str) -> Any:
    return getattr(cfg, key, None)


def _checked(view: Any, pixels: Tensor) -> Tensor:
    """Refuse what the caller's ``augment`` returned, unless it can stand for the images."""
    if not isinstance(view, Tensor) or not view.is_floating_point():
        got = view.dtype if isinstance(view, Tensor) else type(view).__name__
        raise TypeError(f"`augment` must return a floating-point tensor, got {got}: correct it.")
    if view.shape != pixels.shape or not bool(torch.isfinite(view.sum())):
        got = "values that are not finite" if view.shape == pixels.shape else tuple(view.shape)
        raise ValueError(
            f"`augment` must return finite pixels of shape {tuple(pixels.shape)}, as it was given, "
            f"got {got}: correct it."
        )
    return view.to(pixels)


class Augmenter(Remembers):
    """Makes views of what a model takes.

    Args:
        model: The classifier.
        context: Gives mean, std and, where there is one, the caller's own ``augment``.
        padding: As for :func:`warp`.
        soften: Whether views are blurred and get noise.
        clip: Whether pixels are clipped to [0, 1] before a view is made of them.

    Raises:
        ValueError: When neither the caller nor the model says how pixels are normalised.
    """

    def __init__(
        self,
        model: nn.Module,
        context: Context,
        padding: str = "edge",
        soften: bool = True,
        clip: bool = True,
    ) -> None:
        space = pixel_space(model, context.mean, context.std)
        if space is None:
            raise ValueError(
                "`mean` and `std` must say how pixels in [0, 1] become what the model takes, "
                f"because this method augments and {type(model).__name__} has no pretrained_cfg: "
                "pass wrap(..., mean=..., std=...), 0 and 1 for a model that takes raw pixels."
            )
        self.padding, self.soften, self.clip = padding, soften, clip
        self.mean, self.std = space
        self.raw = not any(self.mean) and all(s == 1 for s in self.std)
        self.augment: Callable[[Tensor, int], Tensor] | None = context.augment
        self.calls = 0  # of the caller's `augment`, since wrap

    def check(self, x: Tensor) -> None:
        """Refuse what cannot be augmented, before anything has changed.

        Raises:
            ValueError: When ``x`` is not (B, C, H, W) with as many channels as there are means.
        """
        if x.ndim != 4:
            raise ValueError(
                f"`images` must be (B, C, H, W) to be augmented, got shape {tuple(x.shape)}: use a "
                "method that does not augment."
            )
        if {len(self.mean), len(self.std)} - {1, x.shape[1]}:
            raise ValueError(
                f"`mean` and `std` must have one value, or one for each of {x.shape[1]} channels, "
                f"got {shown(self.mean, 40)} and {shown(self.std, 40)}: wrap the model with those "
                "it was "
                "trained with."
            )

    @torch.no_grad()
    def views(
        self, x: Tensor, count: int, draws: CountedDraws, recipe: Recipe | None = None
    ) -> Iterator[Tensor]:
        """Make ``count`` views of ``x``, one by one.

        Args:
            x: (B, C, H, W), as the model takes it.
            count: Number of views.
            draws: On the device of ``x``.
            recipe: Makes a view in place of that of this module, where the caller of ``wrap`` has
                given none.

        Yields:
            (B, C, H, W), as the model takes it.
        """
        pixels = self.pixels(x)
        for _ in range(count):
            # Autocast would do the blur in half precision.
            with torch.autocast(x.device.type, enabled=False):
                view = self._view(pixels, draws, recipe or self._recipe)
            yield self.images(view, x.dtype)

    def pixels(self, x: Tensor) -> Tensor:
        """Convert what the model takes (B, C, H, W) to float32 pixels in [0, 1]."""
        if x.dtype == torch.uint8:
            return x.float() / 255
        mean, std = self._space(x.device)
        pixels = x.float() if self.raw else x.float() * std + mean
        return pixels.clamp(0, 1) if self.clip else pixels

    def images(self, pixels: Tensor, dtype: torch.dtype) -> Tensor:
        """Convert pixels in [0, 1] (B, C, H, W) to what the model takes, perhaps in place."""
        if dtype == torch.uint8:
            return pixels.mul_(255).round_().to(dtype)
        mean, std = self._space(pixels.device)
        return (pixels if self.raw else pixels.sub_(mean).div_(std)).to(dtype)

    def _space(self, device: torch.device) -> tuple[Tensor, Tensor]:
        mean, std = (
            torch.tensor(v, dtype=torch.float32, device=device) for v in (self.mean, self.std)
        )
        return mean.view(1, -1, 1, 1), std.view(1, -1, 1, 1)

    def _view(self, pixels: Tensor, draws: CountedDraws, recipe: Recipe) -> Tensor:
        if self.augment is not None:
            view = self.augment(pixels, self.calls)
            self.calls += 1
            return _checked(view, pixels).clone()
        return recipe(pixels, draws)

    def _recipe(self, pixels: Tensor, draws: CountedDraws) -> Tensor:
        parameters = draw_view(pixels.shape[2], pixels.shape[3], draws)
        if not self.soften:
            return make_view(pixels, parameters._replace(sigma=0.0), None, self.padding)
        noise = draws.normals(*pixels.shape)
        return make_view(pixels, parameters, noise, self.padding)
