"""Torch's foreach operations, which act on lists of tensors and are not in its type stubs."""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["foreach"]

foreach: Any = torch
