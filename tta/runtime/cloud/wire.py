"""What device and cloud send each other: safetensors, in which nothing can be executed.

An *upload* holds images as levels, how uncertain the device was of each, and the version of what it
has. A *downlink* holds a prompt, perhaps parameters of norm layers, and their version. A version is
two numbers, that of a cloud's life and that of its update, so that a device notices a cloud that
has begun anew. Either is checked in full before anything of it is used.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from tta.core.checks import shown, told

__all__ = ["NOTHING", "Downlink", "MessageError", "Upload", "Version"]

Version: TypeAlias = "tuple[int, int]"
NOTHING: Version = (0, 0)  # of a device that has got nothing yet
NORM = "norm/"  # before names of parameters
MOST_SIDE = 1 << 14  # pixels


class MessageError(ValueError):
    """A message that is not what it should be."""


@dataclass(frozen=True, eq=False)
class Upload:
    """Images of which a device was least sure.

    Args:
        images: (N, C, H, W) uint8.
        uncertainty: (N,) float32 in [0, 1].
        version: Of what the device has.
    """

    images: Tensor
    uncertainty: Tensor
    version: Version = NOTHING

    def to_bytes(self) -> bytes:
        """The message."""
        tensors = {
            "images": self.images.contiguous().cpu(),
            "uncertainty": self.uncertainty.float().contiguous().cpu(),
            "version": torch.tensor(self.version, dtype=torch.int64),
        }
        return save(tensors)

    @classmethod
    def from_bytes(cls, message: bytes) -> Upload:
        """The inverse of :meth:`to_bytes`.

        Raises:
            MessageError: When the message is no upload.
        """
        found = _tensors("upload", message)
        images, uncertainty = _take(found, "images", "uint8", 4), found.pop("uncertainty", None)
        version = _version(found)
        if images.numel() == 0 or max(images.shape[2:]) > MOST_SIDE:
            raise MessageError(
                f"`images` must be images of at most {MOST_SIDE} pixels a side, got shape "
                f"{tuple(images.shape)}: send what the device's model takes."
            )
        if uncertainty is None or uncertainty.shape != (len(images),):
            got = "nothing" if uncertainty is None else f"shape {tuple(uncertainty.shape)}"
            raise MessageError(
                f"`uncertainty` must have shape ({len(images)},), one number for each image, got "
                f"{got}: send them together."
            )
        if uncertainty.dtype != torch.float32 or not bool(
            ((uncertainty >= 0) & (uncertainty <= 1)).all()
        ):
            raise MessageError(
                "`uncertainty` must be float32 numbers in [0, 1], got others: divide entropies "
                "by ln C."
            )
        _check_empty("upload", found)
        return cls(images, uncertainty, version)


@dataclass(frozen=True, eq=False)
class Downlink:
    """What a cloud has learned.

    Args:
        prompt: (C, H, W) offsets of pixels; sent in float16.
        norms: Parameters of norm layers by name; sent as they are.
        version: Of both.
    """

    prompt: Tensor
    norms: Mapping[str, Tensor] = field(default_factory=dict)
    version: Version = NOTHING

    def to_bytes(self) -> bytes:
        """The message."""
        norms = {f"{NORM}{name}": v.detach().contiguous().cpu() for name, v in self.norms.items()}
        tensors = norms | {
            "prompt": self.prompt.detach().half().contiguous().cpu(),
            "version": torch.tensor(self.version, dtype=torch.int64),
        }
        return save(tensors)

    @classmethod
    def from_bytes(cls, message: bytes) -> Downlink:
        """The inverse of :meth:`to_bytes`; the prompt is float32.

        Raises:
            MessageError: When the message is no downlink, or holds what is no number.
        """
        found = _tensors("downlink", message)
        prompt, version = _take(found, "prompt", "float16", 3).float(), _version(found)
        norms = {name: found.pop(name) for name in list(found) if name.startswith(NORM)}
        _check_empty("downlink", found)
        for name, value in {"prompt": prompt, **norms}.items():
            if not value.is_floating_point() or not bool(value.isfinite().all()):
                raise MessageError(
                    f"`{told(name, 60)}` must be finite floating-point numbers, got others: look "
                    "at the cloud side."
                )
        if prompt.numel() == 0 or float(prompt.abs().amax()) > 1:
            raise MessageError(
                "`prompt` must hold offsets of pixels in [-1, 1], got others or none: look at the "
                "cloud side."
            )
        return cls(prompt, {name[len(NORM) :]: v for name, v in norms.items()}, version)


def _tensors(what: str, message: bytes) -> dict[str, Tensor]:
    try:
        return load(message)
    except (SafetensorError, ValueError, RuntimeError, KeyError, TypeError) as error:
        raise MessageError(
            f"`{what}` must be a file of safetensors, got {len(message)} bytes that begin with "
            f"{shown(message[:8], 40)} ({told(error, 80)}): see docs/cloud.md."
        ) from None


def _take(found: dict[str, Tensor], name: str, kind: str, axes: int) -> Tensor:
    value = found.pop(name, None)
    if value is None or value.dtype != getattr(torch, kind) or value.ndim != axes:
        got = "nothing" if value is None else f"{value.dtype} of shape {tuple(value.shape)}"
        raise MessageError(
            f"`{name}` must be {kind} with {axes} axes, got {told(got, 90)}: see docs/cloud.md."
        )
    return value


def _version(found: dict[str, Tensor]) -> Version:
    value = found.pop("version", None)
    if value is None or value.dtype != torch.int64 or value.shape != (2,):
        raise MessageError(
            "`version` must be two int64 numbers, got something else or nothing: see docs/cloud.md."
        )
    return int(value[0]), int(value[1])


def _check_empty(what: str, found: Mapping[str, Tensor]) -> None:
    if found:
        raise MessageError(
            f"`{what}` must hold nothing else, got {shown(next(iter(found)), 60)}: see "
            "docs/cloud.md."
        )
