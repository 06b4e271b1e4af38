"""Votes of nearest neighbours, as pure functions of similarities."""

from __future__ import annotations

import torch
from torch import Tensor

from tta.core.tracing import is_tracing

__all__ = ["largest", "vote"]

BLOCK = 64  # values in a block, of which the first search reads the largest


def vote(
    similarity: Tensor,
    labels: Tensor,
    classes: int,
    neighbours: int,
    temperature: float,
    ball_radius: float = 1.1,
) -> Tensor:
    """Share of each class among the rows of a memory that are most similar.

    Args:
        similarity: (B, M) cosine with every row of the memory; -inf for rows that are not there.
        labels: (M,) int64.
        classes: Number of classes C.
        neighbours: How many rows vote, with weights softmax(similarity / temperature).
        temperature: Temperature of these weights.
        ball_radius: When every row of the batch has a similarity above it, all rows of the memory
            from this similarity up vote instead; a value above 1 turns this off.

    Returns:
        (B, C), every row summing to 1.

    Example:
        >>> import torch
        >>> vote(torch.tensor([[0.9, 0.9, 0.1]]), torch.tensor([0, 1, 1]), 2, 2, 0.1)
        tensor([[0.5000, 0.5000]])
    """
    if ball_radius <= 1:
        everyone = similarity.detach().t().amax(0).min() > ball_radius
        if is_tracing():
            whole = _of_ball(similarity, labels, classes, temperature, ball_radius)
            some = _of_nearest(similarity, labels, classes, temperature, neighbours)
            return torch.where(everyone, whole, some)
        if bool(everyone):
            return _of_ball(similarity, labels, classes, temperature, ball_radius)
    return _of_nearest(similarity, labels, classes, temperature, neighbours)


def _of_ball(
    similarity: Tensor, labels: Tensor, classes: int, temperature: float, radius: float
) -> Tensor:
    shares = similarity.new_zeros(similarity.shape[0], classes)
    inside = similarity.masked_fill(similarity < radius, float("-inf"))
    return shares.index_add(1, labels, (inside / temperature).softmax(1))


def _of_nearest(
    similarity: Tensor, labels: Tensor, classes: int, temperature: float, neighbours: int
) -> Tensor:
    shares = similarity.new_zeros(similarity.shape[0], classes)
    nearest, index = largest(similarity, min(neighbours, similarity.shape[1]))
    return shares.scatter_add(1, labels[index], (nearest / temperature).softmax(1))


def largest(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Find the largest values of each row (B, M), in descending order: a faster ``topk``.

    Each row is cut into blocks. Its k largest values lie in the k blocks whose own largest values
    are the largest, so only these blocks are searched.

    Args:
        values: (B, M).
        count: k, at most M.

    Returns:
        Values and their positions in the row, each (B, k).
    """
    size = values.shape[1]
    blocks = size // BLOCK
    if blocks < 4 * count:
        return torch.topk(values, count, dim=1)
    columns = values.t()  # the layout in which AdaNPC computes them
    head, rest = columns[: blocks * BLOCK], columns[blocks * BLOCK :]
    head = head.unflatten(0, (blocks, BLOCK))
    best = head.detach().amax(1).topk(count, dim=0, sorted=False).indices[:, None]
    within = torch.arange(BLOCK, device=values.device)[:, None]
    last = torch.arange(blocks * BLOCK, size, device=values.device)[:, None]
    index = torch.cat([(best * BLOCK + within).flatten(0, 1), last.expand(rest.shape)])
    found = torch.cat([head.gather(0, best.expand(-1, BLOCK, -1)).flatten(0, 1), rest])
    nearest, place = found.t().topk(count, dim=1)
    return nearest, index.t().gather(1, place)
