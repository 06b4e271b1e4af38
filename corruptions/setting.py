"""What a corruption is asked to draw for: name, shape, severity and seeds in one place."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from corruptions import draws
from corruptions.severity import ParameterSet, constants, mixture

__all__ = ["Params", "Setting", "scalar"]

# Everything `apply` needs: draws with a leading batch dimension, constants as 0-d tensors.
Params = dict[str, Tensor]


@dataclass(frozen=True)
class Setting:
    """One request to draw parameters.

    Attributes:
        name: The corruption.
        shape: (B, 3, H, W) of the images.
        severity: 0 to 5.
        seeds: (B,) int64; what is drawn lies on their device.
        parameters: Which published set; see `severity.mixture`.
        frost_pictures: Folder of the user's own frost pictures, or None for synthetic frost.
    """

    name: str
    shape: tuple[int, int, int, int]
    severity: float
    seeds: Tensor
    parameters: ParameterSet = "auto"
    frost_pictures: Path | None = None

    @property
    def side(self) -> int:
        """Short side of the images in pixels."""
        return min(self.shape[2:])

    def constants(self) -> dict[str, float]:
        """Constants of the recipe here; see `severity.constants`."""
        return constants(self.name, self.severity, self.side, self.parameters)

    def mixture(self) -> list[tuple[float, str, int]]:
        """Published points around this setting; see `severity.mixture`."""
        return mixture(self.severity, self.side, self.parameters)

    def integers(self, field: str, *shape: int) -> Tensor:
        """Draws from all int32, each equally likely, of shape (B, *shape)."""
        count = torch.Size(shape).numel()
        halves = draws.words(self.seeds, f"{self.name}/{field}", (count + 1) // 2)
        return halves.view(torch.int32)[:, :count].reshape(len(self.seeds), *shape)

    def uniforms(self, field: str, *shape: int) -> Tensor:
        """Uniform draws in [0, 1) of shape (B, *shape), float32."""
        count = torch.Size(shape).numel()
        flat = draws.uniforms(self.seeds, f"{self.name}/{field}", count)
        return flat.reshape(len(self.seeds), *shape)

    def normals(self, field: str, *shape: int) -> Tensor:
        """Standard normal draws of shape (B, *shape), float32."""
        count = torch.Size(shape).numel()
        flat = draws.normals(self.seeds, f"{self.name}/{field}", count)
        return flat.reshape(len(self.seeds), *shape)


def scalar(value: float) -> Tensor:
    """A constant as `params` carries it."""
    return torch.tensor(value, dtype=torch.float64)
