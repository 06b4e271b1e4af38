"""RoTTA: robust statistics, a balanced memory to learn from, a teacher that predicts.

Yuan, Xie, Li: Robust Test-Time Adaptation in Dynamic Scenarios, CVPR 2023, arXiv 2303.13899.

On streams whose neighbouring images share a class, a batch does not represent the stream. Therefore
statistics move slowly instead of being the batch's (``robust_bn``), and updates are made on a
memory instead of the batch. The memory is balanced over pseudo-labels, prefers recent and confident
images, and gives old ones less weight. A weight-averaged teacher, with statistics of its own,
predicts every batch before anything else happens, and teaches the student on augmented views.

    m_t = (1 - a) m_{t-1} + a m_batch, v_t likewise, and x is normalised with (m_t, v_t)
    L = mean_i w_i CE(f_t(x_i) -> f_s(A(x_i))),   w_i = exp(-g_i) / (1 + exp(-g_i))
    theta_t <- n theta_t + (1 - n) theta_s

The mean is over the images i of the memory, and g_i is an image's age divided by the capacity.
There is one update after every ``update_every`` images, counted across batches: the teacher runs on
the memory, the student on one view of it, and the statistics of each move with its own input. All
other passes use the statistics as they are. The class :class:`tta.parts.memory.Cstu` decides which
image goes to which slot.

With ``steps`` above 1, every batch is offered to the memory that many times.

Used on its own, the norm rule ``robust_bn`` moves with every batch. Gradients flow through the
batch part. With another norm rule, the teacher has its own copy of that rule's state as well. A
layer with one value per channel is normalised with the statistics as they are.

Bad images. A frame whose pixels are 255 times too large would spoil the moving statistics for
dozens of batches. An image is bad in a layer where, in more than half of the channels, its energy
``(m_b - m_t)^2 + v_b`` is above 30 times the moving variance or the source's, whichever is larger.
It is left out of the statistics that move and of those that normalise the other images, and a batch
of bad images moves nothing. The energies of the recorded traces stay below 0.8, those of CIFAR-10
corruptions at severity 5 on the bundled network below 6.4 and those of 256 photographs under
corruptions on ``tf_efficientnet_lite0`` below 4; those of images times 255 are above 100.

Narrow layers. Networks of depthwise convolutions lose channels in training: 28 of the 49 layers of
``tf_efficientnet_lite0`` have channels with no variance. A layer with a channel whose variance is
under 1e-6 times the layer's median keeps the source's statistics. On 128 photographs in batches of
16, which are clean, with fog, with low contrast, with JPEG artefacts and clean again, the error is
then 16, 41, 59, 72 and 27 % instead of 21, 39, 62, 70 and 30 (source: 16, 61, 89, 52, 16). This
does not make such a network safe, which cannot bear statistics that lie between two domains: six
batches of 32 with noise at severity 5 leave 95 % on clean photographs instead of 97, although no
mean has moved by more than 0.4 deviations and no variance by more than a factor of 5; a floor for
variances at the source's own leaves 92. Where such changes may come, ``unmix_tns`` does better
there. On the bundled network the share is never under 1e-4, and in the traces never under 0.05.
``robust_bn`` with ``official=True`` has neither rule.

Statistics move by the share a at every update and no faster, so where a domain lasts only a few
hundred images they do not arrive before it ends; ``robust_bn`` on its own moves with every batch.

Images are kept as they came; as 8-bit pixels, in a quarter of the space, while all images are such.
The shape of ``update/memory`` is known from the first batch on, and images of another size are
refused until ``reset``.

Differences: all norm layers are trained, not BatchNorm alone (the mariodoebler repository trains
GroupNorm and LayerNorm too). The authors add 1e-6 to probabilities in the entropy of an image,
which changes no order but in ties, and leave out a last batch of one image. The figures are the
authors' for CIFAR; those for ImageNet are the mariodoebler repository's. Equation numbers are not
given: this follows a description of the authors' code, and its traces.
The authors do not scale the learning rate; below the batch size of the preset it falls with
``wrap(batch_size=)`` here (``lr_scaling="none"`` is theirs).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from tta.core.backbone import Backbone
from tta.core.checks import LARGE, LARGEST, fraction, number, whole_number
from tta.core.component import Context
from tta.core.config import ComponentConfig, UpdateConfig
from tta.core.prediction import Prediction, Report
from tta.core.random import fork
from tta.core.registry import register
from tta.core.update import Update
from tta.methods._moving_statistics import MovingStatistics
from tta.parts.augment import Augmenter
from tta.parts.losses import entropy, soft_cross_entropy
from tta.parts.memory import Cstu
from tta.parts.teachers import OtherWeights

__all__ = ["RobustBn", "RobustBnConfig", "Rotta", "RottaConfig"]

ROUNDING = 1e-5  # of an image of 8 bits, as a model takes it


@dataclass(frozen=True, kw_only=True)
class RobustBnConfig(ComponentConfig):
    """Fields of ``robust_bn``."""

    batch_weight: float = 0.05  # a, share of the batch in the new statistics
    official: bool = False  # without the rules for bad images and narrow layers

    def __post_init__(self) -> None:
        super().__post_init__()
        fraction("batch_weight", self.batch_weight)


@register("robust_bn")
class RobustBn(MovingStatistics):
    """Moving averages of the statistics of batches, starting from the source's."""

    Config = RobustBnConfig

    @property
    def rate(self) -> float:
        """Share a of the batch."""
        return self.config.batch_weight


@dataclass(frozen=True, kw_only=True)
class RottaConfig(UpdateConfig):
    """Fields of ``rotta``."""

    lr: float = 1e-3  # learning rate
    optimizer: str = "adam"  # "sgd" or "adam"
    teacher_momentum: float = 0.999  # n of the teacher's moving average
    memory_size: int = 64  # images in the memory
    update_every: int = 64  # images between updates, counted across batches
    timeliness: float = 1.0  # lambda_t, weight of age in what leaves the memory
    uncertainty: float = 1.0  # lambda_u, weight of entropy in what leaves the memory

    def __post_init__(self) -> None:
        super().__post_init__()
        fraction("teacher_momentum", self.teacher_momentum)
        whole_number("memory_size", self.memory_size, 1, LARGEST)
        whole_number("update_every", self.update_every, 1, LARGEST)
        number("timeliness", self.timeliness, 0, LARGE)
        number("uncertainty", self.uncertainty, 0, LARGE)


@register("rotta")
class Rotta(Update):
    """A teacher that predicts, a student that learns from a balanced memory."""

    Config = RottaConfig
    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        family: {"lr_scaling": "linear_below"} for family in ("imagenet", "cifar10", "cifar100")
    }
    default_norm: ClassVar[str | None] = "robust_bn"
    injects: ClassVar[tuple[str, ...]] = ("augment",)
    learns_from_whole_batch: ClassVar[bool] = False

    # (memory_size, 0) before the first batch, then (memory_size, C, H, W): uint8 pixels while all
    # images are such, and else float32 as the model takes them
    memory: Tensor
    offered: Tensor  # 0-dimensional: images offered to the memory so far

    def __init__(self, config: RottaConfig, network: Backbone, context: Context) -> None:
        super().__init__(config, network, context)
        self.teacher = OtherWeights(network, context.parameters, own_statistics=True)
        self.augmenter = Augmenter(network.model, context)
        self.bank = Cstu(
            config.memory_size, context.num_classes, config.timeliness, config.uncertainty
        )
        empty = torch.zeros(config.memory_size, 0, dtype=torch.uint8)
        self.register_buffer("memory", empty)
        self.register_buffer("offered", torch.zeros((), dtype=torch.int64))

    def adapt(self, x: Tensor) -> Prediction:
        """Predict with the teacher, then offer each image to the memory, with updates when due."""
        self.augmenter.check(x)
        self._check_size(x)
        self.report = Report(selected=0, loss=float("nan"), stepped=False)
        prediction = self.teacher.predict(x)
        images = self._as_kept(x)
        labels = prediction.logits.argmax(1).tolist()
        entropies = entropy(prediction.logits).tolist()
        start = 0
        while start < len(x):
            wait = self.config.update_every - int(self.offered) % self.config.update_every
            end = min(start + wait, len(x))
            placed = self.bank.offer(labels[start:end], entropies[start:end])
            if placed:
                self.context.journal.keep(self.memory, list(placed))
                self.memory[list(placed)] = images[[start + p for p in placed.values()]]
            self.offered += end - start
            if end - start == wait:
                self._update(x.dtype)
            start = end
        self.report["remembered"] = (self.bank.labels >= 0).sum()
        return prediction

    def predict(self, x: Tensor) -> Prediction:
        """Predict with the teacher, without remembering anything."""
        return self.teacher.predict(x)

    def integer_ranges(self) -> dict[str, tuple[int, int]]:
        """Range of the bank's labels, which are -1 in empty slots."""
        return {"bank.labels": (-1, self.context.num_classes - 1)}

    def kept_by_rows(self) -> tuple[str, ...]:
        """Return ``memory``: it is large, and a batch replaces some of it."""
        return ("memory",)

    def lazy_buffers(self) -> tuple[str, ...]:
        """Return ``memory``: the first batch shows how large images are."""
        return ("memory",)

    def image_buffers(self) -> tuple[str, ...]:
        """Return ``memory``: images of 8 bits are kept in 8 bits."""
        return ("memory",)

    def _as_kept(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) as the memory holds them, which is made ready for them."""
        pixels = (self.augmenter.pixels(x) * 255).round().to(torch.uint8)
        if self.memory.dtype == torch.uint8 and not self._are_bytes(x, pixels):
            kept = self.memory
            self.memory = kept.float() if kept.numel() == 0 else self._floats(kept)
        if self.memory.numel() == 0:
            self.memory = self.memory.new_zeros(len(self.memory), *x.shape[1:])
        return pixels if self.memory.dtype == torch.uint8 else x.float()

    def _are_bytes(self, x: Tensor, pixels: Tensor) -> bool:
        """Whether 8 bits hold these images, but for what a mean and a deviation round."""
        if x.dtype == torch.uint8:
            return True
        return bool(((self._floats(pixels) - x).abs() <= ROUNDING).all())

    def _floats(self, pixels: Tensor) -> Tensor:
        """What the model takes, float32, of pixels (N, C, H, W) uint8."""
        return self.augmenter.images(pixels.float() / 255, torch.float32)

    def _update(self, dtype: torch.dtype) -> None:
        """Take one step of the student on the memory, and move the teacher towards the student."""
        occupied = self.bank.labels >= 0
        images = self.memory[occupied]
        if images.dtype == torch.uint8:
            images = self.augmenter.images(images.float() / 255, dtype)
        images = images.to(dtype)
        (view,) = self.augmenter.views(images, 1, fork(self.context.generator, images.device))
        target = self.teacher.learn_statistics(images).logits
        logits = self.network(view).logits
        weight = torch.sigmoid(-self.bank.ages[occupied].float() / self.config.memory_size)
        loss = (weight * soft_cross_entropy(logits, target)).mean()
        stepped = self.step(loss)
        if stepped:
            self.teacher.follow(self.config.teacher_momentum)
        self.report |= {"selected": len(images), "loss": loss.detach(), "stepped": stepped}

    def _check_size(self, x: Tensor) -> None:
        if self.memory.numel() > 0 and self.memory.shape[1:] != x.shape[1:]:
            raise ValueError(
                "`images` must be of the size of those in the memory, "
                f"{tuple(self.memory.shape[1:])}, got {tuple(x.shape[1:])}: resize them, or call "
                "reset() first."
            )
