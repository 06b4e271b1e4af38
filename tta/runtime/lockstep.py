"""Calls of several adapters side by side, which meet where each runs the model or back-propagates.

Each call has a thread, and one of them runs at a time, in a fixed order. A call that wants a pass
of the model, or gradients, waits until all others want one too or have ended. Then what they want
is served together, in the thread that started them.
"""

from __future__ import annotations

import _thread
import contextvars
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from queue import SimpleQueue
from typing import Any

import torch
from torch import Tensor

from tta.core import autocast
from tta.core.turns import Turns, guest

__all__ = ["ALONE", "Gradients", "Lockstep", "Member", "Pass"]

ALONE = object()  # the answer to a pass that its member is to run by itself


class Pass:
    """A member's wish to run the model.

    Args:
        member: Whose it is.
        tensors: Stand in for the model's own, by name.
        images: (B, ...).
    """

    def __init__(self, member: Member, tensors: dict[str, Tensor], images: Tensor) -> None:
        self.member, self.tensors, self.images = member, tensors, images
        self.graph = torch.is_grad_enabled()
        self.modes = autocast.modes()
        self.answer: Any = ALONE

    @property
    def kind(self) -> tuple[Any, ...]:
        """Passes of one kind can be one."""
        x = self.images
        return x.shape[1:], x.dtype, x.device, self.graph, repr(self.modes)


class Gradients:
    """A member's wish for gradients of a loss.

    Args:
        member: Whose it is.
        loss: A scalar.
        inputs: With respect to which; None to add the gradients to all leaves.
    """

    def __init__(self, member: Member, loss: Tensor, inputs: Sequence[Tensor] | None) -> None:
        self.member, self.loss, self.inputs = member, loss, inputs
        self.answer: Any = None


class _Ended(BaseException):
    """Another member has failed, or the caller was interrupted."""


class Member:
    """One call, and the meeting of its adapter with the others.

    Args:
        lockstep: Whose member it is.
        number: Its place among the members.
        action: Makes the call; takes the member.
    """

    def __init__(self, lockstep: Lockstep, number: int, action: Callable[[Member], Any]) -> None:
        self.number = number
        self.wish: Pass | Gradients | None = None
        self.result: Any = None
        self.error: BaseException | None = None
        self.done = False
        self.begun = False
        self.end: SimpleQueue[None] = SimpleQueue()  # filled when the thread has ended
        self._lockstep, self._action = lockstep, action
        self._go: SimpleQueue[None] = SimpleQueue()
        self._context = contextvars.copy_context()
        self._modes = autocast.modes()
        self._device: AbstractContextManager[Any] = nullcontext()
        if torch.cuda.is_initialized():
            self._device = torch.cuda.stream(torch.cuda.current_stream())

    def go_on(self) -> None:
        """Let it run until it wants something, or ends."""
        self._go.put(None)

    def run(
        self, run: Callable[..., Any], tensors: dict[str, Tensor], x: Tensor, *args: Any, **kw: Any
    ) -> Any:
        """As ``Meeting.run``."""
        if not args and not kw and not x.requires_grad:
            answer = self._ask(Pass(self, tensors, x))
            if answer is not ALONE:
                return answer
        return run(tensors, x, *args, **kw)

    def backward(self, loss: Tensor) -> None:
        """As ``Meeting.backward``."""
        self._ask(Gradients(self, loss, None))

    def gradients(self, loss: Tensor, inputs: Sequence[Tensor]) -> list[Tensor | None]:
        """As ``Meeting.gradients``."""
        return self._ask(Gradients(self, loss, inputs))

    def refuse(self) -> None:
        """As ``Meeting.refuse``."""
        self._lockstep.refused.add(self.number)

    def _live(self) -> None:
        self.begun = True
        self._go.get()
        try:
            if not self._lockstep.ended:
                guest.of = self._lockstep.turns
                self._context.run(self._act)
        except BaseException as error:
            self.error = error
        finally:
            self.done = True
            self._lockstep.back.put(None)
            self.end.put(None)

    def _act(self) -> None:
        autocast.restore(self._modes)
        with self._device:
            self.result = self._action(self)

    def _ask(self, wish: Pass | Gradients) -> Any:
        lockstep = self._lockstep
        if not lockstep.ended:
            self.wish = wish
            lockstep.back.put(None)
            self._go.get()
        if lockstep.ended:
            raise _Ended
        self.wish = None
        if isinstance(wish.answer, BaseException):
            raise wish.answer
        return wish.answer


class Lockstep:
    """Runs calls side by side.

    Args:
        serve: Answers wishes of one kind, all passes or all gradients, by filling in ``answer``.
        turns: Which the thread has that runs the calls; its members must not wait for them.
    """

    def __init__(self, serve: Callable[[list[Any]], None], turns: Turns) -> None:
        self.serve, self.turns = serve, turns
        # Queues and threads of C: a signal that raises between two lines of Python, as those of
        # a semaphore or of Thread.start, would leave a lock held that somebody waits for.
        self.back: SimpleQueue[None] = SimpleQueue()
        self.refused: set[int] = set()  # numbers of members that have refused passes
        self.ended = False
        self.left = True  # whether threads may be there after `run`

    def run(self, actions: Sequence[Callable[[Member], Any]]) -> list[Any]:
        """Return what each action returns; where one raises, end the others and raise that."""
        members = [Member(self, i, action) for i, action in enumerate(actions)]
        try:
            for member in members:
                _thread.start_new_thread(member._live, ())
            going = members
            while going:
                for member in going:
                    member.go_on()
                    self.back.get()
                    if member.error is not None:
                        raise member.error
                going = self._serve([member for member in members if not member.done])
        finally:
            self._end(members)
        return [member.result for member in members]

    def _serve(self, waiting: list[Member]) -> list[Member]:
        """Serve all passes, or all gradients if nobody wants a pass; returns whom."""
        served = [m for m in waiting if isinstance(m.wish, Pass)] or waiting
        if served:
            self.serve([member.wish for member in served])
        return served

    def _end(self, members: list[Member]) -> None:
        """End the threads; where this is interrupted, they end by themselves."""
        self.ended = True
        for member in members:
            member.go_on()
        for member in members:
            if member.begun:
                member.end.get()
        self.left = False
