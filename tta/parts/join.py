"""What is made of two predictions, for images as they came and for others made of them (DDA).

With z the logits of the images, z' those of the others, H the entropy and p the softmax:

    sum: z + z';   entropy_sum: z H(z') + z' H(z);   confidence_sum: z max p + z' max p'

``select_*`` takes, image by image, the prediction of lower entropy, higher confidence, or higher
variance of the logits. ``*_fuse`` mixes the images, with weights that are a softmax of these.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tta.core.checks import one_of
from tta.parts.losses import entropy

__all__ = ["FUSIONS", "JOINS", "fuse", "join"]

JOINS = (
    "sum",
    "entropy_sum",
    "confidence_sum",
    "select_entropy",
    "select_confidence",
    "select_variance",
)
FUSIONS = ("entropy_fuse", "confidence_fuse", "variance_fuse")


def join(logits: Tensor, other: Tensor, rule: str) -> Tensor:
    """Join two predictions.

    Args:
        logits: Of the images as they came (B, C).
        other: Of the images made of them (B, C).
        rule: One of ``JOINS``. Equal entropies give ``other``, equal confidences or variances
            ``logits``.

    Returns:
        (B, C).

    Raises:
        ValueError: For another rule.

    Example:
        >>> join(torch.tensor([[3.0, 0.0]]), torch.tensor([[0.0, 1.0]]), "select_confidence")
        tensor([[3., 0.]])
    """
    one_of("rule", rule, JOINS)
    kind, _, figure = rule.partition("_")
    if rule == "sum":
        return logits + other
    if kind == "select":
        mine, others = (_figure(z, figure) for z in (logits, other))
        takes = others >= mine if figure == "entropy" else others > mine
        return torch.where(takes[:, None], other, logits)
    if kind == "entropy":
        return logits * entropy(other)[:, None] + other * entropy(logits)[:, None]
    weights = (_figure(z, kind)[:, None] for z in (logits, other))
    return logits * next(weights) + other * next(weights)


def fuse(images: Tensor, other_images: Tensor, logits: Tensor, other: Tensor, rule: str) -> Tensor:
    """Mix images by what was predicted for them.

    Args:
        images: As they came (B, ...).
        other_images: Those made of them, of the same shape.
        logits: Of ``images`` (B, C).
        other: Of ``other_images`` (B, C).
        rule: One of ``FUSIONS``.

    Returns:
        Images (B, ...), to be classified.

    Raises:
        ValueError: For another rule, or images of two shapes.
    """
    one_of("rule", rule, FUSIONS)
    if images.shape != other_images.shape:
        raise ValueError(
            f"`other_images` must have the shape of the images, {tuple(images.shape)}, to be mixed "
            f"with them, got {tuple(other_images.shape)}: join the logits instead."
        )
    figure = rule.partition("_")[0]
    weights = torch.stack([_figure(logits, figure), _figure(other, figure)]).softmax(0)
    mine, others = weights.view(2, -1, *[1] * (images.ndim - 1)).to(images.dtype)
    return mine * images + others * other_images


def _figure(logits: Tensor, name: str) -> Tensor:
    """How sure a prediction is (B,): its negative entropy, its confidence, its logits' variance."""
    if name == "entropy":
        return -entropy(logits)
    return logits.softmax(1).amax(1) if name == "confidence" else logits.var(1)
