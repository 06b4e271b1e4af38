"""GTTA: labelled source images mixed with test images, and sure predictions as labels.

Marsden, Döbler, Yang: Introducing Intermediate Domains for Effective Self-Training during
Test-Time, 2022, arXiv 2208.07736.

Self-training fails where the target is far from the source, so it is led through domains in
between: source images are mixed with the test images that look most like their class, and the model
learns from them with the source's own labels. Then it learns from the test images of which it is
sure enough. All parameters are trained.

    x_m = l x_j(i) + (1 - l) x_s,i,   j(i) = argmax_j p(x_s,i) . p(x_j);   step 1 on CE(f(x_m), y_s)
    y_b = argmax p_b where max p_b >= sqrt(c);                             step 2 on CE(f(x), y)

c is a moving average of the mean confidence of batches, 0.9 of which stays, from 0.9 on; c and the
labels y come from a pass before both steps. What is returned are the logits between the two steps,
of the last of ``steps``, each of which takes the next source batch, cut to the length of the test
batch. Source batches are taken in the order given and start over at the end.

This is the variant with mixup, which the authors' code has for CIFAR and for which there is a
trace. The other one transfers the style of test images to source images, by a network that is
trained on source images beforehand; it is not here, and so there is no preset for ImageNet.

Differences: where no image is sure enough there is no second step; in the authors' code the
optimiser takes one with a gradient of zero, in which moments still move the weights. ``reset``
also puts c and the position in the source back. ``official=True`` does as the code does in both.
With a norm rule whose statistics move they do so in the first pass alone. A saved adapter holds the
source batches if they came as a list; a data loader must be given to ``tta.load`` again. The
authors do not scale the rate; below the batch size of the preset it falls with
``wrap(batch_size=)`` here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from tta.core.backbone import Backbone
from tta.core.checks import fraction
from tta.core.component import Context
from tta.core.config import UpdateConfig
from tta.core.norm_layers import frozen_statistics
from tta.core.prediction import Prediction, Report
from tta.core.registry import register
from tta.core.source import SourceStatistics
from tta.methods._source_replay import SourceReplay
from tta.parts.selection import move_average

__all__ = ["Gtta", "GttaConfig"]

KEPT = 0.9  # share of the old average confidence
NONE = -100  # label of an image that gets none, which the cross-entropy leaves out


@dataclass(frozen=True, kw_only=True)
class GttaConfig(UpdateConfig):
    """Fields of ``gtta``."""

    params: str = "all"  # what is trained
    optimizer: str = "adam"  # "sgd", "adam" or "adamw"
    lr: float = 1e-5  # learning rate
    steps: int = 1  # pairs of steps on a batch, each with the next source batch
    mixup: float = 1 / 3  # l, share of the test image
    start_confidence: float = 0.9  # c before the first batch

    def __post_init__(self) -> None:
        super().__post_init__()
        fraction("mixup", self.mixup)
        fraction("start_confidence", self.start_confidence)


_CIFAR = {"lr_scaling": "linear_below", "lr_batch_size": 200}


@register("gtta")
class Gtta(SourceReplay):
    """Source images mixed with like test images, then sure predictions as labels."""

    Config = GttaConfig
    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {"cifar10": _CIFAR, "cifar100": _CIFAR}
    cost: ClassVar[float] = 7.0
    learns_from_whole_batch: ClassVar[bool] = False

    confidence: Tensor  # c, 0-dimensional

    def __init__(self, config: GttaConfig, network: Backbone, context: Context) -> None:
        super().__init__(config, network, context)
        start = torch.tensor(config.start_confidence, dtype=torch.float32)
        self.register_buffer("confidence", start)

    def learn(self, x: Tensor) -> Prediction:
        """Run all steps on a batch (B, ...)."""
        return self.adapt(x)

    def adapt(self, x: Tensor) -> Prediction:
        """Label once, then take the pairs of steps; the prediction is between the last two."""
        with torch.no_grad():
            probs = self.network(x).logits.float().softmax(1)
        sure, labels = probs.max(1)
        move_average(self.confidence, sure.mean(), KEPT)
        labels = torch.where(sure >= self.confidence.sqrt(), labels, NONE)
        kept = labels != NONE
        count = int(kept.sum())
        self.report = Report(selected=count, kept=kept, loss=float("nan"), stepped=False)
        for _ in range(self.config.steps - 1):
            self._steps(x, probs, labels, count)
            with torch.no_grad(), frozen_statistics(self.network.wrappers):
                probs = self.network(x).logits.float().softmax(1)
        return self._steps(x, probs, labels, count)

    def fit(self, source: SourceStatistics) -> None:
        """Keep the source batches.

        Raises:
            ValueError: When ``source`` has none.
        """
        self.keep_batches(source)
        self.source_used = "batches"

    def survives_reset(self) -> tuple[str, ...]:
        """Return the average too under ``official=True``, whose reset keeps it."""
        return (*super().survives_reset(), "confidence") if self.config.official else ()

    def _steps(self, x: Tensor, probs: Tensor, labels: Tensor, count: int) -> Prediction:
        """Take a step on mixed images and one on the test images (B, ...) that have a label."""
        images, source_labels = self.next_batch(x.device)
        images, source_labels = images[: len(x)], source_labels[: len(x)]
        if images.shape[1:] != x.shape[1:]:
            raise ValueError(
                f"`images` must be of the size of the source's, {tuple(images.shape[1:])}, to be "
                f"mixed with them, got {tuple(x.shape[1:])}: resize them."
            )
        if images.is_floating_point() != x.is_floating_point():
            # A cast would mix levels up to 255 with pixels up to 1.
            raise TypeError(
                f"`source` must give gtta images of the kind that it is called with, {x.dtype}, to "
                f"be mixed with them, got {images.dtype}: pass what the model takes, such as "
                "images.float() / 255."
            )
        with frozen_statistics(self.network.wrappers):
            with torch.no_grad():
                of_source = self.network(images.to(x.dtype)).logits.float().softmax(1)
            partners = self._partners(of_source, probs)
            mixed = self.network(self._mixed(x[partners], images)).logits
            loss = F.cross_entropy(mixed.float(), source_labels)
            stepped = self.step(loss)
            self.report["source"] = loss.detach()
            prediction = self.network(x)
            logits = prediction.logits.float()
            if count > 0:
                loss = F.cross_entropy(logits, labels, ignore_index=NONE)
                self.report["loss"] = loss.detach()
                stepped |= self.step(loss)
            elif self.config.official:
                stepped |= self.step((logits * 0).sum())
        self.report["stepped"] = stepped or self.report["stepped"]
        return prediction

    def _partners(self, source: Tensor, probs: Tensor) -> Tensor:
        """For each source image (S, C) the test image (B, C) whose prediction is most like it."""
        return (source @ probs.t()).argmax(1)

    def _mixed(self, x: Tensor, images: Tensor) -> Tensor:
        """Mix test images with source images, in the kind of numbers that the model takes."""
        wide = torch.promote_types(x.dtype, torch.float32)
        share = self.config.mixup
        mixed = share * x.to(wide) + (1 - share) * images.to(wide)
        return (mixed if x.is_floating_point() else mixed.round()).to(x.dtype)
