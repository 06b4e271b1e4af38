"""MEMO: each image by itself, made certain and consistent over its views, then forgotten.

Zhang, Levine, Finn: MEMO: Test Time Robustness via Adaptation and Augmentation, NeurIPS 2022,
arXiv 2110.09506.

One image at a time is augmented into many views, all weights take a step that lowers the entropy of
the prediction averaged over these, the image itself is predicted, and the weights are put back.
Nothing is carried from image to image, so the order of the stream and the size of its batches do
not matter; the price is a forward and a backward pass for every view.

    p = 1/V sum_v softmax(f(A_v(x))),   theta' = theta - lr d/dtheta H(p),   y = f_theta'(x)

With ``steps`` above 1 each step has views of its own. Probabilities are averaged, not logits. Views
are AugMix's: a random crop and a flip, then a mixture of the result with three chains of one to
three operations each on 8-bit pixels (:mod:`tta.parts.augmix`). As in the authors' scripts, images
of at most 64 pixels are padded by an eighth of their side (4 pixels at 32) and cropped, larger ones
are cropped at random and resized; what share such a crop keeps is torchvision's default here, which
the description at hand does not name.

With ``prior_strength`` N every BatchNorm layer uses N/(N + 1) of the source's statistics and
1/(N + 1) of those of the views, or of the single image when it is predicted, with the unbiased
variance and without a gradient through it: that is ``alpha_bn``, which the update then brings, and
no other norm rule may be named. None keeps to the running statistics, as the CIFAR script does; the
ImageNet script has N = 16, and so has the preset ``imagenet``.

Differences: the authors' script loads the weights anew for each image but keeps the optimiser,
whose moments and step count therefore run on over images; ``official=True`` does so, while here
each image starts with a fresh one. Without momentum SGD has none, and there is no difference. A
frozen adapter predicts without views. The preset ``imagenet`` is the authors' for a ResNet-50,
``imagenet_vit`` that for their RVT*-small and ResNeXt-101. Rates do not depend on the batch size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tta.core.backbone import Backbone
from tta.core.checks import LARGE, number, shown, whole_number
from tta.core.component import Context
from tta.core.config import ComponentConfig, UpdateConfig
from tta.core.foreach import foreach
from tta.core.logit_checks import RowsOverflowError, overflow
from tta.core.outputs import joined
from tta.core.prediction import Prediction, Report
from tta.core.random import fork
from tta.core.registry import component, get_config, register
from tta.core.update import Update
from tta.parts.augment import Augmenter
from tta.parts.augmix import random_view
from tta.parts.losses import marginal_entropy

__all__ = ["Memo", "MemoConfig"]

PRIOR = "alpha_bn"


@dataclass(frozen=True, kw_only=True)
class MemoConfig(UpdateConfig):
    """Fields of ``memo``."""

    params: str = "all"  # what is trained
    lr: float = 0.005  # learning rate
    momentum: float = 0.0  # SGD only; dampening is 0
    steps: int = 1  # steps on each image, each with views of its own
    views: int = 32  # V, views of an image in each step
    prior_strength: float | None = None  # N of the source's statistics; None = these alone

    def __post_init__(self) -> None:
        super().__post_init__()
        whole_number("views", self.views, 1, 10_000)
        if self.prior_strength is not None:
            number("prior_strength", self.prior_strength, 0, LARGE)

    @property
    def norm(self) -> ComponentConfig | None:
        """The norm rule that ``prior_strength`` means; None for running statistics."""
        strength = self.prior_strength
        if strength is None:
            return None
        return get_config(PRIOR, source_weight=strength / (strength + 1), official=True)


_CIFAR = {"lr": 0.005, "views": 32}
_ADAMW = {"optimizer": "adamw", "lr": 1e-5, "weight_decay": 0.01}


@register("memo")
class Memo(Update):
    """Marginal entropy over the views of one image, weights put back after it."""

    Config = MemoConfig
    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "imagenet": {"lr": 2.5e-4, "views": 64, "prior_strength": 16.0},
        "imagenet_vit": _ADAMW | {"views": 64},
        "cifar10": _CIFAR,
        "cifar100": _CIFAR,
    }
    default_norm: ClassVar[str | None] = None
    injects: ClassVar[tuple[str, ...]] = ("augment",)
    cost: ClassVar[float] = 100.0  # a forward and a backward pass for each of 32 views
    episodic: ClassVar[bool] = True

    def __init__(self, config: MemoConfig, network: Backbone, context: Context) -> None:
        super().__init__(config, network, context)
        self.augmenter = Augmenter(network.model, context)

    @classmethod
    def brings(cls, config: MemoConfig) -> dict[str, str | ComponentConfig]:
        """The norm rule of ``prior_strength``."""
        return {} if config.norm is None else {"norm": config.norm}

    @classmethod
    def check_slots(
        cls, config: MemoConfig, slots: Mapping[str, ComponentConfig | None], model: nn.Module
    ) -> None:
        """Refuse another norm rule than that of ``prior_strength``."""
        own, given = config.norm, slots["norm"]
        if own is not None and given != own and component(own.name).suits(model):
            raise ValueError(
                "`norm` must be left out with prior_strength="
                f"{config.prior_strength:g}, which is a rule of its own, got "
                f"{shown('source' if given is None else given.name)}: pass prior_strength=None, or "
                "leave norm out."
            )

    def learn(self, x: Tensor) -> Prediction:
        """Adapt to each image of (B, C, H, W) in turn; the weights are then what they were."""
        self.augmenter.check(x)
        self.report = Report(selected=len(x), loss=float("nan"), stepped=False)
        weights = [p.detach() for p in self.parameters_adapted.values()]
        before = [p.clone() for p in weights]

        def forget() -> None:
            foreach._foreach_copy_(weights, before)
            if not self.config.official:
                for value in self.optimizer_slots().values():
                    value.zero_()

        return self._one_by_one(self.adapt, x, forget)

    def adapt(self, x: Tensor) -> Prediction:
        """Take the steps on one image (1, C, H, W), and predict it."""
        draws = fork(self.context.generator, x.device)
        for _ in range(self.config.steps):
            views = torch.cat([*self.augmenter.views(x, self.config.views, draws, random_view)])
            try:
                logits = self.network(views).logits
            except RowsOverflowError:  # nothing is learned from such views
                continue
            loss = marginal_entropy(logits.float().log_softmax(1))
            stepped = self.step(loss)
            self.report |= {"loss": loss.detach(), "stepped": stepped or self.report["stepped"]}
        with torch.no_grad():
            return self.network(x)

    def predict(self, x: Tensor) -> Prediction:
        """Predict without views; one by one where statistics of a batch would mix the images."""
        return self._one_by_one(self.network, x) if self.network.wrappers else self.network(x)

    def _one_by_one(
        self,
        predict: Callable[[Tensor], Prediction],
        x: Tensor,
        after: Callable[[], None] = lambda: None,
    ) -> Prediction:
        """Predict each image as a batch of its own, and leave out those whose features overflow."""
        found: list[Prediction] = []
        results: list[Any] = []
        bad = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        for i in range(len(x)):
            try:
                prediction = predict(x[i : i + 1])
                bad[i : i + 1] = overflow(prediction.logits.detach(), prediction.features)
                found.append(prediction)
                results.append(self.network.result)
            except RowsOverflowError:
                bad[i] = True
            after()
        if bool(bad.any()):
            raise RowsOverflowError(bad)
        self.network.result = joined(results)
        features = [p.features for p in found if p.features is not None]
        logits = torch.cat([p.logits for p in found])
        return Prediction(logits, torch.cat(features) if features else None)
