"""TTAug: the mean prediction over augmented views of one image, with its own share of statistics.

Test-time augmentation as the benchmark that came with ROID (arXiv 2306.00650) has it, with the
views of AugMix (Hendrycks et al., ICLR 2020, arXiv 1912.02781) and the statistics of alpha-BN
(arXiv 2110.04065).

Nothing is learned. Each image makes a batch of its own, of itself and of views of it, whose logits
are averaged. BatchNorm layers use mostly the source's statistics and a little of those of the
views, so that even a single image may say something about its domain.

    output = 1/(V + 1) sum_v f(A_v(x)),   mean = w mean_s + (1 - w) mean_views,   var likewise

A_0 is the identity (``plain``), the others are those of ``memo``: a crop, a flip and a mixture of
three chains of operations. w is ``source_weight``, and the views' variance is the unbiased one:
that is the norm rule ``alpha_bn``, which comes with this one, and no other may be named. Networks
without BatchNorm need none. With an update, the update sees the images themselves, under that norm
rule, and its own prediction is not returned.

A batch equals its images one by one (the benchmark would average all images of a batch together).
With ``augment=`` its calls are those for view 0, 1, ... of the first image, then of the next, with
pixels as they come, which are not clipped to [0, 1] first. While
the adapter is frozen, every image gets the same views. Where gradients are to flow to images, which
they cannot through views, only the images themselves are predicted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tta.core.backbone import Backbone
from tta.core.checks import fraction, shown, whole_number
from tta.core.config import ComponentConfig
from tta.core.logit_checks import RowsOverflowError
from tta.core.output_rule import Output
from tta.core.prediction import Prediction
from tta.core.random import fork
from tta.core.registry import component, get_config, register
from tta.parts.augment import Augmenter
from tta.parts.augmix import random_view

__all__ = ["TtAug", "TtAugConfig"]

MIXED = "alpha_bn"


@dataclass(frozen=True, kw_only=True)
class TtAugConfig(ComponentConfig):
    """Fields of ``ttaug``."""

    views: int = 32  # V, augmented views of each image
    plain: bool = True  # whether the image itself is averaged too
    source_weight: float = 0.9  # w, share of the source's statistics

    def __post_init__(self) -> None:
        super().__post_init__()
        whole_number("views", self.views, 1, 10_000)
        fraction("source_weight", self.source_weight)

    @property
    def norm(self) -> ComponentConfig:
        """The norm rule that ``source_weight`` means."""
        return get_config(MIXED, source_weight=self.source_weight)


@register("ttaug")
class TtAug(Output):
    """The mean of the logits of an image and of views of it."""

    Config = TtAugConfig
    injects: ClassVar[tuple[str, ...]] = ("augment",)
    cost: ClassVar[float] = 33.0

    network: Backbone
    augmenter: Augmenter

    @classmethod
    def brings(cls, config: TtAugConfig) -> dict[str, Any]:
        """The norm rule of ``source_weight``."""
        return {"norm": config.norm}

    @classmethod
    def check_slots(
        cls, config: TtAugConfig, slots: Mapping[str, ComponentConfig | None], model: nn.Module
    ) -> None:
        """Refuse another norm rule than that of ``source_weight``."""
        given = slots["norm"]
        if given != config.norm and component(MIXED).suits(model):
            raise ValueError(
                "`norm` must be left out with ttaug, whose source_weight is a rule of its own, got "
                f"{shown('source' if given is None else given.name)}: leave norm out."
            )

    def begin(self, network: Backbone) -> None:
        """Find out how pixels become what the model takes."""
        self.network = network
        self.augmenter = Augmenter(network.model, self.context, clip=False)

    def correct(self, prediction: Prediction) -> Tensor:
        """Return the logits (B, C) as they are, where nothing is known of the images."""
        return prediction.logits

    def answer(self, x: Tensor, prediction: Prediction) -> Tensor:
        """Mean logits (B, C) of each image of (B, C, H, W) and of its views."""
        self.augmenter.check(x)
        result, found = self.network.result, []
        bad = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        for i in range(len(x)):
            try:
                found.append(self.network(self._batch_of(x[i : i + 1])).logits.float().mean(0))
            except RowsOverflowError:
                bad[i] = True
        self.network.result = result
        if bool(bad.any()):
            raise RowsOverflowError(bad)
        return torch.stack(found)

    def _batch_of(self, image: Tensor) -> Tensor:
        """The image (1, C, H, W) and its views, as the model takes them (N, C, H, W)."""
        if torch.is_grad_enabled():
            return image
        draws = fork(self._generator(), image.device)
        views = self.augmenter.views(image, self.config.views, draws, random_view)
        return torch.cat([*([image] if self.config.plain else []), *views])

    def _generator(self) -> torch.Generator:
        """The adapter's, or a copy of it while nothing may move."""
        own = self.context.generator
        return own if self.learning else torch.Generator().set_state(own.get_state())
