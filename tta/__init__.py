"""Test-time adaptation of image classifiers: wrap a model in one line, adapt while predicting."""

from tta import methods, parallel, streams
from tta.adapter import Adapter
from tta.config import AdapterConfig
from tta.registry import get_config, list_methods, register
from tta.source import SourceStatistics, collect_source
from tta.state import load, save
from tta.version import __version__
from tta.wrap import wrap

__all__ = [
    "Adapter",
    "AdapterConfig",
    "SourceStatistics",
    "__version__",
    "collect_source",
    "get_config",
    "list_methods",
    "load",
    "methods",
    "parallel",
    "register",
    "save",
    "streams",
    "wrap",
]
