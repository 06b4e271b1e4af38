"""Calls that fail half-way: at a chosen operation of torch, or by a signal at any instant."""

from __future__ import annotations

import random
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from tests.helpers.batches import images
from tests.helpers.compositions import Case, make

__all__ = ["AtPlace", "Counting", "Fault", "Subject", "at_places", "interrupted", "same", "shots"]


class Fault(Exception):
    """Raised in the middle of a call."""


class Counting(TorchDispatchMode):
    """Counts operations, and raises before one of them.

    Args:
        at: Number of the operation that is not carried out, from 1; 0 for none.
        watched: A model that must hold its own parameters before every operation.
    """

    def __init__(self, at: int = 0, watched: nn.Module | None = None) -> None:
        super().__init__()
        self.at, self.count = at, 0
        self.held = [] if watched is None else parameters(watched)
        self.foreign = 0  # operations at which the model held others

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        self.foreign += any(held[key] is not p for held, key, p in self.held)
        if self.count == self.at:
            raise Fault
        return func(*args, **(kwargs or {}))


@contextmanager
def interrupted(seconds: float) -> Iterator[None]:
    """Raise :class:`Fault` from a signal after so long, if the block is not left before."""

    def handler(*_: Any) -> None:
        raise Fault

    before = signal.signal(signal.SIGALRM, handler)
    try:
        signal.setitimer(signal.ITIMER_REAL, seconds)
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class AtPlace:
    """Raises :class:`Fault` at one of the places where Python lets a signal's handler run.

    These are the beginning of a function and the return of one of C; only such of code in some
    files count, and what is on its way when the handler raises is what a signal would leave.

    Args:
        number: Of the place, from 0.
        files: Ends of the names of the files.
    """

    def __init__(self, number: int, files: tuple[str, ...]) -> None:
        self.number, self.files, self.where = number, files, ""
        self.left = number

    def __enter__(self) -> AtPlace:
        sys.setprofile(self._look)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)

    def _look(self, frame: Any, event: str, _: Any) -> None:
        if event in ("call", "c_return") and frame.f_code.co_filename.endswith(self.files):
            self.left -= 1
            if self.left < 0:
                sys.setprofile(None)
                self.where = f"{frame.f_code.co_name}, line {frame.f_lineno}, {event}"
                raise Fault


def at_places(files: tuple[str, ...], step: int = 1, most: int = 10_000) -> Iterator[AtPlace]:
    """Every ``step``-th place in turn; the last one has an empty ``where``: nothing was raised.

    There must be fewer than ``most``.
    """
    for number in range(0, most, step):
        place = AtPlace(number, files)
        yield place
        if not place.where:
            return
    raise AssertionError(f"there are {most} places and more, the last one in {place.where}")


def parameters(model: nn.Module) -> list[tuple[dict[str, Any], str, Any]]:
    """Where each parameter of a model is held, and which it is."""
    held = [m._parameters for m in model.modules()]
    return [(some, key, p) for some in held for key, p in some.items() if p is not None]


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Whether two states are equal bit for bit."""
    return one.keys() == other.keys() and all(_equal(one[key], other[key]) for key in one)


def _equal(one: Tensor, other: Tensor) -> bool:
    one, other = one.contiguous(), other.contiguous()
    shapes = (one.shape, one.dtype) == (other.shape, other.dtype)
    return shapes and torch.equal(
        one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8)
    )


class Subject:
    """An adapter after some batches, what its next call gives, and whether a failed one harmed it.

    Args:
        case: Family and components.
        served: Batches before.
        size: Images in the batch of the next call; default: as many as in those before.
    """

    def __init__(self, case: Case, served: int, size: int | None = None) -> None:
        self.net, self.adapter = make(*case)
        self.own = [p for p in self.net.parameters()]
        self.start = self.adapter.state()
        self.batch = images(served)[:size]
        for number in range(served):
            self.adapter(images(number))
        self.before = self.adapter.state()
        self.counting = Counting(watched=self.net)
        with self.counting:
            self.answer = self.adapter(self.batch)
        self.after = self.adapter.state()
        self.adapter.load_state(self.before)

    def harm(self) -> str | None:
        """What a call that has just failed, or has not, left behind, in words; None for nothing.

        The adapter is afterwards as it was before the call.
        """
        state = self.adapter.state()
        if not same(state, self.before) and not same(state, self.after):
            return f"state neither before nor after: {self._moved(state)}"
        if not self._holds_its_own(self.net):
            return "foreign parameters in the model"
        if not torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
            return "modes of torch"
        self.adapter.load_state(self.before)
        return None

    def ends_as_it_should(self) -> str | None:
        """What is wrong with the next call, reset and unwrap, in words; None for nothing."""
        answer = self.adapter(self.batch)
        if not torch.equal(answer.nan_to_num(7.0), self.answer.nan_to_num(7.0)):
            return "the next call gives other logits"
        if not same(self.adapter.state(), self.after):
            return "the next call leaves another state"
        self.adapter.reset()
        if not same(self.adapter.state(), self.start):
            return "reset is not exact"
        if not self._holds_its_own(self.adapter.unwrap()):
            return "unwrap gives other parameters"
        if not all(p.requires_grad and p.grad is None for p in self.own):
            return "unwrap gives parameters with other flags or gradients"
        return None

    def _holds_its_own(self, model: nn.Module) -> bool:
        found = {id(p) for _, _, p in parameters(model)}
        return found == {id(p) for p in self.own}

    def _moved(self, state: dict[str, Tensor]) -> list[str]:
        known = self.before.keys() & state.keys()
        wrong = [key for key in known if not _equal(state[key], self.before[key])]
        return sorted(wrong)[:4] + sorted(state.keys() ^ self.before.keys())[:4]


def shots(seed: int, duration: float, count: int) -> Iterator[float]:
    """Times at which to interrupt a call that takes about ``duration`` seconds."""
    draw = random.Random(seed)
    for _ in range(count):
        yield max(1e-5, draw.random() * duration * 1.1)
