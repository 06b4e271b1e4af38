"""``load(name) -> (model, info)`` for bundled, timm and torchvision classifiers."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Literal, get_args

import timm
import torchvision
from torch import nn

import tta
from models.bundled import BUNDLED, CIFAR10_CLASSES, FOLDER, SDA, give_weights, known
from models.card import SourceCard, of_file
from models.denoiser import is_trained, load_diffusion
from tta.core.checks import boolean, nearest, path_like, shown, string
from tta.core.classifier import num_classes
from tta.core.parameters import is_norm
from tta.runtime.checkpoint import fill, read_checkpoint
from tta.runtime.libraries import check_library, classes_of, make

__all__ = ["ModelInfo", "list_models", "load"]

FROM_LIBRARIES = (
    "mean", "std", "input_size", "class_names", "weights", "crop", "interpolation"
)  # fmt: skip
Match = Literal["name", "order"]


@dataclass(frozen=True, kw_only=True)
class ModelInfo:
    """What a caller must know to feed a model.

    ``mean`` and ``std`` turn pixels in [0, 1] into what the model takes; 0 and 1 say that it takes
    pixels, as the bundled ones do. ``source`` holds artefacts made from training images. ``card``
    says what an error of the unadapted model depends on.
    """

    name: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    input_size: tuple[int, int, int]  # channels, height, width
    num_classes: int
    class_names: tuple[str, ...] | None
    norm_types: dict[str, int]  # class name of each kind of norm layer -> how many
    source: tta.SourceStatistics | None = None
    matched: int | None = None  # tensors taken from a checkpoint
    card: SourceCard | None = None


def list_models(pattern: str = "*") -> list[str]:
    """Names of the bundled classifiers, or with a prefix ("timm:res*") those of that library.

    Example:
        >>> list_models("*_bn")
        ['cifar10_resnet20_bn']
    """
    library, colon, rest = string("pattern", pattern).partition(":")
    if not colon:
        return sorted(n for n in BUNDLED if fnmatch(n, pattern))
    check_library(library)
    if library == "timm":
        return [f"timm:{n}" for n in timm.list_models(rest)]
    names = torchvision.models.list_models(module=torchvision.models)
    return [f"torchvision:{n}" for n in names if fnmatch(n, rest)]


def load(
    name: str,
    pretrained: bool = True,
    *,
    checkpoint: str | Path | None = None,
    match: Match = "name",
) -> tuple[nn.Module, ModelInfo]:
    """Load a classifier in eval mode.

    Args:
        name: A bundled name, also of one that ``models.train --itta`` has left, "timm:<name>" or
            "torchvision:<name>"; "<name>@<path>" is short for ``checkpoint=<path>``.
        pretrained: Whether to load weights (of the library's default tag); False gives random
            ones. Weights of timm and torchvision are fetched by those libraries.
        checkpoint: A local ``.safetensors`` or ``.pt`` file with a state dict for this
            architecture; the number of classes is read off it. The state dict may lie in the
            dictionary of a training script (of several that fit an average of weights is preferred,
            as timm does), under names with a prefix ("module.", "_orig_mod.", "model.", ...), and
            together with buffers of profilers.
        match: "name" pairs the checkpoint's tensors with the model's by their names. "order" pairs
            them by their place, for a port of another framework whose names differ: there must be
            equally many, not counting ``num_batches_tracked``, and every shape must be equal. A
            warning and ``info.matched`` say how many matched.

    Returns:
        The model and its :class:`ModelInfo`.

    Raises:
        TypeError: When an argument is of the wrong kind.
        ValueError: For an unknown name, naming the nearest, or a file that is no checkpoint or does
            not fit.
        FileNotFoundError: When the checkpoint is not there.
        RuntimeError: When weights cannot be fetched.
    """
    name, at, path = string("name", name).partition("@")
    boolean("pretrained", pretrained)
    if match not in get_args(Match):
        raise ValueError(
            f'`match` must be one of {", ".join(get_args(Match))}, got {shown(match)}: "order" is '
            "for "
            "ports whose names differ."
        )
    by_order = match == "order"
    checkpoint = path if at else checkpoint
    if by_order and checkpoint is None:
        raise ValueError(
            '`match="order"` must come with a checkpoint, got none: pass checkpoint= or the name '
            "as NAME@PATH."
        )
    found = None if checkpoint is None else read_checkpoint(path_like("checkpoint", checkpoint))
    library, colon, rest = name.partition(":")
    if colon:
        check_library(library)
        classes = None if found is None else classes_of(found, library, rest, by_order)
        made = make(library, rest, pretrained and found is None, classes)
        model, about = made.model, {key: getattr(made, key) for key in FROM_LIBRARIES}
    else:
        model, about = _bundled(name, pretrained and found is None)
    if found is not None:
        about["matched"] = fill(model, found, name, Path(str(checkpoint)), by_order)
        about["weights"] = of_file(Path(str(checkpoint)))
    card = SourceCard(
        model=name,
        mean=about["mean"],
        std=about["std"],
        input_size=about["input_size"],
        **{field: about.pop(field) for field in ("weights", "crop", "interpolation")},
    )
    norms = Counter(type(m).__name__ for m in model.modules() if is_norm(m))
    info = ModelInfo(
        name=name, num_classes=num_classes(model), norm_types=dict(norms), card=card, **about
    )
    return model.eval(), info


def _bundled(name: str, pretrained: bool) -> tuple[nn.Module, dict[str, Any]]:
    builders = known()
    if name not in builders:
        options = [*builders, "timm:<name>", "torchvision:<name>"]
        raise ValueError(f"unknown model {shown(name)}: " + nearest(name, options))
    model = builders[name]()
    source = None
    if pretrained:
        give_weights(model, name)
        source = tta.SourceStatistics.load(FOLDER / name / "source.safetensors")
        if is_trained():
            first = None
            if name.endswith(SDA):  # which classifies images as they came
                first = builders[plain := name.removesuffix(SDA)]()
                give_weights(first.eval(), plain)
            source.denoiser = load_diffusion(classifier=first)
    return model, {
        "mean": (0.0, 0.0, 0.0),
        "std": (1.0, 1.0, 1.0),
        "input_size": (3, 32, 32),
        "class_names": CIFAR10_CLASSES,
        "source": source,
        "weights": "bundled" if pretrained else "random",
        "crop": 1.0,
        "interpolation": "",
    }
