"""U-VPA's prompt: an image of offsets that a cloud side has learned, added to every test image.

Gan, Pan et al.: Cloud-Device Collaborative Adaptation to Continual Changing Environments in the
Real-world, CVPR 2023, arXiv 2212.00972.

A device with a light model cannot learn by itself. It sends the images of which it is least sure to
a cloud side, which has a large model and learns a visual prompt, one image of offsets, and sends
that down. The device adds it to whatever comes.

    z = f(clip(x + mask * delta, 0, 1)),   delta = 0 at wrap

What is published about the paper says what its parts are, and leaves open how uncertainty is
measured, what the prompt looks like, both losses, all weights and rates. No code was found either.
So this is a **classification version of our own design** in the spirit of the paper, and no figure
of it can be compared with one of theirs.

In the adapter nothing moves by itself: the prompt is the state ``input/prompt``, zero until
``load_state`` or :class:`tta.runtime.cloud.Device` sets it (docs/cloud.md). It is held in pixels in
[0, 1], whatever the normalisation of the model is, and takes the size of the images at the first
batch that is learned from, or by what is loaded. A prompt of zeros suits images of any size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tta.core.backbone import Backbone
from tta.core.checks import LARGEST, whole_number
from tta.core.component import Context
from tta.core.config import ComponentConfig
from tta.core.registry import register
from tta.methods._joined_input import JoinedInput, check_join
from tta.parts.augment import pixel_space
from tta.parts.prompts import add_prompt, check_pixels

__all__ = ["Prompt", "PromptConfig"]


@dataclass(frozen=True, kw_only=True)
class PromptConfig(ComponentConfig):
    """Fields of ``prompt``."""

    width: int | None = None  # pixels of a frame in which it acts; None = the whole image
    join: str | None = None  # with the prediction for the images as they came; None = without it

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.width is not None:
            whole_number("width", self.width, 1, LARGEST)
        check_join(self.join)


@register("prompt")
class Prompt(JoinedInput):
    """A prompt that a cloud side has learned, added to the images."""

    Config = PromptConfig
    needs_given: ClassVar[bool] = True  # the prompt, which somebody else has learned
    cost: ClassVar[float] = 0.05
    uses_labels: ClassVar[bool] = False
    prompt_buffer: ClassVar[str | None] = "prompt"

    prompt: Tensor  # (C, H, W) offsets of pixels in [0, 1]; empty before the first batch

    def __init__(self, config: PromptConfig, network: Backbone, context: Context) -> None:
        super().__init__(config, network, context)
        space = pixel_space(network.model, context.mean, context.std)
        if space is None:
            raise ValueError(
                "`mean` and `std` must say how pixels in [0, 1] become what the model takes, "
                f"because a prompt is added to pixels and {type(network.model).__name__} has no "
                "pretrained_cfg: pass wrap(..., mean=..., std=...), 0 and 1 for raw pixels."
            )
        self._space = space
        self.register_buffer("prompt", torch.zeros(0))

    def lazy_buffers(self) -> tuple[str, ...]:
        """The first batch shows how large images are."""
        return ("prompt",)

    def transform(self, images: Tensor) -> Tensor:
        """Add the prompt to images (B, C, H, W).

        Raises:
            ValueError: When they have another number of axes or channels, or another size than a
                prompt that is not zero.
        """
        check_pixels(images, self._space)
        prompt, shape = self.prompt, images.shape[1:]
        if prompt.numel() == 0 and self.learning:
            self.prompt = prompt = prompt.new_zeros(shape)
        if prompt.shape != shape:
            if bool(prompt.any()):
                raise ValueError(
                    f"`images` must be (B, {', '.join(map(str, prompt.shape))}) like the prompt, "
                    f"got shape {tuple(images.shape)}: load a prompt of that size, or reset()."
                )
            prompt = prompt.new_zeros(0)
        with torch.autocast(images.device.type, enabled=False):
            return add_prompt(images, prompt, self._space, self.config.width)
