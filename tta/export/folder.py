"""``to_onnx``: a folder that runs on a device without torch."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from contextlib import nullcontext
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tta.core.adapter import Adapter
from tta.core.checks import folder_like
from tta.core.files import replacing_together, writing
from tta.core.rehearsal import rehearse
from tta.core.step_function import learns, to_function
from tta.export.onnx_graph import OPSET, forget_origin, trace, translate
from tta.export.quantise import calibration_batches, network_nodes, quantise
from tta.export.trial import check_same, make_batches
from tta.export.triton import pbtxt
from tta.parts.augment import pixel_space
from tta.version import __version__

__all__ = ["to_onnx"]

NEEDED = ("onnx", "onnxscript", "onnxruntime")
SCRIPT = Path(__file__).with_name("run.py")


def to_onnx(
    adapter: Adapter,
    folder: str | Path,
    example: Tensor,
    *,
    calibration: Iterable[Any] | None = None,
) -> Path:
    """Write an adapter as an ONNX graph that adapts by itself, with state as inputs and outputs.

    The folder holds

    * ``model.onnx``: inputs ``images`` (B, ...), ``reset`` (1,) bool and ``state_in_0``, ...;
      outputs ``logits`` (B, C) and ``state_out_0``, ...; the metadata of the model say which key of
      :meth:`tta.Adapter.state` each number is. Any batch size; a tensor without axes has one of
      length 1. Where ``reset`` is true, the state to start with counts, whatever came in. Where
      images or state hold values that are not finite, the source's prediction and the state as
      it came are returned.
    * ``state.npz``: the state to start with, which is that of the adapter now, by names of inputs.
    * ``config.pbtxt``: for Triton, which keeps the state of each stream.
    * ``run.py``: predicts a folder of images by numpy and onnxruntime.

    Norm rules and output rules go on adapting there. With an update, or while frozen, what is
    exported is the adapter as it predicts now, and nothing moves. What was fixed at wrap is in the
    graph. A ``setting`` is not: the graph is in float32, and its runtime has threads of its own.

    With ``calibration`` the convolutions and linear layers of the network are quantised to 8 bits
    by onnxruntime, activations by the range that they have on these images. Norm layers that
    adapt, the output rule and the state stay in float32.

    Args:
        adapter: What :func:`tta.wrap` returned; it stays as it is.
        folder: Made if it does not exist; files of these names in it are replaced.
        example: Images (B, ...) as the model takes them, by which the graph is recorded and tried.
        calibration: Batches of images of the source (B, ...), or of (images, labels), about 100
            images in all; None for a graph in float32.

    Returns:
        The folder.

    Raises:
        TypeError: When ``adapter`` is no adapter, or an argument holds no images.
        ValueError: When something in the model or the recipe has no graph; it is named. Or when
            ``calibration`` has no images like the example.
        ImportError: When the extra "edge" is not installed.
        OSError: When the folder cannot be written to.
    """
    place = folder_like("folder", folder)
    step = to_function(adapter, example)
    _check_installed()
    _check_precision(adapter, example)
    example = example.detach()
    source_images = None if calibration is None else calibration_batches(calibration, example)
    batches = make_batches(example)
    with nullcontext() if learns(adapter) else adapter.frozen():  # as the graph is
        answers = rehearse(adapter, batches)  # a model that refuses the images says so itself
    program = translate(trace(step, example), len(step.keys))
    nodes = network_nodes(program.model.graph)
    forget_origin(program.model.graph)
    program.model.metadata_props.update(_metadata(adapter, step.keys))
    with writing("folder", place):
        place.mkdir(parents=True, exist_ok=True)
    names = ("model.onnx", "state.npz", "config.pbtxt", "run.py")
    files = replacing_together(*(place / name for name in names))
    with writing("folder", place), files as (model, state, config, script):
        program.save(str(model))
        check_same(model, step.start(), batches, answers)
        if source_images is not None:
            quantise(model, nodes, source_images, step.start())
        with open(state, "wb") as file:
            start: Any = {f"state_in_{i}": v.cpu().numpy() for i, v in enumerate(step.start())}
            np.savez(file, **start)
        config.write_text(pbtxt(place.name, example, adapter.num_classes, step.start()))
        shutil.copyfile(SCRIPT, script)
    return place


def _check_precision(adapter: Adapter, example: Tensor) -> None:
    """Refuse what runtimes compute in another way than torch does, or have no kernels for."""
    for tensor in (example, *adapter.model.parameters()):
        if tensor.is_floating_point() and tensor.dtype != torch.float32:
            raise ValueError(
                f"`adapter` must be in float32 to be exported, got {tensor.dtype}: wrap "
                "model.float(), and pass an example in float32."
            )


def _check_installed() -> None:
    for name in NEEDED:
        try:
            import_module(name)
        except ImportError as error:
            raise ImportError(
                f"`to_onnx` needs {name}, which is not installed: pip install 'tta-vision[edge]'."
            ) from error


def _metadata(adapter: Adapter, keys: list[str]) -> dict[str, str]:
    """What the file says of itself: which key of a state each number is, and how to read images."""
    found = {str(i): key for i, key in enumerate(keys)}
    found |= {"recipe": adapter.config.label, "opset": str(OPSET), "tta": __version__}
    found["activation"] = adapter.config.activation
    space = _pixel_space(adapter)
    return found | {"mean": json.dumps(space[0]), "std": json.dumps(space[1])}


def _pixel_space(adapter: Adapter) -> Any:
    """Mean and deviation that the model's pixels are normalised with; 0 and 1 where unknown."""
    config = adapter.config
    return pixel_space(adapter.model, config.mean, config.std) or ((0.0,), (1.0,))
