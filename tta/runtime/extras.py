"""Packages that a plain installation lacks, imported when they are needed."""

from __future__ import annotations

from importlib import import_module
from typing import Any

__all__ = ["needed"]

PACKAGES = {"PIL": "Pillow", "av": "PyAV"}  # by the name of their module, where that is another


def needed(module: str, extra: str) -> Any:
    """Import a module of an extra.

    Args:
        module: Its name, such as "torchvision.transforms.v2".
        extra: The extra of this package that brings it, such as "video".

    Raises:
        ImportError: When it is not installed, with the line that installs it.
    """
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        top = module.partition(".")[0]
        if error.name is None or error.name.partition(".")[0] != top:
            raise  # it is there, and lacks something of its own
        raise ImportError(
            f"`{PACKAGES.get(top, top)}` must be installed for this, and is not: "
            f'pip install "tta-vision[{extra}]"',
            name=top,
        ) from None
