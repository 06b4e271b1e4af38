"""Losses on logits, as pure functions; every row is one sample.

All are computed in float32, whatever the logits are in: under autocast a bfloat16 entropy is too
coarse to compare with a threshold.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "class_correlation",
    "consistency",
    "contrastive",
    "entropy",
    "marginal_entropy",
    "opinion_entropy",
    "soft_cross_entropy",
    "soft_likelihood_ratio",
    "symmetric_cross_entropy",
]


def entropy(logits: Tensor) -> Tensor:
    """Shannon entropy of softmax(logits) in nats.

    Args:
        logits: (B, C).

    Returns:
        (B,), each in [0, ln C].

    Example:
        >>> import torch
        >>> round(float(entropy(torch.zeros(1, 10))), 4)
        2.3026
    """
    logits = logits.float()
    return -(logits.softmax(1) * logits.log_softmax(1)).sum(1)


def opinion_entropy(logits: Tensor, classes: int) -> Tensor:
    """Entropy in nats of the subjective-logic opinion behind the logits (COME).

    The opinion has a mass for each class, ``exp(z_k) / S``, and one for "I do not know",
    ``K / S``, with ``S = sum_k exp(z_k) + K``. The gradient has no part along the logits, so that
    a step does not make them longer.

    Args:
        logits: (B, C).
        classes: K, above 0; usually C.

    Returns:
        (B,), each in [0, ln(C + 1)] but for 1e-7 that is added to every mass.

    Example:
        >>> import torch
        >>> round(float(opinion_entropy(torch.zeros(1, 3), 1)), 4)  # four equal masses
        1.3863
    """
    logits = logits.float()
    length = torch.linalg.vector_norm(logits, dim=1, keepdim=True)
    length = length.clamp_min(torch.finfo(logits.dtype).tiny)
    logits = logits * (length.detach() / length)
    unknown = torch.full_like(logits[:, :1], math.log(classes))
    mass = torch.cat([logits, unknown], 1).softmax(1) + 1e-7
    return -(mass * mass.log()).sum(1)


def marginal_entropy(log_probs: Tensor) -> Tensor:
    """Entropy in nats of the prediction that is averaged over views of one image (MEMO).

    Args:
        log_probs: (V, C), a log-softmax in each row.

    Returns:
        A scalar in [0, ln C].

    Example:
        >>> import torch
        >>> sure = torch.tensor([[1.0, 0.0], [0.0, 1.0]])  # of different classes
        >>> round(float(marginal_entropy(sure.clamp_min(1e-9).log())), 4)
        0.6931
    """
    log_probs = log_probs.float()
    mean = log_probs.logsumexp(0) - math.log(len(log_probs))
    mean = mean.clamp_min(torch.finfo(mean.dtype).min)
    return -(mean.exp() * mean).sum()


def soft_cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy of softmax(logits) against softmax(target).

    Args:
        logits: (B, C).
        target: (B, C) logits; gradients flow into them too.

    Returns:
        (B,).
    """
    return -(target.float().softmax(1) * logits.float().log_softmax(1)).sum(1)


def symmetric_cross_entropy(logits: Tensor, target: Tensor, alpha: float = 0.5) -> Tensor:
    """``(1 - alpha) CE(target -> logits) + alpha CE(logits -> target)``.

    Args:
        logits: (B, C).
        target: (B, C) logits.
        alpha: Share of the reverse direction; 0 leaves it out.

    Returns:
        (B,).

    Example:
        >>> import torch
        >>> z, q = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 1.0]])
        >>> bool(symmetric_cross_entropy(z, q) == symmetric_cross_entropy(q, z))
        True
    """
    forward = soft_cross_entropy(logits, target)
    if alpha == 0:
        return forward
    return (1 - alpha) * forward + alpha * soft_cross_entropy(target, logits)


def consistency(logits: Tensor, target: Tensor, symmetric: bool) -> Tensor:
    """What CoTTA and PETAL train a student with; the teacher's logits are a constant.

    Args:
        logits: (B, C) of the student.
        target: (B, C) of the teacher.
        symmetric: Whether to take half of either direction; otherwise CE(target -> logits) alone.

    Returns:
        (B,).
    """
    return symmetric_cross_entropy(logits, target.detach(), 0.5 if symmetric else 0.0)


def soft_likelihood_ratio(logits: Tensor, clip: float = 0.99, eps: float = 1e-5) -> Tensor:
    """``-sum_k p_k log(p_k / (1 - p_k))``, which keeps a gradient where entropy has none.

    Args:
        logits: (B, C).
        clip: Largest probability.
        eps: Added to the ratio.

    Returns:
        (B,); may be negative.
    """
    probs = logits.float().softmax(1).clamp(0.0, clip)
    return -(probs * torch.log(probs / (1 - probs) + eps)).sum(1)


def contrastive(vectors: Tensor, temperature: float) -> Tensor:
    """Pull the vectors of a sample together and away from all other samples'.

    Every vector is an anchor; the others of its sample are positives, everything else negatives,
    even where two samples share a vector.

    Args:
        vectors: (B, V, D), V vectors of each sample, not normalised.
        temperature: Divides the cosine similarities.

    Returns:
        The mean over all anchors, a scalar.
    """
    samples, each, _ = vectors.shape
    unit = F.normalize(vectors.float(), dim=2).transpose(0, 1).flatten(0, 1)  # V blocks of B
    similarity = unit @ unit.t() / temperature
    itself = torch.eye(len(unit), dtype=torch.bool, device=unit.device)
    log_share = similarity.masked_fill(itself, -torch.inf).log_softmax(1)
    sample = torch.arange(samples, device=unit.device).repeat(each)
    positive = (sample[:, None] == sample) & ~itself
    return -log_share.masked_fill(~positive, 0.0).sum() / positive.sum()


def class_correlation(logits: Tensor, balanced: bool = False) -> Tensor:
    """Mass off the diagonal of ``R = P^T P / B``, P the predicted probabilities.

    Args:
        logits: (B, C).
        balanced: Divide every row of R by its sum and average over classes, so that a class that
            is predicted often weighs no more than a rare one. Otherwise the loss is
            ``1 - mean_b |p_b|^2``, the average quadratic entropy.

    Returns:
        A scalar in [0, 1].

    Example:
        >>> import torch
        >>> float(class_correlation(torch.zeros(3, 4)))
        0.75
    """
    probs = logits.float().softmax(1)
    if not balanced:
        return 1 - probs.square().sum(1).mean()
    rows = probs.t() @ probs  # the division by B cancels
    return 1 - (rows.diagonal() / rows.sum(1).clamp_min(torch.finfo(rows.dtype).tiny)).mean()
