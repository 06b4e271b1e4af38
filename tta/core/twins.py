"""Adapters that share all that does not move, and can hold each other's sets.

A twin is a copy of an adapter. Weights, running statistics of the source, constants and source
batches are the same tensors in both, so that a twin takes the memory of what moves. A set that was
taken out of one (:mod:`tta.core.adapter_sets`) can be put into the other: where an attribute in it
is a parameter or another part of the one adapter, the counterpart in the other takes its place.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from tta.core.adapter import Adapter
from tta.core.adapter_sets import CONTAINERS, AdapterSet, AdapterSets

__all__ = ["TwinSets", "copy_adapter", "own_tensors"]

Pairs = Mapping[int, tuple[Any, Any]]  # by the id of the first
WALKED = (list, tuple, dict)


class TwinSets(AdapterSets):
    """Sets of a twin, made here; they are given and taken as those of the first adapter.

    Args:
        sets: Of the first adapter, which is at its beginning.
    """

    def __init__(self, sets: AdapterSets) -> None:
        first = sets.adapter
        shared = _shared(first)
        memo: dict[int, Any] = {id(thing): thing for thing in shared}
        twin = copy.deepcopy(first, memo)
        # deepcopy keeps what it has copied under the id of the memo.
        pairs = [(o, memo[id(o)]) for o in memo[id(memo)] if id(o) in memo]
        self._to: Pairs = {id(one): (one, other) for one, other in pairs}
        self._back: Pairs = {id(other): (other, one) for one, other in pairs}
        super().__init__(twin)

    def take(self) -> AdapterSet:
        """What the twin holds, as a set of the first adapter."""
        one = super().take()
        return replace(one, attributes=[_translated(held, self._back) for held in one.attributes])

    def put(self, one: AdapterSet) -> None:
        """Put a set of the first adapter into the twin."""
        attributes = [_translated(held, self._to) for held in one.attributes]
        super().put(replace(one, attributes=attributes))


def copy_adapter(adapter: Adapter) -> Adapter:
    """A deep copy, without the graphs of what its model has kept of a pass."""
    kept = (t for t in _tensors(adapter) if not t.is_leaf)
    return copy.deepcopy(adapter, {id(t): t.detach().clone() for t in kept})


def own_tensors(adapter: Adapter) -> set[int]:
    """Ids of the tensors that a twin of this adapter has for itself: those that may move."""
    places, by_rows = adapter._state.named_places()
    moving = [held[key] for held, key in (*places.values(), *by_rows.values())]
    halves = [p for _, p in adapter.network.masters.pairs]
    return {id(t) for t in (*moving, *halves)}


def _shared(adapter: Adapter) -> list[Any]:
    """What an adapter and its twins have in common."""
    own, context = own_tensors(adapter), adapter._context
    tensors = [t for t in _tensors(adapter) if id(t) not in own]
    tensors += [*adapter.session.reset_point.values(), *adapter._state.original.values()]
    given = (context.augment, context.restore_mask, context.draws.given, adapter._on_event)
    return [*tensors, *given, adapter.config, adapter.session.warned]


def _tensors(thing: Any) -> Iterator[Tensor]:
    """Tensors in an object and in all that it holds."""
    seen: set[int] = set()
    waiting = [thing]
    while waiting:
        one = waiting.pop()
        if id(one) in seen:
            continue
        seen.add(id(one))
        if isinstance(one, Tensor):
            yield one
        elif isinstance(one, WALKED):
            waiting += one.values() if isinstance(one, dict) else one
        elif isinstance(one, nn.Module) or type(one).__module__.partition(".")[0] == "tta":
            waiting += getattr(one, "__dict__", {}).values()


def _translated(value: Any, pairs: Pairs) -> Any:
    """A value with counterparts in place of parts; the same object where it holds none."""
    if id(value) in pairs:
        return pairs[id(value)][1]
    kind = type(value)
    if kind not in (*CONTAINERS, tuple):
        return value
    old = list(value.values() if kind is dict else value)
    new = [_translated(item, pairs) for item in old]
    if all(a is b for a, b in zip(old, new, strict=True)):
        return value
    if kind is dict:
        return dict(zip(value, new, strict=True))
    return type(value)(new, value.maxlen) if hasattr(value, "maxlen") else kind(new)
