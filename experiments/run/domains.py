"""Shifted domains that all methods share, so that an image is not corrupted anew by each method.

Every image has its own corruption seed, drawn from (seed, corruption, position in the whole set).
So it looks the same for every method, whatever the batch size and the choice of other images.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

import corruptions
from experiments.data import Collection, ImageSet, LabelledSet
from tta.core.checks import nearest, shown
from tta.streams.sources import CLEAN

__all__ = ["Shifts", "corrupt_set", "image_seeds", "resolve_domains"]


def resolve_domains(
    names: Sequence[str], data: Collection, usual: Sequence[str] | None = None
) -> tuple[str, ...]:
    """The domains called `names`, or the usual ones.

    Images that are not stored as domains may also be shown as they are, as the domain "clean".

    Args:
        names: Corruptions or stored domains; empty for the usual ones.
        data: Where they come from.
        usual: Those of a scenario, in its order. Where `data` lacks one of them, and without, all
            that it has are shown, in the benchmark's order.

    Raises:
        ValueError: For a name that is neither a stored domain of `data` nor a corruption.
    """
    benchmark = corruptions.list_corruptions()
    if data.stored:
        ranks = {name: rank for rank, name in enumerate(benchmark)}
        ordered = sorted(data.stored, key=lambda name: (ranks.get(name, len(ranks)), name))
        # Held-out corruptions lie in the published folders too, and are no part of the 15.
        default = [name for name in ordered if name in ranks] or ordered
        known: Sequence[str] = ordered
    else:
        default, known = benchmark, [CLEAN, *corruptions.list_corruptions(extra=True)]
    if not names:
        return tuple(usual if usual and set(usual) <= {*known} else default)
    for name in names:
        if name not in known:
            raise ValueError(
                f"`corruptions` must be among the domains of {data.name}, got {shown(name)}: "
                + nearest(name, known)
            )
    if len(set(names)) != len(names):
        raise ValueError(f"`corruptions` must name each domain once, got {' '.join(names)}")
    return tuple(names)


def image_seeds(seed: int, corruption: str, index: np.ndarray) -> Tensor:
    """One int64 seed per image, a function of its position `index` (N,) in the whole set.

    All severities have it in common: with others, results so far would have no partners.
    """
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{corruption}".encode()))
    drawn = torch.randint(0, 2**62, (int(index.max()) + 1,), generator=generator)
    return drawn[torch.from_numpy(index)]


def corrupt_set(
    images: ImageSet, corruption: str, severity: float, seed: int, device: torch.device
) -> Tensor:
    """Corrupt a whole set: (N, 3, H, W) uint8 on `device`."""
    seeds = image_seeds(seed, corruption, images.index)
    return corruptions.corrupt(images.tensor().to(device), corruption, severity, seeds=seeds)


class _Corrupted:
    """An image array (N, 3, H, W) uint8 whose images are made when the first one is read."""

    def __init__(self, shape: tuple[int, ...], make: Callable[[], Tensor]) -> None:
        self.shape = shape
        self._make = make
        self._pixels: Tensor | None = None

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: np.ndarray) -> Tensor:
        if self._pixels is None:
            self._pixels = self._make()
        # Several times faster than indexing: rows are copied whole.
        return self._pixels.index_select(0, torch.as_tensor(index, device=self._pixels.device))


class Shifts:
    """The shifted domains of one run, each corrupted or read once.

    Args:
        data: Where stored domains come from.
        clean: What is corrupted where no domain is stored.
        seed: Seed of the corruptions.
        device: Where images in memory are corrupted and kept.
        on_corrupt: It is called with (domain, severity) before a domain is made.
    """

    def __init__(
        self,
        data: Collection,
        clean: LabelledSet | None,
        seed: int,
        device: torch.device,
        on_corrupt: Callable[[str, float], None] = lambda domain, severity: None,
    ) -> None:
        self.data = data
        self.clean = clean
        self.seed = seed
        self.device = device
        self.on_corrupt = on_corrupt
        self._made: dict[tuple[str, float], Any] = {}

    @property
    def left_out(self) -> int:
        """Pictures of stored domains that cannot be read and were left out, so far."""
        return sum(len(getattr(images, "skipped", ())) for images in self._made.values())

    def build_arguments(
        self,
        names: Sequence[str],
        severities: Sequence[float],
        choose: Callable[[LabelledSet], LabelledSet] = lambda images: images,
        smooth: bool = False,
    ) -> dict[str, Any]:
        """The arguments `dataset`, `domains` and `transform` of `tta.streams.build`.

        Args:
            names: Domain names, in stream order.
            severities: All severities that the stream can ask for.
            choose: Picks the images of a set that the stream uses.
            smooth: Whether the stream asks for severities in between, or for two corruptions at
                once; such a stream corrupts its images as they come.
        """
        stored = bool(self.data.stored)  # `choose` is made for the domains then
        clean = self.clean if self.clean is None or stored else choose(self.clean)
        if smooth or not (stored or isinstance(clean, ImageSet)):
            return {"dataset": clean, "domains": list(names), "transform": self._corrupt}
        domains = {
            name: {
                severity: self._domain(name, severity, clean, choose)
                for severity in ((0,) if name == CLEAN else severities)
            }
            for name in names
        }
        return {"dataset": clean, "domains": domains, "transform": None}

    def _corrupt(
        self, images: Tensor, name: str, severity: float, generator: torch.Generator
    ) -> Tensor:
        """Corrupt a batch when it is shown; every method does so again, as nothing is kept."""
        return corruptions.corrupt(images.to(self.device), name, severity, generator=generator)

    def _domain(
        self,
        name: str,
        severity: float,
        clean: LabelledSet | None,
        choose: Callable[[LabelledSet], LabelledSet],
    ) -> Any:
        if self.data.read_stored is not None:
            if (name, severity) not in self._made:
                # Streams ask for a domain called "clean" at severity 0, which no file has.
                self._made[name, severity] = self.data.read_stored(name, max(1, int(severity)))
            return choose(self._made[name, severity])
        assert isinstance(self.clean, ImageSet) and isinstance(clean, ImageSet)
        whole = self.clean
        if (name, severity) not in self._made:

            def make() -> Tensor:
                if name == CLEAN:
                    return whole.tensor().to(self.device)
                self.on_corrupt(name, severity)
                return corrupt_set(whole, name, severity, self.seed, self.device)

            self._made[name, severity] = _Corrupted((len(whole), 3, *whole.images.shape[1:3]), make)
        positions = np.searchsorted(whole.index, clean.index)  # both ascending
        return _Rows(self._made[name, severity], positions), clean.labels


class _Rows:
    """Some rows of an image array."""

    def __init__(self, array: _Corrupted, positions: np.ndarray) -> None:
        self.shape = (len(positions), *array.shape[1:])
        self._array = array
        self._positions = positions

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: np.ndarray) -> Tensor:
        return self._array[self._positions[index]]
