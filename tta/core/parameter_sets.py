"""Parameter sets: several sets of values for the same tensors, one of which is in place.

A set holds values of parameters, optimiser slots and statistics. To switch sets, values are copied
out of the tensors and others into them; the tensors stay where they are, so the optimiser, a
compiled model and views stay valid. A set is one flat tensor for each device and dtype: hundreds of
small tensors are then kept in a few pieces of memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tta.core.foreach import foreach

__all__ = ["ParameterSet", "ParameterSets", "Place"]

Place = tuple[dict[str, Any], str]  # where a tensor is held: a dict, and the key in it
SMALL = 1 << 22  # values


@dataclass(frozen=True, eq=False)
class ParameterSet:
    """Values of all tensors of a :class:`ParameterSets`; nobody writes to the flat ones.

    Args:
        form: How the flat tensors are divided.
        flats: One for each device and dtype.
        moved: Tensors that are no copies, by name: while the set is in place, they are in use.
    """

    form: _Form
    flats: list[Tensor]
    moved: dict[str, Tensor]

    def named(self) -> dict[str, Tensor]:
        """The values by name; of the flat tensors, as views."""
        return self.form.named(self.flats) | self.moved

    def copy(self) -> ParameterSet:
        """One of the same values that shares no tensor that is written to."""
        return ParameterSet(self.form, self.flats, {n: t.clone() for n, t in self.moved.items()})


class ParameterSets:
    """Takes sets out of tensors, and puts them into these.

    Args:
        places: Where tensors are held whose values are copied, by name.
        moved: Where tensors are held that go with a set as they are, without a copy: large ones,
            to which nobody holds a reference.
    """

    def __init__(self, places: Mapping[str, Place], moved: Mapping[str, Place] | None = None):
        self.places = dict(places)
        self.moved = dict(moved or {})
        self._held = list(places.values())
        self._forms: list[_Form] = []

    @torch.no_grad()
    def take(self) -> ParameterSet:
        """The values that are in place now."""
        tensors = [held[key] for held, key in self._held]
        form = self._form(tensors)
        moved = {name: held[key] for name, (held, key) in self.moved.items()}
        return ParameterSet(form, form.take(tensors), moved)

    @torch.no_grad()
    def put(self, one: ParameterSet) -> None:
        """Put a set in place.

        Where shapes differ, new tensors take the places of old ones; parameters stay.
        """
        for (held, key), (shape, _, _) in zip(self._held, one.form.kinds, strict=True):
            if held[key].shape == shape:
                continue
            if isinstance(held[key], torch.nn.Parameter):
                held[key].data = held[key].data.new_empty(shape)  # the optimiser's own, too
            else:
                held[key] = held[key].new_empty(shape)
        one.form.put(one.flats, [held[key] for held, key in self._held])
        for name, (held, key) in self.moved.items():
            held[key] = one.moved[name]

    def _form(self, tensors: Sequence[Tensor]) -> _Form:
        for form in self._forms:
            if form.fits(tensors):
                return form
        form = _Form(list(self.places), [(t.shape, t.dtype, t.device) for t in tensors])
        self._forms.append(form)
        return form


class _Form:
    """Shapes of tensors, and how these lie in flat ones.

    Args:
        names: Of the tensors.
        kinds: Shape, dtype and device of each.
    """

    def __init__(self, names: list[str], kinds: list[tuple[torch.Size, Any, Any]]) -> None:
        self.names, self.kinds = names, kinds
        groups: dict[Any, list[int]] = {}
        for i, (_, dtype, device) in enumerate(kinds):
            groups.setdefault((dtype, device), []).append(i)
        self.groups = list(groups.values())
        # One flat tensor of each kind is kept with its views, as making views takes most of the
        # time of a small copy. Large ones are better copied once than twice.
        self._between: list[tuple[Tensor, list[Tensor]] | None] = []
        self._sizes = [sum(kinds[i][0].numel() for i in group) for group in self.groups]
        for (dtype, device), group, size in zip(groups, self.groups, self._sizes, strict=True):
            flat = torch.empty(size if size <= SMALL else 0, dtype=dtype, device=device)
            self._between.append((flat, self._views(flat, group)) if size <= SMALL else None)

    def fits(self, tensors: Sequence[Tensor]) -> bool:
        """Whether these are the kinds of the tensors."""
        # One by one: a list of hundreds of shapes would set off Python's collector each time.
        return all(
            t.shape == shape and t.dtype == dtype and t.device == device
            for t, (shape, dtype, device) in zip(tensors, self.kinds, strict=True)
        )

    def take(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Copy tensors into new flat ones."""
        flats = []
        for group, size, between in zip(self.groups, self._sizes, self._between, strict=True):
            some = [tensors[i] for i in group]
            if between is None:
                flat = torch.empty(size, dtype=some[0].dtype, device=some[0].device)
                foreach._foreach_copy_(self._views(flat, group), some)
            else:
                foreach._foreach_copy_(between[1], some)
                flat = between[0].clone()
            flats.append(flat)
        return flats

    def put(self, flats: Sequence[Tensor], tensors: Sequence[Tensor]) -> None:
        """Copy flat tensors into others."""
        for group, flat, between in zip(self.groups, flats, self._between, strict=True):
            views = self._views(flat, group) if between is None else between[1]
            if between is not None:
                between[0].copy_(flat)
            foreach._foreach_copy_([tensors[i] for i in group], views)

    def named(self, flats: Sequence[Tensor]) -> dict[str, Tensor]:
        """Views of flat tensors, in the order of the names."""
        found = {
            i: view
            for group, flat in zip(self.groups, flats, strict=True)
            for i, view in zip(group, self._views(flat, group), strict=True)
        }
        return {name: found[i] for i, name in enumerate(self.names)}

    def _views(self, flat: Tensor, group: list[int]) -> list[Tensor]:
        shapes = [self.kinds[i][0] for i in group]
        parts = flat.split([shape.numel() for shape in shapes])
        return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]
