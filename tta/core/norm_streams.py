"""Norm layers of several streams in one operation, where their results depend on no other channel.

Each stream has statistics and affine parameters of its own. For a layer whose channels know nothing
of each other, S streams of n images with C channels are one batch of n images with S x C channels.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from tta.core.checkpointing import may_be_recomputed
from tta.core.functional import has_hooks
from tta.core.norm_layers import AdaptiveNorm, normalize_by_batch, normalize_by_source

__all__ = ["normalize_streams"]

CHANNELWISE = (normalize_by_batch, normalize_by_source)  # what may stand for a rule


def normalize_streams(
    layers: Sequence[Any], weights: Sequence[Mapping[str, Tensor]], x: Tensor
) -> Tensor | None:
    """Normalise images of several streams, each by its own layer.

    Args:
        layers: The layer of each stream; copies of one.
        weights: For each stream, tensors that stand for those of its layer, by name in it.
        x: (n, S, ...), n images of each of S streams.

    Returns:
        Like ``x``; None where each stream must be given to its layer. Nothing has changed then.
    """
    first = layers[0]
    if any(has_hooks(layer) for layer in layers):
        return None
    if isinstance(first, AdaptiveNorm):
        return _by_rules(layers, weights, x)
    forward = type(first).forward
    if forward is _BatchNorm.forward and first.running_mean is not None:
        return _by_channels(layers, weights, x, normalize_by_source)
    if forward is nn.GroupNorm.forward:
        groups = len(layers) * first.num_groups
        weight, bias = (_flat(layers, weights, name) for name in ("weight", "bias"))
        return F.group_norm(x.flatten(1, 2), groups, weight, bias, first.eps).reshape(x.shape)
    if forward is nn.LayerNorm.forward:
        return _scaled(layers, weights, F.layer_norm(x, first.normalized_shape, eps=first.eps))
    return None


def _scaled(layers: Sequence[Any], weights: Sequence[Mapping[str, Tensor]], y: Tensor) -> Tensor:
    """Scale and shift (n, S, ...) by parameters that are of its last axes."""
    weight, bias = (_stacked(layers, weights, name) for name in ("weight", "bias"))
    if weight is None:
        return y
    shape = (1, len(weight), *[1] * (y.ndim - 1 - weight.ndim), *weight.shape[1:])
    weight = weight.view(shape).to(y.dtype)
    return y * weight if bias is None else torch.addcmul(bias.view(shape).to(y.dtype), y, weight)


def _stacked(
    layers: Sequence[Any], weights: Sequence[Mapping[str, Tensor]], name: str
) -> Tensor | None:
    """A tensor of each layer, (S, ...); None where they have none."""
    own = name.rpartition(".")[2]
    pairs = zip(layers, weights, strict=True)
    found: list[Any] = [held.get(name, getattr(layer, own, None)) for layer, held in pairs]
    return None if found[0] is None else torch.stack(found)


def _flat(
    layers: Sequence[Any], weights: Sequence[Mapping[str, Tensor]], name: str
) -> Tensor | None:
    """A tensor of each layer's channels as one of all channels, (S x C,)."""
    found = _stacked(layers, weights, name)
    return None if found is None else found.flatten()


def _by_rules(
    wrappers: Sequence[AdaptiveNorm], weights: Sequence[Mapping[str, Tensor]], x: Tensor
) -> Tensor | None:
    first, rules = wrappers[0], [wrapper.rule for wrapper in wrappers]
    rule = rules[0]
    ended = not first.finish or isinstance(getattr(first.base, "act", None), nn.Module)
    recomputed = first.session.recording and may_be_recomputed()
    modes = {(r.override, r.learning, r.part_size) for r in rules}
    possible = rule.channelwise if rule.override is None else rule.override in CHANNELWISE
    own_more = any(True for child in first.base.children() for _ in child.parameters())
    if not (possible and ended) or recomputed or len(modes) > 1 or own_more:
        return None
    bases = [wrapper.base for wrapper in wrappers]
    if rule.override is not None:
        y = _by_channels(bases, weights, x, rule.override, "base.")
    else:
        joint = copy.copy(rule)
        held = {key: [r._buffers[key] for r in rules] for key in rule._buffers}
        joint.__dict__["_buffers"] = {k: torch.cat(list(v), -1) for k, v in held.items()}  # type: ignore[arg-type]
        y = _by_channels(bases, weights, x, joint, "base.")
        with torch.no_grad():
            for key, buffers in held.items():
                parts = joint._buffers[key].chunk(len(rules), -1)  # type: ignore[union-attr]
                for buffer, part in zip(buffers, parts, strict=True):
                    buffer.copy_(part)  # type: ignore[union-attr]
        for one in rules:
            one.fell_back = joint.fell_back
    return first._finished(y.flatten(0, 1)).reshape(x.shape) if first.finish else y


def _by_channels(
    bases: Sequence[Any],
    weights: Sequence[Mapping[str, Tensor]],
    x: Tensor,
    normalise: Callable[[Tensor, Any], Tensor],
    prefix: str = "",
) -> Tensor:
    """Normalise (n, S, C, ...) as (n, S x C, ...), by a layer of all streams' channels."""
    names = ("weight", "bias", "running_mean", "running_var")
    flat = {name: _flat(bases, weights, prefix + name) for name in names}
    base = SimpleNamespace(**flat, eps=bases[0].eps, affine=flat["weight"] is not None)
    return normalise(x.flatten(1, 2), base).reshape(x.shape)
