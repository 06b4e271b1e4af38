"""The output slot: what the adapter returns."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from tta.core.backbone import Backbone
from tta.core.component import Component, Context
from tta.core.prediction import Prediction, Report
from tta.core.source import SourceStatistics

__all__ = ["Output"]


class Output(Component):
    """Decides what the adapter returns. A subclass defines :meth:`correct`.

    ``learning`` is False while the adapter is frozen.

    Args:
        config: The component's config.
        context: What is known at wrap.
    """

    slot = "output"
    must_define = ("correct",)
    makes_logits: ClassVar[bool] = False  # stands in for the linear layer, by ``make_logits``
    # How a guard sees that the rule does harm: "classes", it gives fewer than there were; "runs",
    # it is for labels that come in runs, and there are none; "", it sees itself what it is for.
    harm: ClassVar[str] = "classes"

    def __init__(self, config: Any, context: Context) -> None:
        super().__init__(config)
        self.context = context
        self.learning = True
        self.report = Report()

    def fit(self, source: SourceStatistics, network: Backbone) -> None:
        """Take what the rule needs from ``source``, or raise ``ValueError`` if it is not there.

        Args:
            source: The artefacts at hand.
            network: The source model under its running statistics.
        """

    def write_to(self, base: Any) -> None:
        """Write what the rule does into the layer that makes the logits.

        Called only if the class is ``writable``.
        """
        raise NotImplementedError  # pragma: no cover

    def make_logits(self, layer: Any, features: Tensor) -> Tensor | None:
        """Return what the linear layer gives for its input, in every pass; None to leave it.

        Called only if the class has ``makes_logits``, so that updates learn from these logits.

        Args:
            layer: The layer, with the weights of the pass.
            features: What it is given, (B, D) or with space.
        """
        raise NotImplementedError  # pragma: no cover

    def begin(self, network: Backbone) -> None:
        """Look at the wrapped model; called once, when all slots are filled, before :meth:`fit`."""

    def answer(self, x: Tensor, prediction: Prediction) -> Tensor:
        """Return scores (B, C) for images (B, ...), of which a prediction is made.

        A subclass whose scores depend on more than that prediction writes this one too.
        """
        return self.correct(prediction)

    @property
    def runs_model(self) -> bool:
        """Whether scores depend on more than a prediction, by an :meth:`answer` of its own."""
        return type(self).answer is not Output.answer

    def correct(self, prediction: Prediction) -> Tensor:
        """Return scores (B, C) that replace the logits."""
        raise NotImplementedError  # pragma: no cover
