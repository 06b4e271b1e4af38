"""The update slot: how parameters move."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tta.core.autocast import forget_casts
from tta.core.backbone import Backbone
from tta.core.component import Component, Context
from tta.core.config import ComponentConfig, UpdateConfig
from tta.core.prediction import Prediction, Report
from tta.core.source import SourceStatistics

__all__ = ["Update"]

# A kept row costs a forward and a backward of its own, about 2.3 forwards; the backward of the
# whole batch, about 1.3, whether one row or all of them are in the loss.
RERUN_BELOW = 0.55  # share of kept rows

ADAM_EPS = 1e-8
HALF_EPS = 1e-4  # in float16 the other is 0, and so are squares of gradients below 2e-4


class Update(Component):
    """How parameters move. A subclass writes :meth:`adapt`, top to bottom as the paper has it.

    ``self.network(x)`` is one forward pass, ``self.step(loss)`` the only place where a loss
    becomes a change of parameters.
    """

    slot = "update"
    Config: ClassVar[type[ComponentConfig]] = UpdateConfig
    default_norm: ClassVar[str | None] = "bn"  # norm rule when the caller names none
    default_output: ClassVar[str | None] = None  # output rule, likewise
    needs_features: ClassVar[bool] = False
    cost: ClassVar[float] = 3.0
    replays_source: ClassVar[bool] = False  # goes on reading source batches after wrap
    for_artefacts: ClassVar[dict[str, Any]] = {}  # fields that leave out what artefacts need not
    injects: ClassVar[tuple[str, ...]] = ()  # of wrap's "augment" and "restore_mask"
    learns_from_all: ClassVar[bool] = True  # given margins wide enough, from all of a batch at once
    selects: ClassVar[bool] = False  # looks, then leaves samples out: see `look`

    resets: Tensor
    kept_share: Tensor  # of the last batch, where the method selects

    def __init__(self, config: Any, network: Backbone, context: Context) -> None:
        super().__init__(config)
        self.network = network
        self.context = context
        self.parameters_adapted = context.parameters
        self.report = Report()
        self.recover: Callable[..., None] = lambda **_: None  # set by the adapter
        self.register_buffer("resets", torch.zeros((), dtype=torch.int64))
        if self.selects:
            self.register_buffer("kept_share", torch.ones(()))
        self.optimizer = self._make_optimizer()

    @classmethod
    def leaves_out(cls, config: Any, names: Iterable[str]) -> set[str]:
        """Parameters, of those that ``config.params`` selects, that the method does not train."""
        return set()

    def adapt(self, x: Tensor) -> Prediction:
        """One cycle: predict ``x`` (B, ...), learn from it, fill ``self.report``."""
        raise NotImplementedError  # pragma: no cover

    def learn(self, x: Tensor) -> Prediction:
        """``config.steps`` cycles; the prediction is that of the last one."""
        prediction = self.adapt(x)
        for _ in range(self.config.steps - 1):
            prediction = self.adapt(x)
        return prediction

    def predict(self, x: Tensor) -> Prediction:
        """Predict without learning, as a frozen adapter does."""
        return self.network(x)

    def fit(self, source: SourceStatistics) -> None:
        """Take what the method needs of ``source`` and raise ``ValueError`` if it is not there."""

    def attach(self, source: SourceStatistics) -> None:
        """Take again what no file holds when an adapter is loaded, and raise if it is missing."""

    def survives_reset(self) -> tuple[str, ...]:
        """Buffers that ``reset`` leaves as they are; only ``official=True`` may name some."""
        return ()

    def forward_rows(self, x: Tensor, rows: Tensor) -> Tensor:
        """Logits (N, C) of the rows of ``x`` in the mask ``rows`` (B,), in a new forward pass.

        Where rows depend on each other (batch statistics) the whole batch goes through the model.
        """
        if self.context.rows_independent:
            return self.network(x[rows]).logits
        return self.network(x).logits[rows]

    def look(self, x: Tensor) -> Prediction:
        """The pass that samples are chosen by.

        Without a graph where few were kept of the last batch, as then :meth:`kept_logits` will not
        need one: to hold what a backward pass would want costs a fifth of a pass.
        """
        few = self.selects and self.context.rows_independent
        with torch.set_grad_enabled(not (few and bool(self.kept_share < RERUN_BELOW))):
            return self.network(x)

    def count_kept(self, rows: Tensor) -> int:
        """How many of a batch are in the mask ``rows`` (B,); :meth:`look` remembers the share."""
        count = int(rows.sum())
        if self.selects:
            self.kept_share.fill_(count / len(rows))
        return count

    def kept_logits(self, x: Tensor, prediction: Prediction, rows: Tensor) -> Tensor:
        """Logits (N, C) of the rows that go into a loss, those that :meth:`look` gave for ``x``.

        A backward pass costs the same for every row, in the loss or not. Where rows do not depend
        on each other and few are kept, these go through the model again alone and the graph of
        the whole batch is dropped: the same gradient, up to rounding, for less.
        """
        if not self.context.rows_independent:
            return prediction.logits[rows]
        few = self.count_kept(rows) < RERUN_BELOW * len(rows)
        if few or not prediction.logits.requires_grad:
            return self.forward_rows(x, rows)
        return prediction.logits[rows]

    def optimized(self) -> dict[str, nn.Parameter]:
        """What the optimiser moves: the model's chosen parameters, then the method's own."""
        return self.context.parameters | {f"update.{n}": p for n, p in self.named_parameters()}

    def step(
        self,
        loss: Tensor,
        gradients: Sequence[Tensor] | None = None,
        see: Callable[[list[Tensor]], None] | None = None,
    ) -> bool:
        """Back-propagate ``loss`` and take one optimiser step, unless something is not finite.

        Args:
            loss: A scalar.
            gradients: Its gradients where they were taken already, elsewhere than here (SAM).
            see: Called between the two with the gradients, in the order of :meth:`optimized`
                (zeros where a parameter got none); it may change them in place.

        Returns:
            Whether the parameters moved. Gradients are cleared either way.
        """
        params = list(self.optimized().values())
        if gradients is None and not loss.requires_grad:
            raise ValueError(
                "`model` must let gradients flow from its logits to the parameters that are "
                "trained, got logits without a graph: take no_grad, detach or "
                "requires_grad_(False) out of it."
            )
        if gradients is None:
            loss.backward()
        else:
            for p, g in zip(self.parameters_adapted.values(), gradients, strict=True):
                p.grad = g
        if see is not None:
            for p in params:
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            with torch.no_grad():
                see([p.grad for p in params if p.grad is not None])
        grads = [p.grad for p in params if p.grad is not None]
        total = torch.nn.utils.get_total_norm(grads) if grads else loss.detach()
        finite = bool(torch.isfinite(loss.detach() + total))
        if finite:
            self.optimizer.step()
        self.optimizer.zero_grad()
        forget_casts(loss.device.type)
        return finite

    def _make_optimizer(self) -> torch.optim.Optimizer:
        """The optimiser, with its slots filled with zeros so that the state has fixed keys.

        A zero momentum buffer gives the same first step as torch's lazily made one, because
        dampening is 0.
        """
        c, params = self.config, list(self.optimized().values())
        if c.optimizer == "sgd":
            optimizer: torch.optim.Optimizer = torch.optim.SGD(
                params,
                lr=c.lr,
                momentum=c.momentum,
                nesterov=c.nesterov,
                weight_decay=c.weight_decay,
                foreach=True,
            )
            if c.momentum > 0:
                for p in params:
                    optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
            return optimizer
        optimizer = torch.optim.Adam(
            params,
            lr=c.lr,
            betas=c.betas,
            eps=HALF_EPS if any(p.dtype == torch.float16 for p in params) else ADAM_EPS,
            weight_decay=c.weight_decay,
            foreach=True,
        )
        for p in params:
            optimizer.state[p].update(
                step=torch.zeros(()), exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p)
            )
        return optimizer
