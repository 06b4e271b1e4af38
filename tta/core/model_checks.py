"""Checks that refuse what cannot be wrapped, before anything has changed."""

from __future__ import annotations

from collections.abc import Callable
from inspect import Parameter, signature
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from tta.core.adapter import Adapter
from tta.core.checks import shown
from tta.core.classifier import evaluating
from tta.core.loan import WRAPPED
from tta.core.norm_layers import AdaptiveNorm

__all__ = ["check_model"]

PARALLEL = (nn.DataParallel, nn.parallel.DistributedDataParallel)


def check_model(model: Any) -> None:
    """Refuse what is no single, unwrapped network.

    Raises:
        TypeError: When ``model`` is no module.
        ValueError: When it is scripted, parallel, compiled in part, wrapped already, or made under
            ``torch.inference_mode``.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"`model` must be a torch.nn.Module, got {type(model).__name__}: pass a classifier."
        )
    forward = getattr(model, "forward", None)
    if not callable(forward) or getattr(forward, "__func__", None) is nn.Module.forward:
        raise TypeError(
            f"`model` must be a module that can be called, got a {type(model).__name__}, which has "
            "no forward(): pass the classifier itself."
        )
    if _takes_keywords_alone(model.forward):
        raise ValueError(
            "`model` must take its images as the first positional argument, got a "
            f"{type(model).__name__}, whose forward() takes keywords alone: wrap a module that "
            "passes them on by name."
        )
    try:
        list(model.named_modules(remove_duplicate=False))
    except RecursionError:
        raise ValueError(
            f"`model` must not hold itself, got a {type(model).__name__} that is one of its own "
            "modules: take it out."
        ) from None
    for module in model.modules():
        if isinstance(module, PARALLEL):
            raise ValueError(
                f"`model` must be one copy of a network, got a {type(module).__name__}, whose "
                "copies would each adapt and forget: wrap its .module."
            )
        inner = getattr(module, "_orig_mod", None)
        if isinstance(inner, _BatchNorm):
            raise ValueError(
                f"`model` must be compiled as a whole, got a {type(inner).__name__} that was by "
                "itself and would go on as it is: give torch.compile the model."
            )
        if isinstance(module, torch.jit.ScriptModule):
            raise ValueError(
                f"`model` must have layers that can be looked into, got a {type(module).__name__}: "
                "wrap the network it was scripted from."
            )
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if is_lazy(tensor):
            raise ValueError(
                f"`model` must know the shape of every parameter, but {shown(name)} is not "
                "initialised "
                "yet: call the model with one batch first."
            )
        if tensor.is_meta:
            raise ValueError(
                f"`model` must have weights with values, but {shown(name)} is on the meta device: "
                "load "
                "the weights first, such as by load_state_dict(..., assign=True)."
            )
    try:
        with evaluating(model):
            pass
    except NotImplementedError:  # what torch.export makes has one mode for good
        raise ValueError(
            f"`model` must have layers and an eval mode, got a {type(model).__name__} that refuses "
            "eval(), as exported programs do: wrap the network that it was exported from."
        ) from None
    if any(p.is_inference() for p in model.parameters()):
        raise ValueError(
            "`model` must have ordinary parameters, got inference tensors: build it outside "
            "torch.inference_mode()."
        )
    if any(
        isinstance(m, (Adapter, AdaptiveNorm)) or WRAPPED in m.__dict__ for m in model.modules()
    ):
        raise ValueError(
            f"`model` must not be wrapped yet, got {type(model).__name__} that is or holds a "
            "wrapped model: call unwrap() on its adapter first."
        )


def _takes_keywords_alone(forward: Callable[..., Any]) -> bool:
    try:
        kinds = [parameter.kind for parameter in signature(forward).parameters.values()]
    except (TypeError, ValueError):  # a function in C, which says nothing of itself
        return False
    alone = (Parameter.KEYWORD_ONLY, Parameter.VAR_KEYWORD)
    return bool(kinds) and all(kind in alone for kind in kinds)
