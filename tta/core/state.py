"""The state of an adapter: all that moves as one flat dict of tensors, copied and put back.

Names are those of the caller's model: ``param/<name>``, ``norm/<layer>.<buffer>``,
``update/<buffer>``, ``optim/<parameter>.<slot>``, ``output/<buffer>``, ``guard/<buffer>``,
``input/<buffer>``, ``window/<buffer>``, ``model/<name>`` (buffers that the model itself changes)
and ``rng``.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tta.core.backbone import Backbone
from tta.core.component import Component
from tta.core.guard import Guard
from tta.core.journal import Journal
from tta.core.norm_layers import AdaptiveNorm
from tta.core.output_rule import Output
from tta.core.parameter_sets import Place
from tta.core.state_dict import (
    check_origin,
    check_state,
    checksum,
    compact_copies,
    copy_tensors,
    current_name,
)
from tta.core.update import Update
from tta.core.window import WINDOW

__all__ = ["AdapterState", "Place"]

GUARD = "guard/"
CHECKED = 1024  # elements of each parameter that a fingerprint covers: training moves all


class AdapterState:
    """Everything that moves in one adapter.

    Args:
        label: The components in one word; a state belongs to adapters of the same label.
        generator: Source of all random draws.
        journal: Of what a call writes row by row.
        network: The wrapped model.
        wrappers: The wrapped norm layers, by their names in the caller's model.
        update: The update, or None.
        output: The output rule, or None.
        guard: The guard, or None.
        input_rule: The input rule, or None.
        window: The last images, or None.
    """

    def __init__(
        self,
        label: str,
        generator: torch.Generator,
        journal: Journal,
        network: Backbone,
        wrappers: dict[str, AdaptiveNorm],
        update: Update | None,
        output: Output | None,
        guard: Guard | None = None,
        input_rule: Component | None = None,
        window: Component | None = None,
    ) -> None:
        self.generator = generator
        self.journal = journal
        self.network = network
        self.session = network.session
        self.update = update
        self.norm_rules = {f"norm/{name}.": wrapper.rule for name, wrapper in wrappers.items()}
        self.parts: dict[str, Component] = {}
        slots = (
            ("input/", input_rule),
            ("update/", update),
            ("output/", output),
            (GUARD, guard),
            (f"{WINDOW}/", window),
        )
        for prefix, part in slots:
            if part is not None:
                self.parts[prefix] = part
        trained = {} if update is None else update.trained()
        self.original = {key.partition("/")[2]: value.clone() for key, value in trained.items()}
        self.fingerprint = {
            "method": label,
            "weights": checksum(network.model.parameters(), CHECKED),
        }
        if guard is not None and guard.keeps_healthy:
            guard.hold_snapshot(self)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors themselves, and the state of the generator as a copy."""
        found = {} if self.update is None else self.update.trained()
        for prefix, part in self._components().items():
            found |= {f"{prefix}{name}": value for name, value in part.state_dict().items()}
        if self.update is not None:
            found |= self.update.optimizer_slots()
        own = self.network.buffers.tensors()
        found |= {f"model/{name}": buffer for name, buffer in own.items()}
        return found | {"rng": self.generator.get_state()}

    def places(self) -> tuple[list[Place], list[Place]]:
        """Where all that moves is held: what a call may write to, and what it writes rows of.

        The latter are buffers that their components name in ``kept_by_rows``.
        """
        found, by_rows = self.named_places()
        return list(found.values()), list(by_rows.values())

    def named_places(self) -> tuple[dict[str, Place], dict[str, Place]]:
        """As :meth:`places`, by the names of a state."""
        own = self.network.buffers.moving
        found = dict(zip((f"model/{name}" for name in own), self.own_places(), strict=True))
        by_rows: dict[str, Place] = {}
        for slot, part in self._components().items():
            rows = part.kept_by_rows()
            for prefix, module in part.named_modules():
                before = f"{prefix}." if prefix else ""
                for key, value in module._buffers.items():
                    if value is not None and key not in module._non_persistent_buffers_set:
                        places = by_rows if before + key in rows else found
                        places[slot + before + key] = (module._buffers, key)
                for key, p in module._parameters.items():
                    if p is not None:
                        found[slot + before + key] = (module._parameters, key)
        if self.update is not None:
            trained: dict[str, Any] = dict(self.update.context.parameters)
            found |= {f"param/{name}": (trained, name) for name in trained}
            for name, p in self.update.optimized().items():
                slots = self.update.optimizer.state.get(p, {})
                for key, value in slots.items():
                    if isinstance(value, Tensor):
                        found[f"optim/{name}.{key}"] = (slots, key)
        return found, by_rows

    def own_places(self) -> list[Place]:
        """Where the model's own buffers are held that move."""
        return [self.network.buffers.place(name) for name in self.network.buffers.moving]

    def layout(self) -> tuple[Any, ...]:
        """What :meth:`places` depends on."""
        optimizer = None if self.update is None else self.update.optimizer
        return (optimizer, *self.network.buffers.moving)

    def parameters(self) -> list[nn.Parameter]:
        """All parameters: the model's, float32 copies of them, and those of the update."""
        own = [] if self.update is None else self.update.parameters()
        masters = [master for master, _ in self.network.masters.pairs]
        return [*self.network.model.parameters(), *masters, *own]

    def moving(self) -> dict[str, Tensor]:
        """The tensors that a guard may put back: what was learned, and not what was seen."""
        others = (GUARD, f"{WINDOW}/")
        return {k: v for k, v in self.tensors().items() if not k.startswith(others) and k != "rng"}

    def keys_of(self, trait: str, but: str = GUARD) -> list[str]:
        """Keys of buffers that their component names in ``trait``, except those of one slot."""
        return [
            f"{prefix}{name}"
            for prefix, part in self._components().items()
            if prefix != but
            for name in getattr(part, trait)()
        ]

    def lazy_keys(self, but: str = GUARD) -> list[str]:
        """Keys of what is empty until the first batch, except those of one slot."""
        return [*self.keys_of("lazy_buffers", but), *self._lazy_own()]

    def ranges(self, but: str = GUARD) -> dict[str, tuple[int, int]]:
        """Smallest and largest whole numbers by key, except those of one slot."""
        return {
            f"{prefix}{name}": bounds
            for prefix, part in self._components().items()
            if prefix != but
            for name, bounds in part.integer_ranges().items()
        }

    def clones(self) -> dict[str, Tensor]:
        """Copies, in a dict that carries the fingerprint as torch's state dicts carry versions."""
        self.notice_model_buffers(by_value=True)
        tensors = self.tensors()
        self._check_layout(tensors)
        copies: Any = OrderedDict((k, v.detach().clone()) for k, v in tensors.items())
        copies.fingerprint = self.fingerprint
        return copies

    def constants(self) -> dict[str, Tensor]:
        """What was fixed at wrap, by name."""
        return {
            f"{prefix}{name}": value
            for prefix, part in self.parts.items()
            for name, value in part.constants().items()
        }

    def load(
        self,
        state: Mapping[str, Tensor],
        as_source: bool = False,
        allow_nonfinite: bool = False,
    ) -> None:
        """Check a full or partial state and copy it in; see :meth:`tta.Adapter.load_state`."""
        of_0_1_0 = getattr(state, "made_by", self.fingerprint)
        check_origin(getattr(state, "fingerprint", of_0_1_0), self.fingerprint)
        named = ((current_name(str(key)), value) for key, value in state.items())
        values = {key: value for key, value in named if key is not None}
        self._take_up_model_buffers(values)
        lazy = set(self.lazy_keys(but=""))
        undefined = set(self.keys_of("undefined_as_nan", but=""))
        check_state(
            values,
            self.tensors(),
            self._resizable().keys() - lazy,
            lazy,
            None if allow_nonfinite else undefined,
            self.ranges(but=""),
            self.keys_of("image_buffers", but=""),
        )
        self.copy_in(values)
        if as_source:
            moving = self.tensors()
            changed = {key: moving[key] for key in values if key != "rng"}
            self.session.reset_point |= compact_copies(changed, self.original)
            if "rng" in values:
                self.session.reset_point["rng"] = values["rng"].clone()

    def copy_in(self, values: Mapping[str, Tensor]) -> None:
        """Copy checked tensors to where they belong."""
        images = self.keys_of("image_buffers", but="")
        for key, (part, name) in self._resizable().items():
            held = getattr(part, name)
            kind = values[key].dtype if key in images and key in values else held.dtype
            if key in values and (values[key].shape != held.shape or kind != held.dtype):
                # Not by register_buffer, since names may have dots.
                part._buffers[name] = held.new_empty(values[key].shape, dtype=kind)
        for key, (place, name) in self.named_places()[1].items():
            if key in values:  # no copy of these was made when the call began
                self.journal.keep(place[name], ...)
        for key, own in self._lazy_own().items():
            if key in values and values[key].shape != own.shape:
                own.data = own.new_empty(values[key].shape)  # of the optimiser, too
        copy_tensors(self.tensors(), {k: v for k, v in values.items() if k != "rng"})
        if "rng" in values:
            self.generator.set_state(values["rng"].cpu())
        self.network.masters.write_to_model()
        self.network.buffers.notice()

    def notice_model_buffers(self, by_value: bool = False) -> list[str]:
        """Take buffers of the model that have moved for the first time into the state.

        Args:
            by_value: Whether values are compared whatever has been seen, or after the first call
                alone.
        """
        buffers = self.network.buffers
        found = buffers.notice(by_value=True) if by_value else buffers.notice_after_call()
        self._note_starts(found)
        return found

    def _note_starts(self, names: Iterable[str]) -> None:
        """Have ``reset`` restore what buffers of the model were at wrap."""
        for name in names:
            start = self.network.buffers.start_of(name)
            self.session.reset_point[f"model/{name}"] = start.clone()

    def _take_up_model_buffers(self, state: Mapping[str, Tensor]) -> None:
        """Those that moved in the adapter that the state is of, and not yet in this one."""
        buffers = self.network.buffers
        before = set(buffers.moving)
        buffers.take_up(key.partition("/")[2] for key in state if key.startswith("model/"))
        self._note_starts(name for name in buffers.moving if name not in before)

    def mark_reset_point(self) -> None:
        """Make the present state the one that :meth:`reset` restores."""
        guard: Any = self.parts.get(GUARD)
        if guard is not None and guard.keeps_healthy:
            guard.remember()
        self.session.reset_point.update(compact_copies(self.tensors(), self.original))

    def reset(self) -> None:
        """Put everything back, except what a component declares to survive a reset."""
        self.network.buffers.empty()
        self.notice_model_buffers(by_value=True)
        self._check_layout(self.tensors())
        kept = self.surviving()
        self.copy_in({k: v for k, v in self.session.reset_point.items() if k not in kept})
        for part in self.parts.values():
            part.after_reset()

    def surviving(self) -> set[str]:
        """Keys that a component declares to survive a reset."""
        return {
            f"{prefix}{name}"
            for prefix, part in self.parts.items()
            for name in part.survives_reset()
        }

    def _check_layout(self, tensors: Mapping[str, Tensor]) -> None:
        """Refuse buffers that are other ones than at wrap, which a component may only declare."""
        start, free = self.session.reset_point, {*self._resizable(), *self._lazy_own()}
        for key, value in tensors.items():
            if not start or key in free or key == "rng":
                continue
            before = tuple(start[key].shape) if key in start else None
            if before != tuple(value.shape):
                raise ValueError(
                    f"`{key}` must keep the shape that it had at wrap, {before or 'none at all'}, "
                    f"got {tuple(value.shape)}: register it in the component's __init__, and name "
                    "it in lazy_buffers() or resizable_buffers() where its shape is open."
                )

    def _components(self) -> dict[str, Component]:
        return {**self.norm_rules, **self.parts}

    def resizable_places(self) -> set[str]:
        """Keys whose tensors may change their length."""
        return set(self._resizable())

    def _resizable(self) -> dict[str, tuple[Any, str]]:
        """Keys whose tensors may change their length, with the component and the buffer's name."""
        return {
            f"{prefix}{name}": (part, name)
            for prefix, part in self._components().items()
            for name in (*part.resizable_buffers(), *part.lazy_buffers())
        }

    def _lazy_own(self) -> dict[str, Tensor]:
        """The update's own parameters that are empty until the first batch, and their moments."""
        found: dict[str, Tensor] = {}
        for name in () if self.update is None else self.update.lazy_parameters():
            p = self.update.get_parameter(name)  # type: ignore[union-attr]
            slots = self.update.optimizer.state.get(p, {})  # type: ignore[union-attr]
            found[f"update/{name}"] = p
            found |= {f"optim/update.{name}.{k}": v for k, v in slots.items() if k != "step"}
        return found
