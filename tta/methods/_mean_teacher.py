"""What CoTTA and PETAL share: a teacher, a source anchor, and the choice of what to learn from.

The target is the teacher's logits on the batch or, when the source model is unsure of the batch,
their mean over augmented views. What a method does with the target is in its own file.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from tta.core.backbone import Backbone
from tta.core.checks import LARGE, boolean, fraction, number, shown, whole_number
from tta.core.component import Context
from tta.core.config import CIFAR_ADAM, UpdateConfig
from tta.core.prediction import Prediction, Report
from tta.core.random import fork
from tta.core.update import Update
from tta.parts.augment import Augmenter
from tta.parts.losses import consistency
from tta.parts.teachers import OtherWeights, random_mask, restore

__all__ = ["ConsistencyConfig", "ConsistencyUpdate", "presets"]


@dataclass(frozen=True, kw_only=True)
class ConsistencyConfig(UpdateConfig):
    """Fields of updates that learn from a teacher averaged over views."""

    params: str = "weight_bias"  # what is trained: every parameter called weight or bias
    lr: float = 0.01  # learning rate
    nesterov: bool = True  # SGD only
    teacher_momentum: float = 0.999  # alpha of the teacher's moving average
    restore_probability: float = 0.001  # p, share of elements put back to source every step
    confidence_threshold: float = 0.1  # tau; views are used when the source is less sure than this
    views: int = 32  # N, augmented views
    symmetric_loss: bool = True  # half of the cross-entropy in either direction

    def __post_init__(self) -> None:
        super().__post_init__()
        fraction("teacher_momentum", self.teacher_momentum)
        fraction("restore_probability", self.restore_probability)
        number("confidence_threshold", self.confidence_threshold, 0, LARGE)
        whole_number("views", self.views, 1, 10_000)
        boolean("symmetric_loss", self.symmetric_loss)


def presets(**cifar: Any) -> dict[str, dict[str, Any]]:
    """The authors' settings: for ImageNet the defaults, for CIFAR those of their yaml files.

    Args:
        **cifar: Further fields of the CIFAR presets.
    """
    common = CIFAR_ADAM | {
        "nesterov": False,
        "restore_probability": 0.01,
        "symmetric_loss": False,
    }
    return {
        "imagenet": {"lr": 0.01, "lr_scaling": "linear_below"},
        "cifar10": common | {"confidence_threshold": 0.92} | cifar,
        "cifar100": common | {"confidence_threshold": 0.72} | cifar,
    }


class ConsistencyUpdate(Update):
    """A student that learns from its own moving average, the teacher, which also predicts."""

    injects: ClassVar[tuple[str, ...]] = ("augment", "restore_mask")
    cost: ClassVar[float] = 35.0  # the teacher sees each image in 32 views

    def __init__(self, config: ConsistencyConfig, network: Backbone, context: Context) -> None:
        super().__init__(config, network, context)
        self.teacher = OtherWeights(network, context.parameters)
        self.anchor = OtherWeights(network, context.parameters, constant=True)
        self.augmenter = Augmenter(network.model, context)

    def predict(self, x: Tensor) -> Prediction:
        """Predict with the teacher, without views."""
        return self.teacher.predict(x)

    def compare(self, x: Tensor) -> tuple[Prediction, Tensor]:
        """Return the teacher's prediction for ``x`` (B, ...), and the student's mean loss."""
        self.report = Report(selected=len(x))
        self.augmenter.check(x)
        student = self.network(x)
        target = self.target(x)
        loss = consistency(student.logits, target.logits, self.config.symmetric_loss)
        return target, loss.mean()

    def target(self, x: Tensor) -> Prediction:
        """Return the teacher's logits (B, C), averaged over views if the source is unsure.

        Fills the report's ``anchor_confidence`` and ``augmented``.
        """
        config = self.config
        # Forked whether views are needed or not, so that what is drawn later does not depend on it.
        draws = fork(self.context.generator, x.device)
        confidence = self.anchor.predict(x).logits.float().softmax(1).amax(1).mean()
        unsure = bool(confidence < config.confidence_threshold)
        self.report |= {"anchor_confidence": confidence, "augmented": unsure}
        plain = views = None
        if unsure or config.official:
            views = self.teacher.average(self.augmenter.views(x, config.views, draws))
        if not unsure or config.official:
            plain = self.teacher.predict(x)
        chosen = views if unsure else plain
        assert chosen is not None
        return chosen

    def restore_at_random(self, given: list[Tensor] | None) -> None:
        """Put a random share of all elements back to their source values.

        Args:
            given: What :meth:`given_masks` returned.
        """
        parameters = self.parameters_adapted
        draws = fork(self.context.generator, next(iter(parameters.values())).device)
        sizes = [p.numel() for p in parameters.values()]
        if given is not None:
            masks = given
        elif self.config.restore_probability > 0:
            mask = random_mask(sum(sizes), self.config.restore_probability, draws)
            self.report["restored"] = torch.count_nonzero(mask)
            masks = list(mask.split(sizes))
        else:
            return
        restore(list(parameters.values()), self.anchor.tensors(), masks)

    def given_masks(self) -> list[Tensor] | None:
        """Ask the caller for masks before anything has changed; None without ``restore_mask``."""
        draw = self.context.restore_mask
        if draw is None:
            return None
        return [_checked(n, draw(n, p.shape), p) for n, p in self.parameters_adapted.items()]


def _checked(name: str, mask: Any, parameter: Tensor) -> Tensor:
    if isinstance(mask, Tensor) and mask.dtype == torch.bool and mask.shape == parameter.shape:
        return mask.to(parameter.device)
    got = f"{mask.dtype} {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
    raise ValueError(
        f"`restore_mask` must return a bool tensor of shape {tuple(parameter.shape)} for "
        f"{shown(name)}, "
        f"got {got}: correct it."
    )
