"""What the first logits show of a model: probabilities, or logits that its head has not made."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tta.core.classifier import CONVOLUTIONS
from tta.core.hooks import without_own_hooks
from tta.core.input_guard import copies
from tta.core.norm_layers import normalize_by_source, with_statistics
from tta.core.session import Session

__all__ = ["LogitChecks", "RowsOverflowError", "ends_in_head", "overflow"]

ENOUGH_VALUES = 8  # logits that must lie in [0, 1] before they are taken for probabilities
ORDER_LIMIT = 1e-3  # largest difference by which rows are the same, by the largest logit
HEAD_LIMIT = 0.05  # largest difference between logits and the head's, by the largest logit


class RowsOverflowError(ArithmeticError):
    """Logits of some images are NaN or infinite, although their pixels are finite.

    Args:
        rows: Mask (B,) of these images.
    """

    def __init__(self, rows: Tensor) -> None:
        super().__init__("features of some images overflow")
        self.rows = rows


class LogitChecks:
    """Judges the first logits that tell.

    Args:
        session: Warns the caller.
        softmax: Whether the logits are meant for a softmax, rather than a sigmoid.
        classifier: The linear layer that a component takes the logits to be made by, if one does.
        head: The linear layer whose input the features are, if there is one.
    """

    def __init__(self, session: Session, softmax: bool, classifier: Any, head: Any = None) -> None:
        self.session = session
        self.head = head
        self._order_unknown = head is not None
        self.classifier = classifier
        self._scale_unknown = softmax  # True until logits are seen that are no probabilities
        self._linear_unknown = classifier is not None  # True until logits are seen that it has made

    def check(
        self, logits: Tensor, features: Tensor | None, own: bool, ends: Callable[[], bool]
    ) -> None:
        """Judge logits (B, C) of the features (B, D).

        Args:
            logits: Without a graph.
            features: If there are any.
            own: Whether the model's own weights made them, and not those of a teacher.
            ends: Says whether nothing comes behind the linear layer.

        Raises:
            ValueError: For probabilities that do not sum to 1, and for logits that the classifier
                has not made.
        """
        if self._scale_unknown:
            low, high = (float(v) for v in logits.aminmax())
            if low < 0 or high > 1:
                self._scale_unknown = False
            elif logits.numel() >= ENOUGH_VALUES:
                self._scale_unknown = False
                self._judge_probabilities(logits, ends)
            if low == float("-inf"):
                self._warn_of_minus_infinity()
        if self._order_unknown and own and features is not None:
            self._order_unknown = False
            self._judge_order(logits, features.detach())
        if self._linear_unknown and own and features is not None:
            self._judge_head(logits, features.detach())

    def _warn_of_minus_infinity(self) -> None:
        self.session.warn_once(
            "minus infinity",
            "`model` must return finite logits, but some are -inf, as of classes that are masked: "
            "give those -1e4, since the entropy of a batch with -inf is NaN, and nothing is "
            "learned of it.",
        )

    @torch.no_grad()
    def _judge_order(self, logits: Tensor, features: Tensor) -> None:
        made = self._made(self.head, logits, features)
        if made is None or made.shape != logits.shape or not bool(logits.isfinite().all()):
            return
        close = ORDER_LIMIT * float(logits.abs().max())
        if bool(((made - logits).abs() <= close).all()):
            return
        rows = torch.cdist(logits, made).argmin(1)
        if len(rows.unique()) == len(rows) and bool(((made[rows] - logits).abs() <= close).all()):
            raise ValueError(
                "`features` must have rows in the order of the images, got the rows of a model "
                "that sorts its images: pass wrap(..., features=...), a function of model and "
                "images that returns them in order."
            )

    def _made(self, layer: Any, logits: Tensor, features: Tensor) -> Tensor | None:
        """The logits that a linear layer makes of features; None where that cannot be compared."""
        if {logits.dtype, features.dtype, layer.weight.dtype} != {torch.float32}:
            return None  # rounding could hide or feign a difference
        hook = self.session.logit_hook
        made = None if hook is None else hook.rule.make_logits(layer, features)
        return F.linear(features, layer.weight.flatten(1), layer.bias) if made is None else made

    @torch.no_grad()
    def _judge_head(self, logits: Tensor, features: Tensor) -> None:
        layer = self.classifier
        made = self._made(layer, logits, features)
        if made is None:
            return
        if bool(((made - logits).abs() > HEAD_LIMIT * logits.abs().max()).any()):
            raise ValueError(
                "`model` must make its logits by a linear layer for a method that reads it, got "
                f"other logits than those of its {type(layer).__name__}, as after a scale or a "
                "normalisation: use another method."
            )
        self._linear_unknown = False

    def _judge_probabilities(self, logits: Tensor, ends: Callable[[], bool]) -> None:
        if bool(((logits.float().sum(1) - 1).abs() < 1e-2).all()):
            self.session.warn_once(
                "softmax",
                "`model` must return logits, but what it returns lies in [0, 1] and sums to 1, as "
                "after a softmax: take the softmax out, since methods would apply another.",
            )
            return
        if bool((logits == 0).any()):
            return  # a sigmoid never reaches 0 but in the far tail; a ReLU behind the head does
        if ends():
            return  # the logits of few classes, as before training, may all be small and positive
        raise ValueError(
            "`model` must return logits, but all that it returns lies in [0, 1], as after a "
            "sigmoid: take the sigmoid out, scale similarities as in training, or say "
            "wrap(..., activation='sigmoid') for a model whose classes do not exclude each other, "
            "which goes with norm rules alone."
        )


@torch.no_grad()
def ends_in_head(network: Any, x: Tensor) -> bool:
    """Whether a model returns what its linear layer gives; this takes a pass that leaves no trace.

    Args:
        network: The model, a :class:`tta.core.backbone.Backbone`.
        x: Images (B, ...).
    """
    args, kwargs = copies(*network.arguments)
    head, model = network.head.module, network.model
    kinds = (nn.Linear, *CONVOLUTIONS)
    if not any(isinstance(head, kind) and type(head).forward is kind.forward for kind in kinds):
        return False
    given: list[Tensor] = []
    with without_own_hooks(model):  # or components would see the images twice
        handle = head.register_forward_hook(lambda *call: given.append(call[-1].clone()))
        try:
            with with_statistics(network.wrappers, normalize_by_source), network.buffers.kept():
                logits = network.reader.read(model(x.clone(), *args, **kwargs))
        finally:
            handle.remove()
    last = given[-1].flatten(1) if given else logits[:0]
    return last.shape == logits.shape and torch.equal(last, logits)


def overflow(logits: Tensor, features: Tensor | None) -> Tensor:
    """Which rows (B,) of logits, or of squared features, are no numbers."""
    rows = (logits.isnan() | (logits == float("inf"))).any(1)
    if features is not None:
        rows = rows | ~features.detach().float().square().flatten(1).sum(1).isfinite()
    return rows
