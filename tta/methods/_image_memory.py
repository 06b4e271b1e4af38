"""What RoTTA, PeTTA and NOTE share: a memory of images; and of the first two, the teacher."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from tta.core.backbone import Backbone
from tta.core.checks import LARGEST, whole_number
from tta.core.component import Context
from tta.core.config import UpdateConfig
from tta.core.prediction import Prediction
from tta.core.registry import get_config
from tta.core.update import Update
from tta.parts.augment import Augmenter
from tta.parts.losses import entropy
from tta.parts.memory import Cstu
from tta.parts.teachers import OtherWeights

__all__ = ["BalancedMemoryConfig", "BalancedMemoryUpdate", "ImageMemoryUpdate"]

ROUNDING = 1e-5  # of an image of 8 bits, as a model takes it


@dataclass(frozen=True, kw_only=True)
class BalancedMemoryConfig(UpdateConfig):
    """Fields of updates that learn from a balanced memory."""

    lr: float = 1e-3  # learning rate
    optimizer: str = "adam"  # "sgd", "adam" or "adamw"
    memory_size: int = 64  # images in the memory

    def __post_init__(self) -> None:
        super().__post_init__()
        whole_number("memory_size", self.memory_size, 1, LARGEST)


class ImageMemoryUpdate(Update):
    """Remembers images as they came; in 8 bits while all images are such.

    Args:
        config: The component's config, with ``memory_size``.
        network: The wrapped model.
        context: What is known at wrap.
    """

    counts_images: ClassVar[bool] = True
    # (memory_size, 0) before the first batch, then (memory_size, C, H, W): uint8 pixels while all
    # images are such, and else float32 as the model takes them
    memory: Tensor

    @classmethod
    def brings(cls, config: Any) -> dict[str, Any]:
        """The default rules, of which that for norm layers is official where the update is."""
        found = super().brings(config)
        if config.official and "norm" in found:
            found["norm"] = get_config(found["norm"], official=True)
        return found

    def __init__(self, config: Any, network: Backbone, context: Context) -> None:
        super().__init__(config, network, context)
        empty = torch.zeros(config.memory_size, 0, dtype=torch.uint8)
        self.register_buffer("memory", empty)

    def kept_by_rows(self) -> tuple[str, ...]:
        """Return ``memory``: it is large, and a batch replaces some of it."""
        return ("memory",)

    def lazy_buffers(self) -> tuple[str, ...]:
        """Return ``memory``: the first batch shows how large images are."""
        return ("memory",)

    def image_buffers(self) -> tuple[str, ...]:
        """Return ``memory``: images of 8 bits are kept in 8 bits."""
        return ("memory",)

    def keep(self, placed: dict[int, int], x: Tensor) -> None:
        """Write images to the memory.

        Args:
            placed: For every slot that changes, the position of its image in ``x``.
            x: (B, ...), as the model takes it.

        Raises:
            ValueError: When the images are not of the size of those in the memory.
        """
        if self.memory.numel() > 0 and self.memory.shape[1:] != x.shape[1:]:
            raise ValueError(
                "`images` must be of the size of those in the memory, "
                f"{tuple(self.memory.shape[1:])}, got {tuple(x.shape[1:])}: resize them, or call "
                "reset() first."
            )
        images = self._as_kept(x)
        if placed:
            self.context.journal.keep(self.memory, list(placed))
            self.memory[list(placed)] = images[list(placed.values())]

    def images(self, slots: Tensor, dtype: torch.dtype) -> Tensor:
        """Images of the memory (N, ...), as the model takes them.

        Args:
            slots: What ``memory[slots]`` takes.
            dtype: Of the images that were given.
        """
        images = self.memory[slots]
        return images if images.dtype == dtype else self._floats(images, dtype)

    def _as_kept(self, x: Tensor) -> Tensor:
        """Images (B, ...) as the memory holds them, which is made ready for them."""
        pixels = self._pixels(x) if self.memory.dtype == torch.uint8 else None
        if self.memory.dtype == torch.uint8 and pixels is None:
            kept = self.memory
            self.memory = kept.float() if kept.numel() == 0 else self._floats(kept, torch.float32)
        if self.memory.numel() == 0:
            self.memory = self.memory.new_zeros(len(self.memory), *x.shape[1:])
        return x.float() if pixels is None else pixels

    def _pixels(self, x: Tensor) -> Tensor | None:
        """Images (B, ...) in 8 bits, where these hold them."""
        return x if x.dtype == torch.uint8 else None

    def _floats(self, images: Tensor, dtype: torch.dtype) -> Tensor:
        """What the model takes, of what the memory holds."""
        return images.to(dtype)


class BalancedMemoryUpdate(ImageMemoryUpdate):
    """A teacher that predicts, and a memory of what it was sure of, balanced over its labels.

    Args:
        config: The component's config.
        network: The wrapped model.
        context: What is known at wrap.
        timeliness: Weight of age in what leaves the memory.
        uncertainty: Weight of entropy in what leaves the memory.
    """

    default_norm: ClassVar[str | None] = "robust_bn"
    injects: ClassVar[tuple[str, ...]] = ("augment",)
    learns_from_whole_batch: ClassVar[bool] = False

    def __init__(
        self,
        config: BalancedMemoryConfig,
        network: Backbone,
        context: Context,
        timeliness: float = 1.0,
        uncertainty: float = 1.0,
    ) -> None:
        super().__init__(config, network, context)
        self.teacher = OtherWeights(network, context.parameters, own_statistics=True)
        self.augmenter = Augmenter(network.model, context)
        self.bank = Cstu(config.memory_size, context.num_classes, timeliness, uncertainty)

    def predict(self, x: Tensor) -> Prediction:
        """Predict with the teacher, without remembering anything."""
        return self.teacher.predict(x)

    def integer_ranges(self) -> dict[str, tuple[int, int]]:
        """Range of the bank's labels, which are -1 in empty slots."""
        return {"bank.labels": (-1, self.context.num_classes - 1)}

    def remember(self, x: Tensor, prediction: Prediction) -> None:
        """Offer images (B, C, H, W), in order, with what the teacher said of them."""
        labels = prediction.logits.argmax(1).tolist()
        self.keep(self.bank.offer(labels, entropy(prediction.logits).tolist()), x)

    def remembered(self, dtype: torch.dtype) -> Tensor:
        """The images in the memory (M, C, H, W), as the model takes them.

        Args:
            dtype: Of the images that were given.
        """
        return self.images(self.bank.labels >= 0, dtype)

    def _pixels(self, x: Tensor) -> Tensor | None:
        """Images in 8 bits, where these hold them but for what a mean and a deviation round."""
        if x.dtype == torch.uint8:
            return x
        pixels = (self.augmenter.pixels(x) * 255).round().to(torch.uint8)
        same = (self._floats(pixels, torch.float32) - x).abs() <= ROUNDING
        return pixels if bool(same.all()) else None

    def _floats(self, images: Tensor, dtype: torch.dtype) -> Tensor:
        """What the model takes, of pixels or of what it takes."""
        if images.dtype == torch.uint8:
            images = self.augmenter.images(images.float() / 255, dtype)
        return images.to(dtype)
