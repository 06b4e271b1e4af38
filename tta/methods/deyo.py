"""DeYO: entropy minimisation on samples whose prediction rests on the shape of the object.

Lee, Jung, Lee, Park, Shin, Hwang, Yoon: Entropy is not Enough for Test-Time Adaptation: From the
Perspective of Disentangled Factors, ICLR 2024, arXiv 2403.07366.

Low entropy alone does not make a sample trustworthy: the prediction may rest on background or
texture. So the object is destroyed, by shuffling patches, and only samples whose pseudo-label then
loses probability (PLPD, pseudo-label probability difference) are learned from. A sample weighs more
the more confident its prediction is and the more probability it loses. The returned logits are
those of the first forward pass.

    S1 = [H_b < t_ent ln C],   PLPD_b = p_y(x_b) - p_y(x'_b),   y = argmax p(x_b)
    S2 = S1 [PLPD_b > t_plpd],   L = mean_{S2} (exp(m ln C - H_b) + exp(PLPD_b)) H_b

x' is x with its patches in a random order, made from the images of S1 alone, which are a batch of
their own (with their own batch statistics). The factor before H_b carries no gradient. Nothing
moves when S2 is empty. Both thresholds are strict.

As in SAR, the last blocks and the final norm are not trained. Here they are found by position;
``official=True`` finds them by the names in the code (layer4, blocks.9, blocks.10, blocks.11,
norm): see ``sar``. ``destroy`` has the code's alternatives: "pixel" shuffles single pixels,
"occlusion" covers a rectangle in the middle with the image's mean (half of each side, as 112 of
224). Sides that the grid does not divide are resized down and back, bilinearly and with
antialiasing. The code shuffles the pixels of all images of a batch in one order, and
``official=True`` does so; otherwise each image has an order of its own, as patches have.
``draws=`` is asked for ``patch_order``: (N, patches^2) for the N reliable images, (N, H W) for
pixels and (H W,) under ``official=True``; the new patch j is the old patch order[j].

The threshold on PLPD is 0.3 for ResNet-50 in the mild setting (``imagenet``) and 0.2 in the wild
ones (``imagenet_wild``, ``imagenet_vit``); the two biased sets have five times the learning rate;
the CIFAR presets are the mariodoebler repository's, whose weight of a sample has EATA's margin
(0.4) too. Differences: the authors' code runs the model in train mode, this code in eval mode;
their ``reset`` refers to attributes that are never made and cannot run. For images that are not
square the code takes both sides from the width. Equation numbers are missing: this follows a
description of the authors' code, and its traces.

With ``loss="opinion"`` (ours) it is COME's opinion entropy (see ``tent``) in filter, weight
and loss; PLPD keeps the softmax.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from tta.core.checks import LARGE, number, one_of, whole_number
from tta.core.config import CIFAR_ADAM
from tta.core.norm_layers import frozen_statistics, part_of_batch
from tta.core.prediction import Prediction, Report
from tta.core.random import fork
from tta.core.registry import register
from tta.methods._lower_layers import LowerLayersConfig, LowerLayersUpdate
from tta.methods._uncertainty import UncertaintyConfig, uncertainty
from tta.parts.occlusion import occlude, random_orders, shuffle_patches, shuffle_pixels

__all__ = ["Deyo", "DeyoConfig"]


@dataclass(frozen=True, kw_only=True)
class DeyoConfig(UncertaintyConfig, LowerLayersConfig):
    """Fields of ``deyo``."""

    entropy_margin: float = 0.5  # t_ent, largest entropy as a share of ln C
    weight_margin: float = 0.4  # m, entropy of weight 1 as a share of ln C
    plpd_threshold: float = 0.2  # t_plpd, smallest loss of probability of the pseudo-label
    destroy: str = "patch"  # how the object is destroyed: "patch", "pixel" or "occlusion"
    patches: int = 4  # number of patches along each side; "patch" only
    occlusion: float = 0.5  # share of each side that is covered; "occlusion" only

    def __post_init__(self) -> None:
        super().__post_init__()
        number("entropy_margin", self.entropy_margin, 0, LARGE, above=True)
        number("weight_margin", self.weight_margin, 0, LARGE)
        number("plpd_threshold", self.plpd_threshold, -1, 1)
        one_of("destroy", self.destroy, ("patch", "pixel", "occlusion"))
        whole_number("patches", self.patches, 1, 10_000)
        number("occlusion", self.occlusion, 0, 1, above=True)


_RESNET = {"lr": 2.5e-4, "lr_scaling": "small_batch"}
_BIASED = _RESNET | {"lr": 5 * 2.5e-4, "plpd_threshold": 0.5}  # sets whose classes go with colours
_CIFAR = CIFAR_ADAM | {"plpd_threshold": 0.2}


@register("deyo")
class Deyo(LowerLayersUpdate):
    """Entropy of samples that lose their label when their object is destroyed."""

    Config = DeyoConfig
    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "imagenet": _RESNET | {"plpd_threshold": 0.3},
        "imagenet_wild": _RESNET | {"plpd_threshold": 0.2},
        "imagenet_vit": {"lr": 1e-3, "lr_scaling": "linear", "plpd_threshold": 0.2},
        "waterbirds": _BIASED,
        "coloredmnist": _BIASED | {"entropy_margin": 1.0, "weight_margin": 1.0},
        "cifar10": _CIFAR,
        "cifar100": _CIFAR,
    }
    takes_draws: ClassVar[bool] = True

    def adapt(self, x: Tensor) -> Prediction:
        """Predict, select by entropy and by PLPD, weigh, step."""
        config, log_classes = self.config, self.context.log_classes
        self._check(x)
        self.report = Report(reliable=0, selected=0, loss=float("nan"), stepped=False)
        selection = self.selection_pass(x)
        self.leave_out_last()
        measure = uncertainty(config, self.context.num_classes)
        entropies = measure(selection.logits)
        reliable = entropies < config.entropy_margin * log_classes
        self.report["reliable"] = count = selection.keep(reliable)
        self.report["kept"] = torch.zeros_like(reliable)
        if count == 0:
            return selection.prediction
        with part_of_batch(self.network.wrappers, count / len(x)):
            drop = self._drop(x[reliable], selection.logits[reliable])
        kept = drop > config.plpd_threshold
        chosen = reliable.clone()
        chosen[reliable] = kept
        self.report["selected"] = count = selection.keep(chosen)
        self.report["kept"] = chosen
        if count == 0:
            return selection.prediction
        weight = torch.exp(config.weight_margin * log_classes - entropies[chosen])
        weight = weight + torch.exp(drop[kept])
        loss = (weight * measure(selection.kept_logits())).mean()
        self.report |= {"loss": loss.detach(), "stepped": self.step(loss)}
        return selection.prediction

    @torch.no_grad()
    def _drop(self, images: Tensor, logits: Tensor) -> Tensor:
        """PLPD (N,): the label's loss of probability as the object in (N, C, H, W) is destroyed."""
        destroyed = self._destroy(images)
        with frozen_statistics(self.network.wrappers):
            after = self.network(destroyed).logits.float().softmax(1)
        before, label = logits.float().softmax(1).max(1)
        return before - after.gather(1, label[:, None])[:, 0]

    def _destroy(self, images: Tensor) -> Tensor:
        config = self.config
        if config.destroy == "occlusion":
            return occlude(images, config.occlusion)
        if config.destroy == "pixel":
            length = images.shape[2] * images.shape[3]
            return shuffle_pixels(images, self._orders(images, length, config.official))
        return shuffle_patches(images, config.patches, self._orders(images, config.patches**2))

    def _orders(self, images: Tensor, length: int, one: bool = False) -> Tensor:
        """Orders (N, length) for images (N, C, H, W), of which all have ``one``, or each its own.

        They are the caller's, or drawn.
        """
        shape = torch.Size((length,) if one else (len(images), length))
        orders = self.context.draws.ask_order("patch_order", shape, images.device)
        if orders is None:
            draws = fork(self.context.generator, images.device)
            orders = random_orders(1 if one else len(images), length, draws)
        return orders.expand(len(images), length)

    def _check(self, x: Tensor) -> None:
        least = self.config.patches if self.config.destroy == "patch" else 1
        if x.ndim != 4 or min(x.shape[2:]) < least:
            raise ValueError(
                f"`images` must be (B, C, H, W) with sides of at least {least} pixels for deyo to "
                f"destroy what they show, got shape {tuple(x.shape)}: set patches= or use another "
                "method."
            )
