"""Weights from a file, made to fit a model: containers, prefixes, extra keys, other names."""

from __future__ import annotations

import argparse
import pickle
import re
import textwrap
from collections import Counter
from collections.abc import Iterator, Mapping
from datetime import date, datetime, time, timedelta, timezone
from pathlib import Path, PosixPath, PurePosixPath, PureWindowsPath
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from tta.core.checks import shown
from tta.core.warn import warn

__all__ = ["Weights", "fill", "fit", "read_checkpoint", "rows_of"]

Weights = Mapping[str, Tensor]

# Keys under which training scripts store weights, in order of preference: averaged ones first, as
# timm does. Other keys come last.
_PLACES = ("state_dict_ema", "model_ema", "ema", "state_dict", "model_state_dict", "model", "net")
_DEPTH = 3  # how deep containers in containers are searched
# What torch's wrappers of modules put into the names of weights.
_WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
# Buffers of profilers and of weight averaging.
_EXTRAS = ("total_ops", "total_params", "n_averaged")
_COUNTER = "num_batches_tracked"
_SHOWN = 3  # names in an error


class _Fit(NamedTuple):
    """Weights under a model's names, and why they do not fit it."""

    named: dict[str, Tensor]
    missing: list[str]
    unexpected: list[str]
    other_shape: list[str]

    @property
    def faults(self) -> int:
        return len(self.missing) + len(self.unexpected) + len(self.other_shape)


def read_checkpoint(path: Path) -> list[Weights]:
    """Read all dictionaries of tensors in a file, most likely ones first.

    Besides tensors and plain values, only settings (`argparse.Namespace`), paths, times and
    numpy's numbers and arrays are loaded, which training scripts store and which run no code.

    Args:
        path: A ``.safetensors`` file, or one that `torch.save` wrote.

    Raises:
        FileNotFoundError: When the file is not there.
        ValueError: When it holds no tensors by name, or objects that are not loaded.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"`checkpoint` must be a file, but {path} is not there: pass a .safetensors or "
            ".pt file."
        )
    try:
        if _is_safetensors(path):
            return [load_file(str(path))]
        with torch.serialization.safe_globals(_harmless()), path.open("rb") as file:
            content: Any = torch.load(file, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # junk makes an unpickler raise anything
        refused = re.search(r"GLOBAL (\S+)", str(error))
        odd = isinstance(error, pickle.UnpicklingError) or not str(error)
        reason = "it holds no plain tensors" if odd else textwrap.shorten(str(error), 200)
        if refused:
            reason = f"it holds no plain tensors but a {refused[1]}, which could run code"
        raise _no_checkpoint(path, reason) from None
    if not isinstance(content, Mapping):
        raise _no_checkpoint(path, f"it holds a {type(content).__name__}")
    found = list(_states(content, _DEPTH))
    if not found:
        raise _no_checkpoint(path, "it holds no tensors")
    return found


def _is_safetensors(path: Path) -> bool:
    """Whether a file begins as such files do, whatever it is called."""
    with path.open("rb") as file:
        start = file.read(9)
    named = path.suffix == ".safetensors"
    return start[8:] == b"{" or (named and not start.startswith((b"PK", b"\x80")))


def _harmless() -> list[Any]:
    """Types of training scripts' settings, paths, times and numbers.

    Those of numpy and of paths are found under the names of old and new versions.
    """
    numbers = {type(np.dtype(code)) for code in "?bhilqBHILQefd"}
    arrays = {
        "scalar": np.float64(0).__reduce__()[0],
        "_reconstruct": np.zeros(1).__reduce__()[0],  # type: ignore[index]
    }
    found: list[Any] = [argparse.Namespace, SimpleNamespace, np.dtype, np.ndarray, *numbers]
    found += [datetime, date, time, timedelta, timezone]
    for module in ("numpy.core.multiarray", "numpy._core.multiarray"):
        found += [(function, f"{module}.{name}") for name, function in arrays.items()]
    for kind in (PosixPath, PurePosixPath, PureWindowsPath):
        found += [(kind, f"{module}.{kind.__name__}") for module in ("pathlib", "pathlib._local")]
    return [*found, (PureWindowsPath, "pathlib.WindowsPath")]


def _no_checkpoint(path: Path, reason: str) -> ValueError:
    return ValueError(
        f"`checkpoint` must be a .safetensors or .pt file with a state dict, but {path} is not "
        f"({reason}): save one with torch.save(model.state_dict(), path)."
    )


def _states(content: Mapping[Any, Any], depth: int) -> Iterator[Weights]:
    """Find dictionaries of tensors in a container; the container itself comes last."""
    inner = {str(k): v for k, v in content.items() if isinstance(v, Mapping)}
    if depth:
        for place in sorted(inner, key=_preference):
            yield from _states(inner[place], depth - 1)
    tensors = {
        str(k): _tensor(v) for k, v in content.items() if isinstance(v, (Tensor, np.ndarray))
    }
    tensors = {key: tensor for key, tensor in tensors.items() if tensor is not None}
    if tensors:
        yield tensors


def _preference(place: str) -> tuple[bool, int]:
    return re.search(r"(^|_)ema($|_)", place) is None, (*_PLACES, place).index(place)


def _tensor(value: Tensor | np.ndarray) -> Tensor | None:
    """A tensor as it is, or one of an array of numbers; None for other arrays."""
    if isinstance(value, Tensor):
        return value
    return torch.from_numpy(value) if value.dtype.kind in "fiub" else None


def fit(
    found: list[Weights], expected: Weights, by_order: bool, model: str, path: Path
) -> dict[str, Tensor]:
    """The weights of a checkpoint under a model's names.

    Args:
        found: See `read_checkpoint`.
        expected: The model's state dict.
        by_order: Pair tensors by their order, whatever their names are; all shapes must be equal.
        model: What errors call the model.
        path: What errors call the file.

    Raises:
        ValueError: When no dictionary of the file fits; the nearest one is described.
    """
    if by_order:
        return _fit_by_order(found, expected, model, path)
    best = _best(found, expected)
    if not best.faults:
        return {key: value for key, value in best.named.items() if key in expected}
    advice = "pass the name of the architecture it was made with"
    if not _is_safetensors(path) and any(_pairs(state, expected)[1] == "" for state in found):
        advice += ', or match="order" since all shapes match in order'
    raise ValueError(
        f"`checkpoint` must hold a state dict of {model}, but {path} does not fit "
        f"({_described(best)}): {advice}."
    )


def fill(
    model: nn.Module, found: list[Weights], name: str, path: Path, by_order: bool = False
) -> int:
    """Load weights that fit.

    Args:
        model: What takes them.
        found: See `read_checkpoint`.
        name: What errors call the model.
        path: What errors call the file.
        by_order: As for `fit`; a warning asks to check the accuracy then.

    Returns:
        How many tensors these were.

    Raises:
        ValueError: When they do not fit.
    """
    expected = model.state_dict()
    state = fit(found, expected, by_order, name, path)
    for key, tensor in state.items():
        if tensor.is_quantized or tensor.layout != torch.strided:
            kind = "quantised" if tensor.is_quantized else "sparse"
            raise ValueError(
                f"`checkpoint` must hold dense tensors, but {shown(key)} of {path} is {kind}: "
                "save it after dequantize() or to_dense()."
            )
        if tensor.is_floating_point() and bool(tensor.isnan().any()):
            warn(
                f"`checkpoint` must hold finite weights, but {shown(key)} of {path} has NaN, as of "
                "a training run that diverged: take an earlier file."
            )
    model.load_state_dict(expected | state)  # old files lack counters of batches
    if by_order:
        warn(
            f'match="order": all {len(state)} tensors of {path} have the shapes of {name} in '
            "order; check the accuracy, since tensors of one shape may have changed places"
        )
    return len(state)


def rows_of(key: str, found: list[Weights], expected: Weights, by_order: bool) -> int | None:
    """First size of the tensor that a checkpoint has for one of a model's names; None if none."""
    if by_order:
        aligned = (dict(_aligned(state, expected)[0]) for state in found)
        candidates = [(state[key][1]) for state in aligned if key in state]
    else:
        named = _best(found, expected).named
        candidates = [named[key]] if key in named else []
    return next((int(value.shape[0]) for value in candidates if value.ndim), None)


def _best(found: list[Weights], expected: Weights) -> _Fit:
    return min((_fit_names(state, expected) for state in found), key=lambda fit: fit.faults)


def _fit_names(state: Weights, expected: Weights) -> _Fit:
    named = {_unwrapped(key, expected): value for key, value in state.items()}
    prefix = _prefix(named, expected)
    # Names without the prefix belong to what is stored besides the model: losses, metrics,
    # teachers.
    named = {k.removeprefix(prefix): v for k, v in named.items() if k.startswith(prefix)}
    unexpected, other_shape = [], []
    for key, value in named.items():
        if key not in expected:
            if key.rpartition(".")[2] not in _EXTRAS:
                unexpected.append(key)
        elif value.shape != expected[key].shape:
            other_shape.append(
                f"{key} is {tuple(value.shape)} in place of {tuple(expected[key].shape)}"
            )
    # Files from before torch 0.4.1 have no counters.
    missing = [k for k in expected if k not in named and not k.endswith(_COUNTER)]
    return _Fit(named, missing, unexpected, other_shape)


def _unwrapped(key: str, expected: Weights) -> str:
    if key not in expected:
        for wrapper in _WRAPPERS:
            key = key.replace(wrapper, "")
    return key


def _prefix(named: Weights, expected: Weights) -> str:
    """What stands before most of the model's names: "", "module.", "model.", "student.net."."""
    counts: Counter[str] = Counter({"": 0})
    for key in named:
        start = 0
        while True:
            if key[start:] in expected:
                counts[key[:start]] += 1
            start = key.find(".", start) + 1
            if not start:
                break
    return counts.most_common(1)[0][0]


def _described(found: _Fit) -> str:
    parts = []
    for words, names in (
        ("missing", found.missing),
        ("unexpected", found.unexpected),
        ("of another shape", found.other_shape),
    ):
        if names:
            more = ", ..." if len(names) > _SHOWN else ""
            parts.append(f"{len(names)} {words}: {', '.join(names[:_SHOWN])}{more}")
    return textwrap.shorten("; ".join(parts), 400, placeholder=" ...")


def _fit_by_order(
    found: list[Weights], expected: Weights, model: str, path: Path
) -> dict[str, Tensor]:
    if _is_safetensors(path):
        raise ValueError(
            f'`match="order"` must have a file that keeps the order of its tensors, but {path} '
            "does not: pass one that torch.save wrote."
        )
    best, reasons = 0, []
    for state in found:
        pairs, reason = _pairs(state, expected)
        if not reason:
            return pairs
        reasons.append((len(pairs), reason))
    best, reason = max(reasons, key=lambda item: item[0])
    raise ValueError(
        f'`checkpoint` must hold tensors in the order of {model} for `match="order"`, but of '
        f"{len(expected)} tensors the first {best} match in {path} and then {reason}: pass the "
        "name of the architecture that it is a port of."
    )


def _pairs(state: Weights, expected: Weights) -> tuple[dict[str, Tensor], str]:
    """Tensors under the model's names by their order, and why they do not fit; "" if they do."""
    aligned, reason = _aligned(state, expected)
    pairs = {}
    for name, (key, value) in aligned:
        if value.shape != expected[name].shape:
            return pairs, (
                f"{key} of shape {tuple(value.shape)} stands where {name} has "
                f"{tuple(expected[name].shape)}"
            )
        pairs[name] = value
    return pairs, reason


def _aligned(state: Weights, expected: Weights) -> tuple[list[tuple[str, tuple[str, Tensor]]], str]:
    """The model's names with the names and tensors at the same place, and why lengths differ."""
    values = [item for item in state.items() if item[0].rpartition(".")[2] not in _EXTRAS]
    names = list(expected)
    if len(values) != len(names):  # other frameworks do not count batches
        values = [item for item in values if item[1].ndim or item[1].is_floating_point()]
        names = [name for name in names if not name.endswith(_COUNTER)]
    same = len(values) == len(names)
    reason = "" if same else f"it has {len(values)} tensors in place of {len(names)}"
    return list(zip(names, values, strict=False)), reason
