"""A diffusion model as an input rule takes it: a denoiser, and the noise of its training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tta.core.checks import shown

__all__ = ["Diffusion"]

Denoiser = nn.Module | Callable[[Tensor, Tensor], Tensor]


class Diffusion:
    """A trained denoiser, for the input rules that project images onto the source.

    Args:
        denoiser: Noisy images (B, C, H, W) in [-1, 1], before noise, and steps (B,) int64 from 0 to
            T - 1, to the noise (B, C, H, W), or to (B, 2C, H, W) if it also tells the variance.
            A module is used in eval mode and goes with the model's device.
        betas: Variances of the noise that is added in each of T steps (T,), above 0 and below 1, as
            the denoiser was trained with them.
        config: The input rule; None for ``dda`` with its defaults.
        classifier: Classifies the images as they came, where that is another model than the one
            that is wrapped (SDA).

    Raises:
        TypeError: When an argument is of the wrong kind.
        ValueError: When ``betas`` has another shape or values out of range.

    Example:
        >>> diffusion = Diffusion(lambda x, t: torch.zeros_like(x), torch.full((1000,), 0.01))
    """

    def __init__(
        self,
        denoiser: Denoiser,
        betas: Tensor | Sequence[float],
        config: Any = None,
        *,
        classifier: nn.Module | None = None,
    ) -> None:
        if not callable(denoiser):
            raise TypeError(
                "`denoiser` must be a module or a function of images and steps, got "
                f"{type(denoiser).__name__}: pass one."
            )
        if classifier is not None and not isinstance(classifier, nn.Module):
            raise TypeError(
                f"`classifier` must be a torch.nn.Module, got {type(classifier).__name__}: pass "
                "the one that was trained before the wrapped one, or leave it out."
            )
        try:
            found = torch.as_tensor(betas, dtype=torch.float64).detach().cpu().clone()
        except (TypeError, ValueError, RuntimeError):
            raise TypeError(
                f"`betas` must be a tensor of variances (T,), got {shown(betas)}: pass those of "
                "the training."
            ) from None
        if found.ndim != 1 or len(found) < 2 or not bool(((found > 0) & (found < 1)).all()):
            raise ValueError(
                "`betas` must be at least two variances (T,) above 0 and below 1, got shape "
                f"{tuple(found.shape)} or values outside: pass those of the training."
            )
        self.denoiser = denoiser
        self.betas = found
        self.config = config
        self.classifier = classifier

    @property
    def modules(self) -> list[nn.Module]:
        """What of it can be moved to a device."""
        parts = (self.denoiser, self.classifier)
        return [part for part in parts if isinstance(part, nn.Module)]
