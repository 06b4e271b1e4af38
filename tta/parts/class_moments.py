"""Mean and covariance of source features by class, and distances under them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from tta.core.backbone import Backbone
from tta.core.norm_layers import normalize_by_batch, normalize_by_source, with_statistics
from tta.core.prediction import Prediction
from tta.core.source import SourceStatistics

__all__ = ["ClassMoments", "class_moments", "mahalanobis", "predicted_moments", "whitening"]

MOST_IMAGES = 100_000


class ClassMoments(NamedTuple):
    """What :func:`class_moments` measures, in float32."""

    means: Tensor  # (C, D), NaN for a class without images
    covariance: Tensor | None  # (D, D) within classes, or (C, D, D)


@torch.no_grad()
def class_moments(
    network: Backbone, source: SourceStatistics, like: Tensor, covariance: str | None = None
) -> ClassMoments:
    """Moments of the classifier's input over labelled source batches, under batch statistics.

    Batches are read until they hold more than 100,000 images.

    Args:
        network: The wrapped model, which gives features.
        source: Artefacts that include ``batches``.
        like: (C, D), gives the shape and the model's device.
        covariance: "tied" = around each image's class mean, over all classes; "class" = one for
            each class, 0 for a class without images; None = none.

    Raises:
        ValueError: When there is no batch.
    """
    classes, size = like.shape
    wide = torch.zeros(classes, size, dtype=torch.float64, device=like.device)
    total, count = wide, wide.new_zeros(classes)
    products = wide.new_zeros((classes,) * (covariance == "class") + (size, size))
    with with_statistics(network.wrappers, normalize_by_batch):
        for found, labels in _predictions(network, source, like):
            assert found.features is not None
            features, labels = found.features.double(), labels.to(like.device)
            total.index_add_(0, labels, features)
            count.index_add_(0, labels, torch.ones_like(labels, dtype=count.dtype))
            if covariance == "tied":
                products += features.t() @ features
            elif covariance == "class":
                for c in labels.unique():
                    some = features[labels == c]
                    products[c] += some.t() @ some
    means = total / count[:, None]
    if covariance is None:
        return ClassMoments(means.float(), None)
    there = means.nan_to_num(0.0)
    if covariance == "tied":
        spread = (products - (there * count[:, None]).t() @ there) / count.sum()
    else:
        spread = products / count.clamp_min(1)[:, None, None]
        spread = spread - there[:, :, None] * there[:, None, :]
    return ClassMoments(means.float(), spread.float())


@torch.no_grad()
def predicted_moments(
    network: Backbone, source: SourceStatistics, like: Tensor
) -> tuple[Tensor, Tensor]:
    """Mean and variance of the classifier's input by predicted class, under running statistics.

    A class that is predicted for fewer than two images has the mean and the variance of all images.
    Batches are read until they hold more than 100,000 images.

    Args:
        network: The wrapped model, which gives features.
        source: Artefacts that include ``batches``.
        like: (C, D), gives the shape and the model's device.

    Returns:
        Means and unbiased variances (C, D), float32.

    Raises:
        ValueError: When there is no batch, or a single image in all.
    """
    classes = len(like)
    rows, labels = [], []
    with with_statistics(network.wrappers, normalize_by_source):
        for found, _ in _predictions(network, source, like):
            assert found.features is not None
            rows.append(found.features.double())
            labels.append(found.logits.argmax(1))
    features, label = torch.cat(rows), torch.cat(labels)
    if len(features) < 2:
        raise ValueError(
            "`source` must hold at least 2 images for a variance of features, got 1: pass more."
        )
    variance, mean = torch.var_mean(features, 0)
    means, variances = mean.repeat(classes, 1), variance.repeat(classes, 1)
    for c in range(classes):
        some = features[label == c]
        if len(some) > 1:
            variances[c], means[c] = torch.var_mean(some, 0)
    return means.float(), variances.float()


def _predictions(
    network: Backbone, source: SourceStatistics, like: Tensor
) -> Iterator[tuple[Prediction, Tensor]]:
    """Predictions for source batches of up to 100,000 images, with the batches' labels."""
    seen = 0
    for images, labels in source.iter_batches():
        yield network(images.to(like.device)), labels
        seen += len(images)
        if seen > MOST_IMAGES:
            return
    if seen == 0:
        raise ValueError(
            "`source` must hold at least one batch, got none: pass an iterable of "
            "(images, labels) that was not read to its end."
        )


def whitening(covariance: Tensor, shrinkage: float) -> Tensor:
    """The inverse of the lower Cholesky factor of ``covariance + ridge``.

    Args:
        covariance: (..., D, D).
        shrinkage: The ridge as a share of the mean variance, trace / D.

    Returns:
        (..., D, D) float32. ``|W x|^2`` is the squared Mahalanobis length of x.

    Raises:
        ValueError: When the result is not positive definite.
    """
    wide = covariance.double()
    level = wide.diagonal(dim1=-2, dim2=-1).mean(-1)
    identity = torch.eye(wide.shape[-1], dtype=wide.dtype, device=wide.device)
    factor, info = torch.linalg.cholesky_ex(wide + (shrinkage * level)[..., None, None] * identity)
    if bool((info != 0).any()):
        flat = bool((level <= 0).any())
        raise ValueError(
            "`covariance` must be positive definite with its ridge, got "
            + ("no variance at all" if flat else "one that is not")
            + ": collect it from more source images of every class"
            + ("." if flat else ", or raise shrinkage=.")
        )
    return torch.linalg.solve_triangular(factor, identity.expand_as(factor), upper=False).float()


def mahalanobis(features: Tensor, means: Tensor, whitening: Tensor) -> Tensor:
    """Squared Mahalanobis distances of features (B, D) to class means (C, D).

    Args:
        features: (B, D).
        means: (C, D).
        whitening: (D, D), or (C, D, D) one for each class.

    Returns:
        (B, C) float32.

    Example:
        >>> mahalanobis(torch.zeros(1, 2), torch.tensor([[3.0, 4.0]]), torch.eye(2))
        tensor([[25.]])
    """
    # Centred at the middle of the means, so that no digits are lost where all are far from the
    # origin.
    whitening = whitening.float()
    middle = means.float().mean(0)
    features, means = features.float() - middle, means.float() - middle
    if whitening.ndim == 2:
        return torch.cdist(features @ whitening.t(), means @ whitening.t()).square()
    centred = features - means[:, None]  # (C, B, D)
    return (centred @ whitening.transpose(1, 2)).square().sum(2).t()
