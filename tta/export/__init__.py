"""Adapters outside torch: ONNX graphs whose state goes in and comes out."""

from tta.export.folder import to_onnx
from tta.export.step import to_function

__all__ = ["to_function", "to_onnx"]
