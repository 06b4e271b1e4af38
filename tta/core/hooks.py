"""What hooks read off a pass of the model: features, and the order of calls of its layers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from tta.core.checkpointing import is_recomputation
from tta.core.classifier import size_in

__all__ = [
    "CallOrderHook",
    "InputHook",
    "LogitHook",
    "drop_hooks",
    "next_hook",
    "pooled",
    "without_own_hooks",
]

TABLES = ("_forward_hooks", "_forward_pre_hooks")
NOTES = (
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks_with_kwargs",
)


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


def next_hook() -> int:
    """The number that torch will give the next hook; they only grow."""
    return RemovableHandle.next_id


def drop_hooks(model: nn.Module, since: int, kept: Iterable[RemovableHandle]) -> None:
    """Take off this package's hooks that a call has left, which an exception ended anywhere.

    An exception between the line that puts a hook on and the one that notes its handle, or among
    those that take hooks off, leaves it in the caller's model, whose passes it then changes.

    Args:
        model: The caller's.
        since: Number of the first hook of the call.
        kept: Handles of hooks that stay.
    """
    stays = {handle.id for handle in kept}
    for module in model.modules():
        for table in TABLES:
            hooks = getattr(module, table)
            for number, hook in list(hooks.items()):
                if number >= since and number not in stays and _is_own(hook):
                    del hooks[number]
                    for notes in NOTES:
                        getattr(module, notes).pop(number, None)


@contextmanager
def without_own_hooks(model: nn.Module) -> Iterator[None]:
    """Within the block, no hook of this package sees or changes a pass of the model."""
    tables = [getattr(module, table) for module in model.modules() for table in TABLES]
    before = [(hooks, dict(hooks)) for hooks in tables if any(map(_is_own, hooks.values()))]
    try:
        for hooks, _ in before:
            for number in [n for n, hook in hooks.items() if _is_own(hook)]:
                del hooks[number]
        yield
    finally:
        for hooks, everything in before:  # in the order that they are called in
            hooks.clear()
            hooks.update(everything)


def _is_own(hook: Any) -> bool:
    while isinstance(hook, partial):
        hook = hook.func
    made_by = getattr(hook, "__module__", None) or type(hook).__module__
    return made_by.startswith("tta.")


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
