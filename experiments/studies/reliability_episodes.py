"""Streams that are disturbed for a while: a calm stretch, an episode, and another calm stretch.

How a method comes back is seen beside a twin: its state before the episode is kept, and goes
through the second calm stretch once more as if there had been no episode.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import torch

from tta.streams import Batch, Stream

__all__ = ["AFTER", "BEFORE", "Episode", "make_episode"]

BEFORE = ("snow", "fog", "defocus_blur")
AFTER = ("defocus_blur", "jpeg_compression", "fog", "gaussian_noise")
EVERY = 8  # of so many images, one is NaN and one is not scaled to [0, 1]
BAD, FROZEN, ONE_CLASS = 100, 500, 56  # batches; 56 of 64 images are an hour at an image a second
UNSCORED = -1  # label of images that nobody could classify


@dataclass(frozen=True)
class Episode:
    """Batches in three parts, each of which can be gone through more than once.

    Args:
        before: A calm stretch.
        during: The episode.
        after: A calm stretch.
    """

    before: Iterable[Batch]
    during: Iterable[Batch]
    after: Iterable[Batch]


class _Made:
    """Batches that are made anew each time."""

    def __init__(self, make: Callable[[], Iterator[Batch]]) -> None:
        self._make = make

    def __iter__(self) -> Iterator[Batch]:
        return self._make()


def make_episode(
    name: str, before: Stream, during: Stream, after: Stream, seed: int, share: float
) -> Episode:
    """Make an episode.

    Args:
        name: Of the episode: a key of ``reliability_grid.EPISODES``.
        before: The calm stretch before.
        during: What the episode is made from.
        after: The calm stretch after it.
        seed: Of what is drawn.
        share: Of the batches that an episode has at full length.
    """
    made = _MAKERS[name](during, seed, share)
    return Episode(before, _Made(made), after)


def _bad_frames(stream: Stream, seed: int, share: float) -> Callable[[], Iterator[Batch]]:
    """One image in eight is NaN, and one has values up to 255."""

    def make() -> Iterator[Batch]:
        for batch in _over_and_over(stream, round(BAD * share)):
            images, labels = batch.images.clone(), batch.labels.clone()
            images[::EVERY] = float("nan")
            images[EVERY // 2 :: EVERY] *= 255
            labels[:: EVERY // 2] = UNSCORED
            yield replace(batch, images=images, labels=labels)

    return make


def _frozen_camera(stream: Stream, seed: int, share: float) -> Callable[[], Iterator[Batch]]:
    """The same image, again and again."""

    def make() -> Iterator[Batch]:
        first = next(iter(stream))
        same = torch.zeros(len(first), dtype=torch.int64)
        still = _rows(first, first.images[same], first.labels[same])
        for _ in range(round(FROZEN * share)):
            yield still

    return make


def _as_it_is(stream: Stream, seed: int, share: float) -> Callable[[], Iterator[Batch]]:
    """The stream itself."""
    return lambda: iter(stream)


def _one_class(stream: Stream, seed: int, share: float) -> Callable[[], Iterator[Batch]]:
    """Images of a single class, in an order that is drawn anew when all were shown."""

    def make() -> Iterator[Batch]:
        batches = list(stream)
        images = torch.cat([batch.images for batch in batches])
        labels = torch.cat([batch.labels for batch in batches])
        images = images[labels == labels[0]]
        generator = torch.Generator().manual_seed(seed)
        wanted, size = round(ONE_CLASS * share), len(batches[0])
        rounds = -(-wanted * size // len(images))
        order = torch.cat([torch.randperm(len(images), generator=generator) for _ in range(rounds)])
        for rows in order[: wanted * size].split(size):
            yield _rows(batches[0], images[rows], labels[0].expand(len(rows)))

    return make


def _rows(like: Batch, images: torch.Tensor, labels: torch.Tensor) -> Batch:
    """A batch of other images of the same domain."""
    return replace(like, images=images, labels=labels, reset=False)


def _over_and_over(stream: Stream, count: int) -> Iterator[Batch]:
    """As many batches, from the start again when the stream is at its end."""
    shown = 0
    while shown < count:
        for batch in stream:
            if shown == count:
                return
            yield replace(batch, reset=False)
            shown += 1


_MAKERS: dict[str, Callable[[Stream, int, float], Callable[[], Iterator[Batch]]]] = {
    "bad_frames": _bad_frames,
    "frozen_camera": _frozen_camera,
    "day_and_night": _as_it_is,
    "one_class": _one_class,
}
