"""Keys of a state: former names, checks before loading, checksums, and compact copies."""

from __future__ import annotations

import zlib
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from tta.core.checks import dense, nearest, shown, told

__all__ = [
    "check_origin",
    "check_state",
    "checksum",
    "compact_copies",
    "copy_tensors",
    "current_name",
    "extra_state",
]

SMALL = 1024  # elements; a copy of fewer is not worth a comparison
LARGEST = 2**63 - 1
IMAGES = (torch.uint8, torch.float32)  # dtypes of images that a state holds
OF_THE_MODEL = "model/"
DROPPED = ("update/kept_share",)  # keys of version 0.1.0 that nothing depends on


def check_origin(theirs: Any, mine: dict[str, Any]) -> None:
    """Refuse a state that another method, or a model with other weights, made."""
    if not isinstance(theirs, dict) or not all(
        isinstance(theirs.get(key), type(value)) for key, value in mine.items()
    ):
        raise ValueError(
            "`state` must carry the fingerprint of an adapter, a method and a checksum of source "
            f"weights, got {shown(theirs)}: load what state() gave."
        )
    if theirs != mine:
        mine_shown, theirs_shown = (
            f"{told(one['method'], 60)} on source weights {told(format(one['weights'], '08x'), 20)}"
            for one in (mine, theirs)
        )
        raise ValueError(
            f"`state` must come from an adapter like this one ({mine_shown}), got one of "
            f"{theirs_shown}: load it there, or pass dict(state) to copy it all the same."
        )


def extra_state(given: Any) -> tuple[Any, Any]:
    """The fingerprint and the state in what ``get_extra_state`` returned.

    Raises:
        TypeError: When it is something else.
    """
    if not isinstance(given, Mapping) or not given.keys() >= {"fingerprint", "state"}:
        raise TypeError(
            f"`state` must be what get_extra_state() gave, got {shown(given)}: load what "
            "state_dict() of an adapter gave."
        )
    return given["fingerprint"], given["state"]


def check_state(
    state: dict[str, Tensor],
    moving: dict[str, Tensor],
    resizable: Collection[str] = (),
    lazy: Collection[str] = (),
    undefined: Collection[str] | None = (),
    ranges: Mapping[str, tuple[int, int]] | None = None,
    images: Collection[str] = (),
) -> None:
    """Refuse a state that does not fit what moves.

    Args:
        state: The tensors to copy, of a full or partial state.
        moving: Everything that moves.
        resizable: Keys whose first axis may have any length; those of one component must all be
            there, with equal lengths.
        lazy: Keys whose axes after the first, or whose only one, may have any length while the
            tensor is empty.
        undefined: Keys in which NaN means that there is no value yet; None allows any value
            anywhere.
        ranges: Smallest and largest value of integers; those not named are at least 0.
        images: Keys of tensors that may be uint8 or float32, whatever they are now.
    """
    for key, value in state.items():
        if key not in moving:
            raise ValueError(
                f"`state` must come from an adapter like this one, got the key {shown(key, 60)}: "
                + nearest(key, _neighbours(moving, key), room=60)
            )
        fixed = slice(1, None) if key in resizable else slice(None)
        if key in lazy and isinstance(value, Tensor):
            empty = 0 in (moving[key].numel(), value.numel())
            # A list of numbers, which has one axis, may have any length itself.
            fixed = slice(0, min(value.ndim, moving[key].ndim, 2) - 1) if empty else slice(None)
        mine = moving[key]
        if key in images and isinstance(value, Tensor) and value.dtype in IMAGES:
            mine = mine.to(value.dtype)
        _check_tensor(key, value, mine, fixed)
        if key == "rng":
            continue
        if _kind(value) == "whole":
            low, high = (ranges or {}).get(key, (0, LARGEST))
            if not key.startswith(OF_THE_MODEL):
                _check_range(key, value, low, high)
        elif undefined is not None:
            _check_finite(key, value.to(mine.dtype), nan=key in undefined)
    slots = ("update/", "output/")
    for slot in (*slots, *(f"guard/healthy.{slot}" for slot in slots)):
        keys = [k for k in resizable if k.startswith(slot)]
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
            f"`state`[{shown(key)}] must be a tensor of shape {tuple(mine.shape)}, got "
            f"{type(value).__name__}: load what state() gave."
        )
    dense(f"state[{told(key)}]", value)
    expected, got = tuple(mine.shape), tuple(value.shape)
    if got[fixed] != expected[fixed]:
        raise ValueError(
            f"`state`[{shown(key)}] must have shape {expected}, got {got}: load a state made with "
            "the "
            "same model and method."
        )
    if _kind(value) != _kind(mine):
        raise ValueError(
            f"`state`[{shown(key)}] must be {mine.dtype} or convert to it, got {value.dtype}: "
            "load a "
            "state made with the same model and method."
        )


def _check_range(key: str, value: Tensor, low: int, high: int) -> None:
    if value.numel() == 0:
        return
    least, most = (int(v) for v in value.aminmax())
    if least < low or most > high:
        upto = f" and at most {high}" if high < LARGEST else ""
        raise ValueError(
            f"`state`[{shown(key)}] must be at least {low}{upto}, got values from {least} to "
            f"{most}: "
            "load what state() gave."
        )


def _check_finite(key: str, value: Tensor, nan: bool) -> None:
    wrong = value.isinf() if nan else ~value.isfinite()
    if bool(wrong.any()):
        raise ValueError(
            f"`state`[{shown(key)}] must be finite, got NaN or infinite values: load what state() "
            "gave, "
            "or pass allow_nonfinite=True."
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


def current_name(key: str) -> str | None:
    """The name that a key has in a state now; None where it has none any more.

    Methods with a teacher call the trained parameters the student.
    """
    if key in DROPPED:
        return None
    student = "update/student."
    return f"param/{key[len(student) :]}" if key.startswith(student) else key


@torch.no_grad()
def copy_tensors(targets: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Copy every one of ``values`` into the target of the same name, in place."""
    if values:
        foreach: Any = torch  # not in its type stubs
        foreach._foreach_copy_([targets[key] for key in values], list(values.values()))


def _neighbours(moving: dict[str, Tensor], key: str) -> list[str]:
    """The keys to list for a wrong one: those of its group, else the names of the groups."""
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


def compact_copies(moving: Mapping[str, Tensor], held: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Make read-only copies, which take no memory for values that are held already.

    Where all of a model is trained, its parameters, a teacher's and Adam's two moments are as large
    as four models; at wrap the first two usually equal the caller's weights and the others are
    zeros.

    Args:
        moving: Tensors by the names of a state.
        held: Copies by the names of parameters.

    Returns:
        Tensors with the bits of ``moving``: one of ``held``, an expanded zero, or a clone.
    """
    return {key: _compact_copy(key, value.detach(), held) for key, value in moving.items()}


def _compact_copy(key: str, value: Tensor, held: Mapping[str, Tensor]) -> Tensor:
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
    """The bytes of a tensor, in which NaN equals itself and -0 differs from 0."""
    return value.reshape(-1).view(torch.uint8)
