"""EATA and ETA: entropy minimisation on reliable, non-redundant samples, with a Fisher anchor.

Niu, Wu, Zhang, Chen, Zheng, Zhao, Tan: Efficient Test-Time Model Adaptation without Forgetting,
ICML 2022, arXiv 2204.02610.

Samples of high entropy give harmful gradients and samples like those before give redundant ones;
both are left out, the rest is weighted towards low entropy. A penalty, weighted by the diagonal
Fisher information of the source, keeps parameters that matter for clean images near their source
values. ETA is EATA without the penalty and needs no source data.

    S(b) = [H_b < E0] [|cos(q, p_b)| < d],   w_b = exp(E0 - H_b)                       (eq. 2-6)
    L = mean_{b in S} w_b H_b + beta sum_i F_i (theta_i - theta_i^0)^2                 (eq. 8-9)

q is a moving average (0.9) of the mean prediction over selected samples. As in the official code,
and unlike the paper's formula, the entropy term is divided by the number selected, so a step does
not shrink when few survive; nothing moves when none does. The Fisher information is the mean over
batches of the squared gradient of the *batch mean* loss against pseudo-labels, not of the loss of
each sample.

Differences: ``reset`` also clears q; ``official=True`` keeps it, as the official code does. The
CIFAR-10 preset follows the paper's settings as recalled by a secondary source (SGD 0.005), which
the authors' repository does not contain; the CIFAR-100 preset is the mariodoebler repository's
(Adam, batches of 200, d = 0.1).

With ``loss="opinion"`` H is COME's opinion entropy (see ``tent``) in the filter, the weight and the
loss; the redundancy filter and q keep the softmax. E0 stays a share of ln C.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from tta.core.backbone import Backbone
from tta.core.checks import LARGE, LARGEST, number, shown, whole_number
from tta.core.component import Context
from tta.core.config import CIFAR_ADAM
from tta.core.registry import register
from tta.core.source import SourceStatistics
from tta.methods._selective import Measure, SelectiveConfig, SelectiveUpdate
from tta.methods._uncertainty import COME, UncertaintyConfig, uncertainty

__all__ = ["Eata", "EataConfig", "Eta", "EtaConfig"]


@dataclass(frozen=True, kw_only=True)
class EataConfig(UncertaintyConfig, SelectiveConfig):
    """Fields of ``eata``."""

    fisher_weight: float = 2000.0  # beta, eq. 8; 0 = no penalty and no source data
    fisher_samples: int = 2000  # largest number of source images used

    def __post_init__(self) -> None:
        super().__post_init__()
        number("fisher_weight", self.fisher_weight, 0, LARGE)
        whole_number("fisher_samples", self.fisher_samples, 1, LARGEST)


@dataclass(frozen=True, kw_only=True)
class EtaConfig(EataConfig):
    """Fields of ``eta``."""

    fisher_weight: float = 0.0  # beta


def _presets(beta: float, beta_cifar: float) -> dict[str, dict[str, Any]]:
    resnet = {"lr": 2.5e-4, "lr_scaling": "small_batch", "fisher_weight": beta}
    vit = {"lr": 1e-3, "lr_scaling": "linear", "fisher_weight": beta}
    return {
        "imagenet": resnet,
        "imagenet_vit": vit,
        "come_imagenet": resnet | COME,
        "come_imagenet_vit": vit | COME,
        "cifar10": {
            "lr": 0.005,
            "lr_scaling": "linear_below",
            "redundancy_margin": 0.4,
            "fisher_weight": beta_cifar,
        },
        "cifar100": CIFAR_ADAM | {"redundancy_margin": 0.1, "fisher_weight": beta_cifar},
    }


@register("eata")
class Eata(SelectiveUpdate):
    """Selective entropy minimisation with a Fisher penalty."""

    Config = EataConfig
    PRESETS: ClassVar[dict[str, dict[str, Any]]] = _presets(2000.0, 1.0)
    uses_labels = False
    in_sets: ClassVar[bool] = True

    fisher: Tensor  # (P,) flat over the trained parameters
    anchor: Tensor  # (P,) source values

    def __init__(self, config: EataConfig, network: Backbone, context: Context) -> None:
        super().__init__(config, network, context)
        anchor = self._flat()
        self.register_buffer("anchor", anchor, persistent=False)
        self.register_buffer("fisher", torch.zeros_like(anchor), persistent=False)

    @property
    def measure(self) -> Measure:
        """The entropy, or that of the opinion with ``loss="opinion"``."""
        return uncertainty(self.config, self.context.num_classes)

    def penalty(self) -> Tensor | None:
        """Beta times the Fisher-weighted squared distance from the source; None where beta is 0."""
        if self.config.fisher_weight == 0:
            return None
        offset = self._flat(detach=False) - self.anchor
        penalty = self.config.fisher_weight * (self.fisher * offset.square()).sum()
        self.report["fisher_penalty"] = penalty.detach()
        return penalty

    def fit(self, source: SourceStatistics) -> None:
        """Take the Fisher information, or compute it from source batches.

        Raises:
            ValueError: When it is needed and ``source`` has neither, or has it for other
                parameters.
        """
        if self.config.fisher_weight == 0:
            return
        if source.fisher is not None:
            missing = [n for n in self.parameters_adapted if n not in source.fisher]
            if missing:
                raise ValueError(
                    f"`source.fisher` must cover every trained parameter, but {shown(missing[0])} "
                    "is "
                    f"missing ({len(missing)} in all): make it for this model with "
                    "tta.collect_source(model, loader, for_methods=['eata'])."
                )
            parts = [source.fisher[n].flatten() for n in self.parameters_adapted]
            self.fisher.copy_(torch.cat(parts))
            self.source_used = "fisher as given"
        elif source.batches is not None:
            self.fisher.copy_(self._measure_fisher(source))
        else:
            raise ValueError(
                f"`source` must give {self.name} its Fisher information, got "
                f"{source.contents or 'nothing'}: pass source batches, what "
                "tta.collect_source(model, loader, for_methods=['eata']) returns, or "
                "fisher_weight=0 (which is 'eta')."
            )

    def source_artefacts(self) -> dict[str, Any]:
        """The Fisher information by parameter name."""
        return {"fisher": self._by_name(self.fisher)} if self.config.fisher_weight > 0 else {}

    def constants(self) -> dict[str, Tensor]:
        """``fisher.<parameter>`` and ``anchor.<parameter>``."""
        return {
            f"{kind}.{name}": value
            for kind in ("fisher", "anchor")
            for name, value in self._by_name(getattr(self, kind)).items()
        }

    def load_constants(self, values: dict[str, Tensor]) -> None:
        """Set what :meth:`constants` returned."""
        mine = self.constants()  # views, so that copying into them sets the buffers
        for name, value in values.items():
            mine[name].copy_(value)

    def survives_reset(self) -> tuple[str, ...]:
        """Return q under ``official=True``, whose reset leaves it in place."""
        return ("ema_probs",) if self.config.official else ()

    def _measure_fisher(self, source: SourceStatistics) -> Tensor:
        """Mean over batches of the squared gradient of the batch-mean pseudo-label loss."""
        total, batches, seen = torch.zeros_like(self.fisher), 0, 0
        parameters = list(self.parameters_adapted.values())
        device = self.fisher.device
        with torch.enable_grad():
            for images, _ in source.iter_batches(self.config.fisher_samples):
                logits = self.network(images.to(device)).logits.float()
                loss = F.cross_entropy(logits, logits.detach().argmax(1))
                gradients = torch.autograd.grad(
                    loss, parameters, allow_unused=True, materialize_grads=True
                )
                total += torch.cat([g.flatten() for g in gradients]).square()
                batches, seen = batches + 1, seen + len(images)
        if batches == 0:
            raise ValueError(
                "`source` must hold at least one batch, got none: pass an iterable of "
                "(images, labels) that was not read to its end."
            )
        self.source_used = f"fisher from {seen} images in {batches} batches"
        return total / batches

    def _flat(self, detach: bool = True) -> Tensor:
        flat = torch.cat([p.flatten() for p in self.parameters_adapted.values()])
        return flat.detach().clone() if detach else flat

    def _by_name(self, flat: Tensor) -> dict[str, Tensor]:
        parameters = self.parameters_adapted
        parts = flat.split([p.numel() for p in parameters.values()])
        return {n: v.view_as(p) for (n, p), v in zip(parameters.items(), parts, strict=True)}


@register("eta")
class Eta(Eata):
    """EATA without the Fisher penalty: no source data needed."""

    Config = EtaConfig
    PRESETS: ClassVar[dict[str, dict[str, Any]]] = _presets(0.0, 0.0)
