"""NHL: a Hebbian rule moves the first convolution, entropy the norm layers, before the answer.

Tang, Zhang, Xu, Chen, Cheng, Leng, Guo, He: Neuro-Modulated Hebbian Learning for Fully Test-Time
Adaptation, CVPR 2023, arXiv 2303.00914.

Early layers get little of use from an unsupervised loss at the top. So the filters of the first
convolution move by a local rule instead, soft competition for the patches of the batch; a "neuro-
modulator" behind them is trained by the entropy of the predictions. Both come before the answer.

    w_k <- w_k + eta mean_n y_nk (a_n - w_k.a_n w_k),   y_n = softmax_k(w_k.a_n / tau),
    L = mean_b H(softmax(z_b)),   theta <- theta - lr dL/dtheta

Inspired by the paper, and unconfirmed: no official code exists, and its formulas were out of reach.
Certain is the order. The rule is that of SoftHebb, which shares an author; its constants, the step
and what the modulator is are our reading. A gain and bias between the convolution and batch
statistics would have no gradient, so the modulator here is the affine part of norm layers: of all
(``modulator="norm"``, TENT's parameters), or of the one behind the first convolution
("first_norm"). When this reading was tried, its Hebbian part gained nothing over TENT.

A batch of one has its own statistics too, by the norm rule that comes with it: the source's are not
those of filters that have moved. The returned logits are those of a pass after both updates. The
bias of the convolution plays no part in the rule. Filters of another length than 1 are rescaled by
it, which batch statistics undo and the source's do not, and filters of zeros come alive.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tta.core.backbone import Backbone
from tta.core.checks import LARGE, number, one_of
from tta.core.classifier import first_layer
from tta.core.component import Context
from tta.core.config import CIFAR_ADAM, UpdateConfig
from tta.core.first_input import first_input
from tta.core.norm_layers import batch_norm_layers, frozen_statistics
from tta.core.parameters import is_norm
from tta.core.prediction import Prediction, Report
from tta.core.registry import get_config, register
from tta.core.update import Update
from tta.parts.hebbian import delta
from tta.parts.losses import entropy

__all__ = ["Nhl", "NhlConfig"]

NORMALISE = ("none", "max")
MODULATORS = ("norm", "first_norm")


@dataclass(frozen=True, kw_only=True)
class NhlConfig(UpdateConfig):
    """Fields of ``nhl``."""

    tau: float = 1.0  # temperature of the competition between filters
    eta: float = 1e-2  # rate of the Hebbian step
    normalise: str = "none"  # divide that step by its largest number: "none", "max"
    modulator: str = "norm"  # what entropy trains: "norm" (all that params selects), "first_norm"

    def __post_init__(self) -> None:
        super().__post_init__()
        number("tau", self.tau, 0, LARGE, above=True)
        number("eta", self.eta, 0, LARGE)
        one_of("normalise", self.normalise, NORMALISE)
        one_of("modulator", self.modulator, MODULATORS)


@register("nhl")
class Nhl(Update):
    """Hebbian steps of the first convolution, entropy steps of the norm layers (unconfirmed)."""

    Config = NhlConfig
    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "imagenet": {"lr": 2.5e-4, "lr_scaling": "small_batch"},
        "cifar10": CIFAR_ADAM,
        "cifar100": CIFAR_ADAM,
    }
    cost: ClassVar[float] = 4.0

    def __init__(self, config: NhlConfig, network: Backbone, context: Context) -> None:
        self._first = next(
            name for name in context.parameters if network.masters.own[name] is network.entry.weight
        )
        super().__init__(config, network, context)
        self.left_out = [self._filters]
        if not network.wrappers and batch_norm_layers(network.model):
            network.session.warn_once(
                "running",
                "the Hebbian rule rescales the filters of the first convolution, which running "
                "statistics do not undo: use norm='bn' with nhl.",
            )

    @classmethod
    def suits(cls, model: nn.Module) -> bool:
        """Whether the model begins with a plain convolution."""
        return _is_plain(model, first_layer(model))

    @classmethod
    def brings(cls, config: Any) -> dict[str, Any]:
        """Batch statistics, of a single image too: the source's do not fit filters that move."""
        return {"norm": get_config("bn", single_image="batch")}

    @classmethod
    def chooses(
        cls, config: Any, model: nn.Module, found: Mapping[str, nn.Parameter]
    ) -> dict[str, nn.Parameter]:
        """Filters of the first convolution, and the modulator.

        Raises:
            ValueError: When the model does not begin with a plain convolution.
        """
        entry = first_layer(model)
        _check_entry(model, entry)
        if config.modulator == "first_norm":
            found = _behind(model, entry, found)
        names = {id(p): name for name, p in model.named_parameters()}
        return {**found, names[id(entry.weight)]: entry.weight}

    @property
    def _filters(self) -> nn.Parameter:
        return self.context.parameters[self._first]

    def optimized(self) -> dict[str, nn.Parameter]:
        """The modulator alone; the Hebbian rule moves the filters."""
        return {name: p for name, p in super().optimized().items() if name != self._first}

    def learn(self, x: Tensor) -> Prediction:
        """Take ``steps`` steps of both kinds, and predict afterwards."""
        for _ in range(self.config.steps):
            self.adapt(x)
        with torch.no_grad(), frozen_statistics(self.network.wrappers):
            return self.network(x)

    def adapt(self, x: Tensor) -> Prediction:
        """One Hebbian step, then one on the mean entropy of the batch."""
        usage = self._hebbian_step(x)
        prediction = self.network(x)
        loss = entropy(prediction.logits).mean()
        stepped = self.step(loss)
        self.report = Report(selected=len(x), loss=loss.detach(), stepped=stepped, usage=usage)
        return prediction

    @torch.no_grad()
    def _hebbian_step(self, x: Tensor) -> Tensor:
        """Move the filters; return how much of the positions each has won (O,)."""
        entry, filters = self.network.entry, self._filters
        given = first_input(self.network, x).to(filters.dtype)
        mode = "constant" if entry.padding_mode == "zeros" else entry.padding_mode
        given = F.pad(given, entry._reversed_padding_repeated_twice, mode)
        step, usage = delta(given, filters, stride=entry.stride, tau=self.config.tau)
        if self.config.normalise == "max":
            step = step / step.abs().max().clamp_min(torch.finfo(step.dtype).tiny)
        if bool(step.isfinite().all()):
            filters.add_(step, alpha=self.config.eta)
        return usage


def _is_plain(model: nn.Module, entry: Any) -> bool:
    plain = isinstance(entry, nn.Conv2d) and type(entry).forward is nn.Conv2d.forward
    plain = plain and entry.groups == 1 and set(entry.dilation) == {1}
    return plain and any(entry.weight is p for p in model.parameters())


def _check_entry(model: nn.Module, entry: Any) -> None:
    if not _is_plain(model, entry):
        got = "none" if entry is None else f"a {type(entry).__name__}"
        got += " of its own kind" if isinstance(entry, nn.Conv2d) else ""
        raise ValueError(
            "`model` must begin with a plain nn.Conv2d (no groups, no dilation, a weight that is a "
            f"parameter) for nhl, which moves its filters, got {got}: use another method."
        )


def _behind(
    model: nn.Module, entry: Any, found: Mapping[str, nn.Parameter]
) -> dict[str, nn.Parameter]:
    """Of the parameters found, those of the first norm layer that comes after the convolution."""
    modules = list(model.named_modules())
    start = next(i for i, (_, module) in enumerate(modules) if module is entry)
    for _, module in (*modules[start:], *modules[:start]):
        own = {id(p) for p in module.parameters(recurse=False)} if is_norm(module) else set()
        mine = {name: p for name, p in found.items() if id(p) in own}
        if mine:
            return mine
    raise ValueError(
        "`modulator` must be 'norm' for a model whose norm layers params= leaves out, got "
        "'first_norm': choose other params=."
    )
