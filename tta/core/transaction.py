"""A call is a transaction: what moves is afterwards as before it, or wholly as after it.

A copy is taken of everything that moves when a call begins, into tensors that are kept for this
purpose. When an exception leaves the call, from whatever line (out of memory in the backward pass,
a signal's timeout, Ctrl-C), the copy goes back. Where this is interrupted too, the next use of the
adapter begins with it. Buffers that hold many images are not copied: their components keep the rows
that they overwrite in a :class:`~tta.core.journal.Journal`.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Collection, Sequence
from types import FrameType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from tta.core import autocast
from tta.core.backbone import Backbone
from tta.core.compiled import end_visit
from tta.core.component import Component, Remembers
from tta.core.foreach import foreach
from tta.core.hooks import next_hook
from tta.core.state import AdapterState, Place

__all__ = ["Transaction"]

Result = TypeVar("Result")


class Transaction:
    """Runs what changes an adapter, and takes it back when it fails.

    Args:
        state: Everything that moves.
        network: The wrapped model.
        parts: The components whose attributes change in a call.
    """

    def __init__(
        self,
        state: AdapterState,
        network: Backbone,
        parts: Sequence[Component],
    ) -> None:
        self.state = state
        self.network = network
        # Those inside of others too; none comes later.
        self.parts = [m for part in parts for m in part.modules() if isinstance(m, Component)]
        self.journal = state.journal
        self._open = False  # whether something may have to be taken back
        self._copies = _Copies([], [])
        self._layout: Any = None  # what the copies were made for
        self._parameters: list[nn.Parameter] = []  # found then: walking a model takes long
        self._undo: Any = None  # what was noted when the call began, besides the copies

    def run(self, action: Callable[[], Result], learning: bool = True) -> Result:
        """Return ``action()``, after which all is as before where it raises.

        Args:
            action: What changes the adapter.
            learning: Whether more than the model's own buffers moves.
        """
        if self._open and self._in_progress():  # a hook of the caller's calls the adapter
            return action()
        if torch.is_inference_mode_enabled():  # in which no tensor is made that can be changed
            with torch.inference_mode(False):
                return self.run(action, learning)
        self.settle()
        modes, grad = autocast.modes(), torch.is_grad_enabled()
        try:
            self._begin(learning)
            self._open = True
            result = action()
        except BaseException as error:
            try:
                _end_contexts(error)
                if self._open:
                    self._take_all_back()
            finally:
                torch.set_grad_enabled(grad)
                autocast.restore(modes)
            raise
        self._open = False
        self.journal.clear()
        return result

    def settle(self) -> None:
        """Take back what a call has left whose end was interrupted."""
        if self._open and not self._in_progress():
            self._take_all_back()

    def take_back(self) -> None:
        """Put everything back to what it was when the call began, which may go on."""
        rng, reset_point, buffers, parameters, attributes = self._undo
        for held, values in attributes:
            for key in held.keys() - values.keys():
                del held[key]
            held.update(values)
        for wrapper in self.network.wrappers:
            wrapper.passes.clear()
        with torch.no_grad():
            self._copies.put_back()
            self.journal.take_back()
        self.state.generator.set_state(rng)
        self._put_back_reset_point(reset_point)
        self.network.buffers.put_back_to(buffers)
        for p, asks, gradient in parameters:
            p.requires_grad_(asks)
            p.grad = gradient
        self.network.masters.write_to_model()

    def undo(self, guard: Component) -> None:
        """Take back what was learned in this call: all that has moved but the generator.

        Args:
            guard: The component that asks for it, whose own buffers stay.
        """
        _, reset_point, buffers, _, _ = self._undo
        with torch.no_grad():
            self._copies.put_back(but={id(module._buffers) for module in guard.modules()})
            self.journal.take_back()
        self._put_back_reset_point(reset_point)
        self.network.buffers.put_back_to(buffers)
        self.network.masters.write_to_model()

    def attributes(self) -> list[dict[str, Any]]:
        """The attributes of components, and of what they hold, that change in a call."""
        things = [v for part in self.parts for v in (part, *vars(part).values())]
        return [vars(thing) for thing in things if isinstance(thing, (Component, Remembers))]

    def _put_back_reset_point(self, before: dict[str, Tensor]) -> None:
        now = self.state.session.reset_point
        now.update(before)
        for key in now.keys() - before.keys():
            del now[key]

    def _begin(self, learning: bool) -> None:
        state, network = self.state, self.network
        network.first_hook = next_hook()
        self.journal.clear()
        layout = state.layout() if learning else tuple(network.buffers.moving)
        if layout != self._layout:
            self._copies = _Copies(*(state.places() if learning else (state.own_places(), [])))
            # Gradients come from an update alone.
            self._parameters = [] if state.update is None else state.parameters()
            self._layout = layout
        with torch.no_grad():
            self._copies.take()
        self._undo = (
            state.generator.get_state(),
            dict(state.session.reset_point),
            network.buffers.now(),
            [(p, p.requires_grad, p.grad) for p in self._parameters],
            [(held, dict(held)) for held in self.attributes()],
        )

    def _take_all_back(self) -> None:
        self.network.settle()
        self.take_back()
        self._open = False

    def _in_progress(self) -> bool:
        """Whether :meth:`run` is still running, in this thread, as calls take turns.

        No variable could tell: an exception may come before any line that changes it.
        """
        frame = sys._getframe()
        while frame is not None:
            local = frame.f_locals if frame.f_code is Transaction.run.__code__ else {}
            if local.get("self") is self and "grad" in local:  # has come further than settling
                return True
            frame = frame.f_back
        return False

    def forget(self) -> None:
        """Make the copies anew, since everything was moved to another device or dtype."""
        self._layout = None

    def __getstate__(self) -> dict[str, Any]:
        empty = {"_open": False, "_layout": None, "_undo": None}
        return self.__dict__ | empty | {"_copies": _Copies([], []), "_parameters": []}


def _end_contexts(error: BaseException) -> None:
    """End the context managers that a signal has left before their block began.

    Their generators would end when the caller drops the traceback, and put modes of torch to what
    they were in the middle of the call.
    """
    trace = error.__traceback__
    while trace is not None:
        frame, trace = trace.tb_frame, trace.tb_next
        # A signal's handler is given the frame that it has come into.
        held = [value for value in frame.f_locals.values() if isinstance(value, FrameType)]
        for found in (frame, *held):
            if found.f_code.co_filename == contextlib.__file__:
                generator = getattr(found.f_locals.get("self"), "gen", None)
                if generator is not None:
                    generator.close()
            end_visit(found)


class _Copies:
    """Copies of tensors, and which tensors these were.

    Args:
        places: Where the tensors are held.
        kept: Places of tensors that are not copied.
    """

    def __init__(self, places: list[Place], kept: list[Place]) -> None:
        self._places, self._kept = places, kept
        self._tensors: list[Tensor] = []
        self._copies: list[Tensor] = []
        # What joins the tensors from one index to another, and the tensor whose parts are copies.
        self._joined: list[tuple[Callable[..., Tensor], int, int, Tensor]] = []
        self._shapes: list[torch.Size] = []
        self._identities: list[tuple[Place, Tensor]] = []

    def take(self) -> None:
        tensors = [held[key] for held, key in self._places]
        if [t.shape for t in tensors] != self._shapes:
            tensors = self._make(tensors)
        self._tensors = tensors
        self._identities = [(place, place[0][place[1]]) for place in self._kept]
        for join, first, end, joined in self._joined:
            join(tensors[first:end], out=joined)
        first = self._joined[-1][2] if self._joined else 0
        _copy(self._copies[first:], tensors[first:])

    def _make(self, tensors: list[Tensor]) -> list[Tensor]:
        """Make the copies; small tensors lie one after the other, as most of the time is per copy.

        Returns:
            The tensors, those that are copied together first.
        """
        self._shapes = []  # should this be interrupted, it begins again
        kinds: dict[Any, list[int]] = {}
        for i, t in enumerate(tensors):
            plain = t.dim() < 2 and t.device.type == "cpu" and not t.is_quantized
            kinds.setdefault((t.dim(), t.dtype) if plain else None, []).append(i)
        alone = kinds.pop(None, [])
        order = [i for members in kinds.values() for i in members] + alone
        self._places = [self._places[i] for i in order]
        self._joined, self._copies, first = [], [], 0
        for (dim, dtype), members in kinds.items():
            sizes = [tensors[i].numel() for i in members]
            joined = torch.empty(sum(sizes), dtype=dtype)
            join = torch.cat if dim else torch.stack
            self._joined.append((join, first, first + len(members), joined))
            self._copies += joined.split(sizes) if dim else joined.unbind()
            first += len(members)
        self._copies += [torch.empty_like(tensors[i]) for i in alone]
        tensors = [tensors[i] for i in order]
        self._shapes = [t.shape for t in tensors]
        return tensors

    def put_back(self, but: Collection[int] = ()) -> None:
        """Put the tensors and their values back.

        Args:
            but: Ids of dicts that are left as they are.
        """
        places = (*zip(self._places, self._tensors, strict=True), *self._identities)
        for (held, key), tensor in places:
            if held[key] is not tensor and id(held) not in but:
                held[key] = tensor
        mine = [i for i, (held, _) in enumerate(self._places) if id(held) not in but]
        for i in mine:
            if self._tensors[i].shape != self._shapes[i]:  # a parameter that got its shape now
                self._tensors[i].data = torch.empty_like(self._copies[i])
        _copy([self._tensors[i] for i in mine], [self._copies[i] for i in mine])


def _copy(to: list[Tensor], of: list[Tensor]) -> None:
    """Copy tensors, those of one device in one call."""
    devices = {t.device for t in to}
    for device in devices:
        some = [i for i, t in enumerate(to) if t.device == device] if len(devices) > 1 else None
        pairs = (to, of) if some is None else ([to[i] for i in some], [of[i] for i in some])
        if pairs[0]:
            foreach._foreach_copy_(*pairs)
