"""Source cards: what a figure of the unadapted model depends on.

Five accuracies between 28.5 and 55.6 % are in print for "ViT-B on ImageNet-C", from weights,
normalisation and crop alone. Two figures may be compared where the cards agree.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

__all__ = ["SourceCard", "of_file"]


@dataclass(frozen=True, kw_only=True)
class SourceCard:
    """Weights, normalisation and crop of a classifier.

    Args:
        model: Name for :func:`models.load`, with the tag of its weights where it has one.
        weights: Where the weights come from: a tag, a file with the start of its SHA-256,
            "bundled", or "random".
        mean: Of each channel, taken from pixels in [0, 1].
        std: Of each channel, by which pixels are divided then.
        input_size: Channels, height and width that the model takes.
        crop: Share of the resized picture's side that the central crop keeps; 1 for all of it.
        interpolation: Of resizing, "" where pictures are taken as they are.

    Example:
        >>> print(SourceCard(model="net", weights="random", mean=(0.5,), std=(0.5,),
        ...     input_size=(1, 8, 8), crop=1.0, interpolation=""))
        net, weights random, mean 0.5, std 0.5, input 1x8x8, crop 1
    """

    model: str
    weights: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    input_size: tuple[int, int, int]
    crop: float
    interpolation: str

    def __str__(self) -> str:
        size = "x".join(map(str, self.input_size))
        resized = f" {self.interpolation}" if self.interpolation else ""
        return (
            f"{self.model}, weights {self.weights}, mean {_numbers(self.mean)}, "
            f"std {_numbers(self.std)}, input {size}, crop {self.crop:g}{resized}"
        )


def of_file(path: Path) -> str:
    """Name a file of weights so that another one is told from it: its name and a checksum."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return f"{path.name} (sha256 {digest.hexdigest()[:12]})"


def _numbers(values: tuple[float, ...]) -> str:
    """Values for people; one that all channels share once."""
    shown = values[:1] if len(set(values)) == 1 else values
    return " ".join(f"{value:g}" for value in shown)
