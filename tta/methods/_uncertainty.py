"""What TENT, EATA, ETA, SAR and DeYO may minimise: entropy, or the entropy of an opinion (COME).

Zhang et al.: COME: Test-time Adaption by Conservatively Minimizing Entropy, ICLR 2025,
arXiv 2410.10894. The rest of each method stays as it is; the formula is that of
:func:`tta.parts.losses.opinion_entropy`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from tta.core.checks import LARGEST, one_of, whole_number
from tta.core.config import UpdateConfig
from tta.parts.losses import entropy, opinion_entropy

__all__ = ["COME", "UncertaintyConfig", "uncertainty"]

COME: dict[str, Any] = {"loss": "opinion", "opinion_classes": 1000}  # the authors' on ImageNet


@dataclass(frozen=True, kw_only=True)
class UncertaintyConfig(UpdateConfig):
    """Fields of updates whose entropy may be that of an opinion."""

    loss: str = "entropy"  # "entropy", or "opinion" for COME's in filters, weights and loss
    opinion_classes: int | None = None  # K of "opinion"; None = the model's classes

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("loss", self.loss, ("entropy", "opinion"))
        if self.opinion_classes is not None:
            whole_number("opinion_classes", self.opinion_classes, 1, LARGEST)


def uncertainty(config: UncertaintyConfig, classes: int) -> Callable[[Tensor], Tensor]:
    """The function from logits (B, C) to nats (B,) that a config asks for.

    Args:
        config: Says which.
        classes: Of the model.
    """
    if config.loss == "entropy":
        return entropy
    return partial(opinion_entropy, classes=config.opinion_classes or classes)
