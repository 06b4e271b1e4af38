"""The slots of an adapter and what flows between them.

An adapter is ``output(update(x))`` with a norm rule inside the model. A component fills one slot:

* :class:`NormRule` says where the statistics of a BatchNorm layer come from (one object a layer),
* :class:`Update` says how parameters move,
* :class:`Output` says what is returned in the end.

Whatever a component remembers is a registered buffer: persistent ones move and make up the state,
non-persistent ones are constants fixed at wrap. Everything else about state (reset, save, resume,
devices) is generic and lives in :mod:`tta.adapter` and :mod:`tta.state`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from tta.config import ComponentConfig, UpdateConfig

if TYPE_CHECKING:
    from tta.backbone import Backbone
    from tta.source import SourceStatistics

__all__ = [
    "Component",
    "Context",
    "NormRule",
    "Output",
    "Prediction",
    "Report",
    "Update",
    "forget_casts",
]

# A kept row costs a forward and a backward of its own, about 2.3 forwards; the backward of the
# whole batch, about 1.3, whether one row or all of them are in the loss.
RERUN_BELOW = 0.55  # share of kept rows

ADAM_EPS = 1e-8
HALF_EPS = 1e-4  # in float16 the other is 0, and so are squares of gradients below 2e-4


@dataclass
class Prediction:
    """What a forward pass gives: logits (B, C), and features (B, D) if a component needs them."""

    logits: Tensor
    features: Tensor | None = None


class Report(dict[str, Any]):
    """Figures of the last batch, readable as keys or as attributes.

    Always there: ``seen`` (images in the batch), ``rejected`` (of these, with non-finite pixels),
    ``selected`` (samples in the loss), ``loss``, ``stepped``, ``resets`` (total since wrap or
    reset). 0-dimensional tensors become Python numbers on reading, whichever way, so that writing
    a report never waits for a GPU.
    """

    def __iter__(self) -> Iterator[str]:
        # An own `__iter__` makes `dict(report)` and `{**report}` read values as we do.
        return super().__iter__()

    def __repr__(self) -> str:
        return repr(dict(self))

    def __getitem__(self, key: str) -> Any:
        value = super().__getitem__(key)
        return value.item() if isinstance(value, Tensor) and value.ndim == 0 else value

    def __getattr__(self, key: str) -> Any:
        try:
            return self[key]
        except KeyError:
            raise AttributeError(f"no figure {key!r} in this report: {', '.join(self)}") from None

    def get(self, key: str, default: Any = None) -> Any:
        """As ``dict.get``, with tensors read as numbers."""
        return self[key] if key in self else default  # noqa: SIM401

    def items(self) -> Any:
        """As ``dict.items``, with tensors read as numbers."""
        return [(key, self[key]) for key in self]

    def values(self) -> Any:
        """As ``dict.values``, with tensors read as numbers."""
        return [self[key] for key in self]

    def copy(self) -> Report:
        """As ``dict.copy``, still a report."""
        return Report(self.raw())

    def raw(self) -> dict[str, Any]:
        """What was written, tensors included; does not wait for a GPU."""
        return dict(dict.items(self))


@dataclass
class Context:
    """What a component may know of its surroundings when it is built."""

    num_classes: int
    parameters: dict[str, nn.Parameter] = field(default_factory=dict)  # to be trained, by name
    generator: torch.Generator = field(default_factory=torch.Generator)
    batch_size: int | None = None
    rows_independent: bool = False  # no image changes what the model says of another one
    mean: tuple[float, ...] | None = None  # of the channels, if the caller said so
    std: tuple[float, ...] | None = None
    augment: Callable[[Tensor, int], Tensor] | None = None  # instead of drawing views
    restore_mask: Callable[[str, torch.Size], Tensor] | None = None  # instead of drawing masks

    @property
    def log_classes(self) -> float:
        """The largest entropy there is, ln C."""
        return math.log(self.num_classes)


def forget_casts(device: str) -> None:
    """Clear autocast's cache of half-precision weights, which knows nothing of a change in place.

    Within one ``torch.autocast`` block a second batch would be predicted with the weights of the
    first, and back-propagate through its graph.
    """
    if torch.is_autocast_enabled(device):
        torch.clear_autocast_cache()


class Component(nn.Module):
    """Base of everything registered; see the slot classes for what to write."""

    slot: ClassVar[str] = ""
    name: ClassVar[str] = ""
    Config: ClassVar[type[ComponentConfig]] = ComponentConfig
    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {}
    uses_labels: ClassVar[bool] = True  # those of source batches, where it takes any

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.source_used: str | None = None  # what `fit` took, in words, for the record

    def source_artefacts(self) -> dict[str, Any]:
        """What :meth:`fit` took of the source, as fields of ``SourceStatistics``."""
        return {}

    def constants(self) -> dict[str, Tensor]:
        """What was fixed at wrap, by name."""
        moving = set(self.state_dict())
        return {name: b for name, b in self.named_buffers() if name not in moving}

    def growing(self) -> tuple[str, ...]:
        """Buffers whose first axis may have any length; only ``official=True`` may name some."""
        return ()

    def taking_shape(self) -> tuple[str, ...]:
        """Buffers that are empty until the first batch shows the shape of their rows."""
        return ()

    def load_constants(self, values: dict[str, Tensor]) -> None:
        """Set what :meth:`constants` returned."""
        buffers = dict(self.named_buffers())
        for name, value in values.items():
            buffers[name].copy_(value)


class NormRule(Component):
    """Where one BatchNorm layer takes its statistics from; built once for every layer.

    A subclass writes :meth:`forward`, usually with :func:`tta.norm.normalize`. ``learning`` is
    False while the adapter is frozen; ``fell_back`` is set when too few values came for batch
    statistics and the source statistics were used instead.
    """

    slot = "norm"
    needs_source_stats: ClassVar[bool] = False  # the layer must have running statistics

    def __init__(self, config: Any, base: Any, context: Context) -> None:
        super().__init__(config)
        self.learning = True
        self.fell_back = False

    def forward(self, x: Tensor, base: Any) -> Tensor:
        """Normalise ``x`` (B, C, ...) with this rule's statistics and the base's affine part."""
        raise NotImplementedError  # pragma: no cover


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


class Output(Component):
    """What is returned in the end. A subclass writes :meth:`correct`."""

    slot = "output"
    needs_features: ClassVar[bool] = False

    def __init__(self, config: Any, context: Context) -> None:
        super().__init__(config)
        self.context = context
        self.learning = True
        self.report = Report()

    def fit(self, source: SourceStatistics, network: Backbone) -> None:
        """Take what the rule needs of ``source`` and raise ``ValueError`` if it is not there.

        Args:
            source: The artefacts at hand.
            network: The source model under its running statistics.
        """

    def correct(self, prediction: Prediction) -> Tensor:
        """Scores (B, C) that replace the logits."""
        raise NotImplementedError  # pragma: no cover
