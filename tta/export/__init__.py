"""Adapters outside torch: ONNX graphs whose state goes in and comes out."""

from tta.core.step_function import to_function
from tta.export.folder import to_onnx

__all__ = ["to_function", "to_onnx"]
