"""AdaNPC: a nearest-neighbour vote over source features instead of the classifier.

Zhang et al.: AdaNPC: Exploring Non-Parametric Classifier for Test-Time Adaptation, ICML 2023,
arXiv 2304.12566.

The classifier is replaced by a vote of the most similar labelled source features, and confident
test images join the memory with their predicted label, so that it follows the shift without a
gradient. What is remembered can be wrong and then confirms itself, and features of a frozen
network under strong corruption can be too poor to be neighbours. ``adanpc_bn`` also moves a scale
and shift of the features to make the vote confident.

    s = cos(z, m),   p_c = sum over the k nearest of softmax(s / T) [label = c]
    score = min(p + 1e-5, 1);   z joins the memory if confidence >= ``confidence_threshold``
    adanpc_bn: z' = w z / sqrt(1 + 1e-5) + b,   (w, b) <- Adam on mean H(softmax(score)), each round

What is returned is log(score) (B, C), which is not renormalised. The whole batch is predicted
before any of it is remembered. The memory starts with the source features, as the classifier sees
them under running statistics; with ``ball_radius`` at most 1, all rows inside the ball vote when
every image of the batch has a neighbour there. A memory with fewer rows than ``neighbours`` votes
with all of them, where the official code fails.

Differences: in the official code the memory grows without bound (here the part for test images
holds ``capacity`` rows, of which the oldest is replaced), its first row is a left-over random
vector of label 0 (here absent), and the confidence is the largest softmax *of the score*, a second
softmax that is at most e / (e + C - 1), 0.23 for 10 classes (here the largest score itself).
``official=True`` does all three; the state's ``memory`` and ``memory_labels`` then have one row for
each image remembered. The threshold must then be one that a second softmax can reach, such as the
constructor's 0.1 (preset ``domainbed``): under the other presets' 0.9, ``official=True`` never
remembers an image. Paper against code: the paper describes recall, vote and growth; similarity
weights, second softmax, random row and the re-insertion of the batch in every round of
``adanpc_bn`` are in the code alone. The official ``reset`` of ``adanpc_bn`` cuts the memory only;
here it always restores the affine part and its optimiser too. There is no official CIFAR or
ImageNet configuration: the field defaults are those of the constructor (domain generalisation;
``domainbed`` adds ``official=True``), the other presets are our own choice.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim.adam import adam

from tta.core.backbone import Backbone
from tta.core.checks import LARGE, LARGEST, boolean, number, whole_number
from tta.core.component import Context
from tta.core.config import ComponentConfig
from tta.core.output_rule import Output
from tta.core.prediction import Prediction, Report
from tta.core.registry import register
from tta.core.source import SourceStatistics, missing_artefact
from tta.core.tracing import is_tracing
from tta.parts.losses import entropy
from tta.parts.neighbours import vote

__all__ = ["Adanpc", "AdanpcBn", "AdanpcBnConfig", "AdanpcConfig"]

ALIGNMENT = 64  # bytes, as torch allocates
FLOOR = 1e-5  # added to every vote, so that its logarithm is finite
BN_EPS = 1e-5
BETAS, ADAM_EPS = (0.9, 0.999), 1e-8


@dataclass(frozen=True, kw_only=True)
class AdanpcConfig(ComponentConfig):
    """Fields of ``adanpc``."""

    neighbours: int = 100  # k
    temperature: float = 0.1  # T
    confidence_threshold: float = 0.1  # beta; on the score, official: on its softmax
    ball_radius: float = 1.1  # cosine from which on all rows vote; above 1 = off
    capacity: int = 1000  # rows of the memory for test images; official: no limit
    source_samples: int = 50_000  # largest number of images taken from source batches
    official: bool = False  # random first row, memory without limit, second softmax

    def __post_init__(self) -> None:
        super().__post_init__()
        whole_number("neighbours", self.neighbours, 1, LARGEST)
        number("temperature", self.temperature, 0, LARGE, above=True)
        number("confidence_threshold", self.confidence_threshold, 0, LARGE)
        number("ball_radius", self.ball_radius, -1, LARGE)
        whole_number("capacity", self.capacity, 1, LARGEST)
        whole_number("source_samples", self.source_samples, 1, LARGEST)
        boolean("official", self.official)


@dataclass(frozen=True, kw_only=True)
class AdanpcBnConfig(AdanpcConfig):
    """Fields of ``adanpc_bn``."""

    neighbours: int = 5  # k; the released sweep has 1 and 5
    rounds: int = 1  # gamma, updates a batch; the last round's scores are returned
    lr: float = 5e-5  # learning rate: that of the source training, times alpha
    weight_decay: float = 0.0  # that of the source training

    def __post_init__(self) -> None:
        super().__post_init__()
        whole_number("rounds", self.rounds, 1, 10**6)
        number("lr", self.lr, 0, LARGE)
        number("weight_decay", self.weight_decay, 0, LARGE)


_OWN_CHOICE = {"neighbours": 10, "confidence_threshold": 0.9}
_OWN_CHOICE_BN = {"confidence_threshold": 0.9}
_FAMILIES = ("imagenet", "cifar10", "cifar100")


@register("adanpc")
class Adanpc(Output):
    """A vote over a memory of source and confident test features."""

    Config = AdanpcConfig
    counts_images: ClassVar[bool] = True
    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        **dict.fromkeys(_FAMILIES, _OWN_CHOICE),
        "domainbed": {"official": True},
    }
    needs_features = True

    source_features: Tensor  # (N, D), not normalised
    source_scale: Tensor  # (N,) factors that normalise them; 1 for the random row
    source_labels: Tensor  # (N,)
    memory: Tensor  # (capacity, D) normalised; official: (number remembered, D)
    memory_labels: Tensor  # (capacity,) int64; official: (number remembered,)
    remembered: Tensor  # 0-dimensional: test images remembered so far, replaced ones included

    def __init__(self, config: AdanpcConfig, context: Context) -> None:
        super().__init__(config, context)
        self.register_buffer(
            "source_features", torch.zeros(0, 0, dtype=torch.float32), persistent=False
        )
        self.register_buffer("source_scale", torch.zeros(0, dtype=torch.float32), persistent=False)
        self.register_buffer("source_labels", torch.zeros(0, dtype=torch.int64), persistent=False)
        self.register_buffer("memory", torch.zeros(0, 0, dtype=torch.float32))
        self.register_buffer("memory_labels", torch.zeros(0, dtype=torch.int64))
        self.register_buffer("remembered", torch.zeros((), dtype=torch.int64))

    def correct(self, prediction: Prediction) -> Tensor:
        """Return the log of the scores (B, C), then remember the confident images."""
        assert prediction.features is not None
        with torch.autocast(prediction.features.device.type, enabled=False):
            unit = F.normalize(prediction.features.float(), dim=1)
            scores = self._scores(unit)
            added = self._remember(unit, scores)
        self.report = Report(added=added, memory_size=self._size())
        return scores.log()

    def fit(self, source: SourceStatistics, network: Backbone) -> None:
        """Fill the memory with given features, or with those of source batches.

        Raises:
            ValueError: When there are neither, or features of another model.
        """
        if source.features is not None and source.feature_labels is not None:
            features, labels = source.features, source.feature_labels
            self.source_used = "features as given"
        elif source.batches is not None:
            features, labels = self._measure(source, network)
            self.source_used = "features from batches"
        else:
            raise missing_artefact(source, self.name, "labelled features")
        width = self.context.feature_size
        labels = labels.flatten().to(torch.int64)
        inside = bool((labels >= 0).all() and (labels < self.context.num_classes).all())
        if features.ndim != 2 or features.shape[1] != width or len(features) == 0 or not inside:
            raise ValueError(
                f"`source.features` must be (N, {width}) with labels below "
                f"{self.context.num_classes}, as this model's classifier has them, got "
                f"{tuple(features.shape)} with labels {labels.unique().tolist()[:10]}: make them "
                f"with tta.collect_source(model, loader, for_methods=['{self.name}'])."
            )
        features = features.float()
        scale = 1 / features.norm(dim=1).clamp_min(1e-12)
        if self.config.official:
            first = self._first_row(source, width)
            features = torch.cat([first.to(features), features])
            scale, labels = F.pad(scale, (1, 0), value=1.0), F.pad(labels, (1, 0))
        self._hold(features, scale, labels)

    def source_artefacts(self) -> dict[str, Any]:
        """The source features and labels, and the random row where there is one."""
        official = self.config.official
        found = {
            "features": self.source_features[int(official) :],
            "feature_labels": self.source_labels[int(official) :],
        }
        return found | ({"memory_init": self.source_features[0]} if official else {})

    def load_constants(self, values: dict[str, Tensor]) -> None:
        """Set what ``constants`` returned."""
        self._hold(values["source_features"], values["source_scale"], values["source_labels"])

    def integer_ranges(self) -> dict[str, tuple[int, int]]:
        """Labels are class numbers."""
        return {"memory_labels": (0, self.context.num_classes - 1)}

    def resizable_buffers(self) -> tuple[str, ...]:
        """Return the memory's buffers under ``official=True``, where it has no limit."""
        return ("memory", "memory_labels") if self.config.official else ()

    def kept_by_rows(self) -> tuple[str, ...]:
        """Return ``memory``: it is large, and a batch replaces some of it."""
        return ("memory",)

    def _measure(self, source: SourceStatistics, network: Backbone) -> tuple[Tensor, Tensor]:
        device, features, labels = self.remembered.device, [], []
        with torch.no_grad():
            for images, y in source.iter_batches(self.config.source_samples):
                found = network(images.to(device)).features
                assert found is not None
                features.append(found)
                labels.append(y)
        if not features:
            raise ValueError(
                "`source` must hold at least one batch, got none: pass an iterable of "
                "(images, labels) that was not read to its end."
            )
        return torch.cat(features), torch.cat(labels)

    def _first_row(self, source: SourceStatistics, width: int) -> Tensor:
        """Return the row that the official memory starts with: (1, D), label 0, not normalised."""
        if source.memory_init is not None:
            if source.memory_init.numel() != width:
                raise ValueError(
                    f"`source.memory_init` must be of shape ({width},), as this model's features, "
                    f"got {tuple(source.memory_init.shape)}: make it for this model."
                )
            return source.memory_init.reshape(1, -1)
        bound = 1 / math.sqrt(width / 3)
        return (
            2 * torch.rand(1, width, generator=self.context.generator, dtype=torch.float32) - 1
        ) * bound

    def _hold(self, features: Tensor, scale: Tensor, labels: Tensor) -> None:
        device, width = self.remembered.device, features.shape[1]
        rows = 0 if self.config.official else self.config.capacity
        features = features.detach().to(device)
        # The last bit of a matrix product depends on how its operands are aligned, and a tensor
        # that was read from a file may begin anywhere.
        misplaced = features.data_ptr() % ALIGNMENT
        self.source_features = features.clone() if misplaced else features
        self.source_scale, self.source_labels = scale.to(device), labels.to(device)
        self.memory = torch.zeros(rows, width, dtype=torch.float32, device=device)
        self.memory_labels = torch.zeros(rows, dtype=torch.int64, device=device)

    def _size(self) -> Tensor:
        """Rows that vote, source and test."""
        return len(self.source_labels) + self.remembered.clamp_max(len(self.memory))

    def _scores(self, unit: Tensor) -> Tensor:
        """Scores (B, C) of normalised features (B, D)."""
        c = self.config
        labels = torch.cat([self.source_labels, self.memory_labels])
        share = vote(
            self._similarity(unit.float()),
            labels,
            self.context.num_classes,
            c.neighbours,
            c.temperature,
            c.ball_radius,
        )
        return (share + FLOOR).clamp_max(1.0)

    def _similarity(self, unit: Tensor) -> Tensor:
        """Cosine (B, M) of features (B, D) with every row of the memory, -inf for free rows.

        The product is computed transposed, as (M, B), which is twice as fast on a CPU. Without a
        gradient both parts are written into one tensor, since on a small network another allocation
        costs as much as the product.
        """
        count, columns = len(self.source_labels), unit.t()
        features, own = self.source_features.float(), self.memory.float()
        if is_tracing() or (torch.is_grad_enabled() and unit.requires_grad):
            found = torch.cat([features @ columns, own @ columns])
        else:
            found = unit.new_empty(count + len(own), len(unit))
            torch.mm(features, columns, out=found[:count])
            torch.mm(own, columns, out=found[count:])
        places = torch.arange(len(own), device=own.device)
        scale = torch.zeros(len(own), dtype=torch.float32, device=own.device).masked_fill(
            places >= self.remembered, float("-inf")
        )
        if is_tracing():
            factors = F.pad(self.source_scale.float(), (0, len(own)), value=1.0)
            return (found * factors[:, None] + F.pad(scale, (count, 0))[:, None]).t()
        found[:count].mul_(self.source_scale.float()[:, None])
        found[count:].add_(scale[:, None])
        return found.t()

    def _remember(self, unit: Tensor, scores: Tensor) -> Any:
        """Put the confident rows of (B, D) into the memory and return how many these were."""
        if not self.learning:
            return 0
        confidence = (scores.softmax(1) if self.config.official else scores).amax(1)
        chosen = confidence >= self.config.confidence_threshold
        if is_tracing():
            return self._remember_whole(unit, scores.argmax(1), chosen)
        rows, labels = unit[chosen], scores[chosen].argmax(1)
        count = len(rows)
        if self.config.official:
            self.memory = torch.cat([self.memory, rows])
            self.memory_labels = torch.cat([self.memory_labels, labels])
        else:
            capacity = len(self.memory)
            places = (self.remembered + torch.arange(count, device=rows.device)) % capacity
            # Of more rows than there is room for, the last ones stay, each with its own place.
            places, rows, labels = places[-capacity:], rows[-capacity:], labels[-capacity:]
            self.context.journal.keep(self.memory, places)
            self.memory[places] = rows.to(self.memory.dtype)
            self.memory_labels[places] = labels
        self.remembered += count
        return count

    def _remember_whole(self, unit: Tensor, labels: Tensor, chosen: Tensor) -> Tensor:
        """As :meth:`_remember`, with every length known: rows that are not chosen go nowhere."""
        capacity, rank = len(self.memory), chosen.to(torch.int64).cumsum(0)
        count = rank[-1]
        stays = chosen & (rank > count - capacity)
        places = torch.where(stays, (self.remembered + rank - 1) % capacity, capacity)
        memory = F.pad(self.memory, (0, 0, 0, 1)).index_copy(0, places, unit.to(self.memory.dtype))
        held = F.pad(self.memory_labels, (0, 1)).index_copy(0, places, labels)
        self.memory.copy_(memory[:-1])
        self.memory_labels.copy_(held[:-1])
        self.remembered += count
        return count


@register("adanpc_bn")
class AdanpcBn(Adanpc):
    """AdaNPC with a trained scale and shift of the features."""

    Config = AdanpcBnConfig
    takes_gradient: ClassVar[bool] = True
    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        **dict.fromkeys(_FAMILIES, _OWN_CHOICE_BN),
        "domainbed": {"official": True},
    }

    weight: Tensor  # (D,), w
    bias: Tensor  # (D,), b
    exp_avg: Tensor  # (2, D), Adam's first moments, for weight and bias
    exp_avg_sq: Tensor  # (2, D), Adam's second moments
    steps: Tensor  # (2,), Adam's step counts

    def __init__(self, config: AdanpcBnConfig, context: Context) -> None:
        super().__init__(config, context)
        for name in ("weight", "bias", "exp_avg", "exp_avg_sq"):
            self.register_buffer(name, torch.zeros(0, dtype=torch.float32))
        self.register_buffer("steps", torch.zeros(2, dtype=torch.float32))

    def correct(self, prediction: Prediction) -> Tensor:
        """Log of the last round's scores (B, C); each round predicts, steps and remembers."""
        assert prediction.features is not None
        self.report = Report()
        with torch.autocast(prediction.features.device.type, enabled=False):
            features = prediction.features.float() / math.sqrt(1 + BN_EPS)
            scores, added = self._round(features)
            for _ in range(self.config.rounds - 1 if self.learning else 0):
                scores, more = self._round(features)
                added += more
        self.report |= {"added": added, "memory_size": self._size()}
        return scores.log()

    def _round(self, features: Tensor) -> tuple[Tensor, int]:
        """Return scores (B, C) under the present affine part, and how many rows were remembered."""
        affine = [self.weight.clone(), self.bias.clone()]
        with torch.set_grad_enabled(self.learning):
            for p in affine:
                p.requires_grad_(self.learning)
            unit = F.normalize(features * affine[0] + affine[1], dim=1)
            scores = self._scores(unit)
            loss = entropy(scores).mean()
        self.report["vote_entropy"] = loss.detach()
        if self.learning:
            # This comes before remembering, which changes the memory that the graph refers to.
            self._step(torch.autograd.grad(loss, affine))
        return scores.detach(), self._remember(unit.detach(), scores.detach())

    def _step(self, gradients: tuple[Tensor, ...]) -> None:
        if not all(bool(g.isfinite().all()) for g in gradients):
            return
        adam(
            [self.weight, self.bias],
            list(gradients),
            list(self.exp_avg),
            list(self.exp_avg_sq),
            [],
            list(self.steps),
            foreach=False,
            amsgrad=False,
            beta1=BETAS[0],
            beta2=BETAS[1],
            lr=self.config.lr,
            weight_decay=self.config.weight_decay,
            eps=ADAM_EPS,
            maximize=False,
        )

    def _hold(self, features: Tensor, scale: Tensor, labels: Tensor) -> None:
        super()._hold(features, scale, labels)
        width = features.shape[1]
        self.weight = torch.ones(width, dtype=torch.float32, device=self.remembered.device)
        self.bias = torch.zeros_like(self.weight)
        self.exp_avg, self.exp_avg_sq = (self.memory.new_zeros(2, width) for _ in range(2))
