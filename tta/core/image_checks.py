"""Refuse images that a model cannot take: beforehand, or when it has raised on them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tta.core.checks import is_final, is_out_of_memory, told
from tta.core.classifier import CONVOLUTIONS, declared_sizes, timm_configs
from tta.core.logit_checks import RowsOverflowError

__all__ = ["ImageChecks", "ImagesRefusedError", "KindRefusedError"]

# What torch says of images whose maps get too small for a layer.
TOO_SMALL = (
    "Kernel size can't be greater than actual input size",
    "Output size is too small",
    "Padding size should be less than",
)
# What models raise on images of a size that they were not made for.
OF_SIZE = (RuntimeError, AssertionError, ValueError, IndexError)


class ImagesRefusedError(ValueError):
    """The model raised on images of a shape or a size that it does not take."""


class KindRefusedError(TypeError):
    """The model raised on numbers of a kind that its first layer does not take, as uint8."""


class ImageChecks:
    """What can be said of images against a model's first layer.

    Args:
        entry: The layer that takes the images; None where none is known to.
    """

    def __init__(self, entry: Any) -> None:
        self.entry = entry
        self.taken: tuple[int, ...] | None = None  # shape of an image that the model has taken

    def check(self, x: Any) -> None:
        """Refuse what is no batch of images, before anything changes.

        Raises:
            TypeError: When ``x`` is no dense tensor of floating-point numbers or of uint8.
            ValueError: When ``x`` has no batch axis or holds no image.
        """
        if not isinstance(x, Tensor):
            raise TypeError(f"`images` must be a tensor, got {type(x).__name__}: pass a batch.")
        if x.is_nested or x.layout != torch.strided or x.is_meta:
            raise TypeError(
                f"`images` must be a dense tensor with values, got {x.layout} on {x.device}: "
                "convert it with to_dense()."
            )
        if not x.is_floating_point() and x.dtype != torch.uint8:
            raise TypeError(
                f"`images` must be floating point, got {x.dtype}: pass what the model takes, "
                "such as images.float() / 255."
            )
        if x.dtype == torch.float64 and self._cast_apart(x):
            raise TypeError(
                "`images` must be float32 under autocast, got float64: convert with images.float()."
            )
        if x.ndim < 2:
            raise ValueError(
                f"`images` must have a batch axis and more, got shape {tuple(x.shape)}: add one."
            )
        if x.shape[0] == 0 or x.numel() == 0:
            raise ValueError(
                f"`images` must hold at least one image, got shape {tuple(x.shape)}: "
                "skip empty batches."
            )

    def refusal(
        self, error: BaseException, x: Tensor
    ) -> ImagesRefusedError | KindRefusedError | None:
        """Return what to raise in place of ``error`` if shape or dtype of ``x`` may be its cause.

        Both are compared with what the first layer takes. Models that rearrange, repeat or convert
        pixels before that layer accept others, so a batch is not refused beforehand.
        """
        final = (ImagesRefusedError, KindRefusedError, RowsOverflowError, torch.OutOfMemoryError)
        if not isinstance(error, Exception) or isinstance(error, final) or is_final(error):
            return None
        reason = self._misfit(x)
        if reason is None and x.dtype == torch.uint8 and type(error) is RuntimeError:
            return KindRefusedError(
                "`images` must be floating point for this model, got torch.uint8: pass what it "
                "takes, such as images.float() / 255."
            )
        if reason is None and type(error) is RuntimeError and self._other_dtype(x):
            return KindRefusedError(
                f"`images` must be {self.entry.weight.dtype} like the model, got {x.dtype}: "
                "convert one of them, or call under torch.autocast."
            )
        return None if reason is None else ImagesRefusedError(reason)

    def size_refusal(
        self, error: BaseException, x: Tensor, model: nn.Module
    ) -> ImagesRefusedError | None:
        """Return what to raise in place of ``error`` if the size of ``x`` may be its cause.

        It may where torch says so, and where the model has taken images of another size, or was
        made for one.
        """
        # Kinds of their own, such as of a device or of other processes, are no matter of size.
        if type(error) not in OF_SIZE or is_final(error) or is_out_of_memory(error):
            return None
        shape, reason, known = tuple(x.shape[1:]), told(error, 100), self.taken
        entry = self.entry  # where channels come first, sizes are last
        if known is None and isinstance(entry, CONVOLUTIONS) and x.ndim == entry.weight.ndim == 4:
            size = _fixed_size(model)
            known = size and (shape[0], *size)
        if known is not None and known != shape:
            return ImagesRefusedError(
                f"`images` must be of a size that the model takes, such as {known}, got "
                f"{shape} ({reason}): resize them."
            )
        if not any(words in str(error) for words in TOO_SMALL):
            return None
        return ImagesRefusedError(
            f"`images` must be larger for this model, got shape {tuple(x.shape)} ({reason}): "
            "resize them."
        )

    def _cast_apart(self, x: Tensor) -> bool:  # autocast leaves what is float64 as it is
        wide = self.entry is not None and self.entry.weight.dtype == torch.float64
        return torch.is_autocast_enabled(x.device.type) and not wide

    def _other_dtype(self, x: Tensor) -> bool:
        if self.entry is None or torch.is_autocast_enabled(x.device.type):
            return False
        return x.dtype != self.entry.weight.dtype

    def _misfit(self, x: Tensor) -> str | None:
        """Say why the first layer cannot take the shape of ``x``; None where it can."""
        entry, shape = self.entry, tuple(x.shape)
        if isinstance(entry, nn.Linear):
            if shape[-1] == entry.in_features:
                return None
            return (
                f"`images` must end in an axis of {entry.in_features}, got shape {shape}: "
                "reshape them."
            )
        if not isinstance(entry, CONVOLUTIONS):
            return None
        rank = entry.weight.ndim
        if x.ndim != rank:
            advice = "add a batch axis with images[None]" if x.ndim == rank - 1 else "reshape them"
            return (
                f"`images` must have {rank} axes (batch, {entry.in_channels} channels, {rank - 2} "
                f"of space), got shape {shape}: {advice}."
            )
        if x.shape[1] != entry.in_channels:
            return (
                f"`images` must have {entry.in_channels} channels, got shape {shape}: convert "
                "them to what the model takes."
            )
        return None


def _fixed_size(model: nn.Module) -> tuple[int, ...] | None:
    """Height and width of the images that a model was made for, where it takes no others."""
    if any(getattr(module, "strict_img_size", True) is False for module in model.modules()):
        return None  # as timm's transformers with dynamic_img_size=True
    if sizes := declared_sizes(model, 2):
        return sizes[0]
    for said in timm_configs(model):
        size = said.get("input_size")
        if said.get("fixed_input_size") and isinstance(size, (tuple, list)) and len(size) == 3:
            return tuple(size[1:])
    return None
