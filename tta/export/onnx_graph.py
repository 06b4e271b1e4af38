"""From a step to an ONNX graph: tracing it, and writing what torch's exporter lacks."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from tta.core.checks import told
from tta.core.step_function import Step

__all__ = ["OPSET", "forget_origin", "trace", "translate"]

OPSET = 18
TRACED = 5  # rows of the batch that is traced


def trace(step: Step, example: Tensor) -> Any:
    """Record a step as a ``torch.export`` program whose batch axis may have any length.

    Args:
        step: The step.
        example: Images (B, ...).

    Raises:
        ValueError: When the model or a component decides by values, or by the number of images.
    """
    # A length of 1, or of 1 less 1 row, would be taken for fixed.
    images = example[torch.arange(TRACED) % len(example)]
    reset = torch.ones(1, dtype=torch.bool, device=images.device)
    arguments = (images, reset, step.start())
    free = ({0: torch.export.Dim.DYNAMIC}, None, [None] * len(step.keys))
    try:
        with torch.no_grad():
            return torch.export.export(step, arguments, dynamic_shapes=free, strict=False)
    except Exception as error:  # of many kinds, which all say that there is no graph
        raise ValueError(
            "`adapter` must compute the same way for all values and any number of images to be "
            f"exported, got {told(error)}: use tensors in the model's forward in place of "
            "Python's if, len, int and float."
        ) from error


def translate(program: Any, states: int) -> Any:
    """Translate a recorded step to ONNX.

    Args:
        program: What :func:`trace` returned.
        states: Number of tensors of state.

    Returns:
        The exporter's program, whose model is in ``.model``.

    Raises:
        ValueError: When there is no ONNX operator for something in the model.
    """
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the exporter's, about its own future
            return torch.onnx.export(
                program,
                dynamo=True,
                verbose=False,
                opset_version=OPSET,
                input_names=["images", "reset", *(f"state_in_{i}" for i in range(states))],
                output_names=["logits", *(f"state_out_{i}" for i in range(states))],
                custom_translation_table={torch.ops.aten.sort.stable: _sort},
            )
    except Exception as error:
        raise ValueError(
            "`adapter` must hold a model of operators that ONNX has, got one that torch's exporter "
            f"refuses ({told(_first_cause(error))}): export it as torch.export.export does, or "
            "replace that operator."
        ) from error


def forget_origin(graph: Any) -> None:
    """Take out what the exporter notes beside nodes: lines of source code, paths of this machine.

    It is as long as the graph of a small network.
    """
    graph.metadata_props.clear()
    values = [*graph.inputs, *graph.initializers.values()]
    for node in graph:
        values += node.outputs
    for noted in (*graph, *values):
        noted.metadata_props.clear()


def _first_cause(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _sort(values: Any, stable: Any = True, dim: int = -1, descending: bool = False) -> Any:
    """``aten.sort.stable``: ONNX's TopK of all values, which gives the first of equals first."""
    from onnxscript import opset18

    op: Any = opset18

    size = op.Gather(op.Shape(values), op.Constant(value_ints=[dim]), axis=0)
    return op.TopK(values, size, axis=dim, largest=int(descending), sorted=1)
