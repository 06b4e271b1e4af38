"""SPA: the clean view teaches two degraded ones, in which geometry is what is left.

Niu et al.: Self-Bootstrapping for Versatile Test-Time Adaptation, ICML 2025, arXiv 2504.08010.

Entropy teaches a model nothing where it is sure, and the views of other methods destroy what a
prediction rests on. Here an image loses low frequencies in one view and is covered by noise, patch
by patch, in the other; where the model is less sure of such a view than of the image itself, it
learns to predict the image's distribution from the view. How much noise each patch gets is learned
against the model.

    L = sum_{two views} mean_{b : max p_b > max p'_b} KL(p_b || p'_b),   p' = softmax(W (P h') + b)
    x'_j = clip((1 - a_j^2) x_j + a_j^2 n_j, -1, 1),   a <- a + rho dL/da, with mean a^2 = r

P is a square predictor on the features h' of a view, the identity at first, which is trained at a
rate of its own beside the norm layers; p is a constant, and what is returned. Amplitudes of the low
square of the spectrum are left out with probability ``mask_ratio``, drawn for each image, channel
and frequency; that of zero frequency may be. The noise n_j is drawn once for the batch. After its
step, a is scaled to a mean square of ``noise_ratio`` and cut to [-1, 1].

``auxiliary`` adds a tenth of the loss of another method on the image itself: entropy (``tent``),
or that on selected samples, with the Fisher penalty if there is one (``eta``, ``eata``). Of its
config, whatever says how it steps is unused.

Differences: both views are made of pixels in [0, 1] stretched to [-1, 1], whatever the model takes,
as the authors' are for theirs; ``official=True`` wants such a model, mean and std 0.5. A view of
which no sample is learned from adds nothing; the authors' code steps on the mean of nothing, NaN.
Its a starts at the square root of 0.4 whatever the ratio, and at that of the ratio after a reset;
``official=True`` does so. Patches may stick out at the right and lower border of images whose sides
are no multiple of ``patch_size``. The preset ``imagenet`` is the authors' for a ResNet-50 with
GroupNorm, ``imagenet_vit`` that for ViT-B. They do not scale the rates; below the batch size of the
preset both fall with ``wrap(batch_size=)`` here, and what is named is not scaled.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from tta.core.backbone import Backbone
from tta.core.checks import LARGE, fraction, number, shown, whole_number
from tta.core.component import Context
from tta.core.config import ComponentConfig
from tta.core.norm_layers import frozen_statistics
from tta.core.prediction import Prediction, Report
from tta.core.random import fork
from tta.core.registry import component, config_from_dict, get_config, register
from tta.core.source import SourceStatistics
from tta.methods._predictor import PredictorConfig, PredictorUpdate
from tta.methods._selective import SelectiveConfig, SelectiveUpdate, select, weighted_entropy
from tta.methods._uncertainty import UncertaintyConfig, uncertainty
from tta.parts.augment import Augmenter
from tta.parts.degraded_views import low_frequencies, mask_amplitudes, noise_patches
from tta.parts.selection import move_average

__all__ = ["Spa", "SpaConfig"]

AUXILIARY_WEIGHT = 0.1
ALPHA_MOMENTUM = 0.9
OFFICIAL_START = 0.4  # mean square of a at wrap in the authors' code, whatever the ratio


@dataclass(frozen=True, kw_only=True)
class SpaConfig(PredictorConfig):
    """Fields of ``spa``."""

    lr: float = 0.01  # learning rate of the norm layers
    predictor_lr: float = 0.05  # learning rate of the predictor P
    noise_ratio: float = 0.4  # r, mean share a^2 of noise in a patch
    mask_ratio: float = 0.2  # probability that an amplitude is left out
    low_fraction: float = 0.2  # side of the low square as a share of the spectrum's
    patch_size: int = 16  # side of a patch in pixels
    alpha_lr: float = 1.0  # rho, learning rate of a
    auxiliary: Any = None  # further loss: None, "tent", "eta", "eata", or a config of such a method

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("noise_ratio", "mask_ratio", "low_fraction"):
            fraction(name, getattr(self, name))
        whole_number("patch_size", self.patch_size, 1, 10_000)
        number("alpha_lr", self.alpha_lr, 0, LARGE)
        if isinstance(self.auxiliary, dict):  # as to_dict() wrote it
            object.__setattr__(self, "auxiliary", config_from_dict(self.auxiliary))
        given = self.auxiliary
        if given is not None and not isinstance(given, (str, ComponentConfig)):
            raise TypeError(
                f"`auxiliary` must be a name, a config or None, got {type(given).__name__}: pass "
                "'tent', 'eta' or 'eata', or what tta.get_config returns."
            )
        config = self.auxiliary_config
        plain = isinstance(config, UncertaintyConfig) and not hasattr(config, "entropy_margin")
        if not (config is None or plain or _selects(config)):
            raise ValueError(
                f"`auxiliary` must be a method that lowers entropy, got {shown(given)}: pass "
                "'tent', 'eta', 'eata', a config of one of them, or None."
            )

    @property
    def auxiliary_config(self) -> ComponentConfig | None:
        """The config of the further loss."""
        given = self.auxiliary
        if given is None or isinstance(given, ComponentConfig):
            return given
        return get_config(given)

    def to_dict(self) -> dict[str, Any]:
        """The component's name and every field, as JSON types."""
        given, found = self.auxiliary, super().to_dict()
        own = given.to_dict() if isinstance(given, ComponentConfig) else given
        return found | {"auxiliary": own}


def _selects(config: Any) -> bool:
    """Whether a config is that of a method of entropy that selects samples."""
    return isinstance(config, UncertaintyConfig) and isinstance(config, SelectiveConfig)


_SCALED = {"lr_scaling": "linear_below", "predictor_lr_scaling": "linear_below"}


@register("spa")
class Spa(PredictorUpdate):
    """Geometry-keeping views, taught by the clean one."""

    Config = SpaConfig
    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "imagenet": {
            "lr": 0.0025,
            "predictor_lr": 0.025,
            **_SCALED,
            "noise_ratio": 0.1,
            "mask_ratio": 0.1,
        },
        "imagenet_vit": {"lr": 0.01, "predictor_lr": 0.05, **_SCALED},
    }
    splits: ClassVar[bool] = False  # its results with two processes are not those of one
    takes_draws: ClassVar[bool] = True
    cost: ClassVar[float] = 6.0
    learns_from_whole_batch: ClassVar[bool] = False
    follows_images: ClassVar[bool] = True  # for the noise
    uses_labels = False

    alpha: Tensor  # (patches,) a; empty before the first batch
    alpha_momentum: Tensor  # (patches,)
    begun: Tensor  # 0-dimensional: 1 once there was a batch, official=True alone
    ema_probs: Tensor  # (C,), of an auxiliary method that selects; NaN while undefined
    fisher: Tensor  # (P,) of an auxiliary method that has it
    anchor: Tensor  # (P,) source values

    def __init__(self, config: SpaConfig, network: Backbone, context: Context) -> None:
        super().__init__(config, network, context)
        self.augmenter = Augmenter(network.model, context)
        halves = {*self.augmenter.mean, *self.augmenter.std} == {0.5}
        if config.official and not halves:
            raise ValueError(
                "`mean` and `std` must be 0.5 for spa with official=True, whose images lie in "
                f"[-1, 1], got {shown(self.augmenter.mean, 40)} and "
                f"{shown(self.augmenter.std, 40)}: leave official out."
            )
        for name in ("alpha", "alpha_momentum"):
            self.register_buffer(name, torch.zeros(0, dtype=torch.float32))
        self.register_buffer("begun", torch.zeros((), dtype=torch.int64))
        self.penalty_weight = 0.0
        self._artefacts: dict[str, Any] = {}
        if (host := self._selective_host()) is not None:
            self.register_buffer("ema_probs", host.ema_probs.clone())
            self.penalty_weight = float(getattr(host.config, "fisher_weight", 0.0))
        if host is not None and self.penalty_weight > 0:
            for name, value in _constants(host).items():
                self.register_buffer(name, value.clone(), persistent=False)

    def adapt(self, x: Tensor) -> Prediction:
        """Predict, degrade, learn where a view is less sure, and move the noise against that."""
        config = self.config
        self.augmenter.check(x)
        self._begin(x)
        with torch.set_grad_enabled(config.auxiliary is not None):
            prediction = self.network(x)
        target = prediction.logits.detach().float()
        signed = self.augmenter.pixels(x) * 2 - 1
        alpha = self.alpha.clone().requires_grad_()
        with torch.autocast(x.device.type, enabled=False):  # views in full precision
            views = self._views(signed, alpha)
        losses, kept = [], []
        for view in views:
            images = self.augmenter.images((view + 1) / 2, x.dtype)
            with frozen_statistics(self.network.wrappers):
                seen = self._logits(self.network(images).features)
            less_sure = target.softmax(1).amax(1) > seen.detach().softmax(1).amax(1)
            kept.append(less_sure)
            losses.append(_divergence(target, seen, less_sure))
        counts = [int(rows.sum()) for rows in kept]
        self.report = Report(
            selected=counts[0],
            kept=kept[0],
            selected_second=counts[1],
            frequency_loss=losses[0].detach() if counts[0] else math.nan,
            noise_loss=losses[1].detach() if counts[1] else math.nan,
            loss=math.nan,
            stepped=False,
        )
        extra = self._auxiliary_loss(prediction.logits)
        if any(counts) or extra is not None:
            loss = losses[0] + losses[1] + (0 if extra is None else AUXILIARY_WEIGHT * extra)
            self.report |= {"loss": loss.detach(), "stepped": self.step(loss)}
            if counts[1]:
                self._ascend(alpha.grad)
        return prediction

    def fit(self, source: SourceStatistics) -> None:
        """Take what the auxiliary method needs."""
        if self.penalty_weight == 0:
            return
        host = self._selective_host()
        assert host is not None
        host.fit(source)
        self.source_used, self._artefacts = host.source_used, host.source_artefacts()
        for name, value in _constants(host).items():
            getattr(self, name).copy_(value)

    def source_artefacts(self) -> dict[str, Any]:
        """Return what the auxiliary method took."""
        return self._artefacts

    def lazy_buffers(self) -> tuple[str, ...]:
        """The first batch shows how many patches there are."""
        return ("alpha", "alpha_momentum")

    def undefined_as_nan(self) -> tuple[str, ...]:
        """There is no average before the first selected sample."""
        return ("ema_probs",) if "ema_probs" in self._buffers else ()

    def integer_ranges(self) -> dict[str, tuple[int, int]]:
        """A flag."""
        return {"begun": (0, 1)}

    def survives_reset(self) -> tuple[str, ...]:
        """Whether there was a batch, under ``official=True``, which starts otherwise after it."""
        return ("begun",) if self.config.official else ()

    def _selective_host(self) -> SelectiveUpdate | None:
        """An auxiliary method that selects, for what it remembers and takes from the source."""
        config: Any = self.config.auxiliary_config
        if not _selects(config):
            return None
        cls: Any = component(config.name)
        return cls(config, self.network, self.context).to(self.predictor.weight.device)

    def _begin(self, x: Tensor) -> None:
        """Start with as many patches as the first batch has, and refuse another number later."""
        config, sides = self.config, x.shape[2:]
        patches = math.prod(math.ceil(n / config.patch_size) for n in sides)
        if self.alpha.numel() == 0:
            first = config.official and not bool(self.begun)
            ratio = OFFICIAL_START if first else config.noise_ratio
            self.alpha = torch.full((patches,), math.sqrt(ratio), device=self.alpha.device)
            self.alpha_momentum = torch.zeros_like(self.alpha)
            self.begun.fill_(1)
        if len(self.alpha_momentum) != len(self.alpha):  # a state without it was loaded
            self.alpha_momentum = torch.zeros_like(self.alpha)
        if len(self.alpha) != patches:
            raise ValueError(
                f"`images` must have as many patches of {config.patch_size} pixels as before, "
                f"{len(self.alpha)}, got {patches} in shape {tuple(x.shape)}: resize them, or call "
                "reset() first."
            )

    def _views(self, signed: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
        """The images (B, C, H, W) in [-1, 1] without some amplitudes, and with noise."""
        config, channels, device = self.config, signed.shape[1], signed.device
        height, width = signed.shape[2:]
        squares = low_frequencies(height, width, config.low_fraction)
        sides = [found.stop - found.start for found in squares]
        shape = torch.Size((len(signed), channels, *sides))
        kept = self.context.draws.ask("frequency_keep", shape, torch.bool, device)
        side = config.patch_size
        patches = torch.Size((len(alpha), channels, side, side))
        noise = self.context.draws.ask("patch_noise", patches, torch.float32, device)
        if kept is None or noise is None:
            draws = fork(self.context.generator, device)
            own = draws.uniforms(*shape) >= config.mask_ratio
            kept = own if kept is None else kept
            noise = draws.normals(*patches) if noise is None else noise
        first = mask_amplitudes(signed, kept, config.low_fraction)
        return first, noise_patches(signed, alpha, noise)

    def _logits(self, features: Tensor | None) -> Tensor:
        """Logits (B, C) of the features of a view, by way of the predictor."""
        assert features is not None
        head: Any = self.context.classifier
        bias = None if head.bias is None else head.bias.float()
        with torch.autocast(features.device.type, enabled=False):
            return F.linear(self.predictor(features.float()), head.weight.flatten(1).float(), bias)

    @torch.no_grad()
    def _ascend(self, gradient: Tensor | None) -> None:
        """Move a up the loss of the noisy view, and back to its mean square."""
        if gradient is None or not bool(gradient.isfinite().all()):
            return
        config = self.config
        self.alpha_momentum.mul_(ALPHA_MOMENTUM).add_(gradient)
        moved = self.alpha + config.alpha_lr * self.alpha_momentum
        scale = config.noise_ratio / moved.square().mean().clamp_min(torch.finfo(moved.dtype).tiny)
        self.alpha.copy_((moved * scale.sqrt()).clamp(-1, 1))

    def _auxiliary_loss(self, logits: Tensor) -> Tensor | None:
        """The loss of the auxiliary method on the images themselves; None where it has none."""
        config: Any = self.config.auxiliary_config
        if config is None:
            return None
        context = self.context
        measure = uncertainty(config, context.num_classes)
        if "ema_probs" not in self._buffers:
            return measure(logits).mean()
        margin = config.entropy_margin * context.log_classes
        found = select(logits, self.ema_probs, margin, config.redundancy_margin, measure)
        if not bool(found.chosen.any()):
            return None
        move_average(self.ema_probs, found.mean_probs)
        loss = weighted_entropy(logits[found.chosen], margin, measure)
        if self.penalty_weight == 0:
            return loss
        flat = torch.cat([p.flatten() for p in self.parameters_adapted.values()])
        return loss + self.penalty_weight * (self.fisher * (flat - self.anchor).square()).sum()


def _constants(host: SelectiveUpdate) -> dict[str, Tensor]:
    """What a method fixes at wrap, flat over the trained parameters."""
    moving = set(host.state_dict())
    return {name: b for name, b in host.named_buffers() if name not in moving}


def _divergence(target: Tensor, logits: Tensor, rows: Tensor) -> Tensor:
    """Mean KL divergence of predictions (B, C) from their targets over some rows; 0 of none."""
    expected = target.log_softmax(1)
    divergence = (expected.exp() * (expected - logits.float().log_softmax(1))).sum(1)
    return (divergence * rows).sum() / rows.sum().clamp_min(1)
