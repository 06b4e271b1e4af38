"""Serving: code that runs adapters, which no method knows of."""

from tta.runtime.parallel import split_batches
from tta.runtime.pool import StreamPool

__all__ = ["StreamPool", "split_batches"]
