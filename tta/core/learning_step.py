"""One call that learns by gradients, where no value can be looked at and all shapes are known.

:mod:`tta.core.step_function` has calls as functions of their state, for recipes without a gradient.
An update and its optimiser hold the parameters that they move, so here the call runs on the
adapter's own tensors.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tta.core.adapter import Adapter
from tta.core.checks import shown
from tta.core.optimizer import UnseenSteps
from tta.core.state import Place
from tta.core.step_function import at_least_1d, check_learning, fits, refuse
from tta.core.tracing import recording

__all__ = ["LearningStep"]


class LearningStep:
    """A call of an adapter that has an update.

    Args:
        adapter: It has served a batch, and stays as it is now.
        images: (B, ...), such as will be served.

    Raises:
        ValueError: When the call does not go by its own images and tensors of fixed shapes alone.
    """

    by_tensors = (False,)  # what decides by tensors, for `torch.export`, drops gradients

    def __init__(self, adapter: Adapter, images: Tensor) -> None:
        refuse(adapter, images)
        check_learning(adapter)
        update: Any = adapter.update
        if update.optimizer is None:
            raise ValueError(f"{update.name} moves tensors of its own, and trains nothing")
        places, by_rows = adapter._state.named_places()
        if by_rows:
            raise ValueError(f"it keeps rows of earlier batches, in {shown(min(by_rows))}")
        if adapter.session.frugal is not None:
            raise ValueError("its passes are cut up to save memory")
        self.adapter, self.update = adapter, update
        undefined = set(adapter._state.keys_of("undefined_as_nan", but=""))
        # The optimiser's step counts are on the CPU; one on the device stands in for them.
        mine = {
            name: place
            for name, place in places.items()
            if not (name.startswith("optim/") and place[1] == "step")
        }
        self._places, self._undefined = list(mine.values()), [name in undefined for name in mine]
        self._taken = torch.zeros((), dtype=torch.float64, device=images.device)
        self._counts: list[Tensor] = []  # as :class:`UnseenSteps` has them

    def places(self) -> list[Place]:
        """Where the adapter holds what moves, but for the optimiser's step counts."""
        return self._places

    def begin(self) -> bool:
        """Take up the optimiser's step counts, before a call or a replay.

        Returns:
            Whether they are one number, as they must be.
        """
        found = {float(count) for count in self._counts}
        self._taken.fill_(max(found, default=0.0))
        return len(found) < 2

    def end(self) -> None:
        """Count the steps of a replay that has moved the adapter."""
        for count in self._counts:
            count += 1

    def trained(self) -> list[Tensor]:
        """Copies of all that the optimiser moves."""
        return [p.detach().clone() for p in self.update.optimized().values()]

    def advance(
        self, images: Tensor, state: list[Tensor]
    ) -> tuple[Tensor, Tensor, list[Tensor], list[tuple[Any, dict[str, Any]]]]:
        """Serve a batch and learn from it; as :meth:`tta.core.step_function.Step.advance`.

        ``state`` are the adapter's own tensors. The call writes to them, and what it returns is
        what they are to hold.
        """
        adapter, update = self.adapter, self.update
        before = [value.clone() for value in state]
        own = [held[key] for held, key in self._places]
        try:
            with recording(adapter):
                update.unseen = unseen = UnseenSteps(self._taken)
                adapter._context.signs.look()
                with adapter.network.call():
                    answer = adapter._serving.learned(images)
                logits = adapter.network.reader.read(answer)
                parts: list[Any] = [part for part in (adapter.output, update) if part is not None]
                figures = [(part, part.report.raw()) for part in parts]
            after = [held[key].detach() for held, key in self._places]
        finally:
            for (held, key), value in zip(self._places, own, strict=True):
                held[key] = value
        self._counts = unseen.counts
        fine = logits.isfinite().all()
        for is_fine in (*unseen.moved, *self._defined(after), *fits(images)):
            fine = fine & is_fine
        pairs = [(v, w.reshape(v.shape)) for v, w in zip(after, before, strict=True)]
        after = [at_least_1d(torch.where(fine, v, w)) for v, w in pairs]
        return fine, logits, after, figures

    def _defined(self, values: list[Tensor]) -> list[Tensor]:
        """Whether the state is numbers, or NaN where that means that there is no value."""
        known = [(v, u) for v, u in zip(values, self._undefined, strict=True) if v.numel()]
        known = [(v, u) for v, u in known if v.is_floating_point()]
        sizes = [torch.linalg.vector_norm(v, torch.inf) for v, undefined in known if not undefined]
        found = [torch.stack([size.float() for size in sizes]).isfinite().all()] if sizes else []
        return found + [~v.isinf().any() for v, undefined in known if undefined]
