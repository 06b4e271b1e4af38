"""Test-time adaptation of image classifiers: wrap a model in one line, adapt while predicting."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from tta import methods, streams
from tta._moved import FORMER, MOVED, install_old_names
from tta.collect import collect_source
from tta.core.adapter import Adapter
from tta.core.config import ComponentConfig, UpdateConfig
from tta.core.guard import Batch, Guard, Verdict
from tta.core.norm_rule import NormRule
from tta.core.output_rule import Output
from tta.core.prediction import Prediction, Report
from tta.core.recipe import AdapterConfig
from tta.core.registry import get_config, list_methods, register
from tta.core.source import SourceStatistics
from tta.core.update import Update
from tta.saving import load, save
from tta.version import __version__
from tta.wrap import wrap

if TYPE_CHECKING:
    from tta import runtime

__all__ = [
    "Adapter",
    "AdapterConfig",
    "Batch",
    "ComponentConfig",
    "Guard",
    "NormRule",
    "Output",
    "Prediction",
    "Report",
    "SourceStatistics",
    "Update",
    "UpdateConfig",
    "Verdict",
    "__version__",
    "collect_source",
    "get_config",
    "list_methods",
    "load",
    "methods",
    "register",
    "runtime",
    "save",
    "streams",
    "wrap",
]

LAZY = ("cli", "core", "parts", "runtime")  # imported when first asked for

install_old_names()


def __getattr__(name: str) -> Any:
    """Import subpackages on first use, and modules under their old names."""
    if name in LAZY or f"tta.{name}" in {*MOVED, *FORMER}:
        return import_module(f"tta.{name}")
    raise AttributeError(f"module 'tta' has no attribute {name!r}")
