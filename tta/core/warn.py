"""Warnings that point at the line of the caller's code, not at a line in here or in torch."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import torch

__all__ = ["warn"]

_INSIDE = tuple(f"{folder}/" for folder in (Path(__file__).parents[1], Path(torch.__file__).parent))


def warn(text: str) -> None:
    """Warn at the first line outside this package and torch that led here.

    A fixed ``stacklevel`` would point elsewhere as soon as an adapter is called inside another
    module. ``skip_file_prefixes`` of Python 3.12 does the same.
    """
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_INSIDE):
        frame, level = frame.f_back, level + 1
    warnings.warn(text, stacklevel=level)
