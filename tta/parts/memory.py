"""Memories of test images: which ones to keep when there is room for few."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from tta.parts.chance import Chance

__all__ = ["Cstu", "Fifo", "Pbrs"]

EMPTY = -1


class Cstu(nn.Module):
    """Category-balanced sampling with timeliness and uncertainty (RoTTA, arXiv 2303.13899).

    It decides which of ``capacity`` slots an image goes to; whoever uses it holds the images. Every
    class has a quota of capacity / C slots. An image of a class below its quota takes a free slot
    or, when there is none, a slot of the classes that have most; an image of a class at its quota
    takes one of that class. The image that has to leave is the one with the highest score there,
    and it leaves only for a new image that scores less:

        score = w_t / (1 + exp(-age / capacity)) + w_u H / ln C

    The ages of all images held, the new one included, grow by one with every image offered. Where C
    is above the capacity, one image fills a class's quota.

    Args:
        capacity: Number of slots.
        classes: Number of classes C.
        timeliness: Weight w_t of the age.
        uncertainty: Weight w_u of the entropy.
    """

    labels: Tensor  # (capacity,) pseudo-labels, -1 = empty
    ages: Tensor  # (capacity,), images offered since each was stored
    entropies: Tensor  # (capacity,) in nats

    def __init__(self, capacity: int, classes: int, timeliness: float, uncertainty: float) -> None:
        super().__init__()
        self.capacity, self.classes = capacity, classes
        self.timeliness, self.uncertainty = timeliness, uncertainty
        self.register_buffer("labels", torch.full((capacity,), EMPTY))
        self.register_buffer("ages", torch.zeros(capacity, dtype=torch.int64))
        self.register_buffer("entropies", torch.zeros(capacity, dtype=torch.float32))

    def score(self, age: int, entropy: float) -> float:
        """Score an image by its age and entropy: the image with the highest score leaves first."""
        timely = self.timeliness / (1 + math.exp(-age / self.capacity))
        return timely + self.uncertainty * entropy / math.log(max(self.classes, 2))

    def offer(self, labels: Iterable[int], entropies: Iterable[float]) -> dict[int, int]:
        """Offer images one after another, and take some of them.

        Args:
            labels: Pseudo-labels of the images.
            entropies: Entropies of their predictions, in nats.

        Returns:
            For every slot that changed, the position of its new image among the images offered.
        """
        # Plain numbers, since there is a decision for each image, which would wait for a GPU.
        held, ages, unsure = self.labels.tolist(), self.ages.tolist(), self.entropies.tolist()
        placed: dict[int, int] = {}
        for position, (label, entropy) in enumerate(zip(labels, entropies, strict=True)):
            slot = self._slot(label, entropy, held, ages, unsure)
            if slot is not None:
                held[slot], ages[slot], unsure[slot] = label, 0, entropy
                placed[slot] = position
            ages = [age + (kept != EMPTY) for age, kept in zip(ages, held, strict=True)]
        for buffer, values in ((self.labels, held), (self.ages, ages), (self.entropies, unsure)):
            buffer.copy_(torch.tensor(values, dtype=buffer.dtype))
        return placed

    def _slot(
        self, label: int, entropy: float, held: list[int], ages: list[int], unsure: list[float]
    ) -> int | None:
        """Choose the slot of an image; None if it is not taken."""
        counts = Counter(kept for kept in held if kept != EMPTY)
        if counts[label] >= self.capacity / self.classes:
            classes = {label}
        elif EMPTY in held:
            return held.index(EMPTY)
        else:
            most = max(counts.values())
            classes = {c for c, count in counts.items() if count == most}
        candidates = [i for i, kept in enumerate(held) if kept in classes]
        worst = max(candidates, key=lambda i: self.score(ages[i], unsure[i]))
        better = self.score(ages[worst], unsure[worst]) > self.score(0, entropy)
        return worst if better else None


class Fifo(nn.Module):
    """The last images, in order.

    It decides which of ``capacity`` slots an image goes to; whoever uses it holds the images.

    Args:
        capacity: Number of slots.
        classes: Number of classes.
    """

    labels: Tensor  # (capacity,) pseudo-labels, -1 = empty
    arrivals: Tensor  # (capacity,), higher for images that were stored later

    def __init__(self, capacity: int, classes: int) -> None:
        super().__init__()
        self.capacity, self.classes = capacity, classes
        self.register_buffer("labels", torch.full((capacity,), EMPTY))
        self.register_buffer("arrivals", torch.zeros(capacity, dtype=torch.int64))

    def offer(self, labels: Iterable[int], chance: Chance) -> dict[int, int]:
        """Offer images one after another, and take some of them.

        Args:
            labels: Pseudo-labels of the images.
            chance: Makes random decisions.

        Returns:
            For every slot that changed, the position of its new image among the images offered.
        """
        held, arrivals = self.labels.tolist(), self.arrivals.tolist()
        placed: dict[int, int] = {}
        for position, label in enumerate(labels):
            slot = self._slot(label, held, arrivals, chance)
            if slot is not None:
                held[slot], arrivals[slot] = label, max(arrivals) + 1
                placed[slot] = position
        for buffer, values in ((self.labels, held), (self.arrivals, arrivals)):
            buffer.copy_(torch.tensor(values, dtype=buffer.dtype))
        return placed

    def order(self) -> list[int]:
        """The slots that hold images, in order of arrival."""
        labels, arrivals = self.labels.tolist(), self.arrivals.tolist()
        return _by_arrival([i for i, kept in enumerate(labels) if kept != EMPTY], arrivals)

    def _slot(self, label: int, held: list[int], arrivals: list[int], chance: Chance) -> int | None:
        """Choose the slot of an image; None if it is not taken."""
        return arrivals.index(min(arrivals))


class Pbrs(Fifo):
    """Prediction-balanced reservoir sampling (NOTE, arXiv 2208.05117).

    While there is a free slot, an image takes it. After that, an image of a class that is not among
    those with most images takes the slot of a random image of one of these. An image of a class
    that is takes the slot of a random image of its own class with the probability of (images of the
    class held) / (images of the class offered so far).

    For every decision ``chance`` is asked for ``draw_value``: for the class, as a label, and then
    for the image, as its position in the class's images by arrival; or for a uniform number, and
    then for the image.

    Args:
        capacity: Number of slots.
        classes: Number of classes.
    """

    seen: Tensor  # (C,), images offered of each class

    def __init__(self, capacity: int, classes: int) -> None:
        super().__init__(capacity, classes)
        self.register_buffer("seen", torch.zeros(classes, dtype=torch.int64))

    def order(self) -> list[int]:
        """The slots that hold images, class by class, in order of arrival within a class."""
        labels = self.labels.tolist()
        return sorted(super().order(), key=lambda slot: labels[slot])

    def _slot(self, label: int, held: list[int], arrivals: list[int], chance: Chance) -> int | None:
        self.seen[label] += 1
        if EMPTY in held:
            return held.index(EMPTY)
        counts = Counter(held)
        most = max(counts.values())
        largest = sorted(c for c, count in counts.items() if count == most)
        if label not in largest:
            label = chance.pick("draw_value", largest)
        elif chance.uniform("draw_value") > counts[label] / int(self.seen[label]):
            return None
        slots = _by_arrival([i for i, kept in enumerate(held) if kept == label], arrivals)
        return slots[chance.pick("draw_value", range(len(slots)))]


def _by_arrival(slots: list[int], arrivals: list[int]) -> list[int]:
    return sorted(slots, key=arrivals.__getitem__)
