"""The update slot: how parameters move."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tta.core.autocast import forget_casts
from tta.core.backbone import Backbone
from tta.core.component import Component, Context
from tta.core.config import ComponentConfig, UpdateConfig
from tta.core.guard import DEFAULT_GUARD
from tta.core.optimizer import UnseenSteps, make_optimizer
from tta.core.prediction import Prediction, Report
from tta.core.selection_pass import RowSelector
from tta.core.source import SourceStatistics
from tta.core.state_dict import copy_tensors

__all__ = ["ForwardUpdate", "Update"]


class Update(Component):
    """Decides how parameters move. A subclass defines :meth:`adapt`, in the order of the paper.

    ``self.network(x)`` is one forward pass, ``self.selection_pass(x)`` one by which samples are
    chosen, and ``self.step(loss)`` the only place where a loss becomes a change of parameters.

    Args:
        config: The component's config.
        network: The wrapped model.
        context: What is known at wrap.
    """

    slot = "update"
    must_define = ("adapt",)
    Config: ClassVar[type[ComponentConfig]] = UpdateConfig
    default_norm: ClassVar[str | None] = "bn"  # norm rule when the caller names none
    default_output: ClassVar[str | None] = None  # output rule when the caller names none
    default_guard: ClassVar[str] = DEFAULT_GUARD  # guard when the caller says guard=True
    cost: ClassVar[float] = 3.0
    # Whether parameters of the model move, by one optimiser for the whole stream.
    trains_model: ClassVar[bool] = True
    # Whether its weights may be one of several sets, which are exchanged between batches.
    in_sets: ClassVar[bool] = False
    # Whether it learns from every sample of a batch, given margins wide enough.
    learns_from_whole_batch: ClassVar[bool] = True
    # Whether the parameters are put back to what they were before a call returns.
    episodic: ClassVar[bool] = False
    # Whether it takes gradients with respect to what the model is fed.
    follows_images: ClassVar[bool] = False

    resets: Tensor  # 0-dimensional: by the method itself, since wrap or the user's last reset

    def __init__(self, config: Any, network: Backbone, context: Context) -> None:
        super().__init__(config)
        self.network = network
        self.context = context
        self.parameters_adapted = context.parameters
        self.report = Report()
        self.left_out: list[nn.Parameter] = []  # whose gradients of this batch are dropped
        self.unseen: UnseenSteps | None = None  # takes the steps where no value can be looked at
        self.selection_pass = RowSelector(network, context.rows_independent)
        self.register_buffer("resets", torch.zeros((), dtype=torch.int64))
        self.optimizer = self._make_optimizer()

    @classmethod
    def brings(cls, config: Any) -> dict[str, Any]:
        """The default norm and output rules."""
        found = {"norm": cls.default_norm, "output": cls.default_output}
        return {slot: name for slot, name in found.items() if name is not None}

    @classmethod
    def leaves_out(cls, config: Any, names: Iterable[str]) -> set[str]:
        """Parameters, of those that ``config.params`` selects, that the method does not train."""
        return set()

    def adapt(self, x: Tensor) -> Prediction:
        """Run one cycle: predict ``x`` (B, ...), learn from it, fill ``self.report``."""
        raise NotImplementedError  # pragma: no cover

    def learn(self, x: Tensor) -> Prediction:
        """Run ``config.steps`` cycles, and return the prediction of the last one."""
        prediction = self.adapt(x)
        for _ in range(self.config.steps - 1):
            prediction = self.adapt(x)
        return prediction

    def predict(self, x: Tensor) -> Prediction:
        """Predict without learning, as a frozen adapter does."""
        return self.network(x)

    @classmethod
    def chooses(
        cls, config: Any, model: nn.Module, found: Mapping[str, nn.Parameter]
    ) -> dict[str, nn.Parameter]:
        """Parameters that the method moves.

        Args:
            config: The method's config.
            model: The unwrapped model.
            found: Those that ``config.params`` selects, less what the method leaves out.

        Raises:
            ValueError: When the model does not have what the method moves.
        """
        return dict(found)

    def fit(self, source: SourceStatistics) -> None:
        """Take what the method needs from ``source``; raise ``ValueError`` if it is missing."""

    def optimized(self) -> dict[str, nn.Parameter]:
        """What the optimiser moves: the model's chosen parameters, then the method's own."""
        return self.context.parameters | {f"update.{n}": p for n, p in self.named_parameters()}

    def learning_rates(self) -> dict[str, float]:
        """Learning rates other than ``config.lr``, by the names of :meth:`optimized`."""
        return {}

    def lazy_parameters(self) -> tuple[str, ...]:
        """Own parameters that are empty, but for their first axis, until the first batch."""
        return ()

    def give_shape(self, name: str, value: Tensor) -> None:
        """Fill a lazy parameter, and give the optimiser's moments of it their shape."""
        p = self.get_parameter(name)
        p.data = value
        for key, slot in self.optimizer.state.get(p, {}).items():
            if key != "step":
                slot.data = torch.zeros_like(value)

    def trained(self) -> dict[str, Tensor]:
        """The model's chosen parameters, by their names in a state."""
        return {f"param/{name}": p.detach() for name, p in self.context.parameters.items()}

    def optimizer_slots(self) -> dict[str, Tensor]:
        """The optimiser's moments and step counts, by their names in a state."""
        return {
            f"optim/{name}.{key}": value
            for name, p in self.optimized().items()
            for key, value in self.optimizer.state.get(p, {}).items()
        }

    def recover(self, optimizer: bool = True) -> None:
        """Put parameters, and optionally the optimiser's state, back to the reset point."""
        mine = self.trained() | (self.optimizer_slots() if optimizer else {})
        start = self.network.session.reset_point
        copy_tensors(mine, {key: start[key] for key in mine})

    def step(
        self,
        loss: Tensor,
        gradients: Sequence[Tensor] | None = None,
        see: Callable[[list[Tensor]], None] | None = None,
    ) -> bool:
        """Back-propagate ``loss`` and take one optimiser step, unless something is not finite.

        Args:
            loss: A scalar.
            gradients: Gradients for ``parameters_adapted``, where the method has computed them
                itself (SAM); None to compute them here.
            see: Called before the step with the gradients, in the order of :meth:`optimized` (zeros
                where a parameter got none); it may change them in place.

        Returns:
            Whether the parameters moved; while a step is captured, a 0-dimensional bool. Gradients
            are cleared either way.
        """
        params = list(self.optimized().values())
        if gradients is None and not loss.requires_grad:
            raise ValueError(
                "`model` must let gradients flow from its logits to the parameters that are "
                "trained, got logits without a graph: take no_grad, detach or "
                "requires_grad_(False) out of it."
            )
        self.optimizer.zero_grad()  # gradients that somebody else has left there
        if gradients is not None:
            for p, g in zip(self.parameters_adapted.values(), gradients, strict=True):
                p.grad = g
        elif self.unseen is None:
            self.network.session.backward(loss)
        else:  # autograd's AccumulateGrad would run on the stream on which it was made
            asked = [p for p in params if p.requires_grad]
            found = self.network.session.gradients(loss, asked)
            for p, g in zip(asked, found, strict=True):
                p.grad = g
        for p in self.left_out:
            p.grad = None
        if see is not None:
            for p in params:
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            with torch.no_grad():
                see([p.grad for p in params if p.grad is not None])
        if self.network.session.guard is not None:
            self._ask_guard()
        grads = [p.grad for p in params if p.grad is not None]
        total = torch.nn.utils.get_total_norm(grads) if grads else loss.detach()
        finite = torch.isfinite(loss.detach() + total)
        if self.unseen is not None:
            stepped: Any = finite & (total > 0)
            self.unseen.step(self.optimizer, stepped)
            self.optimizer.zero_grad()
            return stepped if self.config.lr > 0 else stepped & False
        moved = bool(finite)
        if moved:
            # With gradients of zero, only momentum or weight decay moves anything.
            certain = bool(grads) and bool(total > 0) and self.config.lr > 0
            before = None if certain else [p.detach().clone() for p in params]
            self.optimizer.step()
            if before is not None:
                moved = not all(torch.equal(a, b) for a, b in zip(before, params, strict=True))
        self.optimizer.zero_grad()
        forget_casts(loss.device.type)
        return moved

    def _ask_guard(self) -> None:
        """Show the guard the gradients of the method's own loss, and add those of its penalty."""
        session, parameters = self.network.session, self.context.parameters
        if not session.serving:  # a method may take steps at wrap
            return
        held = {n: p.grad for n, p in parameters.items() if p.grad is not None}
        with torch.no_grad():
            session.guard.see_gradients(held)
        penalty = session.guard.penalty()
        if penalty is not None:
            penalty.backward()

    def _make_optimizer(self) -> Any:
        """Make the optimiser; a method calls this again after making parameters of its own."""
        params, own = self.optimized(), self.learning_rates()
        if not params:
            return None
        usual: float = self.config.lr
        rates = [own.get(name, usual) for name in params]
        return make_optimizer(self.config, list(params.values()), rates)

    def _apply(self, fn: Any, recurse: bool = True) -> Update:
        super()._apply(fn, recurse)
        for p in self.optimized().values():
            slots = self.optimizer.state.get(p, {})
            for key, value in slots.items():
                if key != "step":  # torch keeps the step count on the CPU
                    moved = fn(value)
                    same = moved.dtype == p.dtype
                    slots[key] = moved if same else value.to(moved.device, p.dtype)
        return self


class ForwardUpdate(Update):
    """An update that needs no gradient: what it moves are buffers of its own.

    Its config is made from ``tta.ComponentConfig``, as it has no learning rate.
    """

    slot = "update"
    Config = ComponentConfig
    trains_model = False

    @torch.no_grad()
    def learn(self, x: Tensor) -> Prediction:
        """Run one cycle, without a graph."""
        return self.adapt(x)
