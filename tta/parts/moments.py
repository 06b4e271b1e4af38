"""Mean and variance of rows that come in batches, and those that a source brings."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from tta.core.source import SourceStatistics, missing_artefact

__all__ = ["RunningMoments", "fill_moments"]


class RunningMoments:
    """Collects rows, in float64 and around the mean of the first batch."""

    def __init__(self) -> None:
        self.count = 0
        self._origin = self._sum = self._squares = torch.zeros((), dtype=torch.float64)

    def add(self, rows: Tensor) -> None:
        """Take in more rows (B, ...)."""
        rows = rows.double()
        if self.count == 0:
            self._origin = rows.mean(0)
            self._sum = self._squares = torch.zeros_like(self._origin)
        offsets = rows - self._origin
        self._sum = self._sum + offsets.sum(0)
        self._squares = self._squares + offsets.square().sum(0)
        self.count += rows.shape[0]  # len() would fix it in a graph

    def mean(self) -> Tensor:
        """Mean of all rows (...)."""
        self._check(1)
        return self._origin + self._sum / self.count

    def variance(self) -> Tensor:
        """Unbiased variance of all rows (...)."""
        self._check(2)
        scatter = self._squares - self._sum.square() / self.count
        return (scatter / (self.count - 1)).clamp_min(0)

    def _check(self, needed: int) -> None:
        if self.count < needed:
            raise ValueError(
                f"`source` must hold at least {needed} images, got {self.count}: pass an iterable "
                "of (images, labels) that was not read to its end."
            )


def fill_moments(
    held: Mapping[str, Tensor],
    source: SourceStatistics,
    method: str,
    fits: str,
    measure: Callable[[SourceStatistics], str],
) -> str:
    """Take artefacts of the source, or measure them on its batches.

    Args:
        held: Tensors that are written to, by the names of the artefacts.
        source: Where to take them from.
        method: The method's name.
        fits: What their shape is that of, in words.
        measure: Fills ``held`` from source batches, and says what was used.

    Returns:
        What was used, in words.

    Raises:
        ValueError: When the source has neither, or artefacts of another model.
    """
    given = {name: getattr(source, name) for name in held}
    if all(value is not None for value in given.values()):
        for name, value in given.items():
            if value.shape != held[name].shape:
                raise ValueError(
                    f"`source.{name}` must be of shape {tuple(held[name].shape)}, {fits}, got "
                    f"{tuple(value.shape)}: make it with "
                    f"tta.collect_source(model, loader, for_methods=['{method}'])."
                )
            held[name].copy_(value)
        return f"{' and '.join(held)} as given"
    if source.batches is None:
        raise missing_artefact(source, method, " and ".join(held))
    return measure(source)
