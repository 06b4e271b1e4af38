"""UnMix-TNS: statistics for each image from K running components.

Tomar, Vray, Thiran, Bozorgtabar: Un-Mixing Test-Time Normalization Statistics: Combatting
Label Temporal Correlation, ICLR 2024, arXiv 2401.08328.

Every BatchNorm layer keeps K sets of statistics that spread around the source's. Each image's own
statistics are mixed into all K, by similarity, and the image is normalised with their average, so
that a batch of one class is normalised as if it were a mixed one; then the components move
towards the images. Given the components, an image does not depend on its batch mates.

    p_bk = softmax_k(cos(m_b, mu_k) / T)
    M_bk = (1 - p_bk) mu_k + p_bk m_b,     V_bk = (1 - p_bk) s_k + p_bk v_b
    mean_b = avg_k M_bk,                   var_b = avg_k V_bk + avg_k M_bk^2 - mean_b^2
    mu_k += lambda avg_b p_bk (m_b - mu_k),   s_k likewise

Paper and code differ: a published review reads the paper as one random number per component and
statistics shared by the batch; the official code draws per channel and normalises per image, and so
does this. BatchNorm1d keeps its source statistics, as in that code. Differences from the code: the
components are drawn from the adapter's own generator, and wrapping keeps subclasses' activations.
Under an update there is one set of components, moved by its passes over the batch that it learns
from (each of ``steps``, both of SAR's): a teacher shares them, and passes of a teacher, over views,
destroyed images or source images, or for the answer after a step, leave them as they are. In that
code every pass moves them, and copies of the model have their own.

Bad images. A frame whose pixels are 255 times too large would shift all components for hundreds of
batches. An image is bad in a layer where, in more than half of the channels, its energy
``(m_b - mean)^2 + v_b`` is above 30 times the variance of the mixture or of the source, whichever
is larger. Nothing of it is mixed into the statistics, so it stays far outside in the layers that
follow, and the components move as if the batch had come without it. The energies of the recorded
traces stay below 1.8, those of CIFAR-10 corruptions at severity 5 on the bundled network below 4.2
and those of photographs under corruptions on ``tf_efficientnet_lite0`` below 4; those of images
times 255 are far above it in the first layer already.

Narrow networks. Networks of depthwise convolutions lose channels in training: 28 of the 49 layers
of ``tf_efficientnet_lite0`` have channels with no variance. Such networks average little over
channels, and K random draws have the source's mean and variance in expectation only: with 16
components every channel of every layer is off by a fifth of its deviation. On 64 photographs, which
are clean, with noise, with fog and clean again, the error is 77, 100, 88 and 64 % (source: 22, 86,
62, 22). The small variances are not the cause, and a floor for them does not help. Where a layer of
the model has a channel whose variance is under 1e-6 times the layer's median, the draws of all
layers are shifted and scaled so that the mixture has the source's mean and variance exactly (27,
89, 56 and 38 %), and all layers are normalised with statistics a fifth of the way from the source's
to those of the image's mixture, so that no variance falls below four fifths of the source's. On 256
photographs in batches of 16, clean, with noise, fog, low contrast and JPEG artefacts, the error is
then 12, 86, 59, 36 and 52 % (source: 11, 90, 61, 37, 49). On the bundled network the smallest
variance is never under 1e-4 of the median, and in the traces never under 0.05. ``official=True``
turns both rules off.

Gradients of images that are normalised one by one are larger, and the learning rates that updates
are published with break the model on top of this rule. The authors run them at 1e-5 (CIFAR) and
2.5e-6 (ImageNet); an update that is named without a learning rate gets that (``update_lr``).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tta.core.batch_split import current_split
from tta.core.checks import LARGE, LARGEST, fraction, number, whole_number
from tta.core.component import Context
from tta.core.config import ComponentConfig
from tta.core.narrow import part_of_way, share_of_way
from tta.core.norm_layers import (
    far_outside,
    instance_stats,
    normalize,
    normalize_by_source,
)
from tta.core.norm_rule import NormRule
from tta.core.registry import register
from tta.core.tracing import all_finite, count_rows, is_tracing, look

__all__ = ["UnmixTns", "UnmixTnsConfig"]


@dataclass(frozen=True, kw_only=True)
class UnmixTnsConfig(ComponentConfig):
    """Fields of ``unmix_tns``."""

    components: int = 16  # K; the authors use 128 for mixed domains, as the "mixed" presets
    momentum: float | None = None  # lambda; None = 1 - (1 - m)^(B / batch_size_max), m the layer's
    batch_size: int | None = None  # B of that formula; None = wrap's, else batch_size_max
    batch_size_max: int = 64  # batch size at which lambda is the layer's own momentum
    temperature: float = 0.07  # T
    alpha: float = 0.5  # share of the source variance that the spread of components makes up
    update_lr: float | None = None  # lr of an update that is named without one of its own
    official: bool = False  # without the rules for bad images and narrow layers

    def __post_init__(self) -> None:
        super().__post_init__()
        whole_number("components", self.components, 1, 10_000)
        if self.momentum is not None:
            fraction("momentum", self.momentum)
        if self.batch_size is not None:
            whole_number("batch_size", self.batch_size, 1, LARGEST)
        whole_number("batch_size_max", self.batch_size_max, 1, LARGEST)
        number("temperature", self.temperature, 0, LARGE, above=True)
        fraction("alpha", self.alpha)
        if self.update_lr is not None:
            number("update_lr", self.update_lr, 0, LARGE)

    def for_batch_size(self, batch_size: int | None) -> UnmixTnsConfig:
        """Take ``batch_size`` as the B of lambda, unless the config has one."""
        return self if self.batch_size is not None else self.replace(batch_size=batch_size)


def _rate(config: UnmixTnsConfig, momentum: float) -> float:
    """Return lambda, from the layer's own momentum unless the config has it."""
    if config.momentum is not None:
        return config.momentum
    share = (config.batch_size or config.batch_size_max) / config.batch_size_max
    return 1 - (1 - momentum) ** share


@register("unmix_tns")
class UnmixTns(NormRule):
    """K components of statistics for one layer: ``means`` and ``vars``, each (K, C)."""

    Config = UnmixTnsConfig
    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "imagenet": {"batch_size_max": 16, "update_lr": 2.5e-6},
        "cifar10": {"batch_size_max": 64, "update_lr": 1e-5},
        "cifar100": {"batch_size_max": 64, "update_lr": 1e-5},
        "domainnet126": {"batch_size_max": 64},
        "imagenet_mixed": {"components": 128, "batch_size_max": 16, "update_lr": 2.5e-6},
        "cifar10_mixed": {"components": 128, "batch_size_max": 64, "update_lr": 1e-5},
        "cifar100_mixed": {"components": 128, "batch_size_max": 64, "update_lr": 1e-5},
    }
    needs_source_stats = True

    means: Tensor  # (K, C)
    vars: Tensor  # (K, C)

    def __init__(self, config: UnmixTnsConfig, base: Any, context: Context) -> None:
        super().__init__(config, base, context)
        # At least float32, since half precision would round small moves away.
        wide = torch.promote_types(base.running_mean.dtype, torch.float32)
        mean, var = base.running_mean.to(wide), base.running_var.to(wide)
        k = config.components
        self.way = share_of_way(context.narrow, config.official)
        if k == 1:
            means, variances = mean[None].clone(), var[None].clone()
        else:
            # Spread and shrink so that the mixture has the source variance in expectation.
            shape = (k, len(mean))
            noise = torch.randn(shape, generator=context.generator, dtype=torch.float32).to(mean)
            if self.way < 1:  # exactly, not only in expectation
                noise = noise - noise.mean(0)
                noise = noise / noise.square().mean(0).sqrt() * ((k - 1) / k) ** 0.5
            spread = (config.alpha * k / (k - 1)) ** 0.5
            means = mean + spread * var.sqrt() * noise
            variances = ((1 - config.alpha) * var).expand(k, -1).clone()
        self.register_buffer("means", means)
        self.register_buffer("vars", variances)
        self.rate: float = _rate(config, 0.1 if base.momentum is None else base.momentum)

    def mixed_images(self, count: int) -> float:
        """Those of the batches that a component goes back over, of as many classes as there are."""
        return len(self.means) * count / self.rate if self.rate > 0 else math.inf

    @classmethod
    def update_fields(cls, config: Any) -> dict[str, Any]:
        """The authors' learning rate on top of this rule, for batches of ``batch_size_max``."""
        if config.update_lr is None:
            return {}
        scaling = {"lr_scaling": "linear_below", "lr_batch_size": config.batch_size_max}
        return {"lr": config.update_lr} | scaling

    def forward(self, x: Tensor, base: Any) -> Tensor:
        """Normalise each image of (B, C, ...) with its own mixture, then move the components."""
        if x.ndim == 2 or isinstance(base, nn.BatchNorm1d):
            return normalize_by_source(x, base)
        if torch.is_autocast_enabled(x.device.type):
            with torch.autocast(x.device.type, enabled=False):  # statistics stay in float32
                return self._unmixed(x, base)
        return self._unmixed(x, base)

    def _unmixed(self, x: Tensor, base: Any) -> Tensor:
        mean, var = instance_stats(x)
        with torch.set_grad_enabled(self.following):  # an update takes the shares for constants
            means, variances = self.means.to(mean.dtype), self.vars.to(mean.dtype)
            similarity = F.normalize(mean, dim=1) @ F.normalize(means, dim=1).t()
            p = (similarity / self.config.temperature).softmax(1)  # (B, K)
        whole = self.config.official
        if not whole:  # nothing of bad images is mixed in
            bad = self._bad(mean.detach(), var.detach(), means, variances, base)[:, None]
            whole = look(bad.any()) is False
            if not whole:
                p, mean, var = (torch.where(bad, 0.0, v) for v in (p, mean, var))
        k, rest = len(self.means), 1 - p
        # Averages over k of M and of V + M^2, expanded so that nothing of size (B, K, C) is made; p
        # sums to one, or it and the image's own statistics are 0. There are few operations, since
        # their number is what costs time on small layers and on GPUs.
        mixed_mean = torch.addmm(mean, rest, means) / k
        second = torch.addmm(var, rest, variances)
        second = torch.addmm(second, rest.square(), means.square())
        second = torch.addcmul(second, (rest * p) @ means, mean, value=2)
        second = torch.addcmul(second, p.square().sum(1, keepdim=True), mean.square()) / k
        mixed_var = torch.addcmul(second, mixed_mean, mixed_mean, value=-1)
        y = normalize(x, *part_of_way(mixed_mean, mixed_var, base, self.way), base)
        if self.learning:
            self._move(p, mean.detach(), var.detach(), whole)
        return y

    @staticmethod
    def _bad(mean: Tensor, var: Tensor, means: Tensor, variances: Tensor, base: Any) -> Tensor:
        """Find the images (B,) that are far outside the mixture of all components."""
        centre = means.mean(0)
        second = variances.mean(0) + means.square().mean(0)
        mixture = torch.addcmul(second, centre, centre, value=-1)
        reference = torch.maximum(mixture, base.running_var) + base.eps
        return far_outside(mean, var, centre, reference)

    @torch.no_grad()
    def _move(self, p: Tensor, mean: Tensor, var: Tensor, whole: bool) -> None:
        """Move all components towards the images, in proportion to similarity, divided by B.

        With ``whole`` no image was left out.
        """
        if (split := current_split()) is not None:  # the other ranks' images too
            p, mean, var = (split.gather(v) for v in (p, mean, var))
            whole = self.config.official
        # Finite pixels may overflow; such an image would spoil the components for good.
        if not all_finite(mean, var):
            fine = (mean + var).isfinite().all(1, keepdim=True)
            p, mean, var = (torch.where(fine, v, 0.0) for v in (p, mean, var))
            whole = self.config.official
        if not whole:  # as if the batch had come without bad images
            p = p * (count_rows(p) / (p.sum(1) > 0).sum().clamp_min(1))
        rate = self.rate / count_rows(p)
        if is_tracing():  # it is a tensor then
            p, rate = p * rate, 1.0
        kept = 1 - rate * p.sum(0)[:, None]
        for components, towards in ((self.means, mean), (self.vars, var)):
            stay = components.to(mean.dtype) * kept
            components.copy_(torch.addmm(stay, p.t(), towards, alpha=rate))
