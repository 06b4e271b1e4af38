"""The whole step of an adapter, captured once and replayed: CUDA graphs, and what stands in.

A step of small kernels takes as long as launching them; a replay launches all of them at once. What
is captured reads images from a tensor of its own, and state from the adapter's own tensors, to
which it writes: so the adapter is at any time what it would be without, for whoever reads its
state, resets it, or has it serve a batch itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tta.core.adapter import Adapter
from tta.core.checks import told
from tta.core.compiled import is_compiled
from tta.core.foreach import foreach
from tta.core.learning_step import LearningStep
from tta.core.prediction import Report
from tta.core.rehearsal import rehearse, undone
from tta.core.step_function import at_least_1d, to_function
from tta.core.tracing import NoLoopError, capturing

__all__ = [
    "Captured",
    "CudaGraph",
    "Graph",
    "NotCapturedError",
    "StandIn",
    "graph_on",
    "standing_in",
]

# Of logits, as a share of the largest of the batch where that is above 1; TF32 has 10 bits.
TOLERANCE = 1e-2
# Of what two steps move, in norm: Adam's first steps magnify the rounding of small gradients.
SHARE = 0.3
WARM_UPS = 3  # in which libraries choose kernels and take their memory
# Operations that wait for values, or whose results have a length that depends on these.
WAIT = {
    "aten::_linalg_check_errors", "aten::_local_scalar_dense", "aten::_unique2", "aten::bincount",
    "aten::equal", "aten::is_nonzero", "aten::masked_select", "aten::nonzero",
    "aten::repeat_interleave.Tensor", "aten::unique_consecutive", "aten::unique_dim",
}  # fmt: skip
INDEX = {"aten::index", "aten::index_put", "aten::index_put_"}
COPY = {"aten::_to_copy", "aten::copy_", "aten::where", *INDEX}  # what they get from elsewhere
_stands_in = False


class NotCapturedError(ValueError):
    """A step cannot be captured; says why."""


class Graph(Protocol):
    """Calls that are captured once."""

    def ready(self, call: Callable[[], None]) -> None:
        """Warm up, by calls that have their effects, and capture one that has none."""

    def replay(self) -> None:
        """Do what the captured call did, with what its tensors hold now."""


class CudaGraph:
    """A CUDA graph.

    Args:
        device: With a number or without.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self._graph = device, torch.cuda.CUDAGraph()

    def ready(self, call: Callable[[], None]) -> None:
        """See :class:`Graph`."""
        with torch.cuda.device(self.device):
            now, side = torch.cuda.current_stream(), torch.cuda.Stream()
            side.wait_stream(now)
            with torch.cuda.stream(side):
                for _ in range(WARM_UPS):
                    call()
            now.wait_stream(side)
            # Other threads, such as those that upload images, may do on the device what they want.
            with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
                call()

    def replay(self) -> None:
        """See :class:`Graph`."""
        with torch.cuda.device(self.device):
            self._graph.replay()


class StandIn:
    """Calls again what a graph would replay, where there is no GPU."""

    def ready(self, call: Callable[[], None]) -> None:
        """See :class:`Graph`."""
        for _ in range(WARM_UPS):
            call()
        self._call = call

    def replay(self) -> None:
        """See :class:`Graph`."""
        self._call()


@contextmanager
def standing_in() -> Iterator[None]:
    """Within the block, :class:`StandIn` takes the place of graphs on devices that have none."""
    global _stands_in
    before, _stands_in = _stands_in, True
    try:
        yield
    finally:
        _stands_in = before


def graph_on(device: torch.device) -> Callable[[], Graph] | None:
    """What makes graphs on a device; None where there are none."""
    if device.type == "cuda":
        return lambda: CudaGraph(device)
    return StandIn if _stands_in else None


class Captured:
    """The step of an adapter for images of one shape.

    Args:
        adapter: It has served such images, learns, and stays as it is now.
        images: (B, ...), by which it is captured.
        graph: Not ready yet.

    Raises:
        NotCapturedError: When this cannot be captured.
    """

    def __init__(self, adapter: Adapter, images: Tensor, graph: Graph) -> None:
        self.adapter, self.graph = adapter, graph
        self._refuse()
        try:
            learns = adapter.update is not None
            self._step = LearningStep(adapter, images) if learns else to_function(adapter, images)
            learned: list[list[Tensor]] = [self._step.trained()]
            expected = rehearse(
                adapter, [images, images], lambda: learned.append(self._step.trained())
            )
        except ValueError as error:
            raise NotCapturedError(str(error)) from error
        self.images = images.detach().clone()
        self._tensors = [held[key] for held, key in self._step.places()]
        if any(tensor.device != images.device for tensor in self._tensors):
            raise NotCapturedError("part of its state is on another device than the images")
        start, found = [tensor.clone() for tensor in self._tensors], []

        def prepare() -> None:
            try:
                self._choose()
                self.graph.ready(self._call)
                self._put(start)
                for _ in expected:
                    whole = self._step.begin()
                    self.graph.replay()
                    if learned[0] and not (whole and bool(self.fine)):
                        raise NotCapturedError("nothing is learned from the images at hand")
                    self._step.end()
                    found.append(self.logits.clone())
                learned.append(self._step.trained())
            finally:
                self._put(start)

        try:
            undone(adapter, prepare)
        except NotCapturedError:
            raise
        except Exception as error:  # of the model or the device, which the adapter may survive
            raise NotCapturedError(f"{type(error).__name__}: {told(error, 160)}") from error
        self._check(found, expected)
        self._check_learned(*learned)

    def fits(self, images: Tensor) -> bool:
        """Whether images are like those that this was captured for."""
        return images.shape == self.images.shape and images.dtype == self.images.dtype

    def serve(self, images: Tensor) -> Tensor | None:
        """Serve a batch that fits.

        Returns:
            Logits (B, C), which the next call overwrites. None where images, logits or state are
            not all numbers: nothing has happened then, and the adapter is to serve the batch.
        """
        adapter = self.adapter
        with torch.inference_mode(False), torch.no_grad():
            self._take_up()
            if not self._step.begin():
                return None
            self.images.copy_(images)
            self.fine.zero_()
            try:
                self.graph.replay()
                fine = bool(self.fine)
            except BaseException:  # a signal, while the device was waited for
                if bool(self.fine):
                    self._step.end()
                raise
            if not fine:
                return None
            self._step.end()
            serving = adapter._serving
            serving.seen, serving.rejected = len(images), 0
            adapter._context.draws.call += 1
            for part, figures in self.figures:
                kept = {k: v.clone() if isinstance(v, Tensor) else v for k, v in figures.items()}
                part.report = Report(kept)
        return self.logits

    def _refuse(self) -> None:
        """Refuse what would be exported as something else than it is."""
        adapter, reason = self.adapter, ""
        if adapter.guard is not None:
            reason = f"{adapter.guard.name} looks at each batch"
        elif adapter.config.setting is not None:
            reason = "the adapter runs by a setting of its own"
        elif any(is_compiled(module) for module in adapter.model.modules()):
            reason = "the model is compiled"
        if reason:
            raise NotCapturedError(reason)

    def _choose(self) -> None:
        """Find out whether components may go on as on a GPU, or must decide by tensors."""
        generator, reason = self.adapter._context.generator, ""
        for way in self._step.by_tensors:
            self._by_tensors, drawn = way, generator.get_state()
            try:
                with _Waits():
                    self._call()
            except _WaitsError as error:
                reason = f"it waits for values, by {error}"
            except NoLoopError as error:
                raise NotCapturedError(told(error)) from error
            else:
                if not torch.equal(generator.get_state(), drawn):
                    raise NotCapturedError("it draws random numbers")
                return
        raise NotCapturedError(reason)

    def _call(self) -> None:
        with capturing(self._by_tensors):
            state = [at_least_1d(tensor) for tensor in self._tensors]
            self.fine, self.logits, after, self.figures = self._step.advance(self.images, state)
            self._put(after)

    def _put(self, values: list[Tensor]) -> None:
        if values:
            shapes = (tensor.shape for tensor in self._tensors)
            parts = [value.reshape(shape) for value, shape in zip(values, shapes, strict=True)]
            foreach._foreach_copy_(self._tensors, parts)

    def _take_up(self) -> None:
        """Let the adapter hold its tensors where it has come to hold others, with their values."""
        for (held, key), tensor in zip(self._step.places(), self._tensors, strict=True):
            if held[key] is not tensor:
                tensor.copy_(held[key])
                held[key] = tensor

    def _check(self, found: list[Tensor], expected: list[Tensor]) -> None:
        for ours, theirs in zip(found, expected, strict=True):
            limit = TOLERANCE * max(1.0, float(theirs.nan_to_num().abs().max()))
            if not torch.allclose(ours.float(), theirs.float(), 0.0, limit):
                far = float((ours.float() - theirs.float()).abs().max())
                raise NotCapturedError(
                    f"its logits then differ by {far:.2g}: the model decides by values in Python, "
                    "or draws random numbers"
                )

    def _check_learned(
        self, before: list[Tensor], theirs: list[Tensor], ours: list[Tensor]
    ) -> None:
        """Compare what two steps move with what they are to move.

        As a share of it, since one step moves logits by less than rounding does.
        """
        moved, apart = (
            sum(float((a - b).float().norm()) ** 2 for a, b in zip(theirs, other, strict=True))
            for other in (before, ours)
        )
        if apart > SHARE**2 * moved:
            raise NotCapturedError(
                "what it learns then differs: the method or the model counts calls in Python, or "
                "draws random numbers"
            )


class _WaitsError(Exception):
    """An operation would wait for the device."""


class _Waits(TorchDispatchMode):
    """Refuses what cannot be captured on a GPU, on whatever device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, overload = func._schema.name, func._schema.overload_name
        waits = name in WAIT or f"{name}.{overload}" in WAIT
        if waits or (name in INDEX and _by_mask(args)):
            raise _WaitsError(name.rpartition("::")[2])
        found = func(*args, **(kwargs or {}))
        if name in COPY and _crosses(found, args):
            raise _WaitsError("a copy to another device")
        return found


def _by_mask(args: Any) -> bool:
    """Whether an index is a mask, whose number of elements is not known."""
    return any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])


def _crosses(found: Any, args: Any) -> bool:
    return len({t.device for t in tree_leaves((found, args)) if isinstance(t, Tensor)}) > 1
