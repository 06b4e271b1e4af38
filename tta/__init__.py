"""Test-time adaptation of image classifiers: wrap a model in one line, adapt while predicting.

What is listed here is imported when it is first asked for, and torch with it: the help of the
command line is there at once.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from tta._moved import FORMER, MOVED, install_old_names
from tta.core.checks import shown
from tta.version import __version__

if TYPE_CHECKING:
    from tta import export, methods, runtime, streams
    from tta.collect import collect_source
    from tta.core.adapter import Adapter
    from tta.core.config import ComponentConfig, UpdateConfig
    from tta.core.denoiser import Diffusion
    from tta.core.guard import Batch, Guard, Verdict
    from tta.core.input_rule import Input
    from tta.core.norm_rule import NormRule
    from tta.core.output_rule import Output
    from tta.core.prediction import Prediction, Report
    from tta.core.recipe import AdapterConfig
    from tta.core.registry import get_config, list_methods, register
    from tta.core.setting import Setting
    from tta.core.source import SourceStatistics
    from tta.core.update import Update
    from tta.saving import load, save
    from tta.tuning import tune
    from tta.wrapping import wrap

__all__ = [
    "Adapter",
    "AdapterConfig",
    "Batch",
    "ComponentConfig",
    "Diffusion",
    "Guard",
    "Input",
    "NormRule",
    "Output",
    "Prediction",
    "Report",
    "Setting",
    "SourceStatistics",
    "Update",
    "UpdateConfig",
    "Verdict",
    "__version__",
    "collect_source",
    "export",
    "get_config",
    "list_methods",
    "load",
    "methods",
    "register",
    "runtime",
    "save",
    "streams",
    "tune",
    "wrap",
]

SUBPACKAGES = ("cli", "core", "export", "methods", "parts", "runtime", "streams")
PLACES = {  # of the public names; no module at the top has the name of one of them
    "tta.collect": ("collect_source",),
    "tta.core.adapter": ("Adapter",),
    "tta.core.config": ("ComponentConfig", "UpdateConfig"),
    "tta.core.denoiser": ("Diffusion",),
    "tta.core.guard": ("Batch", "Guard", "Verdict"),
    "tta.core.input_rule": ("Input",),
    "tta.core.norm_rule": ("NormRule",),
    "tta.core.output_rule": ("Output",),
    "tta.core.prediction": ("Prediction", "Report"),
    "tta.core.recipe": ("AdapterConfig",),
    "tta.core.registry": ("get_config", "list_methods", "register"),
    "tta.core.setting": ("Setting",),
    "tta.core.source": ("SourceStatistics",),
    "tta.core.update": ("Update",),
    "tta.saving": ("load", "save"),
    "tta.tuning": ("tune",),
    "tta.wrapping": ("wrap",),
}

install_old_names()


def __getattr__(name: str) -> Any:
    """Import public names, subpackages, and modules under their old names, on first use."""
    if name in SUBPACKAGES or f"tta.{name}" in {*MOVED, *FORMER}:
        return import_module(f"tta.{name}")
    for place, names in PLACES.items():
        if name in names:
            value = globals()[name] = getattr(import_module(place), name)
            return value
    raise AttributeError(f"module 'tta' has no attribute {shown(name)}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *SUBPACKAGES})
