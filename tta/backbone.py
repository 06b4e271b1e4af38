"""The wrapped model as methods see it: a function from images to logits and features.

Features are what the classifier is fed. The classifier is found by structure (timm's
``get_classifier``, else the last linear layer), never by architecture name, and its input is read
by a hook, so that no model has to be split.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from tta.norm import AdaptiveNorm
from tta.slots import Prediction

__all__ = ["Backbone", "feature_size", "find_classifier", "num_classes"]


def find_classifier(model: nn.Module) -> nn.Module:
    """The layer that makes logits out of features.

    Raises:
        ValueError: When the model has neither ``get_classifier()`` nor a linear layer.
    """
    get_classifier: Any = getattr(model, "get_classifier", None)
    if callable(get_classifier):
        head = get_classifier()
        if isinstance(head, (tuple, list)):
            head = head[0]
        if isinstance(head, nn.Module) and not isinstance(head, nn.Identity):
            return head
    linear = [m for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    if not linear:
        raise ValueError(
            f"`model` must be a classifier with a linear layer, got {type(model).__name__} without "
            "one: give it a get_classifier() that returns the layer which makes the logits."
        )
    return next((m for m in reversed(linear) if isinstance(m, nn.Linear)), linear[-1])


def num_classes(model: nn.Module) -> int:
    """Number of classes, read off the classifier."""
    head = find_classifier(model)
    for module in [head, *reversed(list(head.modules()))]:
        for name in ("out_features", "out_channels"):
            if isinstance(getattr(module, name, None), int):
                return getattr(module, name)
    raise ValueError(
        f"`model` must have a classifier with out_features, got a {type(head).__name__}: give "
        "the model a get_classifier() that returns its last linear layer."
    )


def feature_size(model: nn.Module) -> int:
    """Length of the features that the classifier takes, read off its first layer.

    Raises:
        ValueError: When no layer of it says so.
    """
    head = find_classifier(model)
    for module in [head, *head.modules()]:
        for name in ("in_features", "in_channels"):
            if isinstance(getattr(module, name, None), int):
                return getattr(module, name)
    raise ValueError(
        f"`model` must have a classifier with in_features, got a {type(head).__name__}: give "
        "the model a get_classifier() that returns its last linear layer."
    )


class _Tap:
    """A forward pre-hook that keeps the input of its layer; picklable, unlike a closure."""

    def __init__(self) -> None:
        self.value: Tensor | None = None

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self.value = args[0]


class _Mark:
    """A forward pre-hook that notes the first call of its layer."""

    def __init__(self, name: str, order: list[str]) -> None:
        self.name, self.order = name, order

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if self.name not in self.order:
            self.order.append(self.name)


class Backbone:
    """Calls the model, checks what comes out, and reads features when asked to.

    Args:
        model: A classifier in eval mode.
        classes: Expected number of logits.
        features: Whether predictions carry features.
    """

    def __init__(self, model: nn.Module, classes: int, features: bool) -> None:
        self.model = model
        self.num_classes = classes
        self.tap = _Tap() if features else None
        self._handles: list[Any] = []
        self._marks: list[Any] = []
        self._order: list[str] = []
        if self.tap is not None:
            self._handles.append(find_classifier(model).register_forward_pre_hook(self.tap))
        self.wrappers = [m for m in model.modules() if isinstance(m, AdaptiveNorm)]
        self.entry = next((m for m in model.modules() if _takes_images(m)), None)

    def names(self, parameters: Iterable[nn.Parameter]) -> list[str]:
        """Names in the model as it is now, with norm layers inside their wrappers."""
        known = {id(p): name for name, p in self.model.named_parameters()}
        return [known[id(p)] for p in parameters]

    def __call__(self, x: Tensor, weights: dict[str, Tensor] | None = None) -> Prediction:
        """One forward pass.

        Args:
            x: What the model takes.
            weights: Used in place of the parameters of these :meth:`names`.
        """
        if weights is None:
            logits = self.model(x)
        else:
            logits = torch.func.functional_call(self.model, weights, (x,))
        if not isinstance(logits, Tensor):
            raise TypeError(
                f"`model` must return one tensor of logits, got {type(logits).__name__}: wrap it "
                "in a module that returns the logits."
            )
        if logits.ndim != 2 or logits.shape[1] != self.num_classes:
            raise ValueError(
                f"`model` must return logits of shape (B, {self.num_classes}), the size of its "
                f"classifier, got {tuple(logits.shape)}: give it a get_classifier() that returns "
                "the layer which makes the logits."
            )
        features = None
        if self.tap is not None:
            if self.tap.value is None:
                raise ValueError(
                    "`model` must call its classifier in forward, but "
                    f"{type(find_classifier(self.model)).__name__} was not called: give the model "
                    "a get_classifier() that returns the layer which makes the logits."
                )
            features, self.tap.value = self.tap.value.flatten(1), None
        return Prediction(logits, features)

    def check(self, x: Any) -> None:
        """Refuse images that the model cannot take, before anything has changed.

        Raises:
            TypeError: Not a floating-point tensor of the model's dtype.
            ValueError: Wrong rank or channel count, or an empty batch.
        """
        if not isinstance(x, Tensor):
            raise TypeError(f"`images` must be a tensor, got {type(x).__name__}: pass a batch.")
        if not x.is_floating_point():
            raise TypeError(
                f"`images` must be floating point, got {x.dtype}: pass what the model takes, "
                "such as images.float() / 255."
            )
        entry: Any = self.entry
        if isinstance(entry, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            rank = entry.weight.ndim
            if x.ndim != rank:
                raise ValueError(
                    f"`images` must have {rank} axes (batch, {entry.in_channels} channels, "
                    f"{rank - 2} of space), got shape {tuple(x.shape)}: "
                    + ("add a batch axis with images[None]." if x.ndim == rank - 1 else "reshape.")
                )
        elif x.ndim < 2:
            raise ValueError(
                f"`images` must have a batch axis and more, got shape {tuple(x.shape)}: add one."
            )
        if x.shape[0] == 0 or x.numel() == 0:
            raise ValueError(
                f"`images` must hold at least one image, got shape {tuple(x.shape)}: "
                "skip empty batches."
            )
        if entry is not None:
            if x.dtype != entry.weight.dtype and not torch.is_autocast_enabled(x.device.type):
                raise TypeError(
                    f"`images` must be {entry.weight.dtype} like the model, got {x.dtype}: convert "
                    "one of them, or call under torch.autocast."
                )
            if _direct(entry) and x.shape[1] != entry.in_channels:
                raise ValueError(
                    f"`images` must have {entry.in_channels} channels, got shape "
                    f"{tuple(x.shape)}: convert them to what the model takes."
                )

    def watch_calls(self, names: Iterable[str]) -> None:
        """Note, from now on, in which order the named layers are called."""
        for name in names:
            mark = _Mark(name, self._order)
            self._marks.append(self.model.get_submodule(name).register_forward_pre_hook(mark))

    def call_order(self) -> list[str]:
        """The watched layers in the order of their first call, those never called left out.

        Watching ends here.
        """
        for handle in self._marks:
            handle.remove()
        order, self._marks, self._order = self._order, [], []
        return order

    def close(self) -> None:
        """Take all hooks off the model."""
        self.call_order()
        for handle in self._handles:
            handle.remove()


def _takes_images(module: nn.Module) -> bool:
    return isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) and bool(
        module.weight.dtype.is_floating_point
    )


def _direct(entry: nn.Module) -> bool:
    """Whether images reach the first convolution as they are.

    Some models rearrange pixels into many channels first (space to depth), which only their code
    knows; a convolution of at most 4 channels is taken at its word.
    """
    return getattr(entry, "in_channels", 99) <= 4
