"""The bundled CIFAR-10 classifiers: which there are and how each is built.

Weights, source artefacts and the card of each lie in ``models/weights/<name>/``;
``models/train.py`` makes the weights and the artefacts. `BUNDLED` are compared on every stream.
`VARIANTS` are trained in a way that one method asks for, and hold the artefacts of that one alone.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from safetensors.torch import load_file
from torch import nn

from models.conv_vit import ConvViT
from models.resnet import CifarResNet, InstanceAwareBatchNorm2d

__all__ = [
    "BUNDLED",
    "CIFAR10_CLASSES",
    "CIFAR10_MEAN",
    "CIFAR10_STD",
    "FOLDER",
    "IABN",
    "ITTA",
    "LONG_TAILED",
    "SDA",
    "VARIANTS",
    "base",
    "builder",
    "give_weights",
    "known",
]

FOLDER = Path(__file__).parent / "weights"
IABN = "cifar10_resnet20_iabn"
ITTA = "_itta"  # ends the names of networks that were trained further with ITTA's consistency
LONG_TAILED = "_lt"  # ends, with the ratio, those of networks that saw few images of some classes
SDA = "_sda"  # ends the names of networks that were tuned on projections of the diffusion model

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


# Of each of the above there may be one that ends in ITTA, SDA, or LONG_TAILED and its ratio.
VARIANTS: dict[str, Callable[[], nn.Module]] = {
    IABN: lambda: CifarResNet(CIFAR10_MEAN, CIFAR10_STD, norm=InstanceAwareBatchNorm2d),
}


def known() -> dict[str, Callable[[], nn.Module]]:
    """Those that can be loaded: the bundled classifiers, and variants that have been trained."""
    return {name: builder(name) for name in [*BUNDLED, *_trained()]}


def _trained() -> list[str]:
    """Variants whose weights are there, sorted."""
    folders = (file.parent.name for file in FOLDER.glob("*/weights.safetensors"))
    return sorted(name for name in folders if name not in BUNDLED and base(name) is not None)


def base(name: str) -> str | None:
    """The name that says how a network is built; None for an unknown one.

    Example:
        >>> base("cifar10_resnet20_bn_lt100")
        'cifar10_resnet20_bn'
    """
    plain = re.sub(rf"({ITTA}|{SDA}|{LONG_TAILED}\d+)$", "", name)
    return plain if plain in BUNDLED or plain in VARIANTS else None


def builder(name: str) -> Callable[[], nn.Module]:
    """What builds the network of a name that `base` knows, with random weights."""
    return (BUNDLED | VARIANTS)[str(base(name))]


def give_weights(model: nn.Module, name: str) -> None:
    """Give a network the weights that are stored under a name, in its own dtype."""
    model.load_state_dict(load_file(str(FOLDER / name / "weights.safetensors")))
