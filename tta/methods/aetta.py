"""AETTA: accuracy without labels, from how far predictions hold under dropout; resets by it.

Lee, Chottananurak, Gong, Lee: AETTA: Label-Free Accuracy Estimation for Test-Time Adaptation,
CVPR 2024, arXiv 2404.01351.

Where predictions of a model change under dropout they are often wrong, and the share of changes
estimates the error. A collapsed model is certain and wrong; then the mean of all predictions has a
low entropy, by which the estimate is scaled.

    err = 1 - mean_{b,i} [argmax q_bi = argmax z_b]      q_bi: softmax of pass i of N with dropout
    E <- k E + (1 - k) clip(err / (e / ln C)^3, 0, 1 - 1/C),   e = entropy of the mean of q

The estimated accuracy is 1 - E, and E starts at the first err. The model is reset when an estimate
is below 20 %, or when the mean of the last five is more than two points below that of the five
before; E goes on.

z is what the model predicts before it learns from the batch, its statistics at rest. Dropout comes
after the modules named by ``places``, as in the authors' code after each stage of a ResNet: then it
costs N + 1 forward passes. Without ``places`` it is on the features alone, for which the linear
head is run N times on one forward pass; such estimates are weaker. ``official=True`` rounds ln C to
four decimals, as the code does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from tta.core.backbone import Backbone
from tta.core.checks import LARGEST, fraction, nearest, number, shown, whole_number
from tta.core.component import Context
from tta.core.config import ComponentConfig
from tta.core.guard import LEARN, Batch, Guard, Verdict
from tta.core.random import CountedDraws
from tta.core.registry import register
from tta.parts.dropout import dropped, dropping, keep_mask
from tta.parts.estimates import dropout_error

__all__ = ["Aetta", "AettaConfig"]

LOWEST = 0.2  # estimated accuracy below which the model is reset
SPAN = 5  # estimates in each of the two means that are compared
FALL = 0.02  # of the second mean below the first, at which the model is reset
FEATURES = "features"  # name of the place where dropout is on the features


@dataclass(frozen=True, kw_only=True)
class AettaConfig(ComponentConfig):
    """Fields of ``aetta``."""

    passes: int = 10  # N, predictions under dropout
    dropout: float = 0.4  # share of the elements that are dropped
    places: tuple[str, ...] | None = None  # modules after which it is; None: on the features
    momentum: float = 0.6  # k, share of the old estimate
    official: bool = False  # reproduce the official code's rounding of ln C

    def __post_init__(self) -> None:
        super().__post_init__()
        whole_number("passes", self.passes, 1, LARGEST)
        number("dropout", self.dropout, 0, 1, below=True, advice="use a value below 1")
        fraction("momentum", self.momentum)
        names = () if self.places is None else self.places
        if not isinstance(names, tuple) or not all(isinstance(name, str) for name in names):
            raise TypeError(
                f"`places` must be names of modules, got {shown(self.places)}: pass such as "
                "('layer1', 'layer2')."
            )


@register("aetta")
class Aetta(Guard):
    """Resets the model when the accuracy that dropout tells falls."""

    Config = AettaConfig
    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "cifar10": {"dropout": 0.4},
        "cifar100": {"dropout": 0.3},
        "imagenet_c": {"dropout": 0.2},
        "imagenet_r": {"dropout": 0.3},
    }
    takes_draws = True
    wants_features = True
    cost = 11.0

    error: Tensor  # 0-dimensional, E; NaN before the first batch
    estimates: Tensor  # (10,), of accuracy, the last one last; NaN where there is none

    def __init__(self, config: AettaConfig, network: Backbone, context: Context) -> None:
        super().__init__(config, network, context)
        self.register_buffer("error", torch.full((), float("nan")))
        self.register_buffer("estimates", torch.full((2 * SPAN,), float("nan")))
        if config.places is None:
            self._check_head()
        modules = dict(network.model.named_modules())
        for place in config.places or ():
            if place not in modules:
                raise ValueError(
                    f"`places` must name modules of the model, got {shown(place)}: "
                    + nearest(place, [name for name in modules if name], limit=10)
                )

    def undefined_as_nan(self) -> tuple[str, ...]:
        """There are no estimates before the first batch."""
        return (*super().undefined_as_nan(), "error", "estimates")

    def admit(self, batch: Batch) -> Verdict:
        """Estimate the accuracy of the model as it is before it learns."""
        agreement, spread, scaled = self._estimate(batch)
        old = 1 - agreement if bool(self.error.isnan()) else self.error
        share = self.config.momentum
        self.error.copy_(share * old + (1 - share) * scaled)
        batch.figures |= {
            "estimated_accuracy": 1 - self.error,
            "estimator": self.name,
            "dropout_agreement": agreement,
            "dropout_entropy": spread,
        }
        return LEARN

    def judge(self, batch: Batch) -> Verdict:
        """Reset if the estimates are low, or fall."""
        if not batch.learning:  # the last estimate, since none is made while frozen
            batch.figures |= {"estimated_accuracy": 1 - self.error, "estimator": self.name}
            return LEARN
        self.estimates.copy_(torch.cat([self.estimates[1:], 1 - self.error[None]]))
        last = float(self.estimates[-1])
        before, now = (float(part.mean()) for part in self.estimates.split(SPAN))
        reason = ""
        if last < LOWEST:
            reason = f"the estimated accuracy is {last:.3f}"
        elif now + FALL < before:  # not where one of the two is NaN
            reason = f"the estimated accuracy fell from {before:.3f} to {now:.3f}"
        if not reason:
            return LEARN
        self.estimates.fill_(float("nan"))
        return Verdict(action="reset", reason=reason)

    @torch.no_grad()
    def _estimate(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Agreement, entropy of the mean, and the error that follows from both."""
        draws = batch.draws(self.context)
        plain = batch.predict()
        logits = plain.logits.detach()
        if self.config.places is None:
            assert plain.features is not None
            passes = [self._from_features(plain.features, i, draws) for i in self._numbers()]
        else:
            passes = [self._dropping(batch, i, draws) for i in self._numbers()]
        return dropout_error(logits, torch.stack(passes), rounded=self.config.official)

    def _numbers(self) -> range:
        return range(self.config.passes)

    def _dropping(self, batch: Batch, number: int, draws: CountedDraws) -> Tensor:
        def mask(place: str, output: Tensor) -> Tensor:
            return self._mask(number, place, output, draws)

        places = self.config.places or ()
        with dropping(self.network.model, places, self.config.dropout, mask):
            return batch.predict().logits

    def _from_features(self, features: Tensor, number: int, draws: CountedDraws) -> Tensor:
        mask = self._mask(number, FEATURES, features, draws)
        head = self.network.classifier
        # A model may run in half precision by itself, and its head is called outside of it here.
        return head(dropped(features, mask, self.config.dropout).to(head.weight.dtype))

    def _mask(self, number: int, place: str, x: Tensor, draws: CountedDraws) -> Tensor:
        name = f"dropout_masks/{number}/{place}"
        given = self.context.draws.ask(name, x.shape, torch.bool, x.device)
        return keep_mask(x.shape, self.config.dropout, draws) if given is None else given

    def _check_head(self) -> None:
        module = self.network.head.module
        if not isinstance(module, torch.nn.Linear):
            found = "none" if module is None else type(module).__name__
            raise ValueError(
                f"`places` must name the modules after which {self.name} drops elements, since "
                f"this model has no linear layer for its features, got {found}: pass such as "
                "('layer1', 'layer2')."
            )
