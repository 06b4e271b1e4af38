"""The ``config.pbtxt`` by which NVIDIA's Triton serves an exported graph.

Triton keeps the state of each sequence (its "implicit state"): a request is one batch of one
stream, and the first of a sequence resets. ``max_batch_size`` is 0, as otherwise requests of
different streams would be put together.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["pbtxt"]

TYPES = {
    torch.float32: "TYPE_FP32",
    torch.float64: "TYPE_FP64",
    torch.float16: "TYPE_FP16",
    torch.int64: "TYPE_INT64",
    torch.int32: "TYPE_INT32",
    torch.uint8: "TYPE_UINT8",
    torch.bool: "TYPE_BOOL",
}
TEXT = """\
name: "{name}"
backend: "onnxruntime"
max_batch_size: 0
input [
  {{
    name: "images"
    data_type: {images}
    dims: [ {shape} ]
  }}
]
output [
  {{
    name: "logits"
    data_type: TYPE_FP32
    dims: [ -1, {classes} ]
  }}
]
sequence_batching {{
  max_sequence_idle_microseconds: {idle}
  control_input [
    {{
      name: "reset"
      control [
        {{
          kind: CONTROL_SEQUENCE_START
          bool_false_true: [ false, true ]
        }}
      ]
    }}
  ]{states}
}}
"""
STATE = """
    {{
      input_name: "state_in_{i}"
      output_name: "state_out_{i}"
      data_type: {kind}
      dims: [ {dims} ]
    }}"""
IDLE = 60_000_000  # microseconds after which Triton may give a silent stream's place away


def pbtxt(name: str, example: Tensor, classes: int, state: Sequence[Tensor]) -> str:
    """The text of the file.

    Args:
        name: Of the model in Triton's repository: the folder's.
        example: Images (B, ...).
        classes: C.
        state: The tensors of state, in order.
    """
    return TEXT.format(
        name=name.replace("\\", "_").replace('"', "_"),
        images=_type(example),
        shape=", ".join(["-1", *(str(n) for n in example.shape[1:])]),
        classes=classes,
        idle=IDLE,
        states=_states(state),
    )


def _states(state: Sequence[Tensor]) -> str:
    if not state:
        return ""
    entries = [
        STATE.format(i=i, kind=_type(value), dims=", ".join(str(n) for n in value.shape))
        for i, value in enumerate(state)
    ]
    return f"\n  state [{','.join(entries)}\n  ]"


def _type(value: Any) -> str:
    return TYPES[value.dtype]
