"""Keys of an adapter's state: other names for them, what may be loaded, what it belongs to."""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

__all__ = ["alias", "check_rng", "check_shape", "checksum", "neighbours"]


def check_shape(key: str, value: Any, mine: Tensor, grows: bool) -> None:
    expected = tuple(mine.shape)
    got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
    if grows and isinstance(got, tuple):
        # Nothing is there yet, here or there, and the first batch decides what it looks like.
        grows = 0 in (mine.numel(), value.numel()) or got[1:] == expected[1:]
    if got != expected and not grows:
        raise ValueError(
            f"`state`[{key!r}] must have shape {expected}, got {got}: load a state made with the "
            "same model and method."
        )


def check_rng(value: Tensor) -> None:
    try:
        torch.Generator().set_state(value.cpu())
    except (RuntimeError, TypeError):
        raise ValueError(
            "`state`['rng'] must be the state of a torch.Generator: load what state() gave."
        ) from None


def alias(key: str) -> str:
    """Methods with a teacher call the trained parameters the student."""
    student = "update/student."
    return f"param/{key[len(student) :]}" if key.startswith(student) else key


def neighbours(moving: dict[str, Tensor], key: str) -> list[str]:
    """The keys worth listing for a wrong one: those of its group, else the groups."""
    group = key.partition("/")[0]
    same = [k for k in moving if k.partition("/")[0] == group]
    return same[:40] or sorted({k.partition("/")[0] for k in moving})


def checksum(tensors: Iterable[Tensor]) -> int:
    """CRC-32 of the bytes of tensors, in order."""
    crc = 0
    for tensor in tensors:
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        crc = zlib.crc32(flat.view(torch.uint8).numpy().tobytes(), crc)
    return crc
