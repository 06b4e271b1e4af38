"""SAR: sharpness-aware entropy minimisation on reliable samples, with recovery from collapse.

Niu, Wu, Zhang, Wen, Chen, Zhao, Tan: Towards Stable Test-Time Adaptation in Dynamic Wild World,
ICLR 2023, arXiv 2302.12400.

Batches of one, mixed domains and shifting labels make entropy minimisation collapse, through few
samples with large gradients. Samples of high entropy are left out; on the rest a sharpness-aware
step is taken, which looks for flat minima that noisy gradients do not leave; and when the average
of the loss falls under a threshold, as it does in a collapse, the source model is restored. It is
meant for models with GroupNorm or LayerNorm.

    S1 = [H_b(theta) < E0],   theta' = theta + rho g / |g|,   g = grad mean_{S1} H_b(theta)
    S2 = S1 [H_b(theta') < E0],   theta <- theta - lr grad mean_{S2} H_b(theta')
    e <- 0.9 e + 0.1 L2;   e < ``reset_threshold``: theta <- theta_0

The returned logits are those of the first forward pass. The last blocks and the final norm are not
trained. Here they are found by position: of the norm layers, in the order in which a forward pass
first calls them, the last ``skip_blocks`` share is left out, rounded up and at least the last one
(for ViT-B the six of blocks 9 to 11 and the final one, as in the official code; one layer is always
trained). The order is recorded during the first batch; until then ``parameters_adapted`` names all
norm layers. The keys of the state always do, but the layers left out never move. Layers that a
forward pass does not call are not counted. This concerns ``params="norm"`` alone.

Differences: the official code leaves layers out by name (layer4, blocks.9, blocks.10, blocks.11,
norm), which leaves out nothing in most models; ignores its threshold argument (0.2); after a
recovery keeps the average that triggered it, so that the next batches recover as well, and the
momentum; and, when nothing is selected, still steps on momentum. ``official=True`` does all that.
Otherwise the average and the momentum are cleared and an empty selection is no step. The official
repository has no CIFAR settings; those presets are the mariodoebler repository's.

With ``loss="opinion"`` H is COME's opinion entropy (see ``tent``) in both filters, both losses and
the average e, to which the same threshold applies. E0 stays a share of ln C.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from tta.core.backbone import Backbone
from tta.core.checks import LARGE, number
from tta.core.component import Context
from tta.core.prediction import Prediction, Report
from tta.core.registry import register
from tta.core.selection_pass import SelectionPass
from tta.methods._lower_layers import LowerLayersConfig, LowerLayersUpdate
from tta.methods._uncertainty import COME, UncertaintyConfig, uncertainty
from tta.parts.sam import perturbed
from tta.parts.selection import move_average

__all__ = ["Sar", "SarConfig"]

OFFICIAL_THRESHOLD = 0.2


@dataclass(frozen=True, kw_only=True)
class SarConfig(UncertaintyConfig, LowerLayersConfig):
    """Fields of ``sar``."""

    entropy_margin: float = 0.4  # E0 as a share of ln C
    rho: float = 0.05  # length of the sharpness-aware perturbation
    reset_threshold: float = 0.2  # average loss in nats below which the source model is restored

    def __post_init__(self) -> None:
        super().__post_init__()
        number("entropy_margin", self.entropy_margin, 0, LARGE, above=True)
        number("rho", self.rho, 0, LARGE)
        number("reset_threshold", self.reset_threshold, 0, LARGE)


_RESNET = {"lr": 2.5e-4, "lr_scaling": "small_batch"}
_VIT = {"lr": 1e-3, "lr_scaling": "linear"}


@register("sar")
class Sar(LowerLayersUpdate):
    """Sharpness-aware and reliable entropy minimisation."""

    Config = SarConfig
    in_sets: ClassVar[bool] = True
    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "imagenet": _RESNET,
        "imagenet_vit": _VIT,
        "come_imagenet": _RESNET | COME,
        "come_imagenet_vit": _VIT | COME,
        "cifar10": {"lr": 1e-3, "lr_scaling": "linear_below", "lr_batch_size": 200},
        "cifar100": {"lr": 1e-3, "lr_scaling": "linear_below", "lr_batch_size": 200},
    }

    ema: Tensor  # 0-dimensional, e; NaN while undefined

    def __init__(self, config: SarConfig, network: Backbone, context: Context) -> None:
        super().__init__(config, network, context)
        self.register_buffer("ema", torch.tensor(float("nan"), dtype=torch.float32))

    def measure(self, logits: Tensor) -> Tensor:
        """The entropy (B,) of logits (B, C) in filters and loss."""
        return uncertainty(self.config, self.context.num_classes)(logits)

    def undefined_as_nan(self) -> tuple[str, ...]:
        """There is no average before the first loss, and after a recovery."""
        return ("ema",)

    def adapt(self, x: Tensor) -> Prediction:
        """Predict, select, step from the perturbed point, recover if the average says so."""
        config = self.config
        selection = self.selection_pass(x)
        self.leave_out_last()
        margin = config.entropy_margin * self.context.log_classes
        kept = self.measure(selection.logits) < margin
        count = selection.keep(kept)
        self.report = Report(selected=count, kept=kept, selected_second=0, gradient_norm=0.0)
        self.report |= {"loss": float("nan"), "stepped": False}
        if count > 0:
            self._sharp_step(selection, margin)
        if config.official and self.report["selected_second"] == 0:
            self._coast()
        threshold = OFFICIAL_THRESHOLD if config.official else config.reset_threshold
        if bool(self.ema < threshold):
            self.recover(optimizer=not config.official)
            self.resets += 1
            if not config.official:
                self.ema.fill_(float("nan"))
        return selection.prediction

    def _sharp_step(self, selection: SelectionPass, margin: float) -> None:
        parameters = list(self.parameters_adapted.values())
        first = self.measure(selection.kept_logits()).mean()
        climb = self._gradients(first, parameters)
        with perturbed(parameters, climb, self.config.rho) as norm:
            entropies = self.measure(selection.again())
            kept = entropies.detach() < margin
            count = int(kept.sum())
            self.report |= {"selected_second": count, "gradient_norm": norm}
            if count == 0:
                return
            loss = entropies[kept].mean()
            gradients = self._gradients(loss, parameters)
        move_average(self.ema, loss.detach())
        self.report |= {"loss": loss.detach(), "stepped": self.step(loss, gradients)}

    def _coast(self) -> None:
        """Take a step with a gradient of zero, in which only the momentum acts."""
        zeros = [torch.zeros_like(p) for p in self.parameters_adapted.values()]
        self.report["stepped"] = self.step(torch.zeros((), device=self.ema.device), zeros)

    def _gradients(self, loss: Tensor, parameters: list[Any]) -> list[Tensor]:
        """Gradients of a loss; zeros for a parameter without effect."""
        found = self.network.session.gradients(loss, parameters)
        pairs = zip(found, parameters, strict=True)
        return [torch.zeros_like(p) if g is None else g for g, p in pairs]
