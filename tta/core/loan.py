"""Settings of the caller's model that an adapter changes while it has the model."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from tta.core.compiled import COMPILED

__all__ = ["WRAPPED", "Loan", "Untouched"]

WRAPPED = "_tta_wrapped"  # set on every module of a wrapped model
# Of every module: its parts, parameters and hooks, by name.
HELD = tuple(name for name, value in vars(nn.Module()).items() if isinstance(value, dict))


class Loan:
    """Eval mode, flags and gradients of a model, from wrapping until it is given back.

    Args:
        model: The model, with its norm layers wrapped.
        own: The model's parameters that are trained, whose gradients are stored until the end.
        trained: The parameters that need gradients; None where nothing is trained.
        mark: Whether the model counts as wrapped meanwhile.
    """

    def __init__(
        self,
        model: nn.Module,
        own: Iterable[nn.Parameter],
        trained: Iterable[nn.Parameter] | None,
        mark: bool = True,
    ) -> None:
        self._modes = [(m, m.training) for m in model.modules()]
        self._flags = [(p, p.requires_grad) for p in model.parameters()]
        self._gradients = [(p, p.grad) for p in own]
        self._mark = mark
        for module, _ in self._modes if mark else ():
            module.__dict__[WRAPPED] = True
        for p, _ in self._gradients:
            p.grad = None
        model.eval()
        if trained is not None:
            chosen = {id(p) for p in trained}
            for p in model.parameters():
                p.requires_grad_(id(p) in chosen)
        self._caching = []
        for module, _ in self._modes:
            if module._parameters and _caches(module):
                before = module.register_forward_pre_hook(_forget)
                self._caching.append((module, before, module.register_forward_hook(_forget)))

    def end(self) -> None:
        """Put everything back, on the model's own modules."""
        for module, *handles in self._caching:
            for handle in handles:
                handle.remove()
            _forget(module)
        for p, gradient in self._gradients:
            p.grad = gradient
        for p, flag in self._flags:
            p.requires_grad_(flag)
        for module, mode in self._modes:
            module.training = mode
            if self._mark:
                module.__dict__.pop(WRAPPED, None)


class Untouched:
    """A model before it is wrapped, to be put back where wrapping ends early, wherever that is.

    A signal comes between any two lines, so that no part of an adapter could be asked to take back
    what it did.

    Args:
        model: The model, which is not wrapped.
    """

    def __init__(self, model: nn.Module) -> None:
        self._modules = [
            (m, m.training, [(held, held.copy()) for held in _held(m)]) for m in model.modules()
        ]
        self._parameters = [(p, p.requires_grad, p.grad) for p in model.parameters()]
        self._model, self._compiled = model, COMPILED in vars(model)

    def put_back(self) -> None:
        """Make the model what it was."""
        for module, training, held in self._modules:
            module.training = training
            module.__dict__.pop(WRAPPED, None)
            for now, before in held:  # the dictionary itself stays, since handles of hooks know it
                now.clear()
                now.update(before)
        for p, flag, gradient in self._parameters:
            p.requires_grad_(flag)
            p.grad = gradient
        if not self._compiled:
            vars(self._model).pop(COMPILED, None)


def _held(module: nn.Module) -> list[dict[str, Any]]:
    """The dictionaries of a module's parts and hooks; a scripted one keeps its parts elsewhere."""
    return [held for name in HELD if isinstance(held := module.__dict__.get(name), dict)]


def _caches(module: nn.Module) -> list[str]:
    """Names of dictionaries in which a module keeps in eval mode what it made of its weights.

    LeViT, TinyViT, EfficientFormer and EfficientViT of timm keep their attention biases so.
    """
    return [name for name, held in vars(module).items() if "cache" in name and type(held) is dict]


def _forget(module: nn.Module, *_: Any) -> None:
    """Empty them: weights are trained, here or on source images, and teachers' stand in for them.

    What is in them has a graph, which the next pass must not go back through.
    """
    for name in _caches(module):
        if vars(module)[name]:
            setattr(module, name, {})
