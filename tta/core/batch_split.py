"""What crosses between processes that share a batch; see :mod:`tta.runtime.parallel`."""

from __future__ import annotations

import threading
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["Ranks", "Split", "current_split"]

CLOSE = 1e-5  # largest relative difference of sums over pixels between two kinds of device


class Ranks:
    """The processes of a group, and what crosses between them.

    Args:
        group: A process group of ``torch.distributed``.
    """

    def __init__(self, group: Any) -> None:
        self.group = group
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)
        if self.rank < 0:
            raise ValueError(
                "`group` must hold this process, got one that does not: call it on the group's "
                "ranks alone."
            )

    def __deepcopy__(self, memo: Any) -> Ranks:
        """Return this object, since a copied adapter has the same ranks."""
        return self

    def __reduce__(self) -> Any:
        """Pickle as None, since a process group cannot be sent to another process."""
        return type(None), ()

    def check_same(self, what: Any, message: str) -> None:
        """Raise ``ValueError`` with ``message`` on all ranks unless ``what`` is equal on all."""
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, what, self.group)
        if any(other != found[0] for other in found):
            raise ValueError(message)

    def check_batch(self, x: Tensor) -> None:
        """Refuse batches that differ between ranks, such as shares of one batch."""
        pixels = x.detach().float().nan_to_num(0.0, 0.0, 0.0)
        # Sums of rows and of columns, each with a weight of its own, so that order counts.
        sums = [pixels.flatten(1).sum(1).double(), pixels.flatten(0, -2).sum(0).double()]
        weighted = [(s * torch.arange(1, len(s) + 1, device=s.device).cos()).sum() for s in sums]
        kind = zlib.crc32(f"{tuple(x.shape)} {x.dtype}".encode())
        bad = (~x.isfinite()).sum()
        mine = torch.stack([torch.full_like(weighted[0], kind), bad.double(), *weighted])
        found = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(found, mine, self.group)
        scale = sums[0].abs().sum() + 1e-3
        for other in found:
            difference = (other[2:] - found[0][2:]).abs().max()
            if not (torch.equal(other[:2], found[0][:2]) and difference <= CLOSE * scale):
                raise ValueError(
                    "`images` must be the same whole batch on every rank, got different ones: "
                    "give each rank all images; the adapter splits them."
                )

    @contextmanager
    def splitting(self, rows: int) -> Iterator[Split]:
        """Open a pass in which this rank runs its share of a batch of ``rows`` rows."""
        before, _going_on.split = current_split(), Split(self, rows)
        try:
            yield _going_on.split
        finally:
            _going_on.split = before


@dataclass(frozen=True)
class Split:
    """A batch of which every rank has a share, in order.

    Args:
        ranks: The processes that share it.
        rows: Rows of the whole batch, at least one for each rank.
    """

    ranks: Ranks
    rows: int

    @property
    def sizes(self) -> list[int]:
        """Rows of each rank."""
        whole, rest = divmod(self.rows, self.ranks.size)
        return [whole + (rank < rest) for rank in range(self.ranks.size)]

    @property
    def own(self) -> slice:
        """This rank's rows."""
        start = sum(self.sizes[: self.ranks.rank])
        return slice(start, start + self.sizes[self.ranks.rank])

    def gather(self, x: Tensor) -> Tensor:
        """Gather all rows (B, ...), where later computation differs between ranks.

        The gradient of a row is the sum of its gradients on all ranks.
        """
        result: Any = _Gather.apply(x, self, True)
        return result

    def collect(self, x: Tensor) -> Tensor:
        """Gather all rows (B, ...), where later computation is the same on every rank (a loss)."""
        result: Any = _Gather.apply(x, self, False)
        return result

    def share(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return the tensors, with gradients that are summed over all ranks."""
        return list(_Share.apply(self, *tensors)) if tensors else []


_going_on = threading.local()  # each thread has passes of its own


def current_split() -> Split | None:
    """The split of the current pass, for norm rules; None where this process has all rows."""
    return getattr(_going_on, "split", None)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, split: Split, differs: bool) -> Tensor:
        ctx.split, ctx.differs = split, differs
        sizes = split.sizes
        if len(x) != sizes[split.ranks.rank]:
            raise ValueError(
                f"`model` must keep one row for each image where batches are split over ranks, got "
                f"{len(x)} rows of {sizes[split.ranks.rank]} images: run it in one process."
            )
        # All ranks must send equally many rows; shares differ by one row at most.
        padded = x.new_zeros(max(sizes), *x.shape[1:])
        padded[: len(x)] = x
        found = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(found, padded, split.ranks.group)
        return torch.cat([rows[:size] for rows, size in zip(found, sizes, strict=True)])

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (gradient,) = gradients
        if ctx.differs:
            gradient = gradient.contiguous().clone()
            dist.all_reduce(gradient, group=ctx.split.ranks.group)
        return gradient[ctx.split.own], None, None


class _Share(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, split: Split, *tensors: Tensor) -> Any:
        ctx.split = split
        ctx.shapes = [(t.shape, t.dtype, t.device) for t in tensors]
        return tuple(t.view_as(t) for t in tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        # One message carries all gradients. A rank whose rows do not use a parameter sends zeros.
        filled = [
            torch.zeros(shape, dtype=dtype, device=device) if g is None else g
            for g, (shape, dtype, device) in zip(gradients, ctx.shapes, strict=True)
        ]
        flat = torch.cat([g.reshape(-1).float() for g in filled])
        dist.all_reduce(flat, group=ctx.split.ranks.group)
        parts = flat.split([g.numel() for g in filled])
        return None, *(p.view_as(g).to(g) for p, g in zip(parts, filled, strict=True))
