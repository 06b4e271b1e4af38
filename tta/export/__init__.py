"""Adapters outside torch: ONNX graphs whose state goes in and comes out."""

from tta.export.folder import to_onnx

__all__ = ["to_onnx"]
