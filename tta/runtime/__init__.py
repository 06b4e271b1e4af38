"""Serving: code that runs adapters, which no method knows of."""

from tta.runtime import cloud, ray, server
from tta.runtime.frames import Source
from tta.runtime.opening import open_or_make
from tta.runtime.parallel import split_batches
from tta.runtime.pipeline import Pipeline, Result
from tta.runtime.pool import StreamPool
from tta.runtime.sources import open_source

__all__ = [
    "Pipeline",
    "Result",
    "Source",
    "StreamPool",
    "cloud",
    "open_or_make",
    "open_source",
    "ray",
    "server",
    "split_batches",
]
