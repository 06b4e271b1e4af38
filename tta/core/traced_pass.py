"""A forward pass that ``torch.export`` records: nothing is checked, as no value is known."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tta.core.hooks import pooled
from tta.core.prediction import Prediction

__all__ = ["traced_pass"]


def traced_pass(network: Any, x: Tensor, tensors: dict[str, Tensor]) -> Prediction:
    """One pass of a :class:`~tta.core.backbone.Backbone`.

    Args:
        network: The backbone.
        x: Images (B, ...).
        tensors: In place of the model's own, by name.
    """
    args, kwargs = network._arguments
    hook = network.feature_hook
    if hook is not None:
        hook.values = []
    with network._other.afresh():  # torch.export puts tensors without values into the model
        result, features = network._other(tensors, x.clone(), *args, **kwargs), None
    if network._prefix:
        result, features = result
    if hook is not None:
        seen, hook.values = hook.values, []
        features = torch.cat([pooled(value, network.head.module) for value in seen])
    network.result = result
    return Prediction(network.reader.read(result), features)
