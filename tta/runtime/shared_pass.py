"""One pass of a model for several adapters that differ in some of its layers.

The layers that differ (norm layers, what else is trained, the head, where components have hooks)
are called for each adapter with its rows, or in one operation where that is possible. All others
run once, on the rows of all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tta.core import autocast, functional
from tta.core.adapter import Adapter
from tta.core.checks import shown
from tta.core.norm_layers import AdaptiveNorm, with_statistics
from tta.core.norm_streams import normalize_streams
from tta.core.outputs import some_rows
from tta.core.twins import own_tensors
from tta.runtime.lockstep import Gradients, Pass

__all__ = ["ApartError", "SharedPass"]

CLOSE = 1e-3  # of logits of a row with others beside it, relative to the largest
LARGE_PIXEL = 1e3  # above all that pixels are taken for, levels to 255 too
WORTH = 0.5  # of all parameters, the least share in layers that run once


class ApartError(Exception):
    """Passes of several adapters cannot be one; says why."""


class SharedPass:
    """Runs the model for several adapters at once.

    Args:
        adapter: At its beginning; the others are its twins.

    Raises:
        ApartError: When these can have no pass together.
    """

    def __init__(self, adapter: Adapter) -> None:
        network = adapter.network
        _check(adapter)
        self.reader = network.reader
        self.places = _places(adapter)
        head, layers = network.head.module, map(network.model.get_submodule, self.places)
        self._head = next((n for n, m in zip(self.places, layers, strict=True) if m is head), "")
        self._trunk = functional.copy_structure(network.model)
        self._buffers = self._prepare()
        self._outer: list[list[Any]] = []  # hooks of layers that run once, of each adapter
        self._layers: list[dict[str, Any]] = []  # the others, by place
        self._rows = _Rows([], [])
        self._weights: list[dict[str, dict[str, Tensor]]] = []
        self._trying = 0  # images, while it is found out whether the model keeps rows apart
        self._called: set[str] = set()
        self._tried: set[Any] = set()
        self._pulling = False

    def add(self, model: nn.Module) -> None:
        """Take up the model of a further adapter."""
        self._layers.append({name: model.get_submodule(name) for name in self.places})
        inside = {id(m) for layer in self._layers[-1].values() for m in layer.modules()}
        outer = [m for m in model.modules() if id(m) not in inside]
        self._outer.append([m.__dict__[hooks] for m in outer for hooks in functional.HOOKS])

    def run(self, passes: Sequence[Pass], members: Sequence[int]) -> bool:
        """Answer passes of one kind, or leave them to their members; returns whether they were one.

        Args:
            passes: At least two.
            members: Which adapter each is of, by the order in which they were taken up.

        Raises:
            ApartError: When no passes of this model can be one.
        """
        weights = [self._by_place(one.tensors) for one in passes]
        if any(w is None for w in weights) or any(any(self._outer[i]) for i in members):
            return False
        self._weights = [w or {} for w in weights]
        self._rows = _Rows([len(one.images) for one in passes], members)
        before = autocast.modes()
        try:
            autocast.restore(passes[0].modes)
            autocast.forget_casts(passes[0].images.device.type)
            with torch.set_grad_enabled(passes[0].graph):
                x = self._rows.join([one.images for one in passes])
                if not self._keeps_rows(x.detach()):
                    return False
                result = self._forward(x)
        finally:
            autocast.restore(before)
        self._refuse_alone(self.reader.read(result))
        for i, one in enumerate(passes):
            one.answer = some_rows(
                result, len(x), lambda t, i=i: self._rows.split(t)[i].contiguous()
            )
        return True

    def differentiate(self, wishes: Sequence[Gradients], refused: Mapping[int, int]) -> None:
        """Back-propagate losses of several adapters in one backward pass.

        Rows that overflow are no part of any loss, but stay in the graph of a pass that others
        go on with, and zero times what is no number is none. So who has refused a pass for them
        is served alone, and has no gradients of others' passes.

        Args:
            wishes: At least one.
            refused: Numbers of members that have refused a pass, by the adapter of each.
        """
        alone = [wish for wish in wishes if wish.member.number in refused.values()]
        together = [wish for wish in wishes if wish not in alone]
        for some in ([together] if together else []) + [[wish] for wish in alone]:
            mine = {wish.member.number for wish in some}
            layers = (
                layer
                for adapter, number in refused.items()
                if number not in mine
                for layer in self._layers[adapter].values()
            )
            others = {p: p.grad for layer in layers for p in layer.parameters() if p.requires_grad}
            try:
                for p in others:
                    p.grad = None
                self._pull(some)
            finally:
                for p, gradient in others.items():
                    p.grad = gradient

    def _pull(self, wishes: Sequence[Gradients]) -> None:
        add = [wish.loss for wish in wishes if wish.inputs is None]
        give = [(wish, wish.inputs) for wish in wishes if wish.inputs is not None]
        self._pulling = True
        try:
            # Somebody may yet want other gradients of the same pass.
            if add:
                torch.autograd.backward(add, retain_graph=True)
            if give:
                losses, inputs = [w.loss for w, _ in give], [p for _, ps in give for p in ps]
                found = iter(
                    torch.autograd.grad(losses, inputs, retain_graph=True, allow_unused=True)
                )
                for wish, own in give:
                    wish.answer = [next(found) for _ in own]
        finally:
            self._pulling = False

    def _prepare(self) -> list[Tensor]:
        """Redirect the places of the trunk, and give it buffers of its own, which are returned."""
        layers = {name: self._trunk.get_submodule(name) for name in self.places}
        inside = {id(m) for layer in layers.values() for m in layer.modules()}
        buffers = []
        for module in self._trunk.modules():
            if id(module) not in inside:
                own = {k: None if b is None else b.clone() for k, b in module._buffers.items()}
                module.__dict__["_buffers"] = own
                buffers += [b for b in own.values() if b is not None]
        for name, layer in layers.items():
            functional.take_hooks_off(layer)
            layer.__dict__["forward"] = partial(self._cross, name, layer.forward)
        return buffers

    def _forward(self, x: Tensor) -> Any:
        versions = [b._version for b in self._buffers]
        result = self._trunk(x)
        if versions != [b._version for b in self._buffers]:
            raise ApartError("the model changes its own buffers")
        return result

    def _by_place(self, tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]] | None:
        """Tensors by place and name in it; None where one is in no place."""
        found: dict[str, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            place = next((p for p in _above(name) if p in self._layers[0]), None)
            if place is None:
                return None
            found.setdefault(place, {})[name[len(place) + 1 :]] = tensor
        return found

    def _refuse_alone(self, tensor: Tensor) -> None:
        """Refuse a backward pass of one adapter through layers that have run for all."""
        if tensor.requires_grad:
            tensor.register_hook(self._check_pulling)

    def _check_pulling(self, gradient: Tensor) -> None:
        if not self._pulling:
            raise ApartError("a component takes gradients itself, not by `network.session`")

    # Layers that differ ------------------------------------------------------------------------

    def _cross(self, name: str, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """In place of a layer's forward: call that of each adapter with its rows."""
        if self._trying:
            return self._try_place(name, forward, *args, **kwargs)
        rows = self._rows
        if not args or not isinstance(args[0], Tensor) or len(args[0]) != rows.count:
            raise ApartError(_not_rows(name))
        if name == self._head:
            self._refuse_alone(args[0])
        layers = [self._layers[i][name] for i in rows.members]
        weights = [held.get(name, {}) for held in self._weights]
        alone = len(args) == 1 and not kwargs
        parts: list[Any] = [None] * len(layers)
        blocks: list[Tensor] = []
        for block, x in zip(rows.blocks, rows.in_blocks(args[0]), strict=True):
            mine, own = [layers[i] for i in block], [weights[i] for i in block]
            y = normalize_streams(mine, own, x) if alone else None
            if y is not None:
                blocks.append(y)
                continue
            given = x.unbind(1)
            for at, i in enumerate(block):
                rest = [rows.rows_of(a, i) for a in args[1:]]
                more = {key: rows.rows_of(a, i) for key, a in kwargs.items()}
                parts[i] = _call(layers[i], weights[i], given[at], *rest, **more)
            outputs = [parts[i] for i in block]
            if all(isinstance(part, Tensor) for part in outputs):
                _check_alike([part.shape[1:] for part in outputs], name)
                blocks.append(torch.stack(outputs, 1))
        if len(blocks) == len(rows.blocks):
            _check_alike([block.shape[2:] for block in blocks], name)
            return rows.of_blocks(blocks)
        return rows.join_all(parts, name)

    def _try_place(self, name: str, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._called.add(name)
        result = forward(*args, **kwargs)
        first = result[0] if isinstance(result, (tuple, list)) else result
        for x in (args[0] if args else None, first):
            if not isinstance(x, Tensor) or x.ndim == 0 or len(x) != self._trying:
                raise ApartError(_not_rows(name))
        return result

    def _keeps_rows(self, x: Tensor) -> bool:
        """Whether passes of these images can be one.

        The first time, the model runs on three and on two images, each normalised by itself: all
        layers that differ must be given a row for each, and the first two must give what they give
        with the third beside them.

        Raises:
            ApartError: When rows do not stay apart.
        """
        kind = x.shape[1:], x.dtype, x.device, torch.is_grad_enabled()
        if kind in self._tried:
            return True
        three = _ordinary(torch.cat([x] * 3)[:3] if len(x) < 3 else x[:3])
        wrappers = [m for m in self._trunk.modules() if isinstance(m, AdaptiveNorm)]
        found = []
        try:
            with with_statistics(wrappers, _by_image):
                for count in (3, 2):
                    self._trying = count
                    found.append(self.reader.read(self._forward(three[:count].clone())).detach())
        except ApartError:
            raise
        except Exception:
            return False  # each adapter says in words what it is
        finally:
            self._trying = 0
        if missing := [name for name in self.places if name not in self._called]:
            raise ApartError(f"the model does not call {shown(missing[0], 60)}")
        of_three, of_two = (logits.float() for logits in found)
        if of_three.shape[0] != 3 or of_two.shape[0] != 2:
            raise ApartError("the model does not return a row for each image")
        if not bool(((of_three[:2] - of_two).abs() <= CLOSE * of_two.abs().max()).all()):
            raise ApartError("an image changes the logits of others in the model itself")
        self._tried.add(kind)
        return True


class _Rows:
    """Where the rows of each adapter are among those of all.

    Those with as many images lie interleaved, first image by first image, so that they are one
    tensor (images, adapters, ...) without a copy.

    Args:
        sizes: Images of each.
        members: Which adapter each is.
    """

    def __init__(self, sizes: Sequence[int], members: Sequence[int]) -> None:
        self.members, self.count = members, sum(sizes)
        order = sorted(range(len(sizes)), key=sizes.__getitem__)
        self.blocks = [list(found) for _, found in groupby(order, sizes.__getitem__)]
        self._images = [sizes[block[0]] for block in self.blocks]
        self._place = {i: (b, j) for b, some in enumerate(self.blocks) for j, i in enumerate(some)}

    def in_blocks(self, x: Tensor) -> list[Tensor]:
        """(count, ...) as one (images, adapters, ...) for each block."""
        lengths = [n * len(block) for n, block in zip(self._images, self.blocks, strict=True)]
        parts = [x] if len(lengths) == 1 else x.split(lengths)
        shapes = [(n, len(block)) for n, block in zip(self._images, self.blocks, strict=True)]
        return [part.unflatten(0, shape) for part, shape in zip(parts, shapes, strict=True)]

    def of_blocks(self, blocks: Sequence[Tensor]) -> Tensor:
        """The inverse of :meth:`in_blocks`."""
        flat = [block.flatten(0, 1) for block in blocks]
        return flat[0] if len(flat) == 1 else torch.cat(flat)

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """The rows (B_i, ...) of each as those of all, (count, ...)."""
        return self.of_blocks([torch.stack([parts[i] for i in b], 1) for b in self.blocks])

    def split(self, x: Tensor) -> list[Tensor]:
        """The inverse of :meth:`join`."""
        found = [block.unbind(1) for block in self.in_blocks(x)]
        return [found[b][j] for b, j in (self._place[i] for i in range(len(self.members)))]

    def rows_of(self, value: Any, i: int) -> Any:
        """What one is given of an argument."""
        own = isinstance(value, Tensor) and value.ndim > 0 and len(value) == self.count
        return self.split(value)[i] if own else value

    def join_all(self, values: Sequence[Any], name: str) -> Any:
        """What a layer gave to each as what it gave to all."""
        first = values[0]
        if isinstance(first, Tensor):
            _check_alike([value.shape[1:] for value in values], name)
            return self.join(values)
        if isinstance(first, (tuple, list)) and not hasattr(first, "_fields"):
            items = [self.join_all(some, name) for some in zip(*values, strict=True)]
            return type(first)(items)
        if first is None:
            return None
        raise ApartError(f"{shown(name, 60)} returns a {type(first).__name__}")


def _check(adapter: Adapter) -> None:
    network, session = adapter.network, adapter.session
    order = list(network._order)
    with session.plain_head():
        network._prepare()
    network._order[:] = order
    setting = adapter.config.setting
    problems = {
        "its setting chooses the number of threads": bool(setting and setting.threads),
        "its batches are split over processes": session.ranks is not None,
        "it has a memory budget": session.frugal is not None,
        "its features come from a function": bool(network._prefix),
        "the model changes its own buffers": bool(network.buffers.moving),
        "the model is compiled, or cannot be copied": adapter.compiled or not network._other.copied,
    }
    for words, found in problems.items():
        if found:
            raise ApartError(words)


def _places(adapter: Adapter) -> list[str]:
    """Names of the layers that differ between adapters, each in no other."""
    model, head, own = adapter.model, adapter.network.head.module, own_tensors(adapter)
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if any(above in found for above in _above(name)):
            continue
        held = (*module._parameters.values(), *module._buffers.values())
        differs = any(id(t) in own for t in held if t is not None)
        if (
            isinstance(module, AdaptiveNorm)
            or module is head
            or differs
            or functional.has_hooks(module)
        ):
            found[name] = module
    if "" in found:
        raise ApartError("the model itself has hooks, or parameters that are trained")
    if head is not None and not any(head is module for module in found.values()):
        raise ApartError("the head is a part of a layer that is trained")
    sizes = {id(p): p.numel() for p in model.parameters()}
    inside = {id(p) for m in found.values() if m is not head for p in m.parameters()}
    shared = sum(size for key, size in sizes.items() if key not in inside)
    if shared < WORTH * sum(sizes.values()):
        raise ApartError("most of the model is trained, or watched by a component")
    return list(found)


def _above(name: str) -> Iterator[str]:
    """The names of what holds a module or a tensor, the nearest first."""
    while name:
        name = name.rpartition(".")[0]
        yield name


def _call(layer: Any, weights: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> Any:
    """Call a layer with tensors that stay as they are when its own are stepped.

    A backward pass for all goes through it even where its adapter has already learned.
    """
    if torch.is_grad_enabled():
        trained = {name: p for name, p in layer.named_parameters() if p.requires_grad}
        weights = {n: p.clone() for n, p in trained.items()} | dict(weights)
    return functional.call(layer, dict(weights), *args, **kwargs)


def _by_image(x: Tensor, base: Any) -> Tensor:
    return F.layer_norm(x, x.shape[1:])


def _ordinary(x: Tensor) -> Tensor:
    """Images, smaller where they are so large that features might overflow, which says nothing."""
    if not x.is_floating_point():
        return x
    largest = x.abs().flatten(1).amax(1).clamp(min=LARGE_PIXEL)
    return x * (LARGE_PIXEL / largest).view(-1, *[1] * (x.ndim - 1))


def _check_alike(shapes: Sequence[torch.Size], name: str) -> None:
    if len(set(shapes)) > 1:
        raise ApartError(f"{shown(name, 60)} gives streams other shapes")


def _not_rows(name: str) -> str:
    return f"{shown(name, 60)} does not have a row for each image"
