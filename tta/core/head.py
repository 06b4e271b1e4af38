"""The head of a model: where it makes logits, for how many classes, from which features."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from tta.core.checks import LARGEST, nearest, shown, whole_number
from tta.core.classifier import CONVOLUTIONS, dry_run, find_classifier, size_in, size_out
from tta.core.outputs import LogitsReader

__all__ = ["FeatureSpec", "Head", "WithFeatures", "find_head"]

FeatureSpec = str | nn.Module | Callable[[nn.Module, Tensor], Tensor] | None


@dataclass(frozen=True)
class Head:
    """What makes logits out of features.

    Args:
        num_classes: Number of classes C.
        module: The layer whose input is the features; None where ``function`` gives them, or where
            it is unknown what they are.
        function: Model and images (B, ...) to features (B, D).
        width: Length D of the features; None where it is unknown before the first batch.
    """

    num_classes: int
    module: nn.Module | None = None
    function: Callable[[nn.Module, Tensor], Tensor] | None = None
    width: int | None = None

    @property
    def linear(self) -> Any:
        """The module, where it is a linear layer from the features to the logits; else None.

        A convolution is one where it sees a single pixel.
        """
        weight = getattr(self.module, "weight", None)
        if not isinstance(self.module, (nn.Linear, *CONVOLUTIONS)) or not isinstance(
            weight, Tensor
        ):
            return None
        fits = weight.is_floating_point() and weight.numel() == self.num_classes * weight.shape[1]
        return self.module if fits and len(weight) == self.num_classes else None

    @property
    def has_features(self) -> bool:
        """Whether it is known what the features are."""
        return self.module is not None or self.function is not None


class WithFeatures(nn.Module):
    """A model and a function that gives its features, called together.

    Args:
        model: The classifier.
        function: Gives features (B, D) for the model and images (B, ...).
    """

    def __init__(self, model: nn.Module, function: Any) -> None:
        super().__init__()
        self.model, self.function = model, function

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, Tensor]:
        """Return what the model returns, and the features."""
        result, found = self.model(x, *args, **kwargs), self.function(self.model, x)
        if not isinstance(found, Tensor) or found.ndim != 2:
            got = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise TypeError(
                f"`features` must be a function that returns features (B, D), got {got}: flatten "
                "or pool what it returns."
            )
        return result, found


def find_head(
    model: nn.Module,
    reader: LogitsReader,
    classes: Any = None,
    features: FeatureSpec = None,
) -> Head:
    """The head of an unwrapped model, from what the caller says of it or from its linear layer.

    Args:
        model: The classifier.
        reader: Takes logits out of what it returns.
        classes: ``num_classes=`` of the caller, or None.
        features: ``features=`` of the caller, or None.

    Raises:
        TypeError: When ``features`` is no name, module or function.
        ValueError: When there is no linear layer and the caller does not say what is there instead,
            or when there are fewer than two classes.
    """
    if classes is not None:
        classes = whole_number("num_classes", classes, 1, LARGEST)
    module = _module(model, features)
    function: Any = None
    if features is not None and module is None:
        function = features
    if module is None and function is None:
        try:
            module = find_classifier(model, reader)
        except ValueError:
            if classes is None:
                raise
        if module is not None and classes not in (None, _size_out(module)):
            module = None  # not the classifier, so the features are unknown
    if classes is None:
        classes = _classes(model, reader, module)
    if classes < 2:
        raise ValueError(
            f"`model` must tell at least 2 classes apart, got {classes} logit: a classifier with a "
            "single logit has no second class to compare with; give it two outputs, such as "
            "torch.stack([-z, z], 1) / 2."
        )
    width = _width(module)
    if width is None and features is not None:
        width = _width_in_dry_run(model, reader, module, function)
    return Head(classes, module, function, width)


def _module(model: nn.Module, features: Any) -> nn.Module | None:
    if features is None or (callable(features) and not isinstance(features, nn.Module)):
        return None
    modules = dict(model.named_modules())
    if isinstance(features, str):
        if features not in modules or features == "":
            raise ValueError(
                f"`features` must name a module of this {type(model).__name__}, got "
                f"{shown(features)}: "
                + nearest(features, [name for name in modules if name], limit=10)
            )
        return modules[features]
    if not isinstance(features, nn.Module):
        raise TypeError(
            "`features` must be the name of a module, a module, or a function of model and images, "
            f"got {type(features).__name__}: name the module that the features go into."
        )
    if not any(features is module for module in modules.values()):
        raise ValueError(
            f"`features` must be a module of the model, got a {type(features).__name__} that is "
            "not in it: pass one of model.named_modules()."
        )
    return features


def _classes(model: nn.Module, reader: LogitsReader, module: nn.Module | None) -> int:
    """Number of classes, read off the head or off a dry run."""
    if getattr(model, "num_classes", None) == 0 and _gives_features(model):
        raise ValueError(
            f"`model` must return logits, got a {type(model).__name__} with num_classes=0, which "
            "returns features: build it with its classifier."
        )
    size = None if module is None else _size_out(module)
    if size is not None:
        return size
    run = dry_run(model, reader)
    logits = None if run is None else run.logits
    if logits is None or logits.ndim != 2:
        raise ValueError(
            f"`model` must say how many classes it has, but this {type(model).__name__} has no "
            "linear layer that tells: pass wrap(..., num_classes=...)."
        )
    return logits.shape[1]


def _gives_features(model: nn.Module) -> bool:
    head = getattr(model, "get_classifier", None)
    return not callable(head) or isinstance(head(), nn.Identity)


def _size_out(module: nn.Module) -> int | None:
    try:
        return size_out(module)
    except ValueError:
        return None


def _width_in_dry_run(
    model: nn.Module, reader: LogitsReader, module: nn.Module | None, function: Any
) -> int | None:
    """Length of the features: the channels of maps, or the last axis of tokens."""
    found: list[Tensor] = []
    if module is None:
        run = dry_run(WithFeatures(model, function), LogitsReader(1))
        found = [] if run is None or run.logits is None else [run.logits]
    else:
        handle = module.register_forward_pre_hook(lambda _, args: found.append(args[0]))
        try:
            dry_run(model, reader, found.clear)
        finally:
            handle.remove()
    if not found or not isinstance(found[-1], Tensor):
        return None
    return found[-1].shape[1 if found[-1].ndim > 3 else -1]


def _width(module: nn.Module | None) -> int | None:
    try:
        return None if module is None else size_in(module)
    except ValueError:
        return None
