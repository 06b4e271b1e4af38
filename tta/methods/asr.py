"""ASR: adaptive and selective reset, when the averaged prediction collapses.

Lim, Hwang, Lee, ICLR 2026: resets for long-term test-time adaptation; the successor of RDumb (arXiv
2306.05401), which resets at fixed intervals.

The entropy of the softmax of a batch's mean logits falls when a model begins to predict few
classes. When it falls below its own slow average, the later layers go back to the source, the
earlier ones stay, and a penalty weighted by Fisher information keeps what was learned in the
segments between resets. The recipe ``asr`` has ``eta`` as its update, with Nesterov momentum; as a
guard it goes with any update.

    e_t = H(softmax(mean_b z_b)),   f_t = share of argmax z that are not the source's
    e_t < c: tensors from max(r0 - r1 (c - e_t), 0) n on go back to the source, c = ln(C a0)
    else:    c <- mu c + (1 - mu) e_t,   mu = m0 f_t + 1 - m0
    L <- L + p0 f_{t-1}^2 sum_i F_i (theta_i - m_i)^2     from the first reset on

F and m are averages over segments, 0.9 old and 0.1 new, of the mean squared gradient of the host's
own loss and of the mean parameters. With a reset the optimiser and what the host remembers start
anew. The source copy here is the source's parameters under the present norm rule, as in the
authors' code. It costs a forward pass a batch; the gradients are those that the host computes
anyway, where the authors compute them twice.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from tta.core.backbone import Backbone
from tta.core.checks import LARGE, fraction, number
from tta.core.component import Context
from tta.core.config import ComponentConfig
from tta.core.guard import LEARN, Batch, Guard, Verdict
from tta.core.prediction import Report
from tta.core.registry import register
from tta.parts.estimates import ConfidenceEstimate
from tta.parts.losses import entropy
from tta.parts.teachers import NamedTensors

__all__ = ["Asr", "AsrConfig"]

KEPT = 0.9  # share of the former segments in the averages over segments


@dataclass(frozen=True, kw_only=True)
class AsrConfig(ComponentConfig):
    """Fields of ``asr``."""

    flip_weight: float = 0.15  # m0, how far agreement with the source moves the threshold
    penalty: float = 5.0  # p0
    threshold: float = 0.5  # a0, share of C whose logarithm is the first threshold
    keep_share: float = 0.5  # r0, largest share of the tensors that a reset leaves
    keep_slope: float = 20.0  # r1, how fast that share falls with the depth of the collapse

    def __post_init__(self) -> None:
        super().__post_init__()
        fraction("flip_weight", self.flip_weight)
        number("penalty", self.penalty, 0, LARGE)
        number("threshold", self.threshold, 0, LARGE, above=True)
        fraction("keep_share", self.keep_share)
        number("keep_slope", self.keep_slope, 0, LARGE)


@register("asr")
class Asr(Guard):
    """Resets the later layers when the averaged prediction collapses."""

    Config = AsrConfig
    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "cifar10": {},
        "cifar100": {},
        "imagenet_vit": {"flip_weight": 0.99, "threshold": 0.005, "keep_slope": 50.0},
    }
    host = "eta"
    host_fields: ClassVar[dict[str, Any]] = {"nesterov": True}
    cost = 1.1
    clears = ("ema_probs",)  # the class average of a host under ``official=True``, too

    threshold: Tensor  # 0-dimensional, c in nats
    penalty_weight: Tensor  # 0-dimensional, for the next batch
    steps: Tensor  # 0-dimensional, of the segment since the last reset
    segments: Tensor  # 0-dimensional, closed so far

    def __init__(self, config: AsrConfig, network: Backbone, context: Context) -> None:
        super().__init__(config, network, context)
        self.estimator = ConfidenceEstimate()
        first = math.log(context.num_classes * config.threshold)
        self.register_buffer("threshold", torch.tensor(first))
        self.register_buffer("penalty_weight", torch.zeros(()))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.register_buffer("segments", torch.zeros((), dtype=torch.int64))
        zeros = {name: torch.zeros_like(p) for name, p in context.parameters.items()}
        self.fisher = NamedTensors(zeros, constant=False)
        self.mean = NamedTensors(zeros, constant=False)
        self.segment_fisher = NamedTensors(zeros, constant=False)
        self.segment_mean = NamedTensors(zeros, constant=False)
        self.term: Tensor | None = None  # of the last step

    def see_gradients(self, gradients: Mapping[str, Tensor]) -> None:
        """Add a step to the segment."""
        squares, sums = self.segment_fisher.named(), self.segment_mean.named()
        for name, p in self.context.parameters.items():
            sums[name] += p.detach()
            if name in gradients:
                squares[name] += gradients[name].square()
        self.steps += 1

    def penalty(self) -> Tensor | None:
        """The distance from the averages of former segments, in the metric of Fisher."""
        if int(self.segments) == 0 or not self.context.parameters:
            return None  # or the update moves parameters of its own alone
        fisher, mean = self.fisher.named(), self.mean.named()
        parts = [
            (fisher[name] * (p - mean[name]).square()).sum()
            for name, p in self.context.parameters.items()
        ]
        term = self.penalty_weight * torch.stack(parts).sum()
        self.term = term.detach()
        return term

    def judge(self, batch: Batch) -> Verdict:
        """Compare the averaged prediction with its threshold."""
        assert batch.prediction is not None
        config, logits = self.config, batch.prediction.logits.detach().float()
        concentration = entropy(logits.mean(0, keepdim=True))[0]
        flips = (logits.argmax(1) != batch.anchor().logits.argmax(1)).float().mean()
        weight = config.penalty * flips.square()
        term, self.term = self.term, None
        self.report = Report(
            mean_logit_entropy=concentration,
            flip_rate=flips,
            penalty_weight=weight,
            penalty=0.0 if term is None else term,
            scope=float("nan"),
        )
        if term is not None:
            self.report["loss"] = batch.report.raw()["loss"] + term
        if not batch.learning:
            return LEARN
        self.penalty_weight.copy_(weight)
        depth = float(self.threshold - concentration)
        if depth <= 0:
            kept = config.flip_weight * flips + 1 - config.flip_weight
            self.threshold.copy_(kept * self.threshold + (1 - kept) * concentration)
            return LEARN
        self._close_segment()
        self.threshold.fill_(math.log(self.context.num_classes * config.threshold))
        scope = max(config.keep_share - config.keep_slope * depth, 0.0)
        self.report["scope"] = scope
        names = list(self.context.parameters)
        stay = {name for i, name in enumerate(names) if i < scope * len(names)}
        reason = f"the mean prediction is {depth:.3g} nats more concentrated than its threshold"
        return Verdict(action="reset", reason=reason, only=_Leaving(stay))

    @torch.no_grad()
    def _close_segment(self) -> None:
        """Take the segment's averages into those over segments."""
        count = int(self.steps)
        new = 1.0 if int(self.segments) == 0 else 1 - KEPT
        for total, average in (
            (self.segment_fisher, self.fisher),
            (self.segment_mean, self.mean),
        ):
            for name, value in total.named().items():
                if count:
                    average.named()[name].lerp_(value / count, new)
                value.zero_()
        self.segments += count > 0
        self.steps.zero_()


class _Leaving:
    """Says which keys of a state a reset touches: all of the update but tensors that stay.

    Args:
        stay: Names of the parameters that stay.
    """

    def __init__(self, stay: set[str]) -> None:
        self.stay = stay

    def __call__(self, key: str) -> bool:
        slot, _, name = key.partition("/")
        if slot == "update":  # of teachers, the same tensors
            return name.partition(".")[2] not in self.stay
        return slot == "optim" or (slot == "param" and name not in self.stay)
