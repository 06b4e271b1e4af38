"""The bundled CIFAR-10 classifiers: which there are and how each is built.

Weights, source artefacts and the card of each lie in ``models/weights/<name>/``;
``models/train.py`` makes the weights and the artefacts. A network that it trained further for ITTA
is called ``<name>_itta``; none is bundled, as its training needs CIFAR-10's training images.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from torch import nn

from models.conv_vit import ConvViT
from models.resnet import CifarResNet

__all__ = ["BUNDLED", "CIFAR10_CLASSES", "CIFAR10_MEAN", "CIFAR10_STD", "FOLDER", "ITTA", "known"]

FOLDER = Path(__file__).parent / "weights"
ITTA = "_itta"  # ends the names of networks that were trained further with ITTA's consistency

CIFAR10_MEAN = (0.4914, 0.4822, 0.4465)
CIFAR10_STD = (0.2470, 0.2435, 0.2616)
CIFAR10_CLASSES = (
    "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
)  # fmt: skip


def _group_norm(channels: int) -> nn.Module:
    return nn.GroupNorm(8, channels)


BUNDLED: dict[str, Callable[[], nn.Module]] = {
    "cifar10_resnet20_bn": lambda: CifarResNet(CIFAR10_MEAN, CIFAR10_STD),
    "cifar10_resnet20_gn": lambda: CifarResNet(CIFAR10_MEAN, CIFAR10_STD, norm=_group_norm),
    "cifar10_convvit_ln": lambda: ConvViT(CIFAR10_MEAN, CIFAR10_STD),
}


def known() -> dict[str, Callable[[], nn.Module]]:
    """The bundled classifiers, and those that ``models.train --itta`` has left beside them."""
    trained = {f"{name}{ITTA}": make for name, make in BUNDLED.items()}
    return BUNDLED | {
        name: make
        for name, make in trained.items()
        if (FOLDER / name / "weights.safetensors").is_file()
    }
