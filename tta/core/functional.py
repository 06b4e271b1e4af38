"""A model run with other tensors in place of its own, for teachers and dry runs.

``torch.func.functional_call`` can find all names of a shared tensor by itself, but where a whole
module is shared it then puts a wrong tensor back, and the model stays changed. So names are found
here, one at every module that holds the tensor, each module once.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["HOOKS", "call", "copy_structure", "named", "names"]

# Attributes of a module that hold its hooks.
HOOKS = (
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_backward_pre_hooks",
    "_backward_hooks",
)
# What a module and its copy have in common, besides their tensors: what the model puts among its
# buffers itself is the model's.
SHARED = ("_buffers", *HOOKS)


def names(model: nn.Module, tensors: Iterable[Tensor]) -> list[list[str]]:
    """Find parameters and buffers in ``model``: for each, one name in every module that has it."""
    found: dict[int, list[str]] = {}
    for prefix, module in model.named_modules():
        for key, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                found.setdefault(id(tensor), []).append(f"{prefix}.{key}" if prefix else key)
    return [found[id(tensor)] for tensor in tensors]


def named(places: Sequence[list[str]], values: Sequence[Tensor]) -> dict[str, Tensor]:
    """Return the values under all the names that :func:`names` found for each."""
    return {name: value for at, value in zip(places, values, strict=True) for name in at}


def call(model: nn.Module, tensors: dict[str, Tensor], *args: Any, **kwargs: Any) -> Any:
    """Return ``model(*args, **kwargs)`` with ``tensors`` in place of its own, by name.

    Example:
        >>> net = nn.Linear(1, 1, bias=False)
        >>> weight = named(names(net, [net.weight]), [torch.tensor([[3.0]])])
        >>> call(net, weight, torch.tensor([[2.0]]))
        tensor([[6.]])
    """
    if not tensors:
        return model(*args, **kwargs)
    return torch.func.functional_call(model, tensors, args, kwargs, tie_weights=False)


def copy_structure(model: nn.Module, shared: Iterable[Any] = ()) -> nn.Module:
    """Copy the modules of a model, with the same tensors and hooks in them.

    Args:
        model: Any module.
        shared: Further objects inside it that its copy is to have too.
    """
    same = list(shared)
    for module in model.modules():
        held = module.__dict__
        same += [held[name] for name in SHARED if name in held]
        same += [p for p in module._parameters.values() if p is not None]
        same += [value for value in held.values() if isinstance(value, Tensor)]
    return copy.deepcopy(model, {id(value): value for value in same})
