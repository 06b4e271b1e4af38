"""What is recorded of an adapter as a graph: nothing is checked, as no value is known."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tta.core.checks import shown
from tta.core.hooks import pooled
from tta.core.prediction import Prediction
from tta.core.tracing import is_recorded, is_tracing, recording

__all__ = ["check_one_pass", "either", "is_recorded", "is_tracing", "traced_answer", "traced_pass"]


def check_one_pass(adapter: Any) -> None:
    """Refuse an adapter whose answer is not that of one pass of the images as they came.

    Raises:
        ValueError: When it has an input rule, or an output rule that runs the model.
    """
    if adapter.input is not None:
        raise ValueError(
            f"`input` must be empty to be exported, got {shown(adapter.input.name)}: export an "
            "adapter without it."
        )
    if adapter.output is not None and adapter.output.runs_model:
        raise ValueError(
            "`output` must take the model's prediction as it is to be exported, got "
            f"{shown(adapter.output.name)}, which runs the model on images that it draws: leave it "
            "out."
        )


def traced_answer(adapter: Any, images: Tensor, args: Any, kwargs: Any) -> Any:
    """What a frozen adapter returns for images (B, ...).

    Raises:
        RuntimeError: When the adapter learns.
        ValueError: As :func:`check_one_pass`.
    """
    if adapter.session.learning:
        raise RuntimeError(
            "`adapter` must be frozen for torch.export, got one that learns: call freeze() first, "
            "or tta.export.to_onnx, whose graph carries along what is learned."
        )
    check_one_pass(adapter)
    with torch.no_grad(), recording(adapter), adapter.network.call(*args, **kwargs):
        return adapter._serving.traced(images)[1]


def either(condition: Tensor, one: Prediction, other: Prediction) -> Prediction:
    """One of two predictions, where a graph computes which.

    Args:
        condition: 0-dimensional bool; true for ``one``.
        one: A prediction.
        other: For the same images.
    """
    logits = torch.where(condition, one.logits, other.logits)
    if one.features is None or other.features is None:
        return Prediction(logits)
    return Prediction(logits, torch.where(condition, one.features, other.features))


def traced_pass(network: Any, x: Tensor, tensors: dict[str, Tensor]) -> Prediction:
    """One pass of a :class:`~tta.core.backbone.Backbone`.

    Args:
        network: The backbone.
        x: Images (B, ...).
        tensors: In place of the model's own, by name.
    """
    args, kwargs = network.arguments
    hook = network.feature_hook
    if hook is not None:
        hook.values = []
    network.session.recording = torch.is_grad_enabled() and not is_tracing()  # to learn from it
    try:
        with network._other.afresh():  # torch.export puts tensors without values into the model
            result, features = network._other(tensors, x.clone(), *args, **kwargs), None
    finally:
        network.session.recording = False
    if network._prefix:
        result, features = result
    if hook is not None:
        seen, hook.values = hook.values, []
        features = torch.cat([pooled(value, network.head.module) for value in seen])
    network.result = result
    return Prediction(network.reader.read(result), features)
