"""T3A: classify by the mean directions of the most confident features of each class.

Iwasawa, Matsuo: Test-Time Classifier Adjustment Module for Model-Agnostic Domain Generalization,
NeurIPS 2021 (it has no arXiv number).

Nothing is trained. A support set starts as the rows of the linear layer and takes in the features
of every test image under its predicted class; of each class the K entries of lowest entropy stay.
Images are then compared with the mean direction of each class.

    S <- S + {(h_b, argmax z_b, H(z_b))},   then of each class the K of lowest H
    c_k = unit(sum_{(h, k, .) in S} h / |h|),   score_bk = h_b . c_k

The batch is in S before it is classified. A start row, W_c, has the class and the entropy of its
own logits, W W_c + bias, and may be dropped like any other; what was dropped does not come back. A
class without entries has the score 0. The scores are cosines times the length of h: they rank the
classes and are not calibrated. The bias is not used.

``filter_size=None`` keeps everything, and the state then grows with the stream. The authors' code
has K = -1 for this and drops, by a slip, the entry of highest entropy of every class at every
batch; ``filter_size=None`` with ``official=True`` does so too. Of entries of equal entropy the
older one stays. The authors try K in {1, 5, 20, 50, 100, -1}; 20 is what FOA's comparison on
ImageNet has (arXiv 2404.01650).

Features of a broken camera are long and their entropy is next to none, so that they would stay in S
for good. An image whose squared length is above 30 times the usual one is left out (3.1 at most on
the traces), unless ``official=True``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from tta.core.checks import LARGEST, boolean, whole_number
from tta.core.component import Context
from tta.core.config import ComponentConfig
from tta.core.output_rule import Output
from tta.core.prediction import Prediction, Report
from tta.core.registry import register
from tta.core.tracing import is_tracing
from tta.parts.far_features import FarFeatures
from tta.parts.losses import entropy

__all__ = ["T3a", "T3aConfig"]


@dataclass(frozen=True, kw_only=True)
class T3aConfig(ComponentConfig):
    """Fields of ``t3a``."""

    filter_size: int | None = 20  # K, entries kept for each class; None = all
    official: bool = False  # far images too; filter_size=None drops the last of each class

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.filter_size is not None:
            whole_number("filter_size", self.filter_size, 1, LARGEST)
        boolean("official", self.official)


@register("t3a")
class T3a(Output):
    """Similarity to the mean direction of the most confident features of each class."""

    Config = T3aConfig
    needs_features: ClassVar[bool] = True
    needs_linear_head: ClassVar[bool] = True
    uses_labels: ClassVar[bool] = False
    counts_images: ClassVar[bool] = True

    supports: Tensor  # (S, D), S = C K; all entries without K
    support_labels: Tensor  # (S,) int64, -1 where there is no entry
    support_entropy: Tensor  # (S,) in nats

    def __init__(self, config: T3aConfig, context: Context) -> None:
        super().__init__(config, context)
        layer: Any = context.classifier
        rows = layer.weight.detach().flatten(1).float()
        bias = None if layer.bias is None else layer.bias.detach().float()
        logits = F.linear(rows, rows, bias)
        entries = (rows.clone(), logits.argmax(1), entropy(logits))
        names = ("supports", "support_labels", "support_entropy")
        for name, value in zip(names, self._padded(*entries), strict=True):
            self.register_buffer(name, value)
        self.far = None if config.official else FarFeatures()

    def correct(self, prediction: Prediction) -> Tensor:
        """Scores (B, C), after the batch was taken into the support set."""
        assert prediction.features is not None
        with torch.autocast(prediction.features.device.type, enabled=False):
            features = prediction.features.float()
            if self.learning:
                self._take_in(features.detach(), prediction.logits.detach())
            self.report = Report(supports=(self.support_labels >= 0).sum())
            return features @ self.centroids().t()

    def centroids(self) -> Tensor:
        """Mean directions (C, D); 0 for a class without entries."""
        if is_tracing():  # free places count as a class of their own
            return self._directions(self.supports, self._classes())[:-1]
        filled = self.support_labels >= 0
        return self._directions(self.supports[filled], self.support_labels[filled])

    def integer_ranges(self) -> dict[str, tuple[int, int]]:
        """Classes, and -1."""
        return {"support_labels": (-1, self.context.num_classes - 1)}

    def resizable_buffers(self) -> tuple[str, ...]:
        """Return the support set where it keeps everything."""
        names = ("supports", "support_labels", "support_entropy")
        return names if self.config.filter_size is None else ()

    def _directions(self, rows: Tensor, labels: Tensor) -> Tensor:
        classes = self.context.num_classes + is_tracing()
        total = rows.new_zeros(classes, rows.shape[1])
        return F.normalize(total.index_add_(0, labels, F.normalize(rows, dim=1)), dim=1)

    def _classes(self) -> Tensor:
        """Labels (S,), with C for a free place, which sorts behind all others."""
        free = self.support_labels < 0
        return torch.where(free, self.context.num_classes, self.support_labels)

    @torch.no_grad()
    def _take_in(self, features: Tensor, logits: Tensor) -> None:
        predicted = logits.argmax(1)
        ordinary = None
        if self.far is not None:
            ordinary = self.far.ordinary(features, torch.zeros_like(features[0]))
        if is_tracing():
            if ordinary is not None:
                predicted = torch.where(ordinary, predicted, self.context.num_classes)
            self._take_in_whole(features, logits, predicted)
            return
        if ordinary is not None and not bool(ordinary.all()):
            features, logits, predicted = (v[ordinary] for v in (features, logits, predicted))
        filled = self.support_labels >= 0
        rows = torch.cat([self.supports[filled], features])
        labels = torch.cat([self.support_labels[filled], predicted])
        entropies = torch.cat([self.support_entropy[filled], entropy(logits)])
        order = entropies.argsort(stable=True)
        order = order[labels[order].argsort(stable=True)]  # by class, then by entropy
        count = torch.bincount(labels, minlength=self.context.num_classes)
        first = count.cumsum(0) - count
        rank = torch.arange(len(order), device=order.device) - first[labels[order]]
        if self.config.filter_size is not None:
            order = order[rank < self.config.filter_size]
        elif self.config.official:
            order = order[rank < count[labels[order]] - 1]
        found = self._padded(rows[order], labels[order], entropies[order])
        self.supports, self.support_labels, self.support_entropy = found

    def _take_in_whole(self, features: Tensor, logits: Tensor, predicted: Tensor) -> None:
        """As :meth:`_take_in`, with every length known: places move, and none goes away."""
        classes, limit = self.context.num_classes, self.config.filter_size
        assert limit is not None  # the state of others grows, and has no graph
        rows = torch.cat([self.supports, features])
        labels = torch.cat([self._classes(), predicted])
        entropies = torch.cat([self.support_entropy, entropy(logits)])
        order = entropies.argsort(stable=True)
        order = order[labels[order].argsort(stable=True)]
        ones = torch.ones_like(labels)
        count = torch.zeros(classes + 1, dtype=torch.int64, device=labels.device)
        count = count.index_add(0, labels, ones)
        rank = ones.cumsum(0) - 1 - (count.cumsum(0) - count)[labels[order]]
        free = (rank >= limit) | (labels[order] == classes)
        last = free.to(torch.int64).argsort(stable=True)[: len(self.supports)]
        order, free = order[last], free[last]
        self.supports = torch.where(free[:, None], 0.0, rows[order])
        self.support_labels = torch.where(free, -1, labels[order])
        self.support_entropy = torch.where(free, 0.0, entropies[order])

    def _padded(self, rows: Tensor, labels: Tensor, entropies: Tensor) -> tuple[Tensor, ...]:
        """The entries, with free places up to S where S is fixed."""
        size = self.config.filter_size
        free = 0 if size is None else self.context.num_classes * size - len(rows)
        return (
            F.pad(rows, (0, 0, 0, free)),
            F.pad(labels, (0, free), value=-1),
            F.pad(entropies, (0, free)),
        )
