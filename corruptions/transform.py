"""`Corrupt`, a corruption as a transform, and `CorruptedDataset`, a data set with one applied."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional

from corruptions import api, check
from corruptions.draws import image_seeds
from corruptions.messages import shown
from corruptions.pictures import to_rgb
from corruptions.severity import ParameterSet

__all__ = ["Corrupt", "CorruptedDataset"]


def _through(change: Callable[[Tensor], Tensor], image: Any) -> Any:
    """Apply a function of (B, C, H, W) to a Pillow image, an image tensor or a batch."""
    if isinstance(image, PIL.Image.Image):
        pixels = functional.pil_to_tensor(to_rgb(image))
        return functional.to_pil_image(change(pixels[None])[0])
    check.dense("images", image)
    plain = image.as_subclass(Tensor)
    if plain.ndim == 3 and plain.shape[0] not in check.CHANNELS:
        check.shape(plain.shape)  # says how to make it a batch
    out = change(plain[None] if plain.ndim == 3 else plain).view(plain.shape)
    # Give back a torchvision image where one came in.
    return type(image)(out) if isinstance(image, tv_tensors.TVTensor) else out


class Corrupt(v2.Transform):
    """A corruption as a torchvision v2 transform, which is also an `nn.Module`.

    Takes what v2 transforms take: a Pillow image, an image tensor (3, H, W) or (B, 3, H, W), or a
    structure such as (images, labels), of which the images are corrupted. Every image gets draws of
    its own. Grey tensors of one channel stay grey, see `corrupt`; Pillow images of all modes become
    RGB.

    Args:
        name: One of `list_corruptions(extra=True)`.
        severity: 0 (clean) to 5.
        generator: Draws the seeds; without it every call is different. Copies of one generator in
            several data-loader workers would repeat each other, so leave it out there.
        parameters: See `corrupt`.
        frost_pictures: See `corrupt`.

    >>> Corrupt("fog", 3)(torch.zeros(3, 32, 32)).shape
    torch.Size([3, 32, 32])
    """

    def __init__(
        self,
        name: str,
        severity: float,
        *,
        generator: torch.Generator | np.random.Generator | None = None,
        parameters: ParameterSet = "auto",
        frost_pictures: str | Path | None = None,
    ) -> None:
        super().__init__()
        check.name(name, api.list_corruptions(extra=True))
        check.severity(severity)
        check.parameters(parameters)
        self.name = name
        self.severity = severity
        self.generator = generator
        self.parameters_from: ParameterSet = parameters
        self.frost_pictures = check.folder(frost_pictures)

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Corrupt one image or batch; called by torchvision for each part of the input."""
        pixels = (tv_tensors.Image, tv_tensors.Video)
        if isinstance(inpt, tv_tensors.TVTensor) and not isinstance(inpt, pixels):
            return inpt  # boxes, masks and key points stay where they are
        return _through(self._corrupted, inpt)

    def _corrupted(self, images: Tensor) -> Tensor:
        return api.corrupt(
            images,
            self.name,
            self.severity,
            generator=self.generator,
            parameters=self.parameters_from,
            frost_pictures=self.frost_pictures,
        )

    def extra_repr(self) -> str:
        """Name and severity, for print."""
        return f"{self.name!r}, {self.severity}"


class CorruptedDataset(Dataset):
    """A map-style data set whose images are corrupted, the same image always in the same way.

    What an image gets depends on `seed` and its position alone, so epochs, workers and the order of
    access do not matter. Positions of CIFAR-10's test set give the very images that
    ``python -m corruptions write cifar10`` writes with the same seed.

    Args:
        dataset: Has a length and gives images, or tuples that begin with one. Images are Pillow
            images or tensors (3, H, W), or grey (1, H, W), uint8 or floating point in [0, 1],
            before any normalisation. Pillow images of all modes become RGB.
        name: One of `list_corruptions(extra=True)`.
        severity: 0 (clean) to 5.
        seed: Other seeds give other draws.
        transform: Applied to the corrupted image, such as a normalisation.
        parameters: See `corrupt`.
        frost_pictures: See `corrupt`.

    >>> images = [(torch.zeros(3, 32, 32), 7)]
    >>> image, label = CorruptedDataset(images, "fog", 3)[0]
    >>> image.shape, label
    (torch.Size([3, 32, 32]), 7)
    """

    def __init__(
        self,
        dataset: Any,
        name: str,
        severity: float,
        *,
        seed: int = 0,
        transform: Callable[[Any], Any] | None = None,
        parameters: ParameterSet = "auto",
        frost_pictures: str | Path | None = None,
    ) -> None:
        if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
            raise TypeError(
                "`dataset` must be map-style, with a length and items, got "
                f"{type(dataset).__name__}: wrap the images of a stream by `Corrupt`"
            )
        check.name(name, api.list_corruptions(extra=True))
        check.severity(severity)
        check.parameters(parameters)
        check.seed(seed)
        self.dataset = dataset
        self.name = name
        self.severity = severity
        self.seed = seed
        self.transform = transform
        self.parameters_from: ParameterSet = parameters
        self.frost_pictures = check.folder(frost_pictures)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        """The item at a position with its image corrupted; the rest as it is."""
        if isinstance(index, bool) or not hasattr(index, "__index__"):
            raise TypeError(
                f"`index` must be a position, got {shown(index)}: take one item at a time"
            )
        position = range(len(self.dataset))[index]
        item = self.dataset[position]
        image = item[0] if isinstance(item, (tuple, list)) else item
        if not isinstance(image, (Tensor, PIL.Image.Image)):
            raise TypeError(
                "`dataset` must give Pillow images or tensors, alone or first in a tuple, got "
                f"{type(image).__name__}: convert them first"
            )

        def change(images: Tensor) -> Tensor:
            return api.corrupt(
                images,
                self.name,
                self.severity,
                seeds=image_seeds(self.seed, self.name, self.severity, [position]),
                parameters=self.parameters_from,
                frost_pictures=self.frost_pictures,
            )

        out = _through(change, image)
        if self.transform is not None:
            out = self.transform(out)
        return (out, *item[1:]) if isinstance(item, (tuple, list)) else out
