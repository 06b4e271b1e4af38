"""Measured surfaces of walks, as files; `experiments.studies.surface` makes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tta.core.checks import path_like

__all__ = ["read_surface"]


def read_surface(path: str | Path) -> dict[str, dict[str, Any]]:
    """The surfaces in a file that this module wrote, as a walk's option `surface` takes them."""
    if not path_like("surface", path).is_file():
        raise FileNotFoundError(
            f"`{path}` is missing: make it with python -m experiments surface --output {path}"
        )
    return json.loads(Path(path).read_text())["surface"]
