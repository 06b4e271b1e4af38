"""What golden traces share: named arrays, and hyper-parameters as JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["GOLDEN", "Recorded", "recordings"]

GOLDEN = Path(__file__).parents[1] / "golden"
BESIDE = (
    Path(__file__).parents[3] / "shared" / "golden"
)  # all of them, where there is such a folder


def recordings(which: str, *patterns: str) -> list[Path]:
    """The traces of a set by the patterns of their names.

    Those in the repository are one or two of each method; where a folder beside the repository has
    all of them, the others are from there.
    """
    found: dict[str, Path] = {}
    for folder in (GOLDEN, BESIDE):
        for pattern in patterns:
            for path in (folder / which).glob(f"{pattern}.npz"):
                found.setdefault(path.stem, path)
    return [found[name] for name in sorted(found)]


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

    def augment(self, images: Tensor, index: int) -> Tensor:
        """The READMEs' deterministic augmentation."""
        table = self.group("aug")
        k = index % len(table["dx"])
        x = images.roll((int(table["dy"][k]), int(table["dx"][k])), dims=(2, 3))
        if table["flip"][k]:
            x = x.flip(3)
        return (x * table["gain"][k]).clamp(0, 1)
