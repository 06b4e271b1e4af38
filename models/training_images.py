"""CIFAR-10 as classifiers are trained on it: reading, random crops, accuracy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["accuracy", "augmented", "padded", "read_cifar10"]


def read_cifar10(path: str | Path) -> dict[str, Tensor]:
    """Read CIFAR-10 from an ``.npz`` or a torchvision folder.

    Returns:
        ``train_images`` (50000, 3, 32, 32) uint8, ``train_labels`` (50000,) int64, and ``test_*``.
    """
    path = Path(path)
    if path.is_dir():
        from torchvision.datasets import CIFAR10

        arrays = {}
        for split in ("train", "test"):
            data = CIFAR10(str(path), train=split == "train", download=False)
            arrays[f"{split}_images"] = data.data
            arrays[f"{split}_labels"] = np.array(data.targets)
    else:
        with np.load(path) as file:
            arrays = {key: file[key] for key in file.files}
    return {
        key: torch.from_numpy(array).permute(0, 3, 1, 2).contiguous()
        if key.endswith("images")
        else torch.from_numpy(array.astype(np.int64))
        for key, array in arrays.items()
    }


def padded(images: Tensor) -> Tensor:
    """Images (N, 3, 32, 32) uint8 with a mirrored border of 4, as `augmented` takes them."""
    return F.pad(images.float(), (4, 4, 4, 4), mode="reflect").to(torch.uint8)


def augmented(padded: Tensor, index: Tensor, generator: torch.Generator) -> Tensor:
    """Random 32 x 32 crops of images padded by 4, mirrored half of the time, in [0, 1]."""
    count = len(index)
    offset = torch.randint(0, 9, (2, count, 1), generator=generator)
    steps = torch.arange(32)
    rows, cols = offset[0] + steps, offset[1] + steps
    mirror = torch.rand(count, 1, generator=generator) < 0.5
    cols = torch.where(mirror, cols.flip(1), cols)
    # Indexing this way puts channels last in memory, which convolutions on a CPU prefer.
    crops = padded[index[:, None, None], :, rows[:, :, None], cols[:, None, :]]
    return crops.permute(0, 3, 1, 2).float() / 255


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor, batch_size: int = 500) -> float:
    """Share of correct predictions of a model in eval mode; images (N, 3, H, W) uint8."""
    correct = 0
    for start in range(0, len(images), batch_size):
        part = slice(start, start + batch_size)
        correct += int((model(images[part].float() / 255).argmax(1) == labels[part]).sum())
    return correct / len(images)
