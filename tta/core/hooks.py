"""What hooks read off a pass of the model: features, and the order of calls of its layers."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from tta.core.checkpointing import is_recomputation
from tta.core.classifier import size_in

__all__ = ["CallOrderHook", "InputHook", "LogitHook", "pooled"]


class InputHook:
    """A forward pre-hook that keeps the inputs of its layer; picklable, unlike a closure."""

    def __init__(self) -> None:
        self.values: list[Tensor] = []  # of a pass, one for every call

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if not is_recomputation():  # of a checkpointed part, whose input was seen before
            self.values.append(args[0])


class LogitHook:
    """A forward hook by which an output rule makes the logits in place of its layer."""

    def __init__(self, rule: Any) -> None:
        self.rule = rule
        self.active = True

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        found = self.rule.make_logits(module, args[0]) if self.active else None
        return None if found is None else found.to(output.dtype)


class CallOrderHook:
    """A forward pre-hook that notes the first call of its layer."""

    def __init__(self, name: str, order: list[str]) -> None:
        self.name, self.order = name, order

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if self.name not in self.order:
            self.order.append(self.name)


def pooled(features: Tensor, classifier: nn.Module | None) -> Tensor:
    """Average the input of a classifier over all axes but batch and channels, to (B, D).

    Channels come last, (B, ..., D), for a linear layer, and mostly second, (B, D, ...), otherwise.
    Some models make logits at every place and average these; as their classifier is linear, the
    average may as well come before it.
    """
    if features.ndim == 2:
        return features
    is_linear = isinstance(classifier, nn.Linear)
    channels_first = not is_linear and features.shape[1] == _width(classifier, features)
    return features.mean(
        list(range(2, features.ndim) if channels_first else range(1, features.ndim - 1))
    )


def _width(classifier: nn.Module | None, features: Tensor) -> int:
    """Features that a classifier declares; else the channels of maps or the last axis of tokens."""
    try:
        return size_in(classifier) if classifier is not None else -1
    except ValueError:
        return features.shape[1] if features.ndim > 3 else -1
