"""Python values as JSON and tensors, and back: what attributes of components hold in a file.

Nothing is pickled. Plain data are None, numbers, strings, tensors, reports, parameters that have a
name, and lists, tuples, sets, deques and dicts of such.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from tta.core.checks import shown
from tta.core.prediction import Report

__all__ = ["PlainReader", "PlainWriter", "is_plain"]

SEQUENCES: dict[str, type] = {"list": list, "tuple": tuple, "set": set, "deque": deque}


class PlainWriter:
    """Writes values.

    Args:
        parameters: Those that may occur, by name; a file holds their names.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self.names = {id(p): name for name, p in parameters.items()}
        self.tensors: list[Tensor] = []  # that were met

    def write(self, value: Any) -> Any:
        """What JSON can hold.

        Raises:
            TypeError: When the value is no plain data.
        """
        kind = type(value)
        if value is None or kind in (bool, int, str) or (kind is float and math.isfinite(value)):
            return value
        if kind is float:
            return {"float": repr(value)}
        if isinstance(value, nn.Parameter) and id(value) in self.names:
            return {"parameter": self.names[id(value)]}
        if kind is Tensor:
            self.tensors.append(value.detach())
            return {"tensor": len(self.tensors) - 1}
        for name, cls in SEQUENCES.items():
            if kind is cls:
                items = {name: [self.write(item) for item in value]}
                return items | {"maxlen": value.maxlen} if isinstance(value, deque) else items
        if isinstance(value, dict) and kind in (dict, Report):
            name = "report" if kind is Report else "dict"
            return {name: [[self.write(k), self.write(v)] for k, v in dict.items(value)]}
        raise TypeError(f"a {kind.__name__}")


class PlainReader:
    """Reads what a :class:`PlainWriter` wrote.

    Args:
        parameters: By name.
        tensors: Those that were met in writing.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], tensors: list[Tensor]) -> None:
        self.parameters = parameters
        self.tensors = tensors

    def read(self, value: Any) -> Any:
        """The value.

        Raises:
            ValueError: When this is none of a writer's.
        """
        try:
            return self._read(value)
        except (
            KeyError,
            IndexError,
            TypeError,
            AttributeError,
            RecursionError,
            StopIteration,
        ) as error:
            raise ValueError(f"no plain data: {error}") from None

    def _read(self, value: Any) -> Any:
        if not isinstance(value, dict):
            if value is None or isinstance(value, (bool, int, float, str)):
                return value
            raise ValueError(f"no plain data: a {type(value).__name__}")
        name, content = next(iter(value.items()))
        if name == "float":
            return float(content)
        if name == "parameter":
            return self.parameters[content]
        if name == "tensor":
            return self.tensors[content]
        if name == "deque":
            return deque(map(self._read, content), maxlen=value["maxlen"])
        if name in SEQUENCES:
            return SEQUENCES[name](map(self._read, content))
        if name in ("dict", "report"):
            found = {self._read(k): self._read(v) for k, v in content}
            return Report(found) if name == "report" else found
        raise ValueError(f"no plain data: {shown(name)}")


def is_plain(value: Any, parameters: Mapping[str, nn.Parameter]) -> bool:
    """Whether a writer can write it."""
    try:
        PlainWriter(parameters).write(value)
    except TypeError:
        return False
    return True
