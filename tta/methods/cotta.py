"""CoTTA: a weight-averaged teacher, averaged over views, and random restoration to the source.

Wang, Fink, Van Gool, Dai: Continual Test-Time Domain Adaptation, CVPR 2022, arXiv 2203.13591.

A moving average of the student predicts better than the student and teaches it; where the source
model is unsure of a batch, the teacher's logits are averaged over augmented views first. Against
forgetting over a long stream, random elements of the student go back to their source values after
every step. The returned logits are the teacher's from before the update.

    y = f_t(x), or avg_n f_t(A_n(x)) if mean_b max_k softmax(f_0(x))_bk < tau          (eq. 3-4)
    L = mean_b CE(y -> f_s(x)),  theta_t <- a theta_t + (1-a) theta_s                   (eq. 1-2)
    theta_s <- m theta_0 + (1-m) theta_s,  m ~ Bernoulli(p)                             (eq. 6-8)

Equation numbers are from memory, not checked against the paper. Logits are averaged, not
probabilities. The ImageNet code uses half of the cross-entropy in either direction
(``symmetric_loss``), which the paper, as recalled, does not have; the CIFAR code uses the loss
above. The teacher's average is taken before restoration, and the optimiser keeps the moments of
restored elements. Student, teacher and source all use the norm rule's statistics: by default those
of each pass. tau is said to be a low quantile of the source's confidence on source images. No code
computes it, and one value does not suit every data set (with ten classes, a mean confidence below
0.1 cannot occur).

Differences: the official code draws and runs all views on CIFAR even when it then ignores them;
here they are run only when they are needed, with the same result (``official=True`` always runs
them). Its model is in train mode, here it is in eval mode, which differs only with dropout or
stochastic depth. The state is heavy: teacher, source and optimiser are as large as the model. With
the one-sided loss and a teacher equal to the student, as in the first batch without views, the
gradient is zero: SGD stands still and Adam follows rounding noise.

The authors do not scale the learning rate; below the batch size of the preset it falls with
``wrap(batch_size=)`` here (``lr_scaling="none"`` is theirs).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from tta.core.prediction import Prediction
from tta.core.registry import register
from tta.methods._mean_teacher import ConsistencyConfig, ConsistencyUpdate, presets

__all__ = ["Cotta", "CottaConfig"]


@dataclass(frozen=True, kw_only=True)
class CottaConfig(ConsistencyConfig):
    """Fields of ``cotta``."""


@register("cotta")
class Cotta(ConsistencyUpdate):
    """Averaged teacher, views where the source is unsure, random restoration."""

    Config = CottaConfig
    PRESETS: ClassVar[dict[str, dict[str, Any]]] = presets()

    def adapt(self, x: Tensor) -> Prediction:
        """Learn from the teacher, move it, restore; the prediction is the teacher's before that."""
        config = self.config
        target, loss = self.compare(x)
        masks = self.given_masks()
        stepped = self.step(loss)
        if stepped:
            self.teacher.follow(config.teacher_momentum)
            self.restore_at_random(masks)
        self.report |= {"loss": loss.detach(), "consistency": loss.detach(), "stepped": stepped}
        return target
