"""Buffers that a model itself changes in its forward pass: a counter, an average, statistics.

Such buffers are part of the state, and ``reset`` and ``unwrap`` put them back. A dry run at wrap
finds them; a buffer that moves only later, because that depends on values, is found after the call
in which it first does. A parameter that the model itself writes to, such as prototypes that it
brings to length one, counts as a buffer, unless it is trained, which makes it part of the state.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from tta.core import functional
from tta.core.checks import shown
from tta.core.classifier import dry_run, evaluating
from tta.core.outputs import LogitsReader

__all__ = ["ModelBuffers"]

SMALL = 1 << 16  # elements; up to here a copy is kept of every buffer, in case it moves later


class ModelBuffers:
    """The buffers of a model, and which of them move.

    Args:
        model: The classifier, unwrapped.
        reader: Takes logits out of what it returns.
        skip: Ids of modules to leave out: norm layers that a rule stands in for.
        trained: Parameters to leave out.
    """

    def __init__(
        self,
        model: nn.Module,
        reader: LogitsReader,
        skip: set[int],
        trained: Iterable[Tensor] = (),
    ) -> None:
        self.moving: list[str] = []
        self._copies: dict[str, Tensor] = {}
        self._seen: dict[str, tuple[int, int]] | None = None
        self._first_call = True
        self._before_pass: dict[str, Tensor] = {}  # values that the last pass with a graph found
        self._found: list[str] = []
        modules = [(f"{n}." if n else "", m) for n, m in model.named_modules() if id(m) not in skip]
        self._empty = [
            (module._buffers, key)
            for _, module in modules
            for key, buffer in module._buffers.items()
            if buffer is None
        ]
        self.places: dict[str, tuple[nn.Module, str]] = {
            before + key: (module, key)
            for before, module in modules
            for key, buffer in module._buffers.items()
            if buffer is not None
        }
        run = dry_run(model, reader, unseen=not self.places)
        found = set() if run is None else set(run.moving)
        learned = {id(p) for p in trained}
        for before, module in modules:
            for key, p in module._parameters.items():
                if before + key in found and id(p) not in learned:
                    self.places[before + key] = (module, key)
        self.originals = {name: self._now(name) for name in self.places}
        if not self.places:
            return
        with evaluating(model):
            found |= _statistics_in_training(model)
        self.moving = [name for name in self.places if name in found]
        self._found = [name for name in self.moving if self._stands_alone(model, name)]
        for name, buffer in self.originals.items():
            if run is None or name in self.moving or buffer.numel() <= SMALL:
                self._copies[name] = buffer.detach().clone()
        self._seen = self._signs()

    def notice_after_call(self) -> list[str]:
        """As :meth:`notice`; by value after the first call alone."""
        first, self._first_call = self._first_call, False
        return self.notice(by_value=first)

    def tensors(self) -> dict[str, Tensor]:
        """The moving buffers themselves, by name."""
        return {name: self._now(name).detach() for name in self.moving}

    def notice(self, by_value: bool = False) -> list[str]:
        """Find the buffers that have moved for the first time since the last call, by name.

        Args:
            by_value: Compare values too, which waits for the device: some operations do not raise
                the version, among them a batch norm with statistics in training mode.

        Raises:
            ValueError: When one has another shape than at wrap.
        """
        signs = self._signs()
        before, self._seen = self._seen or signs, signs
        moved = [name for name, sign in signs.items() if sign != before[name]]
        if by_value:
            moved += self._changed(name for name in self._copies if name not in moved)
        for name in moved:
            then, now = (tuple(t.shape) for t in (self.originals[name], self._now(name)))
            if then != now:
                raise ValueError(
                    f"`model` must keep the shapes of its buffers, but {shown(name)} went from "
                    f"{then} to {now} in a forward pass: give it its full size, or hold it outside "
                    "of the buffers."
                )
        new = [name for name in moved if name not in self.moving and name in self._copies]
        self.moving += new
        return new

    def _changed(self, names: Iterable[str]) -> list[str]:
        """Those that have other values than at wrap, of buffers of which there are copies."""
        kinds: dict[Any, list[str]] = {}
        for name in names:
            copy = self._copies[name]
            kinds.setdefault((copy.dtype, copy.device), []).append(name)
        found = []
        for some in kinds.values():  # mostly none has, which one comparison tells
            copies, now = [self._copies[n] for n in some], [self._now(n) for n in some]
            if not torch.equal(*(torch.cat([t.reshape(-1) for t in ts]) for ts in (copies, now))):
                triples = zip(some, copies, now, strict=True)
                found += [name for name, copy, t in triples if not torch.equal(copy, t)]
        return found

    def go_to(self, moving: Iterable[str]) -> None:
        """Count these buffers alone as moving, and give the others their values at wrap."""
        moving = list(moving)
        self.put_back({n: self._copies[n] for n in self.moving if n not in moving})
        self.moving[:] = moving

    def take_up(self, names: Iterable[str]) -> None:
        """Count buffers among those that move, since a state of another adapter says so."""
        known = [name for name in names if name in self._copies and name not in self.moving]
        self.moving += known

    def empty(self) -> None:
        """Take away the tensors of buffers that had none at wrap, and that a pass has filled."""
        for held, key in self._empty:
            held[key] = None

    @contextmanager
    def apart(self, tensors: dict[str, Tensor], prefix: str) -> Iterator[None]:
        """Within the block a pass that records a graph writes to copies; then their values go back.

        The next pass would otherwise change what the graph of this one holds.

        Args:
            tensors: Stand in for the model's own in this pass; the copies are put among them.
            prefix: Of names in the module that is called.
        """
        names = self._found if torch.is_grad_enabled() else ()
        own = {name: self._now(name) for name in names}
        if torch.is_grad_enabled():
            self._before_pass = {name: t.detach().clone() for name, t in own.items()}
        tensors.update((prefix + name, t.detach().clone()) for name, t in own.items())
        yield
        for name in own:
            self._write(name, tensors[prefix + name])

    @contextmanager
    def as_before_pass(self) -> Iterator[None]:
        """Within the block checkpointed parts of the last pass may run again.

        They find what the pass found, and what they write is taken back.
        """
        now = {name: self._now(name).detach().clone() for name in self.moving}
        for name, value in self._before_pass.items():
            self._write(name, value)
        try:
            yield
        finally:
            for name, value in now.items():
                if not torch.equal(self._now(name), value):
                    self._write(name, value)

    @torch.no_grad()
    def _write(self, name: str, value: Tensor) -> None:
        """Copy a value into the tensor of this name, or replace it where the shape is another."""
        held, key = self.place(name)
        if held[key].shape == value.shape:
            held[key].copy_(value)
        else:
            held[key] = value.detach().clone()

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Within the block a pass of the model changes nothing that is counted here."""
        before = {name: (t, t.clone()) for name in self.places for t in [self._now(name)]}
        try:
            yield
        finally:
            with torch.no_grad():
                for name, (tensor, value) in before.items():
                    held, key = self.place(name)
                    held[key] = tensor
                    if not torch.equal(tensor, value):  # a graph may hold those that stayed
                        tensor.copy_(value)
            self._seen = self._signs()

    def start_of(self, name: str) -> Tensor:
        """The value that a buffer had at wrap."""
        return self._copies[name]

    def put_back(self, values: Mapping[str, Tensor]) -> None:
        """Copy values into moving buffers, in the tensors that are there now."""
        for name, value in values.items():
            self._write(name, value)
        self._seen = self._signs()

    def now(self) -> tuple[list[str], dict[str, Tensor]]:
        """What :meth:`put_back_to` takes: which buffers move, and which tensors all of them are."""
        return list(self.moving), {name: self._now(name) for name in self.places}

    @torch.no_grad()
    def put_back_to(self, before: tuple[list[str], dict[str, Tensor]]) -> None:
        """Put back which buffers move, and the tensors and values of those that did not."""
        moving, tensors = before
        for name, tensor in tensors.items():
            held, key = self.place(name)
            if held[key] is not tensor:
                held[key] = tensor
            copy = self._copies.get(name)
            if copy is not None and name not in moving and not torch.equal(copy, tensor):
                tensor.copy_(copy)
        self.moving[:] = moving
        self._seen = self._signs()

    def put_back_all(self) -> None:
        """Give all buffers of which there are copies the values that they had at wrap."""
        self.empty()
        self.notice(by_value=True)
        self.put_back({name: self._copies[name] for name in self.moving})

    def convert(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Apply ``fn``, which moved the model to another device or dtype, to the copies."""
        self.originals = {name: self._now(name) for name in self.places}
        self._copies = {name: fn(copy) for name, copy in self._copies.items()}
        self._seen = self._signs()

    def __getstate__(self) -> dict[str, Any]:
        """Leave out identities and versions, which say nothing about the tensors of a copy."""
        return self.__dict__ | {"_seen": None}

    @torch.no_grad()
    def give_back(self) -> None:
        """Put the caller's own tensors back into the model, with their values."""
        self.empty()
        self.notice(by_value=True)
        for name, original in self.originals.items():
            held, key = self.place(name)
            if name in self._copies and name in self.moving:
                original.copy_(self._copies[name])
            held[key] = original

    def place(self, name: str) -> tuple[dict[str, Any], str]:
        """Where a buffer is held: the dict of its module, and its key there."""
        module, key = self.places[name]
        return module._parameters if key in module._parameters else module._buffers, key

    def _stands_alone(self, model: nn.Module, name: str) -> bool:
        """Whether a graph may hold a tensor, and a copy of it can stand under its only name."""
        tensor = self._now(name)
        return tensor.is_floating_point() and len(functional.names(model, [tensor])[0]) == 1

    def _now(self, name: str) -> Tensor:
        held, key = self.place(name)
        return held[key]

    def _signs(self) -> dict[str, tuple[int, int]]:
        """Identity and version of each buffer, which change when it is replaced or written to."""
        return {name: (id(t := self._now(name)), t._version) for name in self.places}


def _statistics_in_training(model: nn.Module) -> set[str]:
    """Running statistics of norm layers that stay in training mode even after ``eval()``."""
    return {
        f"{prefix}.{key}" if prefix else key
        for prefix, module in model.named_modules()
        if isinstance(module, _NormBase) and module.training
        for key in module._buffers
    }
