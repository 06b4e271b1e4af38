"""Logits in what a model returns, and what it returns with other logits in their place."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tta.core.checks import shown, told

__all__ = ["GIVEN", "LogitsReader", "LogitsSpec", "joined", "last_rows", "some_rows"]

LogitsSpec = str | int | Callable[[Any], Tensor] | None
DEFAULT_NAME = "logits"  # the name in most libraries
GIVEN = "given"  # stands in a config for a function or a module
NESTED = 8  # deepest tensors of what a model returns; a list may hold itself


class LogitsReader:
    """Takes logits (B, C) out of what a model returns, and puts others back.

    Args:
        spec: A key or an attribute, an index, or a function of what is returned. None for a tensor,
            and for anything with ``logits`` as a key or an attribute.
    """

    def __init__(self, spec: LogitsSpec = None) -> None:
        ok = spec is None or isinstance(spec, (str, int)) or callable(spec)
        if not ok or isinstance(spec, bool):
            raise TypeError(
                f"`logits` must be a key, an index or a function, got {shown(spec)}: say how to "
                "take "
                "the logits out of what the model returns."
            )
        self.spec = spec

    def read(self, result: Any) -> Tensor:
        """The logits in what the model returned.

        Raises:
            TypeError: When there is no tensor at that place.
        """
        if self.spec is None:
            found = result if isinstance(result, Tensor) else _item(result, DEFAULT_NAME)
        elif isinstance(self.spec, (str, int)):
            found = _item(result, self.spec)
        else:
            found = self.spec(result)
        if isinstance(found, Tensor):
            return found
        if self.spec is None:
            example = _first_tensor(result)
            raise TypeError(
                "`model` must return a tensor of logits, or something with `logits` in it, got "
                f"{type(result).__name__}{_contents(result)}: say where its logits are, such as "
                f"wrap(..., logits={shown(example)})."
            )
        raise TypeError(
            f"`logits`={shown(self.spec)} must lead to a tensor in what the model returns, got "
            f"{type(found).__name__} in {type(result).__name__}{_contents(result)}: correct it."
        )

    def replace(self, result: Any, logits: Tensor, rows: Tensor | None = None) -> Any:
        """What the model returned, with other logits and nothing that carries a gradient.

        Args:
            result: What the model returned.
            logits: (B, C) in place of those in it.
            rows: Mask (B,) of the images that the model saw; None for all. A tensor with one row
                for each of these is spread over all rows, and filled with NaN, or with 0 if it is
                not floating point.

        Returns:
            The same structure. Where a function makes the logits of what lies there, their place is
            not known, and the logits alone are returned.
        """
        if isinstance(result, Tensor):
            return logits
        place, own = self._place(result)
        found = []

        def change(value: Tensor) -> Tensor:
            if value is own:
                found.append(value)
                return logits
            return _without_gradient(value, rows)

        keys = [key for key in _keys(result) if key != place]
        values = {key: _changed(_item(result, key), change, 1) for key in keys}
        if place is not None:
            return _with_items(result, values | {place: logits})
        return _with_items(result, values) if found else logits

    def _place(self, result: Any) -> tuple[Any, Any]:
        """The key of the logits, or else the tensor that they are, wherever it lies."""
        if callable(self.spec):
            return None, self.spec(result)
        place, keys = DEFAULT_NAME if self.spec is None else self.spec, _keys(result)
        if isinstance(place, int) and place < 0:
            place += len(keys)
        if place not in keys and not hasattr(type(result), "_fields"):  # as of a property
            own = _item(result, place)
            place = next((key for key in keys if _item(result, key) is own), place)
        return place, None


def joined(results: Sequence[Any], rows: Sequence[int] | None = None, deep: int = 0) -> Any:
    """What a model returned for parts of a batch, as for one batch.

    Tensors with a row for each image are joined along it; whatever else there is stays that of the
    last, and so does what lies deeper than ``NESTED``.

    Args:
        results: What it returned for each part.
        rows: Images of each part; None for one each.
        deep: How deep they lie in what the model returned.
    """
    rows = [1] * len(results) if rows is None else rows
    last = results[-1]
    keys = [] if isinstance(last, Tensor) else _keys(last)
    values = {key: _joined([_item(r, key) for r in results], rows, deep + 1) for key in keys}
    return _with_items(last, values) if keys else _joined(results, rows, deep + 1)


def last_rows(result: Any, rows: int, count: int) -> Any:
    """What a model returned for ``rows`` images, as for the last ``count`` of these."""
    return result if count == rows else some_rows(result, rows, lambda t: t[-count:])


def some_rows(result: Any, rows: int, choose: Callable[[Tensor], Tensor]) -> Any:
    """What a model returned for ``rows`` images, as for some of these."""

    def change(value: Tensor) -> Tensor:
        return choose(value) if value.ndim > 0 and len(value) == rows else value

    return _changed(result, change)


def _joined(values: Sequence[Any], rows: Sequence[int], deep: int) -> Any:
    last = values[-1]
    if _is_nest(last):
        return joined(values, rows, deep) if deep < NESTED else last
    pairs = zip(values, rows, strict=True)
    if all(isinstance(v, Tensor) and v.ndim > 0 and len(v) == n for v, n in pairs):
        return torch.cat(list(values))
    return last


def _changed(value: Any, change: Callable[[Tensor], Tensor], deep: int = 0) -> Any:
    """What a model returned, with a function of each tensor in it; what holds none is kept."""
    if isinstance(value, Tensor):
        return change(value)
    if not _is_nest(value) or deep >= NESTED:
        return value
    items = {key: _item(value, key) for key in _keys(value)}
    values = {key: _changed(item, change, deep + 1) for key, item in items.items()}
    return value if all(values[k] is items[k] for k in items) else _with_items(value, values)


def _is_nest(value: Any) -> bool:
    """Whether it is there to hold what a model returns; no module, function or class is."""
    return not (isinstance(value, (Tensor, nn.Module, type)) or callable(value)) and (
        isinstance(value, (Mapping, tuple, list)) or bool(_keys(value))
    )


def _item(result: Any, key: str | int) -> Any:
    """An item by key, index or attribute; None where there is none."""
    try:
        if isinstance(result, Mapping) or isinstance(key, int):
            return result[key]
    except (KeyError, IndexError, TypeError):
        return None
    return getattr(result, str(key), None)


def _keys(result: Any) -> list[Any]:
    """Keys, indices or attributes of what a model returned."""
    if isinstance(result, Mapping):
        return list(result)
    if isinstance(result, (tuple, list)):
        return list(range(len(result)))
    slots = [name for kind in type(result).__mro__ for name in _slots(kind)]
    return [*getattr(result, "__dict__", {}), *(name for name in slots if hasattr(result, name))]


def _slots(kind: type) -> Sequence[str]:
    names = kind.__dict__.get("__slots__", ())
    return [names] if isinstance(names, str) else [n for n in names if not n.startswith("__")]


def _with_items(result: Any, values: dict[Any, Any]) -> Any:
    if isinstance(result, (tuple, list)):
        items = [values.get(i, item) for i, item in enumerate(result)]
        for i, name in enumerate(getattr(result, "_fields", ())):
            items[i] = values.get(name, items[i])
        return type(result)(*items) if hasattr(result, "_fields") else type(result)(items)
    if isinstance(result, Mapping):
        try:
            changed: Any = copy.copy(result)
            for key, value in values.items():
                changed[key] = value
        except TypeError:  # a mapping that cannot be written to
            return _made_of(type(result), values)
        return changed
    other = copy.copy(result)
    # A dataclass may be frozen, and need not be made by its fields alone, as replace() would do it.
    put = object.__setattr__ if dataclasses.is_dataclass(result) else setattr
    for key, value in values.items():
        try:
            put(other, key, value)
        except AttributeError:
            raise TypeError(
                f"`model` must return logits that can be replaced, got a {type(result).__name__} "
                f"with {shown(key)} that cannot be set: wrap a module that returns the logits "
                "alone."
            ) from None
    return other


def _made_of(kind: Any, values: dict[Any, Any]) -> Any:
    """A mapping of a kind that cannot be written to, or the dict where it is not made of one."""
    try:
        made = kind(values)
        same = isinstance(made, Mapping) and dict(made) == values
    except Exception:  # whatever the caller's class raises, also where tensors are compared
        return values
    return made if same else values


def _without_gradient(value: Tensor, rows: Tensor | None) -> Tensor:
    """Detach a tensor, and spread what has a row per image over all rows."""
    value = value.detach() if value.requires_grad else value
    if rows is None or value.ndim == 0 or len(value) != int(rows.sum()):
        return value
    filler = float("nan") if value.is_floating_point() else 0
    spread = torch.full((len(rows), *value.shape[1:]), filler, dtype=value.dtype).to(value.device)
    spread[rows.to(value.device)] = value
    return spread


def _contents(result: Any) -> str:
    keys = [shown(key, 20) for key in _keys(result)[:8]]
    return f" with {told(', '.join(keys))}" if keys else ""


def _first_tensor(result: Any) -> Any:
    """The place of the first tensor of two axes, as an example; 0 where there is none."""
    keys = _keys(result)
    fitting = [k for k in keys if isinstance(v := _item(result, k), Tensor) and v.ndim == 2]
    return next(iter(fitting or keys), 0)
