"""What crosses between processes that share the rows of a batch; see :mod:`tta.parallel`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["Ranks", "Split", "current_split"]

CLOSE = 1e-3  # relative difference of sums over pixels that two kinds of device may come to


class Ranks:
    """The processes of a group, and what crosses between them.

    Args:
        group: Of ``torch.distributed``.
    """

    def __init__(self, group: Any) -> None:
        self.group = group
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)

    def __deepcopy__(self, memo: Any) -> Ranks:
        """A copied adapter has the same ranks."""
        return self

    def __reduce__(self) -> Any:
        """A pickled adapter is one of a single process: a group is nothing to be sent."""
        return type(None), ()

    def check_same(self, what: Any, message: str) -> None:
        """Raise ``ValueError`` with ``message`` on all ranks unless ``what`` is equal on all."""
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, what, self.group)
        if any(other != found[0] for other in found):
            raise ValueError(message)

    def check_batch(self, x: Tensor) -> None:
        """Refuse batches that differ, as where every rank was given a share of its own."""
        mine = torch.zeros(2, dtype=torch.float64, device=x.device)
        mine[0] = hash(tuple(x.shape)) % 1_000_003
        mine[1] = x.detach().double().nan_to_num().sum()
        found = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(found, mine, self.group)
        for other in found:
            difference, scale = (other[1] - found[0][1]).abs(), found[0][1].abs() + x.numel() / 100
            if other[0] != found[0][0] or difference > CLOSE * scale:
                raise ValueError(
                    "`images` must be the same whole batch on every rank, got different ones: "
                    "give each rank all images; the adapter splits them."
                )

    @contextmanager
    def splitting(self, rows: int) -> Iterator[Split]:
        """A pass in which this rank has its share of a batch of so many rows."""
        global _current
        before, _current = _current, Split(self, rows)
        try:
            yield _current
        finally:
            _current = before


@dataclass(frozen=True)
class Split:
    """A batch of which every rank has a share, in order.

    Args:
        ranks: Who shares it.
        rows: Of the whole batch, at least one a rank.
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
        """All rows (B, ...) of what this rank has some of, for what differs between ranks.

        The gradient of a row is the sum over what every rank made of it.
        """
        result: Any = _Gather.apply(x, self, True)
        return result

    def collect(self, x: Tensor) -> Tensor:
        """All rows (B, ...), for what is the same on every rank from here on (a loss)."""
        result: Any = _Gather.apply(x, self, False)
        return result

    def share(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The tensors themselves, whose gradients are the sums over all ranks."""
        return list(_Share.apply(self, *tensors)) if tensors else []


_current: Split | None = None


def current_split() -> Split | None:
    """The split of the pass that is going on, for norm rules; None where rows are all here."""
    return _current


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, split: Split, differs: bool) -> Tensor:
        ctx.split, ctx.differs = split, differs
        sizes = split.sizes
        # All ranks must send as much; shares differ by one row at most.
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
        # One message for all. A rank in whose rows a parameter has no part sends zeros.
        filled = [
            torch.zeros(shape, dtype=dtype, device=device) if g is None else g
            for g, (shape, dtype, device) in zip(gradients, ctx.shapes, strict=True)
        ]
        flat = torch.cat([g.reshape(-1).float() for g in filled])
        dist.all_reduce(flat, group=ctx.split.ranks.group)
        parts = flat.split([g.numel() for g in filled])
        return None, *(p.view_as(g).to(g) for p, g in zip(parts, filled, strict=True))
