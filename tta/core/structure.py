"""A copy of a model's structure, which shares its tensors, for passes with other weights.

A teacher's weights are never put into the caller's model, where an exception could leave them and
another thread would see them. They go into a copy of its modules. Parameters, buffers, hooks and
norm rules are the same objects in both, so that the copy takes next to no memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from tta.core import functional
from tta.core.classifier import dry_run
from tta.core.compiled import has_graphs
from tta.core.frugal import Frugal
from tta.core.norm_layers import AdaptiveNorm, with_statistics
from tta.core.outputs import LogitsReader
from tta.core.tracing import is_tracing

__all__ = ["OtherTensors"]


class OtherTensors:
    """Runs a model with other tensors in place of its own, in a copy of its structure.

    Some models have no copy that can be relied on: those that are compiled or scripted, whose
    attributes cannot be copied, or whose functions refer to modules from outside. They are run
    themselves with the other tensors, and :meth:`put_back` heals them after an exception.

    Args:
        model: The model, with its norm layers wrapped.
        reader: Takes logits out of what it returns.
        frugal: How passes that record a graph are run; None for as they come.
    """

    def __init__(
        self, model: nn.Module, reader: LogitsReader, frugal: Frugal | None = None
    ) -> None:
        self.frugal = frugal
        self.model = model
        self.reader = reader
        self._copy: nn.Module | None = None
        self._in_place: bool | None = None  # None until it is known
        self._doubted = False  # whether the first pass has to show it
        self._own = [
            (module._parameters, key, p)
            for module in model.modules()
            for key, p in module._parameters.items()
        ]

    def prepare(self) -> None:
        """Find out how to run the model, which calls it on the ``meta`` device."""
        if self._in_place is None:
            # Another copy is made by the first pass: the model may be in train mode until all parts
            # of its adapter are there, and what its `eval` does besides is to be in the copy too.
            trusted = _has_trusted_copy(self.model, self.reader)
            self._in_place, self._doubted = not trusted, trusted is None

    def _decide(self, args: Any, kwargs: Any) -> None:
        """Find out by a pass of its own what none without values has shown."""
        try:
            found = functional.copy_structure(self.model)
            self._in_place = not _uses_its_own_tensors(found, args, kwargs)
        except Exception:  # the model raises on these images, as it will again in its own pass
            return
        self._doubted = False

    @property
    def copied(self) -> bool:
        """Whether the model has a copy that can be relied on; known after :meth:`prepare`."""
        return self._in_place is False

    def __call__(self, tensors: dict[str, Tensor], *args: Any, **kwargs: Any) -> Any:
        """Return what the model returns with ``tensors`` in place of its own, by name."""
        if self.frugal is not None and torch.is_grad_enabled():
            return self.frugal(
                partial(self._run, tensors), self.model, not tensors, *args, **kwargs
            )
        return self._run(tensors, *args, **kwargs)

    def _run(self, tensors: dict[str, Tensor], *args: Any, **kwargs: Any) -> Any:
        if not tensors:
            return self.model(*args, **kwargs)
        self.prepare()
        if self._doubted and not is_tracing():
            self._decide(args, kwargs)
        if self._copy is None and not self._in_place:
            self._copy = functional.copy_structure(self.model)
        target = self.model if self._copy is None else self._copy
        return functional.call(target, tensors, *args, **kwargs)

    def put_back(self) -> None:
        """After an exception: give the model its own parameters, and begin a new copy."""
        self._copy = None
        for held, key, p in self._own:
            if held[key] is not p:
                held[key] = p

    @contextmanager
    def afresh(self) -> Iterator[None]:
        """Within the block use another copy, while the model's tensors stand for others."""
        before, self._copy = self._copy, None
        try:
            yield
        finally:
            self._copy = before

    def forget(self) -> None:
        """Begin a new copy, since the model was moved to another device or dtype."""
        self._copy = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_copy": None}


def _has_trusted_copy(model: nn.Module, reader: LogitsReader) -> bool | None:
    """Whether a copy of a model's structure uses its own tensors alone; None where none can tell.

    In the dry run every tensor of the copy is replaced by one without values. A function that
    refers to the model itself from outside its modules would mix these with real ones, and fail.
    """
    if has_graphs(model):
        return False
    try:
        found = functional.copy_structure(model)
    except Exception:  # whatever an attribute of the caller's raises
        return False
    ours = dict(model.named_parameters(remove_duplicate=False))
    theirs = dict(found.named_parameters(remove_duplicate=False))
    if ours.keys() != theirs.keys() or any(theirs[name] is not p for name, p in ours.items()):
        return False
    with with_statistics(_wrappers(found), _unchanged):
        return True if dry_run(found, reader) is not None else None


def _uses_its_own_tensors(copied: nn.Module, args: Any, kwargs: Any) -> bool:
    """Whether a copy, given clones of its tensors, computes with none of those that it had before.

    One forward pass, for a model that looks at values, or takes images of a rare size.
    """
    for module in copied.modules():
        functional.take_hooks_off(module)
    tensors = [*copied.parameters(), *copied.buffers()]
    held = functional.named(
        functional.names(copied, tensors), [t.detach().clone() for t in tensors]
    )
    args, kwargs = tree_map_only(Tensor, torch.clone, (args, kwargs))  # which it may write to
    devices = {t.device for t in tensors if t.device.type == "cuda"}
    watch = _Watch(tensors)
    with (
        torch.no_grad(), torch.random.fork_rng(list(devices)),
        with_statistics(_wrappers(copied), _unchanged), watch,
    ):  # fmt: skip
        torch.func.functional_call(copied, held, args, kwargs, tie_weights=False)
    return not watch.seen


class _Watch(TorchDispatchMode):
    """Notices whether an operation is given one of some tensors, or a view of it."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        super().__init__()
        self.seen = False
        self._storages = {t.untyped_storage()._cdata for t in tensors}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for value in tree_leaves((args, kwargs)):
            if isinstance(value, Tensor):
                self.seen = self.seen or value.untyped_storage()._cdata in self._storages
        return func(*args, **(kwargs or {}))


def _wrappers(model: nn.Module) -> list[AdaptiveNorm]:
    return [m for m in model.modules() if isinstance(m, AdaptiveNorm)]


def _unchanged(x: Tensor, base: Any) -> Tensor:
    return x
