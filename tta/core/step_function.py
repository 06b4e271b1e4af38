"""One call of an adapter as a function of tensors: images and state in, logits and state out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tta.core.adapter import Adapter
from tta.core.checks import shown
from tta.core.norm_layers import begin_graph
from tta.core.prediction import Prediction
from tta.core.serving import LARGE
from tta.core.state import GUARD, Place
from tta.core.traced_pass import check_one_pass
from tta.core.tracing import is_tracing, recording, tracing_step

__all__ = [
    "BATCHES",
    "Step",
    "at_least_1d",
    "check_learning",
    "fits",
    "learns",
    "moving_keys",
    "refuse",
    "to_function",
]

SMALL = 1 << 16  # elements
BATCHES = f"{GUARD}monitor.batches"  # what a guard that resets goes by


def refuse(adapter: Any, example: Any) -> None:
    """Refuse what no graph can hold, in a sentence that names it.

    Raises:
        TypeError: When ``adapter`` is no adapter or ``example`` no batch of images.
        ValueError: When the adapter's recipe or model cannot be exported.
        RuntimeError: When the adapter was unwrapped.
    """
    if not isinstance(adapter, Adapter):
        raise TypeError(
            f"`adapter` must be one that tta.wrap returned, got {type(adapter).__name__}: wrap the "
            "model first."
        )
    adapter.network.check(example)
    if adapter.session.ranks is not None:
        raise ValueError(
            "`adapter` must run in one process to be exported, got one that splits its batches: "
            "export it before tta.runtime.split_batches."
        )
    if adapter.config.window is not None:
        raise ValueError(
            f"`window` must be left out of an adapter to be exported, got {adapter.config.window}: "
            "wrap the model without it, and hand the graph whole batches."
        )
    if adapter.network.masters.pairs:
        raise ValueError(
            "`adapter` must hold float32 weights to be exported, got trained ones in half "
            "precision: convert the model with model.float() and wrap it again."
        )
    check_one_pass(adapter)
    if adapter.config.shadow:
        raise ValueError(
            "`adapter` must give answers of its own to be exported, got shadow=True: wrap the "
            "model without it, or export the plain model."
        )
    guard = adapter.guard
    if not learns(adapter):
        if guard is not None and (reason := guard.hands_over()) is not None:
            raise ValueError(
                f"`guard` must let the adapted model answer to be exported, got "
                f"{shown(guard.name)}, by which the source answers now ({reason}): reset() first, "
                "or export the plain model."
            )
        return
    check_learning(adapter)
    if guard is not None and guard.resets_after(torch.zeros((), dtype=torch.int64)) is None:
        raise ValueError(
            f"`guard` must decide by the number of batches alone to be exported, got "
            f"{shown(guard.name)}, which looks at figures of each batch: wrap with guard=False or "
            "'periodic', or freeze() first."
        )


def check_learning(adapter: Adapter) -> None:
    """Refuse norm and output rules that cannot go on learning in a graph.

    Raises:
        ValueError: When one takes gradients, or its state grows.
    """
    if adapter.output is not None and adapter.output.takes_gradient:
        raise ValueError(
            f"`output` must learn without gradients to be exported, got "
            f"{shown(adapter.output.name)}: freeze() first, or choose another."
        )
    growing = adapter._state.resizable_places()
    if growing:
        raise ValueError(
            "`adapter` must have a state of fixed shapes to be exported, got "
            f"{shown(min(growing))}, "
            "which grows with the stream: bound it in the component's config, or freeze() first."
        )


def learns(adapter: Adapter) -> bool:
    """Whether the graph learns: not where learning is off, or takes gradients."""
    return adapter.session.learning and adapter.update is None


def moving_keys(adapter: Adapter) -> list[str]:
    """Names, in :meth:`tta.Adapter.state`, of what moves in the graph, in their order."""
    if not learns(adapter):
        return []
    keys = [key for key in adapter.state() if key != "rng" and not key.startswith(GUARD)]
    return keys + ([] if adapter.guard is None else [BATCHES])


def to_function(adapter: Adapter, example: Tensor) -> Step:
    """Give the call of an adapter as a module whose state goes in and comes out.

    It is what :func:`tta.export.to_onnx` records, for ``torch.export.export`` and what takes its
    programs, such as AOTInductor and ExecuTorch. ``module(images, reset, state)`` returns logits
    (B, C) and then the tensors of the state after the batch; ``images`` are (B, ...), ``reset`` is
    (1,) bool, ``state`` a list of tensors. ``module.keys`` says which key of
    :meth:`tta.Adapter.state` each of them is, ``module.start()`` gives the state to start with.
    What adapts, what is frozen and what is refused is as for :func:`tta.export.to_onnx`.

    The module is there to be recorded, with ``strict=False``, rather than called. It holds the
    adapter's own weights, so record it before the adapter learns on or is unwrapped.

    Args:
        adapter: What :func:`tta.wrap` returned; it stays as it is.
        example: Images (B, ...) as the model takes them.

    Raises:
        TypeError: When ``adapter`` is no adapter or ``example`` no batch of images.
        ValueError: When the recipe or the model has no graph; it is named.
        RuntimeError: When the adapter was unwrapped.
    """
    refuse(adapter, example)
    return Step(adapter, moving_keys(adapter)).eval()


class Step(nn.Module):
    """A call as a function, for ``torch.export``.

    It takes images (B, ...), ``reset`` (1,) bool, and a tensor for each key; it returns logits
    (B, C) and the tensors after the batch. Tensors without axes have one of length 1, since Triton
    knows no others. Where the images or the state hold what is no number, the logits are the
    source's and the state is returned as it came.

    Args:
        adapter: Whose call it is.
        keys: Of the state, as :func:`moving_keys` gives them.
    """

    by_tensors = (False, True)  # ways for components to decide, while no value is known

    def __init__(self, adapter: Adapter, keys: list[str]) -> None:
        super().__init__()
        # The rest of the adapter is no part of this module: what it holds is constant here.
        self.model, self.output = adapter.model, adapter.output
        self.__dict__["adapter"] = adapter
        self.keys = keys
        self.device = next((p.device for p in self.model.parameters()), torch.device("cpu"))
        self.undefined = set(adapter._state.keys_of("undefined_as_nan", but=""))
        start = adapter.state()
        self.scalar = [start[key].ndim == 0 for key in keys]
        # Small tensors are looked at and chosen from as one, since an operation on each of hundreds
        # would take as long as the network does.
        self.packed = [
            i
            for i, key in enumerate(keys)
            if start[key].dtype == torch.float32
            and start[key].numel() <= SMALL
            and key not in self.undefined
        ]
        homes = adapter.reset_point() if BATCHES in keys else {}
        for i, key in enumerate(keys):
            self.register_buffer(f"start_{i}", at_least_1d(start[key]))
            home = homes.get(key, start[key]).to(start[key])
            same = torch.equal(home, start[key])  # as before the first batch
            self.register_buffer(f"home_{i}", None if same else at_least_1d(home))

    def start(self) -> list[Tensor]:
        """The state to start with, in the order of ``keys``."""
        return [value.clone() for value in self._start()]

    def _start(self) -> list[Tensor]:
        found: list[Any] = [getattr(self, f"start_{i}") for i in range(len(self.keys))]
        return found

    def _home(self) -> list[Tensor]:
        """What the guard goes back to: where the adapter began, whatever it had learned since."""
        found: list[Any] = [getattr(self, f"home_{i}") for i in range(len(self.keys))]
        pairs = zip(found, self._start(), strict=True)
        return [begin if home is None else home for home, begin in pairs]

    def forward(self, images: Tensor, reset: Tensor, state: list[Tensor]) -> tuple[Tensor, ...]:
        adapter: Adapter = self.__dict__["adapter"]
        first = reset.reshape(())
        joined = torch.where(first, self._pack(self._start()), self._pack(state))
        state = [
            value if i in self.packed else torch.where(first, begin, value)
            for i, (begin, value) in enumerate(zip(self._start(), state, strict=True))
        ]
        state = self._unpack(joined, state)
        fine, sizes = self._defined(joined, state), None
        if images.is_floating_point():
            sizes = torch.linalg.vector_norm(images.flatten(1), dim=1)
            fine = fine & (torch.linalg.vector_norm(sizes) <= LARGE)  # False for NaN
        with recording(adapter), tracing_step(~fine):
            own = [value.clone() for value in state]
            prediction, logits, after = self._serve(adapter, images, own)
        joined_after = self._pack(after)
        fine = fine & self._defined(joined_after, after)
        logits = torch.where(fine, logits, prediction.logits)
        if sizes is not None:  # a network in 8 bits gives numbers for whatever it gets
            logits = torch.where((sizes < torch.inf)[:, None], logits, torch.nan)
        after = [
            value if i in self.packed else torch.where(fine, value, old)
            for i, (value, old) in enumerate(zip(after, state, strict=True))
        ]
        return logits, *self._unpack(torch.where(fine, joined_after, joined), after)

    def advance(
        self, images: Tensor, state: list[Tensor]
    ) -> tuple[Tensor, Tensor, list[Tensor], list[tuple[Any, dict[str, Any]]]]:
        """Serve a batch whose shape is known, where no value is, as on a GPU.

        Args:
            images: (B, ...).
            state: By key, with an axis for each that has none.

        Returns:
            Whether images, logits and state are all numbers (0-dimensional bool); logits (B, C);
            the state after the batch, which is that before it where they are not; and components
            with the figures of their reports.
        """
        adapter: Adapter = self.__dict__["adapter"]
        before = self._pack(state)
        own = [value if i in self.packed else value.clone() for i, value in enumerate(state)]
        with recording(adapter):
            _, logits, after = self._serve(adapter, images, self._unpack(before.clone(), own))
            parts: list[Any] = [] if adapter.output is None else [adapter.output]
            figures = [(part, part.report.raw()) for part in parts]
        joined = self._pack(after)
        fine = self._defined(joined, after) & logits.isfinite().all()
        for fit in fits(images):
            fine = fine & fit
        after = [
            value if i in self.packed else torch.where(fine, value, old)
            for i, (value, old) in enumerate(zip(after, state, strict=True))
        ]
        joined = torch.where(fine, joined, before)
        return fine, logits, self._unpack(joined, after), figures

    def begin(self) -> bool:
        """Whether it can be called or replayed now."""
        return True

    def end(self) -> None:
        """Nothing is counted outside of the state."""

    def trained(self) -> list[Tensor]:
        """Nothing: there is no optimiser."""
        return []

    def places(self) -> list[Place]:
        """Where the adapter holds each tensor of the state, in the order of ``keys``."""
        return self._places(self.__dict__["adapter"])

    def _serve(
        self, adapter: Adapter, images: Tensor, state: list[Tensor]
    ) -> tuple[Prediction, Tensor, list[Tensor]]:
        """Logits before and after the output rule, and the state after the batch.

        ``state`` is written to.
        """
        places = self._places(adapter)
        held_before = [held[key] for held, key in places]
        try:
            for (held, key), value, scalar in zip(places, state, self.scalar, strict=True):
                held[key] = value.reshape(()) if scalar else value
            adapter._context.signs.look()
            if is_tracing():
                begin_graph(adapter._wrappers.values())
            with adapter.network.call():
                prediction, answer = adapter._serving.traced(images)
            logits = adapter.network.reader.read(answer)
            after = [at_least_1d(held[key]) for held, key in places]
        finally:
            for (held, key), value in zip(places, held_before, strict=True):
                held[key] = value
        return prediction, logits, self._guarded(adapter, after)

    def _guarded(self, adapter: Adapter, after: list[Tensor]) -> list[Tensor]:
        """The state after the guard's reset, if there is a guard."""
        if adapter.guard is None or BATCHES not in self.keys:
            return after
        at = self.keys.index(BATCHES)
        batches = after[at]
        resets: Any = adapter.guard.resets_after(batches.reshape(()))
        kept = adapter._state.surviving()
        found = [
            value if key in kept else torch.where(resets, home, value)
            for key, home, value in zip(self.keys, self._home(), after, strict=True)
        ]
        found[at] = batches + 1
        return found

    def _places(self, adapter: Adapter) -> list[Place]:
        whole, by_rows = adapter._state.named_places()
        named = whole | by_rows
        return [named[key] for key in self.keys]

    def _defined(self, joined: Tensor, values: list[Tensor]) -> Tensor:
        """Whether all of the state are numbers, or NaN where that means that there is no value."""
        fine = joined.abs().sum() < torch.inf  # False for NaN
        for i, (key, value) in enumerate(zip(self.keys, values, strict=True)):
            if i in self.packed or not value.is_floating_point():
                continue
            bad = value.isinf() if key in self.undefined else ~value.isfinite()
            fine = fine & ~bad.any()
        return fine

    def _pack(self, values: list[Tensor]) -> Tensor:
        """All small tensors in one (N,); a zero where there is none."""
        small = [values[i].flatten() for i in self.packed]
        return torch.cat(small) if small else torch.zeros((), device=self.device)

    def _unpack(self, joined: Tensor, values: list[Tensor]) -> list[Tensor]:
        """The tensors, of which the small ones are taken out of what :meth:`_pack` returned."""
        if not self.packed:
            return values
        found = list(values)
        parts = joined.split([values[i].numel() for i in self.packed])
        for i, part in zip(self.packed, parts, strict=True):
            found[i] = part.reshape(values[i].shape)
        return found


def at_least_1d(value: Tensor) -> Tensor:
    """A tensor with an axis where it has none."""
    return value.reshape(1) if value.ndim == 0 else value


def fits(images: Tensor) -> list[Tensor]:
    """Whether norm layers can take the numbers (0-dimensional bool); nothing for integers."""
    if not images.is_floating_point():
        return []
    return [torch.linalg.vector_norm(images, dtype=torch.float32) <= LARGE]
