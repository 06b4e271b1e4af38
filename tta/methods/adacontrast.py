"""AdaContrast: pseudo-labels refined by neighbours, and contrast with a queue of other classes.

Chen, Wang, Darrell, Ebrahimi: Contrastive Test-Time Adaptation, CVPR 2022, arXiv 2204.10377.

A batch is seen in three views, a weak one and two strong ones. The prediction for the weak one,
averaged over its nearest neighbours in a bank of earlier images, labels it; the strong ones are
trained to that label, drawn to each other, and pushed away from earlier images of other labels; a
third term keeps the predictions diverse. This is the online form, one step a batch, of the
benchmark that came with ROID (arXiv 2306.00650).

    L = CE(z_q, y) + CE([q.k, {q.k_j : y_j != y}] / T -> 0) + sum_c p_c log p_c

Here q is the normalised feature of the student on one strong view, k that of a teacher on the
other, k_j the queue, p the mean prediction of the batch for the first, y the refined label. In
order: the student sees the weak view; it sees the first strong view, and the teacher moves towards
it and sees the second; the keys replace columns of the queue; the student takes a step; the teacher
sees the weak view, and its features and probabilities go into the bank; the student predicts the
images themselves, which is what is returned. All parameters are trained.

All passes but the last are those of training: BatchNorm takes the statistics of the batch, and
averages of them move, those of the student and those of the teacher apart; the last one takes the
averages. That is ``bn_ema`` with ``official=True``, which the update brings; any other norm rule
moves as it does elsewhere. Neighbours begin after ``refine_after`` images, counted over
batches, and are those of smallest distance between features, by cosine or by length.

The queue starts as random directions with random labels, drawn once at wrap; ``reset`` goes back to
that start, and empties the bank.

Differences: in the benchmark's code the labels in the queue are replaced before it is looked up
which columns have another label, while their features are still the old ones; and the position in
its bank wraps at the length that the bank has while it grows, so that a full bank first loses what
came last. ``official=True`` does both; here the old labels go with the old features, and the bank
is a ring, of which the oldest goes first. Views are made once for the batch: the weak one enlarged
by 8/7, cropped and flipped, the strong ones with colours jittered, grey, blur and flip, without a
random crop, as the benchmark has them for corrupted images. The benchmark does not scale the rate;
below the batch size of the preset it falls with ``wrap(batch_size=)`` here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from tta.core.backbone import Backbone
from tta.core.checks import LARGE, LARGEST, fraction, number, one_of, whole_number
from tta.core.component import Context
from tta.core.config import ComponentConfig, UpdateConfig
from tta.core.logit_checks import RowsOverflowError, overflow
from tta.core.norm_layers import frozen_statistics, learning_pass
from tta.core.prediction import Prediction, Report
from tta.core.random import fork
from tta.core.registry import get_config, register
from tta.core.update import Update
from tta.parts.augment import Augmenter, Recipe
from tta.parts.contrast_views import strong_view, weak_view
from tta.parts.teachers import OtherWeights

__all__ = ["Adacontrast", "AdacontrastConfig"]


@dataclass(frozen=True, kw_only=True)
class AdacontrastConfig(UpdateConfig):
    """Fields of ``adacontrast``."""

    params: str = "all"  # what is trained
    lr: float = 2e-4  # learning rate
    nesterov: bool = True  # SGD only
    weight_decay: float = 1e-4  # added to gradients
    queue_size: int = 16384  # K, keys to contrast with
    bank_size: int = 16384  # images among which neighbours are sought
    neighbours: int = 10  # whose probabilities are averaged
    distance: str = "cosine"  # between features, for neighbours: "cosine" or "euclidean"
    refine_after: int = 1024  # images before neighbours begin
    teacher_momentum: float = 0.999  # m of the teacher's moving average
    temperature: float = 0.07  # T of the contrast
    weight_classification: float = 1.0  # of the cross-entropy with the refined labels
    weight_instance: float = 1.0  # of the contrast
    weight_diversity: float = 1.0  # of the negative entropy of the mean prediction

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("queue_size", "bank_size", "neighbours"):
            whole_number(name, getattr(self, name), 1, LARGEST)
        one_of("distance", self.distance, ("cosine", "euclidean"))
        whole_number("refine_after", self.refine_after, 0, LARGEST)
        fraction("teacher_momentum", self.teacher_momentum)
        number("temperature", self.temperature, 0, LARGE, above=True)
        for name in ("weight_classification", "weight_instance", "weight_diversity"):
            number(name, getattr(self, name), 0, LARGE)


_CIFAR = {"lr_scaling": "linear_below", "lr_batch_size": 200}


@register("adacontrast")
class Adacontrast(Update):
    """Labels refined by neighbours, and contrast with a queue of other labels."""

    Config = AdacontrastConfig
    counts_images: ClassVar[bool] = True
    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "imagenet": {"lr_scaling": "linear_below"},
        "cifar10": _CIFAR,
        "cifar100": _CIFAR,
    }
    needs_features = True
    takes_draws: ClassVar[bool] = True
    injects: ClassVar[tuple[str, ...]] = ("augment",)
    cost: ClassVar[float] = 7.0

    queue: Tensor  # (D, K) directions
    queue_labels: Tensor  # (K,)
    queue_position: Tensor  # 0-dimensional: column that is replaced next
    bank_features: Tensor  # (M, D), NaN where a row is empty
    bank_probs: Tensor  # (M, C), NaN where a row is empty
    bank_position: Tensor  # 0-dimensional: row that is replaced next, once none is empty
    bank_count: Tensor  # 0-dimensional: rows that are filled, which come first
    images_seen: Tensor  # 0-dimensional, since wrap or reset

    def __init__(self, config: AdacontrastConfig, network: Backbone, context: Context) -> None:
        super().__init__(config, network, context)
        size, classes, width = context.feature_size, context.num_classes, config.queue_size
        device = next(iter(context.parameters.values())).device
        self.teacher = OtherWeights(network, context.parameters, own_statistics=True)
        self.augmenter = Augmenter(network.model, context)
        draws = fork(context.generator, device)
        ask, whole = context.draws.ask, torch.int64
        queue = ask("queue_init", torch.Size((size, width)), torch.float32, device)
        if queue is None:
            queue = F.normalize(draws.normals(size, width), dim=0)
        labels = ask("queue_labels_init", torch.Size((width,)), whole, device)
        if labels is None:
            labels = (draws.uniforms(width) * classes).long()
        self.register_buffer("queue", queue.clone())
        self.register_buffer("queue_labels", labels.clone())
        empty = torch.full((config.bank_size, size + classes), float("nan"), dtype=torch.float32)
        self.register_buffer("bank_features", empty[:, :size].clone())
        self.register_buffer("bank_probs", empty[:, size:].clone())
        for name in ("queue_position", "bank_position", "bank_count", "images_seen"):
            self.register_buffer(name, torch.zeros((), dtype=whole))

    @classmethod
    def brings(cls, config: AdacontrastConfig) -> dict[str, str | ComponentConfig]:
        """Statistics as in training."""
        return {"norm": get_config("bn_ema", official=True)}

    def adapt(self, x: Tensor) -> Prediction:
        """Label, contrast, step, remember; the prediction is that after the step."""
        config = self.config
        self.augmenter.check(x)
        draws = fork(self.context.generator, x.device)

        def view(recipe: Recipe) -> Tensor:
            (made,) = self.augmenter.views(x, 1, draws, recipe)
            return made

        weak, query, key = view(weak_view), view(strong_view), view(strong_view)
        with learning_pass(self.network.wrappers):
            with torch.no_grad():
                first = self.network(weak)
                labels, refined = self._labels(first)
            student = self.network(query)
            self.teacher.follow(config.teacher_momentum)
            keys = _directions(self.teacher.learn_statistics(key))
            classification = F.cross_entropy(student.logits.float(), labels)
            instance = self._contrast(_directions(student), keys, labels)
            mean = student.logits.float().softmax(1).mean(0)
            diversity = (mean * (mean + 1e-8).log()).sum()
            loss = (
                config.weight_classification * classification
                + config.weight_instance * instance
                + config.weight_diversity * diversity
            )
            stepped = self.step(loss)
            self._remember(self.teacher.learn_statistics(weak))
        self.images_seen += len(x)
        self.report = Report(
            selected=len(x),
            loss=loss.detach(),
            stepped=stepped,
            classification=classification.detach(),
            instance=instance.detach(),
            diversity=diversity.detach(),
            refined=refined,
        )
        with torch.no_grad(), frozen_statistics(self.network.wrappers):
            prediction = self.network(x)
        bad = overflow(prediction.logits, prediction.features)
        if bool(bad.any()):  # views are made of pixels in [0, 1], the images themselves are not
            raise RowsOverflowError(bad)
        return prediction

    def undefined_as_nan(self) -> tuple[str, ...]:
        """Empty rows of the bank."""
        return ("bank_features", "bank_probs")

    def integer_ranges(self) -> dict[str, tuple[int, int]]:
        """Classes, positions and counts."""
        queue, bank = self.config.queue_size, self.config.bank_size
        return {
            "queue_labels": (0, self.context.num_classes - 1),
            "queue_position": (0, queue - 1),
            "bank_position": (0, bank - 1),
            "bank_count": (0, bank),
        }

    def kept_by_rows(self) -> tuple[str, ...]:
        """The queue and the bank: they are large, and a batch replaces some of them."""
        return ("queue", "bank_features", "bank_probs")

    def _labels(self, weak: Prediction) -> tuple[Tensor, bool]:
        """Refined labels (B,), and whether neighbours had a part in them."""
        count = int(self.bank_count)
        if int(self.images_seen) < self.config.refine_after or count == 0:
            return weak.logits.argmax(1), False
        features, bank = _features(weak), self.bank_features[:count]
        if self.config.distance == "cosine":
            distances = -F.normalize(features, dim=1) @ F.normalize(bank, dim=1).t()
        else:
            distances = torch.cdist(features, bank)
        nearest = distances.topk(min(self.config.neighbours, count), largest=False).indices
        return self.bank_probs[nearest].mean(1).argmax(1), True

    def _contrast(self, queries: Tensor, keys: Tensor, labels: Tensor) -> Tensor:
        """Mean loss of telling each key from the queue, whose oldest columns are then replaced."""
        own = (queries * keys).sum(1, keepdim=True)
        others = queries @ self.queue.clone()  # which changes before the backward pass
        if self.config.official:
            self._replace(keys, labels)
        same = labels[:, None] == self.queue_labels
        if not self.config.official:
            self._replace(keys, labels)
        scores = torch.cat([own, others.masked_fill(same, -torch.inf)], 1)
        target = torch.zeros_like(labels)
        return F.cross_entropy(scores / self.config.temperature, target)

    @torch.no_grad()
    def _replace(self, keys: Tensor, labels: Tensor) -> None:
        """Put keys (B, D) and their labels (B,) into the queue."""
        size = len(self.queue_labels)
        places, kept = _ring(int(self.queue_position), len(keys), size, keys.device)
        self.context.journal.keep(self.queue, (slice(None), places))
        self.queue[:, places] = keys[kept].t()
        self.queue_labels[places] = labels[kept]
        self.queue_position.fill_((int(self.queue_position) + len(keys)) % size)

    @torch.no_grad()
    def _remember(self, weak: Prediction) -> None:
        """Put the teacher's features and probabilities of a batch into the bank."""
        size, count, new = len(self.bank_probs), int(self.bank_count), len(weak.logits)
        at = int(self.bank_position)
        # While there is room, new rows come behind the others.
        start = count if count < size else at
        places, kept = _ring(start, new, size, weak.logits.device)
        for buffer, values in (
            (self.bank_features, _features(weak)),
            (self.bank_probs, weak.logits.float().softmax(1)),
        ):
            self.context.journal.keep(buffer, places)
            buffer[places] = values[kept]
        filled = min(count + new, size)
        # The benchmark's position wraps at the present length of its bank.
        wraps_at = filled if self.config.official else size
        self.bank_position.fill_((at + new) % wraps_at)
        self.bank_count.fill_(filled)


def _ring(start: int, count: int, size: int, device: torch.device) -> tuple[Tensor, slice]:
    """Places of ``count`` rows in a ring from ``start`` on, and which of the rows stay in it."""
    few = min(count, size)
    places = torch.arange(start + count - few, start + count, device=device) % size
    return places, slice(count - few, None)


def _features(prediction: Prediction) -> Tensor:
    assert prediction.features is not None
    return prediction.features.float()


def _directions(prediction: Prediction) -> Tensor:
    return F.normalize(_features(prediction), dim=1)
