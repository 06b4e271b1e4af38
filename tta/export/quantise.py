"""An exported graph with its network in 8 bits; what adapts stays in float32."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tta.core.checks import is_iterable
from tta.core.norm_layers import AdaptiveNorm

__all__ = ["calibration_batches", "network_nodes", "quantise"]

# With weights: layers of the network. Without: what runs in 8 bits between two of them.
LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
BETWEEN = ("Relu", "Clip", "MaxPool", "Add")
ROUNDING = ("QuantizeLinear", "DequantizeLinear")
PREPARED = ("onnx.quant.pre_process", "onnxruntime.quant")  # keeps onnxruntime from advising it


def calibration_batches(calibration: Any, example: Tensor) -> list[Tensor]:
    """The images of the source, in batches like ``example`` (B, ...).

    Raises:
        TypeError: When they are no batches of images, or of images and labels.
        ValueError: When there is none, one of another shape, or values that are not finite.
    """
    if isinstance(calibration, Tensor) or not is_iterable(calibration):
        raise TypeError(
            "`calibration` must give batches of images, got "
            f"{type(calibration).__name__}: pass a list of tensors or a loader."
        )
    found = []
    for batch in calibration:
        images = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
        if not isinstance(images, Tensor):
            raise TypeError(
                f"`calibration` must give tensors, got {type(images).__name__}: pass batches of "
                "images (B, ...), or pairs of images and labels."
            )
        if images.shape[1:] != example.shape[1:] or images.dtype != example.dtype:
            raise ValueError(
                f"`calibration` must hold images like the example, {tuple(example.shape[1:])} of "
                f"{example.dtype}, got {tuple(images.shape[1:])} of {images.dtype}: prepare them "
                "in the same way."
            )
        if not bool(torch.isfinite(images).all()):
            raise ValueError(
                "`calibration` must hold finite pixels, got NaN or infinite ones: leave these "
                "images out."
            )
        if len(images):
            found.append(images.detach())
    if not found:
        raise ValueError(
            "`calibration` must hold at least one image, got none: pass about 100 of the source."
        )
    return found


def network_nodes(graph: Any) -> list[str]:
    """Names of the nodes that make up the network, without the norm layers and their rules.

    Args:
        graph: Of the exporter's program, whose nodes say which module they come from.
    """
    found = []
    for node in graph:
        scope = node.metadata_props.get("namespace", "")
        if "/model: " not in scope or AdaptiveNorm.__name__ in scope:
            continue
        weighted = node.op_type in LAYERS and node.inputs[1].is_initializer()
        if weighted or node.op_type in BETWEEN:
            found.append(node.name)
    return found


def quantise(
    model: Path, nodes: Sequence[str], batches: Sequence[Tensor], start: Sequence[Tensor]
) -> None:
    """Quantise a graph in place: weights per channel, activations by their range over images.

    Args:
        model: The graph's file.
        nodes: Names of the nodes to quantise, as :func:`network_nodes` gives them.
        batches: Images of the source, each (B, ...).
        start: The state to start with.

    Raises:
        ValueError: When the graph has no layer to quantise, or gives no numbers afterwards.
    """
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_static

    state = {f"state_in_{i}": value.cpu().numpy() for i, value in enumerate(start)}

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.feeds = _feeds(batches, state)

        def get_next(self) -> dict[str, Any] | None:  # type: ignore[override]
            return next(self.feeds, None)

    graph = onnx.load(str(model))
    if not any(node.name in set(nodes) and node.op_type in LAYERS for node in graph.graph.node):
        raise ValueError(
            "`adapter` must hold a model with convolutions or linear layers to be quantised, got "
            "none in its graph: export it without calibration."
        )
    notes = [(prop.key, prop.value) for prop in graph.metadata_props] + [("precision", "int8")]
    note = graph.metadata_props.add()
    note.key, note.value = PREPARED
    quantize_static(
        graph,
        str(model),
        Reader(),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        nodes_to_quantize=list(nodes),
    )
    graph = onnx.load(str(model))
    _read_unrounded(graph.graph, set(nodes))
    del graph.metadata_props[:]
    for key, value in notes:
        prop = graph.metadata_props.add()
        prop.key, prop.value = key, value
    onnx.save(graph, str(model))
    _check_numbers(model, next(_feeds(batches, state)))


def _feeds(batches: Sequence[Tensor], state: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Inputs of the graph: every batch from the state to start with."""
    for images in batches:
        yield {"images": images.cpu().numpy(), "reset": np.array([True]), **state}


def _read_unrounded(graph: Any, quantised: set[str]) -> None:
    """Let nodes in float32 read what other such nodes, or the graph's inputs, give unrounded.

    onnxruntime gives every reader of a tensor the rounded one: NaN in the images would be lost.
    """
    made_by = {output: node for node in graph.node for output in node.output}
    for node in graph.node:
        if node.name in quantised or node.op_type in ROUNDING:
            continue
        for place, name in enumerate(node.input):
            rounded = made_by.get(name)
            if rounded is None or rounded.op_type != ROUNDING[1]:
                continue
            rounding = made_by.get(rounded.input[0])
            if rounding is None:  # a weight
                continue
            origin = made_by.get(rounding.input[0])
            if origin is None or origin.name not in quantised:
                node.input[place] = rounding.input[0]


def _check_numbers(model: Path, feeds: dict[str, Any]) -> None:
    import onnxruntime

    session: Any = onnxruntime.InferenceSession(str(model))
    logits, *_ = session.run(None, feeds)
    if not np.isfinite(logits).all():
        raise ValueError(
            "`adapter` must predict numbers in 8 bits to be exported so, got NaN or infinite "
            "logits: export it without calibration."
        )
