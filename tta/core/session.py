"""What the parts of one adapter share while it serves."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from tta.core.batch_split import Ranks
from tta.core.checkpointing import gradients_by_backward, is_reentrant
from tta.core.hooks import LogitHook
from tta.core.warn import warn

__all__ = ["Meeting", "Session"]


class Meeting(Protocol):
    """Where adapters that share weights meet, so that a pass of several of them is one."""

    def run(
        self, run: Callable[..., Any], tensors: dict[str, Tensor], x: Tensor, *args: Any, **kw: Any
    ) -> Any:
        """Return what ``run(tensors, x, *args, **kw)`` would; see ``Session.run``."""

    def backward(self, loss: Tensor) -> None:
        """Do as ``loss.backward()``."""

    def gradients(self, loss: Tensor, inputs: Sequence[Tensor]) -> list[Tensor | None]:
        """Gradients of a loss; see ``Session.gradients``."""
        ...

    def refuse(self) -> None:
        """Say that what this adapter's passes gave so far is used no more."""


@dataclass
class Session:
    """What the parts share: made first, and given to every part that reads or writes it.

    Args:
        ranks: Processes that share the rows of every pass; None for this one alone.
        recording: Whether a pass that records a graph is going on.
        following: Whether gradients to the images are asked for, which flow through teachers too.
        learning: Whether the adapter is not frozen.
        serving: Whether ``wrap`` has returned. Passes over source batches come before that, and
            give no warnings.
        reset_point: What ``reset`` restores, by the names of a state; nobody writes to these
            tensors.
        warned: The kinds of warning that were given already.
        guard: The guard, which sees every step of the update.
        logit_hook: By which an output rule makes the logits; None where the linear layer does.
        answered: The images that are being answered; None outside of an answer.
        passed: Whether a pass of all of these was made.
        frugal: How passes that record a graph save memory; None where they do not.
        meeting: Where passes of several adapters become one; None where each runs its own.
        inserted: Tokens that a component puts into each sequence of the present pass.
        around_backward: Entered around every backward pass.
        reentrant: Whether the model has reentrant checkpoints; None until that is known.
    """

    ranks: Ranks | None = None
    recording: bool = False
    following: bool = False
    serving: bool = False
    learning: bool = True
    reset_point: dict[str, Tensor] = field(default_factory=dict)
    warned: set[str] = field(default_factory=set)
    guard: Any = None
    logit_hook: LogitHook | None = None
    answered: Tensor | None = None
    passed: bool = False
    frugal: Any = None
    meeting: Meeting | None = None
    inserted: int = 0
    around_backward: Callable[[], AbstractContextManager[None]] = nullcontext
    reentrant: bool | None = None

    def run(
        self, run: Callable[..., Any], tensors: dict[str, Tensor], x: Tensor, *args: Any, **kw: Any
    ) -> Any:
        """Return what the model returns for ``x``, alone or in one pass with other adapters.

        Args:
            run: Runs the model: takes all that follows.
            tensors: Stand in for the model's own, by name.
            x: Images (B, ...).
            *args: Further arguments of the model.
            **kw: Further arguments of the model.
        """
        if self.meeting is None:
            return run(tensors, x, *args, **kw)
        return self.meeting.run(run, tensors, x, *args, **kw)

    def refuse(self) -> None:
        """Say that what passes gave so far is used no more, as features of some rows overflow."""
        if self.meeting is not None:
            self.meeting.refuse()

    def backward(self, loss: Tensor) -> None:
        """Back-propagate a scalar; every loss of a pass of the model comes here or below."""
        with self.around_backward():
            if self.meeting is None:
                loss.backward()
            else:
                self.meeting.backward(loss)

    def gradients(self, loss: Tensor, inputs: Sequence[Tensor]) -> list[Tensor | None]:
        """Gradients of a scalar with respect to each input; None for one without effect."""
        with self.around_backward():
            if self.meeting is not None:
                return self.meeting.gradients(loss, inputs)
            if self.reentrant is None:
                self.reentrant = is_reentrant(loss)
            if self.reentrant:
                return gradients_by_backward(loss, inputs)
            found: Any = list(torch.autograd.grad(loss, inputs, allow_unused=True))
        if any(gradient is None for gradient in found):  # checkpoints may have been switched on
            self.reentrant = None
        return found

    def warn_once(self, kind: str, text: str) -> None:
        """Warn the caller, unless this kind of warning was given before."""
        if kind not in self.warned:
            self.warned.add(kind)
            warn(text)

    @contextmanager
    def answering(self, x: Tensor) -> Iterator[None]:
        """Within the block, images (B, ...) are answered."""
        self.answered, self.passed = x, False
        try:
            yield
        finally:
            self.answered = None

    def belongs(self, x: Tensor) -> bool:
        """Whether what the model returns for ``x`` is of the images that are being answered.

        Passes of other images (views, some rows, a memory) count only until there is one of these.
        """
        if self.answered is None:
            return True
        own = x.shape == self.answered.shape and x.data_ptr() == self.answered.data_ptr()
        found, self.passed = own or not self.passed, own or self.passed
        return found

    @contextmanager
    def plain_head(self) -> Iterator[None]:
        """Let the linear layer make the logits itself, as in the source model."""
        hook = self.logit_hook
        if hook is not None:
            hook.active = False
        try:
            yield
        finally:
            if hook is not None:
                hook.active = True

    def settle(self) -> None:
        """Leave what an exception has ended."""
        self.recording = self.following = False
        if self.logit_hook is not None:
            self.logit_hook.active = True
