"""What golden traces share: named arrays, and hyper-parameters as JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["GOLDEN", "Recorded"]

GOLDEN = Path(__file__).parents[1] / "golden"


class Recorded:
    """One recorded run of an official implementation, or some of its functions.

    Args:
        path: The ``.npz``.
    """

    def __init__(self, path: Path) -> None:
        self.name = path.stem
        with np.load(path) as file:
            self.arrays = {key: file[key] for key in file.files}
        text = self.arrays["hparams" if "hparams" in self else "hparams_json"]
        self.hparams: dict[str, Any] = json.loads(str(text))

    def __contains__(self, key: str) -> bool:
        return key in self.arrays

    def tensor(self, key: str) -> Tensor:
        """An array: images as pixels in [0, 1], numbers as float32, int64, uint8 or bool."""
        array = self.arrays[key]
        if array.dtype == np.uint8 and key.endswith("inputs"):
            return torch.from_numpy(array.astype(np.float32) / np.float32(255))
        return torch.from_numpy(array.astype(np.float32) if array.dtype.kind == "f" else array)

    def group(self, prefix: str) -> dict[str, Tensor]:
        """All arrays ``prefix/name``, by name."""
        start = prefix + "/"
        return {k[len(start) :]: self.tensor(k) for k in self.arrays if k.startswith(start)}
