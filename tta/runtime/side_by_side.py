"""Mixed batches in one pass: calls of several streams side by side, each on a twin of the adapter.

Where a recipe moves norm layers alone, streams differ in little of the model. Each stream of a
mixed batch is put into a twin, which shares the weights; their calls go on side by side, and
wherever all of them want a pass of the model, it is one pass (:mod:`tta.runtime.shared_pass`), and
so are their backward passes. All else is done by each stream's own components.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import groupby
from typing import Any

import torch

from tta.core.adapter import Adapter
from tta.core.turns import GuestError
from tta.core.twins import TwinSets
from tta.runtime.lockstep import Gradients, Lockstep, Member, Pass
from tta.runtime.shared_pass import ApartError, SharedPass
from tta.runtime.stream_store import Before, Seat, Stream, StreamStore

__all__ = ["SideBySide"]

Action = Callable[[Adapter, str], Any]
log = logging.getLogger("tta.runtime")
MOST = 32  # streams in one pass


class SideBySide:
    """Runs calls of several streams of a pool.

    Args:
        store: Where the streams are.
    """

    def __init__(self, store: StreamStore) -> None:
        self.store = store
        self.reason: str | None = None  # why streams are served one by one, once that is known
        self.passes = 0  # of several streams, so far
        self._declined = 0  # that might have been such ones
        self._seats: list[Seat] = []
        self._shared: SharedPass | None = None
        self._members: list[int] = []  # numbers of the seats of the streams at hand
        self._refused: set[int] = set()  # places of those in that list that have refused passes

    def run_each(self, streams: Mapping[str, Any], action: Action) -> list[Any]:
        """As ``StreamStore.run_each``, in one pass where the recipe and the model allow it."""
        if len(streams) > 1 and self.reason is None:
            try:
                return self._run_together(list(streams), action)
            except ApartError as error:
                self._serve_apart(str(error))
            except GuestError:
                self._serve_apart("a function that it is given calls the adapter")
        return self.store.run_each(streams, action)

    def close(self) -> None:
        """Let go of the twins."""
        self._seats, self._shared = [], None

    @torch.inference_mode(False)
    def find_out(self) -> str | None:
        """Why streams are served one by one, as far as that can be known without images."""
        if self.reason is None and not self.store.closed:
            with self.store.turn():
                try:
                    self._make()
                except ApartError as error:
                    self._serve_apart(str(error))
        return self.reason

    def _serve_apart(self, reason: str) -> None:
        self.reason = reason
        log.info("streams of a mixed batch are served one by one: %s", reason)

    @torch.inference_mode(False)
    def _run_together(self, names: Sequence[str], action: Action) -> list[Any]:
        with self.store.turn():
            return self.store.all_or_none(lambda before: self._groups(names, action, before))

    def _groups(self, names: Sequence[str], action: Action, before: Before) -> list[Any]:
        store, found = self.store, []
        self._make()
        size = min(MOST, store.capacity)
        for at in range(0, len(names), size):
            some = [store.streams[name] for name in names[at : at + size]]
            seats = self._seated(some)
            for stream, seat in zip(some, seats, strict=True):
                before.append((stream, seat.sets.take().copy()))
            found += store.call(some, partial(self._call, some, seats, action))
        if self._declined and not self.passes:
            self._serve_apart("a component watches layers that would run once, or gives weights")
        return found

    def _make(self) -> None:
        """Prepare the pass, of the adapter at its beginning.

        Raises:
            ApartError: When there can be none.
        """
        store = self.store
        store.check_open()
        if store.capacity < 2:
            raise ApartError("`capacity` is 1")
        if self._shared is None:
            store.seat.set_aside()
            store.sets.put_first()
            self._shared = SharedPass(store.adapter)

    def _seated(self, streams: Sequence[Stream]) -> list[Seat]:
        """Bring each stream into a seat of its own; a stream that has one stays there."""
        store = self.store
        if len(self._seats) < len(streams):
            store.seat.set_aside()
            store.sets.put_first()
            assert self._shared is not None
            while len(self._seats) < len(streams):
                seat = Seat(TwinSets(store.sets))
                self._shared.add(seat.adapter.model)
                self._seats.append(seat)
        store.touch(streams)  # or bringing one might put another of them away, seat and all
        free = [s for s in self._seats if s.stream not in streams or s.stream.seat is not s]  # type: ignore[union-attr]
        for stream in streams:
            seat = stream.seat
            store.bring(stream, free.pop(0) if seat is None or seat is store.seat else seat)
        return [seat for stream in streams if (seat := stream.seat) is not None]

    def _call(
        self,
        streams: Sequence[Stream],
        seats: Sequence[Seat],
        action: Action,
    ) -> list[Any]:
        self._members = [self._seats.index(seat) for seat in seats]
        lockstep = Lockstep(self._serve, self.store.adapter.turns)
        self._refused = lockstep.refused
        pairs = zip(streams, seats, strict=True)
        try:
            return lockstep.run([partial(_meet, seat.adapter, s.name, action) for s, seat in pairs])
        finally:
            if lockstep.left:  # their threads may still hold the seats
                self.close()

    def _serve(self, wishes: list[Any]) -> None:
        """Answer what calls want: passes of one kind at once, or gradients."""
        assert self._shared is not None
        if isinstance(wishes[0], Gradients):
            self._shared.differentiate(wishes, {self._members[i]: i for i in self._refused})
            return
        for _, found in groupby(sorted(wishes, key=self._kind), self._kind):
            some = list(found)
            if len(some) == 1:
                continue
            try:
                members = [self._members[one.member.number] for one in some]
                done = self._shared.run(some, members)
                self.passes += done
                self._declined += not done
            except ApartError:
                raise
            except Exception as error:  # what the model raises, which an adapter puts into words
                some[0].answer = error

    def _kind(self, wish: Pass) -> str:
        seat = self._seats[self._members[wish.member.number]]  # its adapter has its own turn now
        return repr((wish.kind, seat.sets.session.inserted))


def _meet(adapter: Adapter, name: str, action: Action, member: Member) -> Any:
    """Call an adapter whose passes are those of its member."""
    session = adapter.session
    session.meeting = member
    try:
        return action(adapter, name)
    finally:
        session.meeting = None
