"""Which parameters a method trains: ``select(model, spec) -> {name: Parameter}``."""

from __future__ import annotations

import re

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from tta.core.checks import shown, told
from tta.core.classifier import find_classifier

__all__ = ["is_norm", "norm_layers_in_words", "select"]

_TORCH_NORMS = (_NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a normalisation layer: torch's own, or one with such a name."""
    if isinstance(module, _TORCH_NORMS):
        return True
    if re.search(r"Norm|Evo|FilterResponse", type(module).__name__) is None:
        return False
    own = list(module.parameters(recurse=False))
    # It has one number per channel; a linear layer that normalises its weight has such a name too.
    return bool(own) and all(p.numel() == max(p.shape, default=1) for p in own)


def _norm_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    found: dict[str, nn.Parameter] = {}
    for prefix, module in model.named_modules():
        if is_norm(module):
            # Module order, weight before bias: the order in which papers' code collects them.
            for key, p in module.named_parameters(recurse=False):
                found[f"{prefix}.{key}" if prefix else key] = p
    return found


def select(model: nn.Module, spec: str, head: nn.Module | None = None) -> dict[str, nn.Parameter]:
    """The parameters that ``spec`` names, in module order.

    Args:
        model: The model, before any surgery.
        spec: "norm" (affine parameters of normalisation layers), "weight_bias" (parameters whose
            own name is weight or bias), "head" (those of the classifier), "body" (all others),
            "all", or a regular expression that is searched for in the name.
        head: What makes logits of features; None to look for the classifier for "head", and to
            leave nothing out for "body".

    Raises:
        ValueError: When nothing matches or the expression does not compile.
    """
    if spec == "":
        raise ValueError("`params` must name parameters, got '': use 'all' for every one.")
    everything = dict(model.named_parameters())
    if spec == "norm":
        found = _norm_parameters(model)
    elif spec == "weight_bias":
        found = {n: p for n, p in everything.items() if n.rpartition(".")[2] in ("weight", "bias")}
    elif spec == "head":
        inside = {id(p) for p in (head or find_classifier(model)).parameters()}
        found = {n: p for n, p in everything.items() if id(p) in inside}
    elif spec == "body":
        inside = set() if head is None else {id(p) for p in head.parameters()}
        found = {n: p for n, p in everything.items() if id(p) not in inside}
    elif spec == "all":
        found = everything
    else:
        try:
            pattern = re.compile(spec)
        except re.error as error:
            raise ValueError(
                "`params` must be 'norm', 'weight_bias', 'head', 'body', 'all' or a regular "
                f"expression, got {shown(spec)} ({told(error)}): correct it."
            ) from None
        found = {n: p for n, p in everything.items() if pattern.search(n)}
    once = {id(p): n for n, p in reversed(found.items())}  # a tied parameter has several names
    found = {n: p for n, p in found.items() if once[id(p)] == n and p.dtype.is_floating_point}
    if not found:
        raise ValueError(
            f"`params`={shown(spec)} must match at least one parameter, but this "
            f"{type(model).__name__} has none of that kind (it has {norm_layers_in_words(model)}): "
            "choose other params=, or a method that trains nothing, such as 'lame'."
        )
    for name, p in found.items():
        if any(stride == 0 and size > 1 for stride, size in zip(p.stride(), p.shape, strict=True)):
            raise ValueError(
                f"`model` must have parameters with memory for every value, but {shown(name)} is "
                "expanded from fewer: make it a parameter of its own by p.detach().clone()."
            )
    return found


def norm_layers_in_words(model: nn.Module) -> str:
    """The kinds of norm layers of a model, and what of them cannot be trained."""
    found: set[str] = set()
    for module in model.modules():
        kind = type(module).__name__
        if isinstance(module, _TORCH_NORMS) or is_norm(module):
            without = not any(True for _ in module.parameters(recurse=False))
            found.add(f"{kind} without weights" if without else kind)
        elif isinstance(getattr(module, "running_var", None), Tensor):
            found.add(f"{kind}, whose figures are fixed, unlike those of nn.BatchNorm2d")
    return ", ".join(sorted(found)) or "no norm layers"
