"""Teachers, source anchors and restoration: other weights for the same model.

A teacher or a source anchor is a set of tensors by parameter name, run through the same modules
with ``torch.func.functional_call``. It covers the trained parameters; everything else is the same
in student, teacher and source. None of these tensors takes part in autograd, and they move by
foreach operations.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tta.core.backbone import Backbone
from tta.core.foreach import foreach
from tta.core.masters import KeepsDtype, NeverHalf
from tta.core.norm_layers import AdaptiveNorm, frozen_statistics
from tta.core.prediction import Prediction
from tta.core.random import CountedDraws
from tta.core.state_dict import copy_tensors

__all__ = [
    "NamedTensors",
    "OtherStatistics",
    "OtherWeights",
    "ensemble",
    "low_values",
    "order_statistics",
    "quantile",
    "random_mask",
    "restore",
]


SAMPLE = 1 << 15  # values that are sorted to bound a quantile
CHUNK = 256  # images in a joint pass of several views

# Averages over batches move by steps that half precision would round away, so they never take it.
Dtype = Literal["as parameters", "as averages", "its own"]


class NamedTensors(nn.Module):
    """Tensors by parameter name, as buffers, so that devices, copies and state are generic.

    They lie in a tree of modules like that of the model, since torch.export takes no names with
    dots.

    Args:
        tensors: The tensors, which are cloned.
        constant: Whether they are fixed at wrap rather than part of the state.
        dtype: Which dtype they take when the adapter takes another one, where :meth:`hold` says no
            other.
    """

    def __init__(
        self, tensors: dict[str, Tensor], constant: bool, dtype: Dtype = "as parameters"
    ) -> None:
        super().__init__()
        self._places: dict[str, tuple[nn.Module, str]] = {}
        self._dtype: Dtype = dtype
        self._dtypes: dict[str, Dtype] = {}
        self.hold(tensors, constant)

    def __setattr__(self, name: str, value: Any) -> None:
        # Not as a module does: parts of the tree may be called as attributes of this object.
        object.__setattr__(self, name, value)

    def hold(self, tensors: dict[str, Tensor], constant: bool, dtype: Dtype | None = None) -> None:
        """Take in clones of more tensors."""
        for name, value in tensors.items():
            *path, key = name.split(".")
            holder: nn.Module = self
            for part in path:  # not by setattr: a part may be called as an attribute of this class
                holder = holder._modules.setdefault(part, nn.Module())  # type: ignore[assignment]
            holder._buffers[key] = value.detach().clone()
            if constant:
                holder._non_persistent_buffers_set.add(key)
            self._places[name], self._dtypes[name] = (holder, key), dtype or self._dtype

    def copy(self, values: Mapping[str, Tensor]) -> None:
        """Take over values by name."""
        copy_tensors(self.named(), values)

    def named(self) -> dict[str, Tensor]:
        """The tensors themselves, in order."""
        found: Any = {name: held._buffers[key] for name, (held, key) in self._places.items()}
        return found

    def tensors(self) -> list[Tensor]:
        """The tensors of :meth:`named`, without names."""
        return list(self.named().values())

    def _apply(self, fn: Any, recurse: bool = True) -> NamedTensors:
        """Move with the component that holds them, each to the dtype that it is to take."""
        whole = fn.fn if type(fn) is KeepsDtype else fn
        moves = {"as parameters": whole, "as averages": NeverHalf(whole), "its own": fn}
        for name, (holder, key) in self._places.items():
            holder._buffers[key] = moves[self._dtypes[name]](holder._buffers[key])
        return self


class OtherWeights(NamedTensors):
    """The model with other values of its trained parameters.

    Args:
        network: The wrapped model.
        parameters: The trained parameters by their original names, which are cloned.
        constant: True for a source anchor; False for a teacher, which moves.
        own_statistics: Whether it also has its own copy of the norm rules' state, which moves in
            either case.
    """

    def __init__(
        self,
        network: Backbone,
        parameters: dict[str, nn.Parameter],
        constant: bool = False,
        own_statistics: bool = False,
    ) -> None:
        state = _norm_state(network.model) if own_statistics else {}
        super().__init__({n: p.detach() for n, p in parameters.items()}, constant)
        averages = {name: value for name, (_, value) in state.items()}
        self.hold(averages, constant=False, dtype="as averages")
        self.network = network
        self.followed = list(parameters.values())
        self.places = network.names(self.followed) + [[now] for now, _ in state.values()]

    def predict(self, x: Tensor) -> Prediction:
        """Predict ``x`` (B, ...); norm rules use their state and do not move it."""
        with frozen_statistics(self.network.wrappers):
            return self.learn_statistics(x)

    def learn_statistics(self, x: Tensor) -> Prediction:
        """Predict ``x`` (B, ...); norm rules move their state, or the one of this object."""
        with torch.set_grad_enabled(self.network.session.following):
            return self.network(x, (self.places, self.tensors()))

    @torch.no_grad()
    def average(self, views: Iterable[Tensor]) -> Prediction:
        """Average logits and features over views of one batch, each (B, ...).

        Where a norm rule uses the batch, every view is a batch of its own; otherwise several small
        views share a pass, with the same result.
        """
        logits: Tensor | None = None
        features: Tensor | None = None
        count, dtype = 0, torch.float32
        for group in self._grouped(views):
            size = len(group[0])
            found = self.predict(torch.cat(group) if len(group) > 1 else group[0])
            dtype = found.logits.dtype
            total = found.logits.float().view(len(group), size, -1).sum(0)
            logits = total if logits is None else logits + total
            if found.features is not None:
                some = found.features.float().view(len(group), size, -1).sum(0)
                features = some if features is None else features + some
            count += len(group)
        if logits is None:
            raise ValueError("`views` must hold at least one batch, got none.")
        mean = None if features is None else features / count
        return Prediction((logits / count).to(dtype), mean)

    def _grouped(self, views: Iterable[Tensor]) -> Iterable[list[Tensor]]:
        group: list[Tensor] = []
        for view in views:
            group.append(view)
            if self.network.wrappers or len(view) * (len(group) + 1) > CHUNK:
                yield group
                group = []
        if group:
            yield group

    @torch.no_grad()
    def follow(self, momentum: float) -> None:
        """Move towards the student: ``t <- momentum t + (1 - momentum) s`` for every weight."""
        weights = self.tensors()[: len(self.followed)]
        foreach._foreach_lerp_(weights, [p.detach() for p in self.followed], 1 - momentum)


class OtherStatistics(NamedTensors):
    """The norm rules' state once more, which other weights of the same model move.

    Args:
        network: The wrapped model.
    """

    def __init__(self, network: Backbone) -> None:
        state = _norm_state(network.model)
        super().__init__({n: v for n, (_, v) in state.items()}, False, "as averages")
        self.network = network
        self.places = [[now] for now, _ in state.values()]

    @torch.no_grad()
    def follow(self) -> None:
        """Take over the state as it is."""
        self.copy({name: value for name, (_, value) in _norm_state(self.network.model).items()})


def _norm_state(model: nn.Module) -> dict[str, tuple[str, Tensor]]:
    """State of the norm rules: name and value in the wrapped model, by ``<layer>.<buffer>``."""
    return {
        f"{layer}.{key}": (f"{layer}.rule.{key}", value)
        for layer, module in model.named_modules()
        if isinstance(module, AdaptiveNorm)
        for key, value in module.rule.state_dict().items()
    }


@torch.no_grad()
def ensemble(parameters: Iterable[Tensor], source: list[Tensor], share: float) -> None:
    """Pull parameters towards the source, in place: ``p <- p + share (source - p)``."""
    foreach._foreach_lerp_([p.detach() for p in parameters], source, share)


@torch.no_grad()
def restore(parameters: list[nn.Parameter], source: list[Tensor], masks: list[Tensor]) -> None:
    """Put elements back to their source values, in place and bitwise.

    Args:
        parameters: Any shapes.
        source: Like ``parameters``.
        masks: Like ``parameters``, or flat: True or 1 = back to source.
    """
    weights = [m.view_as(p).to(p) for m, p in zip(masks, parameters, strict=True)]
    # A weight of 1 gives exactly the source and one of 0 exactly the parameter.
    foreach._foreach_lerp_([p.detach() for p in parameters], source, weights)


def random_mask(size: int, probability: float, draws: CountedDraws) -> Tensor:
    """Draw a flat mask whose elements are True independently with ``probability``.

    The gaps between the elements that are True are drawn, since these elements are few.

    Args:
        size: Number of elements.
        probability: In (0, 1].
        draws: Random numbers, on the device of the mask.
    """
    mask = torch.zeros(size, dtype=torch.bool, device=draws.device)
    expected = size * probability
    count = math.ceil(expected + 6 * math.sqrt(expected) + 10)
    stay = math.log1p(-probability) if probability < 1 else -math.inf
    end = -1
    while end < size:
        u = draws.uniforms(count)
        gaps = torch.log1p(-u).div_(stay).floor_().clamp_max_(size).long()
        positions = end + (gaps + 1).cumsum(0)
        end = int(positions[-1])
        mask[positions[positions < size]] = True
    return mask


def low_values(values: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """Find the elements strictly below a quantile.

    Args:
        values: (P,).
        share: Share of the elements that the quantile cuts off, in [0, 1].

    Returns:
        Mask (P,) and the quantile. When more than ``share`` of the values are equally small, the
        quantile is that value and nothing lies below it.
    """
    threshold = quantile(values, share)
    return values < threshold, threshold


def quantile(values: Tensor, share: float) -> Tensor:
    """The quantile of (P,) by linear interpolation, as ``torch.quantile``, of any length.

    Example:
        >>> float(quantile(torch.tensor([3.0, 1.0, 2.0, 0.0]), 0.5))
        1.5
    """
    position = share * (len(values) - 1)
    rank = math.floor(position)
    low, high = order_statistics(values, rank)
    return low + (high - low) * (position - rank)


def order_statistics(values: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The elements of (P,) that would be at ``rank`` and ``rank + 1`` (or the last) if sorted.

    Of many values, a sorted sample gives an upper bound for these two, and only the values below
    that bound are sorted, which are few for the small shares that methods use. Where the sample
    shows that many values may equal the bound, they are counted instead.
    """
    count, last = len(values), min(rank + 1, len(values) - 1)
    if count > 8 * SAMPLE:
        sample = values[:: count // SAMPLE].sort().values
        share = rank / count
        place = len(sample) * share + 8 + 4 * math.sqrt(len(sample) * share * (1 - share))
        end = math.ceil(place)
        if end < len(sample):
            bound = sample[end]
            if bool(sample[end - 1] == bound):  # maybe many: gradients of 0 of a whole layer
                below, upto = int((values < bound).sum()), int((values <= bound).sum())
                if below <= rank and last < upto:
                    return bound, bound
            few = values[values <= bound]
            if last < len(few):
                values = few
    ordered = values.sort().values
    return ordered[rank], ordered[last]
