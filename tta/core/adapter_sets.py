"""Everything that one adapter holds, set aside and put back: how streams share one model.

Besides the tensors of a state these are the generator, what ``reset`` restores, whether learning is
paused, which parameters ask for gradients, which buffers of the model have moved, and the
attributes of components in which reports, events and counts are. What equals the beginning is not
kept twice.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from copy import copy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from tta.core.adapter import Adapter
from tta.core.checks import shown
from tta.core.parameter_sets import ParameterSet, ParameterSets
from tta.core.plain_data import PlainReader, PlainWriter, is_plain

__all__ = ["AdapterSet", "AdapterSets"]

INTERNAL = set(vars(nn.Module()))  # attributes that every module has
CONTAINERS = (list, dict, set, deque)  # that are changed in place, if they are exactly of this type
Attributes = list[dict[str, Any]]
MISSING = object()


@dataclass(frozen=True, eq=False)
class AdapterSet:
    """All that an adapter held at one time; see :class:`AdapterSets`."""

    tensors: ParameterSet
    moving: tuple[str, ...]  # buffers of the model that are among these
    rng: Tensor
    learning: bool
    asking: tuple[bool, ...]  # for gradients, of all parameters
    reset_point: dict[str, Tensor]  # what differs from the beginning
    attributes: Attributes  # what is another object than at the beginning

    def copy(self) -> AdapterSet:
        """One that stays as it is while this one is in use."""
        return replace(self, tensors=self.tensors.copy())


class AdapterSets:
    """Takes sets out of an adapter, and puts them into it.

    The caller has the adapter's turn.

    Args:
        adapter: As it is now, it is the beginning of every new set.
    """

    def __init__(self, adapter: Adapter) -> None:
        self.adapter = adapter
        self.state, self.session = adapter._state, adapter.session
        self.buffers = self.state.network.buffers
        self._sets: dict[Any, tuple[ParameterSets, list[nn.Parameter]]] = {}
        transaction, serving = adapter._transaction, adapter._serving
        self._held: list[tuple[dict[str, Any], set[str] | None]] = [
            *((held, None) for held in transaction.attributes()),
            (vars(serving), {"seen", "rejected", "taken"}),
            (vars(adapter._context.draws), {"call"}),
        ]
        self._settle()
        self._start = self._attributes()
        self._reset_point = dict(self.session.reset_point)
        self._first = self.take().copy()

    def new(self) -> AdapterSet:
        """One as at the beginning."""
        own = [
            {key: copy(value) for key, value in held.items() if type(value) in CONTAINERS}
            for held in self._start
        ]
        return replace(self._first, tensors=self._first.tensors.copy(), attributes=own)

    @torch.inference_mode(False)
    def take(self) -> AdapterSet:
        """What the adapter holds; tensors that are moved go with it, so put another one next."""
        self._settle()
        attributes = [
            {key: value for key, value in now.items() if start.get(key, MISSING) is not value}
            for now, start in zip(self._attributes(), self._start, strict=True)
        ]
        reset_point, start = self.session.reset_point, self._reset_point
        sets, parameters = self._now()
        return AdapterSet(
            sets.take(),
            tuple(self.buffers.moving),
            self.state.generator.get_state(),
            self.session.learning,
            tuple(p.requires_grad for p in parameters),
            {key: value for key, value in reset_point.items() if start.get(key) is not value},
            attributes,
        )

    @torch.inference_mode(False)
    def put(self, one: AdapterSet) -> None:
        """Put a set into the adapter. Where this is interrupted, put it again, or another one."""
        self.buffers.go_to(one.moving)
        self._set_attributes(one.attributes)
        sets, parameters = self._now()
        sets.put(one.tensors)
        self.state.generator.set_state(one.rng)
        self.session.reset_point = self._reset_point | one.reset_point
        for p, asks in zip(parameters, one.asking, strict=True):
            if p.requires_grad != asks:
                p.requires_grad_(asks)
        self.state.network.masters.write_to_model()
        if self.session.learning != one.learning:
            self.adapter.switch_learning(one.learning)

    def put_first(self) -> None:
        """Put the adapter back to the beginning, with the very objects that it held."""
        self.put(self._first.copy())

    def export(self, one: AdapterSet) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """A set as tensors by name, and what JSON can hold.

        Raises:
            TypeError: When a component holds an attribute that no file can hold.
        """
        writer = PlainWriter(self._parameters())
        written = []
        for held, start in zip(one.attributes, self._start, strict=True):
            found = {}
            for key, value in held.items():
                if _alike(value, start.get(key, MISSING)):
                    continue
                try:
                    found[key] = writer.write(value)
                except TypeError as error:
                    raise TypeError(
                        f"`{key}` of a component must be plain data or a buffer to be written to "
                        f"a file, got {error}: register it as a buffer."
                    ) from None
            written.append(found)
        tensors = {f"state:{name}": t for name, t in one.tensors.named().items()}
        tensors["state:rng"] = one.rng
        tensors |= {f"initial:{name}": t for name, t in one.reset_point.items()}
        tensors |= {f"value:{i}": t for i, t in enumerate(writer.tensors)}
        about = {"learning": one.learning, "asking": list(one.asking), "attributes": written}
        return tensors, about

    def export_first(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The beginning as :meth:`export`, with all attributes that a file can hold."""
        tensors, about = self.export(replace(self._first, attributes=[{} for _ in self._start]))
        writer = PlainWriter(self._parameters())
        about["attributes"] = [
            {k: writer.write(v) for k, v in held.items() if is_plain(v, self._parameters())}
            for held in self._start
        ]
        return tensors | {f"value:{i}": t for i, t in enumerate(writer.tensors)}, about

    def load(self, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
        """Put into the adapter what :meth:`export` gave, after checks.

        Raises:
            ValueError: When it does not fit; the adapter then is at the beginning, or as it was.
        """
        parts: dict[str, dict[str, Tensor]] = {"state": {}, "initial": {}, "value": {}}
        for key, tensor in tensors.items():
            kind, _, name = key.partition(":")
            if kind not in parts:
                raise ValueError(
                    f"`tensors` must be what export() gave, got the key {shown(key, 60)}: "
                    "pass that."
                )
            parts[kind][name] = tensor
        values = parts["value"]
        attributes = self._read(about.get("attributes"), values)
        asking, learning = about.get("asking"), about.get("learning")
        count = len(self.state.parameters())
        if not isinstance(learning, bool) or not isinstance(asking, list) or len(asking) != count:
            raise ValueError(
                f"`about` must have one flag for each of {count} parameters, got others: load it "
                "into an adapter like the one that it is of."
            )
        self.put(self.new())

        def load() -> None:
            self.state.load(parts["initial"], as_source=True, allow_nonfinite=True)
            self.state.load(parts["state"], allow_nonfinite=True)
            missing = self.state.tensors().keys() - parts["state"].keys()
            if missing:
                raise ValueError(
                    f"`tensors` must hold a whole state, but {shown(min(missing))} is missing: "
                    "export it again."
                )
            for p, asks in zip(self.state.parameters(), asking, strict=True):
                p.requires_grad_(bool(asks) and p.is_floating_point())

        self.adapter._transaction.run(load)
        self._set_attributes(
            [a | b for a, b in zip(self.new().attributes, attributes, strict=True)]
        )
        self.adapter.switch_learning(learning)

    def _settle(self) -> None:
        """End what was interrupted, and see which buffers of the model have moved."""
        self.adapter._transaction.settle()
        self.state.notice_model_buffers(by_value=True)

    def _now(self) -> tuple[ParameterSets, list[nn.Parameter]]:
        """Sets of what moves at present, and all parameters."""
        layout = self.state.layout()
        if layout not in self._sets:
            places, by_rows = self.state.named_places()
            free = self.state.resizable_places()
            moved = by_rows | {name: place for name, place in places.items() if name in free}
            places = {name: place for name, place in places.items() if name not in free}
            self._sets[layout] = ParameterSets(places, moved), self.state.parameters()
        return self._sets[layout]

    def _parameters(self) -> dict[str, nn.Parameter]:
        return {} if self.state.update is None else self.state.update.optimized()

    def _attributes(self) -> Attributes:
        return [
            {k: v for k, v in held.items() if (k not in INTERNAL if only is None else k in only)}
            for held, only in self._held
        ]

    def _set_attributes(self, attributes: Attributes) -> None:
        """Set what differs from the beginning; the rest is as at the beginning."""
        for (held, only), start, own in zip(self._held, self._start, attributes, strict=True):
            if only is None:
                for key in held.keys() - start.keys() - own.keys() - INTERNAL:
                    del held[key]
            held.update(start)
            held.update(own)

    def _read(self, written: Any, values: Mapping[str, Tensor]) -> Attributes:
        """Attributes from a file, as far as there are such ones and they are plain data."""
        parameters = self._parameters()
        device = next((p.device for p in self.state.parameters()), torch.device("cpu"))
        tensors = [values[str(i)].to(device) for i in range(len(values)) if str(i) in values]
        reader = PlainReader(parameters, tensors)
        same = isinstance(written, list) and len(written) == len(self._start)
        if not same or not all(isinstance(held, dict) for held in written):
            raise ValueError(
                f"`about` must have attributes of {len(self._start)} parts, got others: load it "
                "into an adapter like the one that it is of."
            )
        found: Attributes = []
        for held, start in zip(written, self._start, strict=True):
            found.append({})
            for key, value in held.items():
                if key in start and is_plain(start[key], parameters):
                    read, old = reader.read(value), start[key]
                    if None not in (read, old) and _kind(read) != _kind(old):
                        raise ValueError(
                            f"`about` must have a {type(old).__name__} as {shown(key, 40)}, got a "
                            f"{type(read).__name__}: export it again."
                        )
                    found[-1][key] = read
        return found


def _alike(value: Any, start: Any) -> bool:
    """Whether a container holds the very items that the one at the beginning holds."""
    if value is start:
        return True
    if type(value) is not type(start) or type(value) not in CONTAINERS or len(value) != len(start):
        return False
    if isinstance(value, dict):
        return all(start.get(key, MISSING) is item for key, item in value.items())
    return all(a is b for a, b in zip(value, start, strict=True))


def _kind(value: Any) -> type:
    return float if isinstance(value, (int, float)) else type(value)
