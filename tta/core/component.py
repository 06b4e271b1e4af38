"""The base of all components: a config, buffers that move or stay, and a context known at wrap.

An adapter is ``output(update(x))`` with a norm rule inside the model. A component fills one slot:

* :class:`~tta.core.norm_rule.NormRule` says where a BatchNorm layer takes its statistics from (one
  object for each layer),
* :class:`~tta.core.update.Update` says how parameters move,
* :class:`~tta.core.output_rule.Output` says what is returned in the end.

Whatever a component remembers is a registered buffer: persistent ones move and make up the state,
non-persistent ones are constants fixed at wrap. Everything else about state (reset, save, resume,
devices) is generic and lives in :mod:`tta.core.state`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tta.core.config import ComponentConfig
from tta.core.draws import Draws
from tta.core.journal import Journal
from tta.core.masters import KeepsDtype

__all__ = ["Component", "Context", "Remembers", "log_probabilities"]


@dataclass
class Signs:
    """What one component sees of a stream, for others that go by it.

    Args:
        runs: Says how persistent labels are, ``runs.persistence()`` in [0, 1); None where no
            component watches labels.
        source: Says whether the source's labels come in runs, ``source.runs_seen``; None where no
            component asks the source.
        persistence: How persistent labels were when the present call began; 0 where nobody watches
            them, 1 where the source's come in runs.
    """

    runs: Any = None
    source: Any = None
    persistence: float = 0.0

    def look(self) -> None:
        """Fill in ``persistence``; once a call, since all norm layers go by it."""
        if self.source is not None and bool(self.source.runs_seen):
            self.persistence = 1.0
        else:
            self.persistence = 0.0 if self.runs is None else self.runs.persistence()


@dataclass(frozen=True)
class Context:
    """What a component may know of its surroundings when it is built."""

    num_classes: int  # C
    width: int | None = None  # D, length of the features; None where the classifier does not say
    classifier: nn.Module | None = None  # the linear layer that makes the logits, if one does
    parameters: dict[str, nn.Parameter] = field(default_factory=dict)  # to be trained, by name
    generator: torch.Generator = field(default_factory=torch.Generator)  # makes all random draws
    batch_size: int | None = None  # of the stream, if the caller said so
    harm: str = ""  # how a guard sees that the output rule does harm, see ``Output.harm``
    narrow: bool = False  # whether a BatchNorm layer of the model has channels without variance
    rows_independent: bool = False  # no image affects the logits of another
    mean: tuple[float, ...] | None = None  # channel means, if the caller gave them
    std: tuple[float, ...] | None = None
    augment: Callable[[Tensor, int], Tensor] | None = None  # replaces random views
    restore_mask: Callable[[str, torch.Size], Tensor] | None = None  # replaces random masks
    signs: Signs = field(default_factory=Signs)  # what one component sees that others go by
    journal: Journal = field(default_factory=Journal)  # keeps rows that a call overwrites
    draws: Draws = field(default_factory=Draws)  # replaces other random draws

    @property
    def log_classes(self) -> float:
        """The largest entropy of C classes, ln C, in nats."""
        return math.log(self.num_classes)

    @property
    def feature_size(self) -> int:
        """Length D of the features that the classifier takes.

        Raises:
            ValueError: When no layer of the classifier says so.
        """
        if self.width is None:
            raise ValueError(
                "`model` must have a classifier whose first layer says how many features it takes, "
                "got one that does not: give the model a get_classifier() that returns its linear "
                "layer."
            )
        return self.width


class Remembers:
    """An object that a component holds, whose attributes go back with it when a call fails."""


class Component(nn.Module):
    """Base of all components; the class of each slot says what a subclass must define."""

    slot: ClassVar[str] = ""
    name: ClassVar[str] = ""  # set by ``register``
    Config: ClassVar[type[ComponentConfig]] = ComponentConfig
    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {}  # fields by the name of a preset
    must_define: ClassVar[tuple[str, ...]] = ()  # methods that a component of the slot writes
    empties_slots: ClassVar[bool] = False  # stands for the source model; is never instantiated
    needs_features: ClassVar[bool] = False  # predictions must carry features
    wants_features: ClassVar[bool] = False  # reads features where the model has any
    needs_linear_head: ClassVar[bool] = False  # reads the layer that makes logits of features
    uses_labels: ClassVar[bool] = True  # reads the labels of source batches
    needs_given: ClassVar[bool] = False  # does nothing without what the caller alone has
    replays_source: ClassVar[bool] = False  # goes on reading source batches while it adapts
    takes_softmax: ClassVar[bool] = True  # works on a softmax of the logits
    takes_gradient: ClassVar[bool] = False  # an output rule that back-propagates
    splits: ClassVar[bool] = True  # works where several processes share a batch
    takes_draws: ClassVar[bool] = False  # asks ``context.draws`` before it draws itself
    counts_images: ClassVar[bool] = False  # remembers or counts images one by one
    injects: ClassVar[tuple[str, ...]] = ()  # of wrap's "augment" and "restore_mask"
    writable: ClassVar[bool] = False  # a plain model can hold what it has learned
    # Fields under which `collect_source` wraps the method, so that only artefacts are computed.
    artefact_fields: ClassVar[dict[str, Any]] = {}
    # Rough cost of a batch on top of its forward pass, in forward passes; progress estimates the
    # time left with it.
    cost: ClassVar[float] = 0.3

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.source_used: str | None = None  # what `fit` took, in words, for the record

    @classmethod
    def suits(cls, model: nn.Module) -> bool:
        """Whether this component can work on an unwrapped model at all."""
        return True

    @classmethod
    def brings(cls, config: Any) -> dict[str, Any]:
        """Names or configs of what fills other slots, by slot, where the caller names none."""
        return {}

    @classmethod
    def check_slots(
        cls, config: Any, slots: Mapping[str, ComponentConfig | None], model: nn.Module
    ) -> None:
        """Raise ``ValueError`` where something in another slot does not go with this component.

        Args:
            config: That of this component.
            slots: The configs of all slots.
            model: The unwrapped model.
        """

    def attach(self, source: Any) -> None:
        """Take from ``source`` what a saved adapter does not hold, or raise if it is not there."""

    def source_artefacts(self) -> dict[str, Any]:
        """What :meth:`fit` took from the source, as fields of ``SourceStatistics``."""
        return {}

    def constants(self) -> dict[str, Tensor]:
        """What was fixed at wrap: the non-persistent buffers, by name."""
        moving = set(self.state_dict())
        return {name: b for name, b in self.named_buffers() if name not in moving}

    def log_probabilities(self, output: Tensor) -> Tensor:
        """Log-probabilities (B, C) in float32 for scores that the adapter returned.

        Args:
            output: (B, C) that the adapter returned, after this component changed them last.
        """
        return F.log_softmax(output.float(), 1)

    def load_constants(self, values: dict[str, Tensor]) -> None:
        """Set what :meth:`constants` returned."""
        buffers = dict(self.named_buffers())
        for name, value in values.items():
            buffers[name].copy_(value)

    def after_reset(self) -> None:
        """Called when the user's reset has put the buffers back; for what is then drawn anew."""

    def survives_reset(self) -> tuple[str, ...]:
        """Buffers that ``reset`` leaves as they are; only ``official=True`` may name some."""
        return ()

    def undefined_as_nan(self) -> tuple[str, ...]:
        """Buffers in which NaN means that there is no value yet."""
        return ()

    def integer_ranges(self) -> dict[str, tuple[int, int]]:
        """Smallest and largest value of integer buffers; those not named are at least 0."""
        return {}

    def resizable_buffers(self) -> tuple[str, ...]:
        """Buffers whose first axis may have any length; only ``official=True`` may name some."""
        return ()

    def kept_by_rows(self) -> tuple[str, ...]:
        """Large buffers whose rows the component keeps in the journal before it writes to them."""
        return ()

    def lazy_buffers(self) -> tuple[str, ...]:
        """Buffers that are empty until the first batch shows the shape of their rows."""
        return ()

    def image_buffers(self) -> tuple[str, ...]:
        """Lazy buffers that are uint8 or float32, as the images are that came."""
        return ()

    def _apply(self, fn: Any, recurse: bool = True) -> Component:
        """Move with the model; but averages stay as exact as at wrap, whatever the model's dtype.

        Copies of the model's parameters, which are ``NamedTensors``, take the model's.
        """
        super()._apply(fn if type(fn) is KeepsDtype else KeepsDtype(fn), recurse)
        return self


def log_probabilities(adapter: Any, output: Tensor) -> Tensor:
    """Log-probabilities (B, C) in float32 that the output of an adapter stands for.

    The component that made the output says how it is read; the plain model's output is logits.

    Args:
        adapter: The adapter that returned the output.
        output: (B, C).
    """
    last = adapter.update if adapter.output is None else adapter.output
    return F.log_softmax(output.float(), 1) if last is None else last.log_probabilities(output)
