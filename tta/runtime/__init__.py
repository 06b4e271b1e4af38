"""Serving: code that runs adapters, which no method knows of."""

from tta.runtime.parallel import split_batches

__all__ = ["split_batches"]
