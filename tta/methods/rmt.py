"""RMT: a robust mean teacher with symmetric cross-entropy, contrast and source replay.

Döbler, Marsden, Yang: Robust Mean Teacher for Continual and Gradual Test-Time Adaptation,
CVPR 2023, arXiv 2211.13081.

Student and teacher agree under a symmetric cross-entropy, whose gradients are balanced between
confident and unsure samples; a contrastive loss pulls a sample, its augmented view and the nearest
source prototype together; a labelled source batch beside each test batch keeps what was learned,
after a warm-up on source images. Student and teacher predict together.

    L = l_trg mean_b [SCE(z, q) + SCE(z', q)] / 2 + l_cont L_con + l_src CE(f_s(x_src), y_src)
    SCE(z, q) = CE(q -> z) / 2 + CE(z -> q) / 2,   z' = f_s(A(x)),   q = f_t(x),   return z + q

The factors l are the ``weight_`` fields. L_con has 3B anchors: for each image its prototype, its
feature and the feature of its view, all passed through a projector that is trained too.
Similarities are cosines divided by T; the other two vectors of an image are positives and all
others are negatives, even if two images share a prototype. All forward passes are separate, each
with its own batch statistics. Prototypes are class means of features under batch statistics, over
at most the batches needed to pass 100,000 images; a class without images has none and is never the
nearest. Warm-up makes floor(``warmup_samples`` / batch) updates on source images with SCE alone,
while the learning rate rises linearly; the optimiser keeps its moments afterwards. The paper is
said to have more variants of warm-up and replay. Without source data, set
``weight_source=0, warmup_samples=0`` and pass prototypes.

Differences: the returned sum doubles the scale of logits, ``combine="mean"`` does not. ``reset``
also rewinds the source batches to where they were after warm-up; the official code goes on in them,
and so does ``official=True``. Source batches are taken in the order given, first by warm-up and
then by replay, and start over at the end. With timm models the official code, as far as can be told
from it, leaves the classifier untrained; here it is trained. With ``norm="source"`` prototypes are
taken under running statistics. A saved adapter holds the source batches if they came as a list; a
data loader must be given to ``tta.load`` again.

The authors do not scale the rate; below the batch size of the preset it falls with
``wrap(batch_size=)`` here (``lr_scaling="none"`` is theirs).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from tta.core.backbone import Backbone
from tta.core.checks import LARGE, LARGEST, fraction, number, one_of, whole_number
from tta.core.component import Context
from tta.core.config import CIFAR_ADAM, UpdateConfig
from tta.core.norm_layers import frozen_statistics
from tta.core.prediction import Prediction, Report
from tta.core.random import fork
from tta.core.registry import register
from tta.core.source import SourceStatistics
from tta.methods._source_replay import SourceReplay
from tta.parts.augment import Augmenter
from tta.parts.losses import symmetric_cross_entropy
from tta.parts.prototypes import (
    fill_prototypes,
    make_projector,
    nearest_class,
    prototype_contrast,
    undefined,
)
from tta.parts.teachers import OtherWeights

__all__ = ["Rmt", "RmtConfig"]


@dataclass(frozen=True, kw_only=True)
class RmtConfig(UpdateConfig):
    """Fields of ``rmt``."""

    params: str = "weight_bias"  # what is trained: every parameter called weight or bias
    lr: float = 0.01  # learning rate
    nesterov: bool = True  # SGD only
    teacher_momentum: float = 0.999  # alpha of the teacher's moving average
    weight_source: float = 1.0  # lambda of the replayed source batch; 0 = no replay
    weight_target: float = 1.0  # lambda of the symmetric cross-entropy
    weight_contrastive: float = 1.0  # lambda of the contrastive loss
    temperature: float = 0.1  # T of the contrastive loss
    projection_dim: int = 128  # width of the projector; 0 = no projector
    warmup_samples: int = 50_000  # source images of the warm-up; 0 = none
    combine: str = "sum"  # of student and teacher logits: "sum" or "mean"

    def __post_init__(self) -> None:
        super().__post_init__()
        fraction("teacher_momentum", self.teacher_momentum)
        number("weight_source", self.weight_source, 0, LARGE)
        number("weight_target", self.weight_target, 0, LARGE)
        number("weight_contrastive", self.weight_contrastive, 0, LARGE)
        number("temperature", self.temperature, 0, LARGE, above=True)
        whole_number("projection_dim", self.projection_dim, 0, 2**16)
        whole_number("warmup_samples", self.warmup_samples, 0, LARGEST)
        one_of("combine", self.combine, ("sum", "mean"))


_RATE = {"lr": 0.01, "lr_scaling": "linear_below"}


@register("rmt")
class Rmt(SourceReplay):
    """Robust mean teacher: symmetric cross-entropy, contrast, source replay."""

    Config = RmtConfig
    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "imagenet": _RATE,
        "cifar10": CIFAR_ADAM | {"nesterov": False},
        "cifar100": CIFAR_ADAM | {"nesterov": False},
        "domainnet126": _RATE | {"lr_batch_size": 128, "projection_dim": 0},
    }
    needs_features = True
    injects: ClassVar[tuple[str, ...]] = ("augment",)
    without_batches: ClassVar[str] = ", or weight_source=0 and warmup_samples=0"
    takes_draws: ClassVar[bool] = True
    artefact_fields: ClassVar[dict[str, Any]] = {"weight_source": 0.0, "warmup_samples": 0}

    prototypes: Tensor  # (C, D), NaN for a class without images

    def __init__(self, config: RmtConfig, network: Backbone, context: Context) -> None:
        super().__init__(config, network, context)
        device = next(iter(context.parameters.values())).device
        self.teacher = OtherWeights(network, context.parameters)
        self.augmenter = Augmenter(network.model, context)
        self.projector = make_projector(context, config.projection_dim, device)
        self.optimizer = self._make_optimizer()  # again, now with the projector
        self.register_buffer("prototypes", undefined(context), persistent=False)

    def adapt(self, x: Tensor) -> Prediction:
        """Learn from teacher, prototypes and source; predict with student and teacher together."""
        config = self.config
        self.report = Report(selected=len(x))
        self.augmenter.check(x)
        student = self.network(x)
        (view,) = self.augmenter.views(x, 1, fork(self.context.generator, x.device))
        with frozen_statistics(self.network.wrappers):
            augmented = self.network(view)
        teacher = self.teacher.predict(x)
        plain = symmetric_cross_entropy(student.logits, teacher.logits).mean()
        other = symmetric_cross_entropy(augmented.logits, teacher.logits).mean()
        contrast = self.contrast(student, augmented)
        loss = config.weight_target * 0.5 * (plain + other) + config.weight_contrastive * contrast
        if config.weight_source > 0:
            source = self.source_loss(x)
            loss = loss + config.weight_source * source
            self.report["source"] = source.detach()
        stepped = self.step(loss)
        if stepped:
            self.teacher.follow(config.teacher_momentum)
        self.report |= {
            "loss": loss.detach(),
            "contrastive": contrast.detach(),
            "self_training": plain.detach(),
            "self_training_view": other.detach(),
            "stepped": stepped,
        }
        return self._together(student, teacher)

    def predict(self, x: Tensor) -> Prediction:
        """Predict with student and teacher together, without learning."""
        return self._together(self.network(x), self.teacher.predict(x))

    def nearest(self, features: Tensor) -> Tensor:
        """Class (B,) of the prototype most similar to each of (B, D) by cosine."""
        return nearest_class(features, self.prototypes)

    def contrast(self, student: Prediction, augmented: Prediction) -> Tensor:
        """Contrastive loss over the prototypes, the features and the features of the view."""
        temperature = self.config.temperature
        return prototype_contrast(self.projector, self.prototypes, student, augmented, temperature)

    def source_loss(self, x: Tensor) -> Tensor:
        """Cross-entropy on the next labelled source batch."""
        images, labels = self.next_batch(x.device)
        if images.is_floating_point() and x.is_floating_point():
            images = images.to(x.dtype)  # the model may have another dtype than at wrap
        with frozen_statistics(self.network.wrappers):
            logits = self.network(images).logits
        return F.cross_entropy(logits.float(), labels)

    def fit(self, source: SourceStatistics) -> None:
        """Take or make prototypes, keep the source batches, warm up.

        Raises:
            ValueError: When prototypes or batches are needed and ``source`` has none.
        """
        self.source_used = fill_prototypes(self.prototypes, source, self.network, self.name)
        if self.config.weight_source > 0 or self.config.warmup_samples > 0:
            self.keep_batches(source)
        if self.config.warmup_samples > 0:
            self._warm_up()

    @property
    def reads_source(self) -> bool:
        """Whether the source loss has a weight."""
        return self.config.weight_source > 0

    def source_artefacts(self) -> dict[str, Any]:
        """The prototypes."""
        return {"prototypes": self.prototypes}

    def log_probabilities(self, output: Tensor) -> Tensor:
        """Return log-probabilities (B, C); a sum of two models' logits is halved first."""
        output = output.float()
        return super().log_probabilities(output / 2 if self.config.combine == "sum" else output)

    def _together(self, student: Prediction, teacher: Prediction) -> Prediction:
        logits = student.logits.detach() + teacher.logits
        if self.config.combine == "mean":
            logits = logits / 2
        return Prediction(logits, student.features)

    def _warm_up(self) -> None:
        """Train on source images without labels or views, at a linearly rising rate."""
        config, device = self.config, self.prototypes.device
        assert self.replay is not None
        total = config.warmup_samples // len(self.replay[0][0])
        with torch.enable_grad():
            for i in range(total):
                images, _ = self.next_batch(device)
                student, teacher = self.network(images), self.teacher.predict(images)
                loss = symmetric_cross_entropy(student.logits, teacher.logits).mean()
                self._set_rate(config.lr * (i + 1) / total)
                if self.step(loss):
                    self.teacher.follow(config.teacher_momentum)
        self._set_rate(config.lr)

    def _set_rate(self, lr: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr
