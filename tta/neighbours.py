"""Votes of nearest neighbours, as pure functions of similarities."""

from __future__ import annotations

from torch import Tensor

__all__ = ["vote"]


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
        classes: C.
        neighbours: How many rows vote, with weights softmax(similarity / temperature).
        temperature: Of these weights.
        ball_radius: When every row of the batch has a similarity above it, all rows of the memory
            from this similarity up vote instead; above 1 never.

    Returns:
        (B, C), every row summing to 1.

    Example:
        >>> import torch
        >>> vote(torch.tensor([[0.9, 0.9, 0.1]]), torch.tensor([0, 1, 1]), 2, 2, 0.1)
        tensor([[0.5000, 0.5000]])
    """
    shares = similarity.new_zeros(len(similarity), classes)
    if ball_radius <= 1 and bool(similarity.detach().amax(1).min() > ball_radius):
        inside = similarity.masked_fill(similarity < ball_radius, float("-inf"))
        return shares.index_add(1, labels, (inside / temperature).softmax(1))
    nearest, index = similarity.topk(min(neighbours, similarity.shape[1]), dim=1)
    return shares.scatter_add(1, labels[index], (nearest / temperature).softmax(1))
