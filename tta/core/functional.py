"""A model run with other tensors in place of its own, for teachers and dry runs.

``torch.func.functional_call`` can find all names of a shared tensor by itself, but where a whole
module is shared it then puts a wrong tensor back, and the model stays changed. So names are found
here, one at every module that holds the tensor, each module once.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

__all__ = ["HOOKS", "bare_copy", "call", "call_with_hooks", "copy_structure", "has_hooks", "named",
           "names", "take_hooks_off"]  # fmt: skip

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
SHARED = ("_buffers", "_non_persistent_buffers_set", *HOOKS)
OF_TORCH = frozenset(vars(nn.Module()))  # attributes that every module has


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


def copy_structure(model: nn.Module, buffers: bool = True) -> nn.Module:
    """Copy the modules of a model, with the same tensors and hooks in them.

    What else is to be in both, a module names by a method ``shared_by_copies``. Attributes that
    nothing can copy, such as locks and open files, are in both too.

    Args:
        model: Any module.
        buffers: Whether what the copy puts among its buffers is put among the model's.
    """
    same: list[Any] = []
    for module in model.modules():
        held = module.__dict__
        same += getattr(type(module), "shared_by_copies", _nothing)(module)
        same += [held[name] for name in (SHARED if buffers else HOOKS) if name in held]
        same += [
            t for t in (*module._parameters.values(), *module._buffers.values()) if t is not None
        ]
        same += [value for value in held.values() if isinstance(value, Tensor)]
    try:
        return copy.deepcopy(model, {id(value): value for value in same})
    except Exception:  # whatever an attribute of the caller's raises
        same += _not_copied(model, same)
        return copy.deepcopy(model, {id(value): value for value in same})


def _not_copied(model: nn.Module, same: list[Any]) -> list[Any]:
    """Attributes of the modules that cannot be copied, beside what is in both."""
    found: list[Any] = []
    for module in model.modules():
        for name, value in module.__dict__.items():
            if name in OF_TORCH:
                continue
            try:
                copy.deepcopy(value, {id(known): known for known in same})
            except Exception:  # whatever it raises
                found.append(value)
    return found


def _nothing(module: nn.Module) -> tuple[()]:
    return ()


def has_hooks(module: nn.Module) -> bool:
    """Whether something watches or changes what a module takes or gives."""
    return any(module.__dict__[hooks] for hooks in HOOKS)


def take_hooks_off(module: nn.Module) -> None:
    """Give a module no hooks; those that it shares with another stay on the other."""
    for hooks in HOOKS:
        module.__dict__[hooks] = OrderedDict()


def bare_copy(module: nn.Module) -> nn.Module:
    """Copy a layer without its hooks and parametrisations, whose tensors the caller puts in."""
    found = copy_structure(module, buffers=False)
    take_hooks_off(found)
    if is_parametrized(found):
        found.__class__ = type(found).__bases__[0]
        del found._modules["parametrizations"]
    return found


def call_with_hooks(
    module: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    """Call a module with another function in place of its ``forward``.

    Hooks get the module that they are on: some compute its weight before each call, as pruning and
    the old ``weight_norm`` do, and others know it by its identity.
    """
    held = module.__dict__
    own = {"forward": held["forward"]} if "forward" in held else {}

    def put_back() -> None:
        held.pop("forward", None)
        held.update(own)

    def once(*args: Any, **kwargs: Any) -> Any:
        put_back()  # as the function may call the module's own
        return forward(*args, **kwargs)

    held["forward"] = once
    try:
        return module._call_impl(*args, **kwargs)
    finally:
        put_back()
