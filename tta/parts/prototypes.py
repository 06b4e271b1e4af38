"""Class prototypes of the source, and the contrast of features with them (RMT, SANTA)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tta.core.backbone import Backbone
from tta.core.component import Context
from tta.core.prediction import Prediction
from tta.core.source import SourceStatistics, missing_artefact
from tta.parts.class_moments import class_moments
from tta.parts.losses import contrastive

__all__ = ["fill_prototypes", "make_projector", "nearest_class", "prototype_contrast", "undefined"]


def undefined(context: Context) -> Tensor:
    """Prototypes (C, D) before any are known: NaN."""
    size = context.num_classes, context.feature_size
    return torch.full(size, float("nan"), dtype=torch.float32)


def fill_prototypes(
    prototypes: Tensor, source: SourceStatistics, network: Backbone, name: str
) -> str:
    """Take prototypes from the source, or measure them on its batches under batch statistics.

    Args:
        prototypes: (C, D), which is written to; NaN for a class without images.
        source: Artefacts that include ``prototypes`` or ``batches``.
        network: The wrapped model.
        name: The method's.

    Returns:
        What was used, in words.

    Raises:
        ValueError: When the source has neither, or prototypes that do not fit the model.
    """
    if source.prototypes is not None:
        given, size = source.prototypes, tuple(prototypes.shape)
        if tuple(given.shape) != size:
            raise ValueError(
                f"`source.prototypes` must be of shape {size}, got {tuple(given.shape)}: make "
                "them for this model with "
                f"tta.collect_source(model, loader, for_methods=['{name}'])."
            )
        prototypes.copy_(given)
        used = "prototypes as given"
    elif source.batches is not None:
        prototypes.copy_(class_moments(network, source, prototypes).means)
        used = "prototypes from batches"
    else:
        raise missing_artefact(source, name, "class prototypes", "prototypes, source batches")
    if bool(prototypes.isnan().all()):
        raise ValueError("`source` must give at least one class a prototype, got none.")
    return used


def nearest_class(features: Tensor, prototypes: Tensor) -> Tensor:
    """Class (B,) of the prototype (C, D) most similar to each of (B, D) by cosine."""
    unit = F.normalize(features.float(), dim=1)
    similarity = unit @ F.normalize(prototypes.float(), dim=1).t()
    return similarity.nan_to_num(nan=-2.0).argmax(1)


def prototype_contrast(
    projector: nn.Module,
    prototypes: Tensor,
    student: Prediction,
    augmented: Prediction,
    temperature: float,
) -> Tensor:
    """Contrastive loss over the nearest prototypes, the features and the features of a view.

    Args:
        projector: What vectors pass through before they are compared.
        prototypes: (C, D).
        student: With features (B, D), by which prototypes are chosen.
        augmented: With features (B, D).
        temperature: Divides the cosine similarities.
    """
    assert student.features is not None and augmented.features is not None
    chosen = prototypes[nearest_class(student.features.detach(), prototypes)]
    own = next(projector.parameters(), chosen).dtype  # float32, unless converted
    vectors = [v.to(own) for v in (chosen, student.features, augmented.features)]
    return contrastive(projector(torch.stack(vectors, dim=1)), temperature)


def make_projector(context: Context, width: int, device: torch.device) -> nn.Sequential:
    """Linear, ReLU, linear, from D to ``width``; none for a width of 0.

    Weights are the caller's (``projector_init/0.weight`` and so on of ``draws=``), or uniform as
    torch's, from the adapter's generator.
    """
    if width == 0:
        return nn.Sequential()
    size = context.feature_size
    first = nn.utils.skip_init(nn.Linear, size, width)
    second = nn.utils.skip_init(nn.Linear, width, width)
    layers = nn.Sequential(first, nn.ReLU(), second)
    with torch.no_grad():
        for name, p in layers.named_parameters():
            bound = (size if name.startswith("0.") else width) ** -0.5
            given = context.draws.ask(f"projector_init/{name}", p.shape, p.dtype, p.device)
            if given is None:
                p.uniform_(-bound, bound, generator=context.generator)
            else:
                p.copy_(given)
    return layers.to(device)
