"""Modules of version 0.1 under their old names, with a DeprecationWarning; dropped after 0.2.

``from tta.losses import entropy`` and ``tta.parallel.split_batches`` go on working. A finder at the
end of ``sys.meta_path`` answers for these names alone, so that no file of an old name is left.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

from tta.core.checks import shown

__all__ = ["MOVED", "install_old_names"]

MOVED = {
    "tta.adapter": "tta.core.adapter",
    "tta.augment": "tta.parts.augment",
    "tta.backbone": "tta.core.backbone",
    "tta.checks": "tta.core.checks",
    "tta.classifier": "tta.core.classifier",
    "tta.config": "tta.core.config",
    "tta.draws": "tta.core.random",
    "tta.losses": "tta.parts.losses",
    "tta.memory": "tta.parts.memory",
    "tta.neighbours": "tta.parts.neighbours",
    "tta.norm": "tta.core.norm_layers",
    "tta.parallel": "tta.runtime.parallel",
    "tta.posterior": "tta.parts.posterior",
    "tta.registry": "tta.core.registry",
    "tta.replay": "tta.parts.replay",
    "tta.selection": "tta.parts.selection",
    "tta.source": "tta.core.source",
    "tta.state": "tta.saving",
    "tta.teachers": "tta.parts.teachers",
}
# Names of a former module that are in several modules now.
SLOTS = {
    "Component": "tta.core.component",
    "Context": "tta.core.component",
    "NormRule": "tta.core.norm_rule",
    "Output": "tta.core.output_rule",
    "Prediction": "tta.core.prediction",
    "Report": "tta.core.prediction",
    "Update": "tta.core.update",
}
RENAMED = {  # functions of `tta.checks`
    "whole": "whole_number",
    "text": "string",
    "flag": "boolean",
    "folder_or_file": "path_like",
}
FORMER = {"tta.config": {"AdapterConfig": "tta.core.recipe"}, "tta.slots": SLOTS}


class _OldName(ModuleType):
    """A module of an old name, whose contents are looked up where they are now."""

    def __getattr__(self, key: str) -> Any:
        if key.startswith("__"):
            raise AttributeError(key)
        place = FORMER.get(self.__name__, {}).get(key, MOVED.get(self.__name__))
        if place is None:
            raise AttributeError(f"module {shown(self.__name__)} has no attribute {shown(key)}")
        return getattr(import_module(place), RENAMED.get(key, key))


class _Finder(MetaPathFinder, Loader):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return ModuleSpec(fullname, self) if fullname in {*MOVED, *FORMER} else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        now = MOVED.get(spec.name, "tta")
        warnings.warn(
            f"{spec.name} has moved to {now} and goes after version 0.2: import it from there.",
            DeprecationWarning,
            stacklevel=_level_of_caller(),
        )
        return _OldName(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """Nothing to run: `_OldName` looks everything up."""


def _level_of_caller() -> int:
    """The stack level of the line that imports; `warnings` itself skips the import machinery."""
    inside = (f"{Path(__file__).parent}/", importlib.__file__)
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None:
        frame = frame.f_back
        file = frame.f_code.co_filename
        if "_bootstrap" in file and "importlib" in file:
            continue
        level += 1
        if not file.startswith(inside):
            return level
    return level


def install_old_names() -> None:
    """Make the old names importable."""
    if not any(type(finder).__name__ == _Finder.__name__ for finder in sys.meta_path):
        sys.meta_path.append(_Finder())
