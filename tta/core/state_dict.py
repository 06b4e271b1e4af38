"""Keys of an adapter's state: other names, what may be loaded, what it belongs to, copies."""

from __future__ import annotations

import zlib
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from tta.core.checks import nearest

__all__ = ["alias", "check_origin", "check_state", "checksum", "lasting_copies"]

SMALL = 1024  # elements; a copy of fewer is not worth a comparison


def check_origin(theirs: dict[str, Any], mine: dict[str, Any]) -> None:
    """Refuse a state that another method, or a model with other weights, made."""
    if theirs != mine:
        mine_told, theirs_told = (
            f"{made_by['method']} on source weights {made_by['weights']:08x}"
            for made_by in (mine, theirs)
        )
        raise ValueError(
            f"`state` must come from an adapter like this one ({mine_told}), got one of "
            f"{theirs_told}: load it there, or pass dict(state) to copy it all the same."
        )


def check_state(
    state: dict[str, Tensor],
    moving: dict[str, Tensor],
    growing: Collection[str] = (),
    taking_shape: Collection[str] = (),
) -> None:
    """Refuse a state that does not fit what moves.

    Args:
        state: What is to be copied, in part or in full.
        moving: Everything that moves.
        growing: Keys whose first axis may have any length; those of a component come together.
        taking_shape: Keys whose other axes are open as long as they are empty.
    """
    for key, value in state.items():
        if key not in moving:
            raise ValueError(
                f"`state` must come from an adapter like this one, got the key {key!r}: "
                + nearest(key, _neighbours(moving, key))
            )
        fixed = slice(1, None) if key in growing else slice(None)
        if key in taking_shape and isinstance(value, Tensor):
            empty = 0 in (moving[key].numel(), value.numel())
            fixed = slice(0, 1) if empty else slice(None)
        _check_tensor(key, value, moving[key], fixed)
    for slot in ("update/", "output/"):
        keys = [k for k in growing if k.startswith(slot)]
        lengths = {k: len(state[k]) if k in state else None for k in keys}
        given = {k: v for k, v in lengths.items() if v is not None}
        if given and len(set(lengths.values())) > 1:
            raise ValueError(
                f"`state` must hold {' and '.join(lengths)} with as many rows each, got "
                f"{', '.join(f'{k}: {v}' for k, v in given.items())}: load them together."
            )
    if "rng" in state:
        _check_rng(state["rng"])


def _check_tensor(key: str, value: Any, mine: Tensor, fixed: slice) -> None:
    """Compare the ``fixed`` axes of a tensor with mine, and the kind of numbers."""
    if not isinstance(value, Tensor):
        raise ValueError(
            f"`state`[{key!r}] must be a tensor of shape {tuple(mine.shape)}, got "
            f"{type(value).__name__}: load what state() gave."
        )
    expected, got = tuple(mine.shape), tuple(value.shape)
    if got[fixed] != expected[fixed]:
        raise ValueError(
            f"`state`[{key!r}] must have shape {expected}, got {got}: load a state made with the "
            "same model and method."
        )
    if _kind(value) != _kind(mine):
        raise ValueError(
            f"`state`[{key!r}] must be {mine.dtype} or convert to it, got {value.dtype}: load a "
            "state made with the same model and method."
        )


def _kind(tensor: Tensor) -> str:
    if tensor.is_complex():
        return "complex"
    return "real" if tensor.is_floating_point() else "whole"


def _check_rng(value: Tensor) -> None:
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


def _neighbours(moving: dict[str, Tensor], key: str) -> list[str]:
    """The keys worth listing for a wrong one: those of its group, else the groups."""
    group = key.partition("/")[0]
    same = [k for k in moving if k.partition("/")[0] == group]
    return same or sorted({k.partition("/")[0] for k in moving})


def checksum(tensors: Iterable[Tensor], first: int | None = None) -> int:
    """CRC-32 of the bytes of tensors, in order; of the ``first`` elements of each, if given."""
    crc = 0
    for tensor in tensors:
        flat = tensor.detach().reshape(-1)[:first].cpu().contiguous()
        crc = zlib.crc32(flat.view(torch.uint8).numpy(), crc)  # type: ignore[arg-type]
    return crc


def lasting_copies(moving: Mapping[str, Tensor], held: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies that the adapter never writes to, without memory for what there is already.

    Where a whole model is trained, its parameters, a teacher's, and the optimiser's slots are four
    models; at wrap the first two are usually the caller's weights and the others are zeros.

    Args:
        moving: Tensors by the names of a state.
        held: Copies by the names of parameters.

    Returns:
        Tensors with the bits of ``moving``: one of ``held``, an expanded zero, or a clone.
    """
    return {key: _lasting_copy(key, value.detach(), held) for key, value in moving.items()}


def _lasting_copy(key: str, value: Tensor, held: Mapping[str, Tensor]) -> Tensor:
    if value.numel() >= SMALL:
        name = key.partition("/")[2]
        # param/<name>, or update/teacher.<name>
        original = held.get(name, held.get(name.partition(".")[2]))
        if original is not None and _same_bits(original, value):
            return original
        if not bool(_bits(value).any()):
            return value.new_zeros(()).expand_as(value)
    return value.clone()


def _same_bits(one: Tensor, other: Tensor) -> bool:
    kind, other_kind = ((t.shape, t.dtype, t.device) for t in (one, other))
    return kind == other_kind and torch.equal(_bits(one), _bits(other))


def _bits(value: Tensor) -> Tensor:
    """Bytes, by which NaN is itself and -0 is not 0."""
    return value.reshape(-1).view(torch.uint8)
