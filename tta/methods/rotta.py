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

``spread=True`` (ours, off by default) spreads an update over the batches before it, so that no call
takes much longer than another: after k of ``update_every`` images, the first k / update_every of
the memory's slots have been learned from as they were then. Gradients are summed until the update
is due; the statistics of teacher and student move with each part, by so much less that all parts
move them as far as one. One batch of ``update_every`` images or more does what it does without.

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
under 1e-6 times the layer's median keeps the source's statistics, and the other layers of such a
network are normalised with statistics a fifth of the way from the source's to the moving ones, so
that no variance falls below four fifths of the source's. On 128 photographs in batches of 16, which
are clean, with noise at severity 5 and clean again, the error is then 17, 88 and 23 % instead of
21, 90 and 48 (source: 16, 90, 16); with fog, low contrast and JPEG artefacts in place of the noise
it ends at or below the source's. A floor for variances, even at the source's own, left more than 90
%: such a network bears little mismatch of means either (decision 20). On the bundled network the
smallest variance is never under 1e-4 of the median, and in the traces never under 0.05.
``robust_bn`` with ``official=True`` has neither rule, and an official ``rotta`` brings that one.

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
from tta.core.config import ComponentConfig
from tta.core.norm_layers import part_of_batch
from tta.core.prediction import Prediction, Report
from tta.core.random import fork
from tta.core.registry import register
from tta.methods._image_memory import BalancedMemoryConfig, BalancedMemoryUpdate
from tta.methods._moving_statistics import MovingStatistics
from tta.parts.losses import soft_cross_entropy
from tta.parts.teachers import NamedTensors

__all__ = ["RobustBn", "RobustBnConfig", "Rotta", "RottaConfig"]


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
class RottaConfig(BalancedMemoryConfig):
    """Fields of ``rotta``."""

    teacher_momentum: float = 0.999  # n of the teacher's moving average
    update_every: int = 64  # images between updates, counted across batches
    timeliness: float = 1.0  # lambda_t, weight of age in what leaves the memory
    uncertainty: float = 1.0  # lambda_u, weight of entropy in what leaves the memory
    spread: bool = False  # ours: an update in parts, over the batches before it

    def __post_init__(self) -> None:
        super().__post_init__()
        fraction("teacher_momentum", self.teacher_momentum)
        whole_number("update_every", self.update_every, 1, LARGEST)
        number("timeliness", self.timeliness, 0, LARGE)
        number("uncertainty", self.uncertainty, 0, LARGE)


@register("rotta")
class Rotta(BalancedMemoryUpdate):
    """A teacher that predicts, a student that learns from a balanced memory."""

    Config = RottaConfig
    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        family: {"lr_scaling": "linear_below"} for family in ("imagenet", "cifar10", "cifar100")
    }

    offered: Tensor  # 0-dimensional: images offered to the memory so far
    swept: Tensor  # 0-dimensional: slots that the coming update has been through; with ``spread``
    summed: Tensor  # 0-dimensional: images in them
    loss_sum: Tensor  # 0-dimensional: of their losses

    def __init__(self, config: RottaConfig, network: Backbone, context: Context) -> None:
        super().__init__(config, network, context, config.timeliness, config.uncertainty)
        self.register_buffer("offered", torch.zeros((), dtype=torch.int64))
        if config.spread:
            zeros = {n: torch.zeros_like(p) for n, p in context.parameters.items()}
            self.gradients = NamedTensors(zeros, constant=False)
            self.register_buffer("swept", torch.zeros((), dtype=torch.int64))
            self.register_buffer("summed", torch.zeros((), dtype=torch.int64))
            self.register_buffer("loss_sum", torch.zeros(()))

    def integer_ranges(self) -> dict[str, tuple[int, int]]:
        """Those of the bank, and how many slots there are."""
        size = self.config.memory_size
        return super().integer_ranges() | {"swept": (0, size), "summed": (0, size)}

    def adapt(self, x: Tensor) -> Prediction:
        """Predict with the teacher, then offer each image to the memory, with updates when due."""
        self.augmenter.check(x)
        self.report = Report(selected=0, loss=float("nan"), stepped=False)
        prediction = self.teacher.predict(x)
        start = 0
        while start < len(x):
            wait = self.config.update_every - int(self.offered) % self.config.update_every
            end = min(start + wait, len(x))
            self.remember(x[start:end], Prediction(prediction.logits[start:end]))
            self.offered += end - start
            if self.config.spread:
                self._learn_from_part(x.dtype)
            elif end - start == wait:
                self._update(x.dtype)
            start = end
        self.report["remembered"] = (self.bank.labels >= 0).sum()
        return prediction

    def _update(self, dtype: torch.dtype) -> None:
        """Take one step of the student on the memory, and move the teacher towards the student."""
        images = self.remembered(dtype)
        (view,) = self.augmenter.views(images, 1, fork(self.context.generator, images.device))
        target = self.teacher.learn_statistics(images).logits
        logits = self.network(view).logits
        ages = self.bank.ages[self.bank.labels >= 0].float()
        weight = torch.sigmoid(-ages / self.config.memory_size)
        loss = (weight * soft_cross_entropy(logits, target)).mean()
        stepped = self.step(loss)
        if stepped:
            self.teacher.follow(self.config.teacher_momentum)
        self.report |= {"selected": len(images), "loss": loss.detach(), "stepped": stepped}

    def _learn_from_part(self, dtype: torch.dtype) -> None:
        """Learn from as much of the memory as is due by now, and step where all of it is."""
        every, size = self.config.update_every, self.config.memory_size
        done = int(self.offered) % every or every
        first, last = int(self.swept), size * done // every
        if first == 0 and last == size:
            self._update(dtype)
            return
        slots = first + torch.nonzero(self.bank.labels[first:last] >= 0).flatten()
        if len(slots) > 0:
            self._sum_gradients(slots, dtype)
        self.swept.fill_(last)
        if done == every:
            self._step_on_sums()

    def _sum_gradients(self, slots: Tensor, dtype: torch.dtype) -> None:
        images = self.images(slots, dtype)
        (view,) = self.augmenter.views(images, 1, fork(self.context.generator, images.device))
        share = len(slots) / int((self.bank.labels >= 0).sum())
        with part_of_batch(self.network.wrappers, share):
            target = self.teacher.learn_statistics(images).logits
            logits = self.network(view).logits
            weight = torch.sigmoid(-self.bank.ages[slots].float() / self.config.memory_size)
            loss = (weight * soft_cross_entropy(logits, target)).sum()
            parameters = list(self.context.parameters.values())
            found = self.network.session.gradients(loss, parameters)
        with torch.no_grad():
            for total, gradient in zip(self.gradients.tensors(), found, strict=True):
                if gradient is not None:
                    total += gradient
            self.loss_sum += loss.detach()
            self.summed += len(slots)
        self.report["selected"] = self.report["selected"] + len(slots)

    def _step_on_sums(self) -> None:
        count = int(self.summed)
        if count > 0:
            loss = self.loss_sum / count
            stepped = self.step(loss, [total / count for total in self.gradients.tensors()])
            if stepped:
                self.teacher.follow(self.config.teacher_momentum)
            self.report |= {"loss": loss, "stepped": stepped}
        with torch.no_grad():
            for total in (*self.gradients.tensors(), self.swept, self.summed, self.loss_sum):
                total.zero_()
