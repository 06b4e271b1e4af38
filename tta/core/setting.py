"""How passes run on a device, which changes their speed and no method."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tta.core.checks import boolean, mapping, nearest, one_of, told, whole_number

__all__ = ["COMPILE_MODES", "MEMORY_FORMATS", "PRECISIONS", "Setting"]

MEMORY_FORMATS = ("contiguous", "channels_last")
PRECISIONS = ("float32", "bfloat16", "float16")
COMPILE_MODES = ("default", "reduce-overhead", "max-autotune")
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class Setting:
    """How the passes of an adapter run; :func:`tta.tune` finds one, ``wrap(setting=)`` takes it.

    The last three fields say what was measured, and change nothing.

    Raises:
        TypeError: When a field is of the wrong kind.
        ValueError: When a field has a value that it cannot have.
    """

    memory_format: str = "contiguous"  # of images of four axes: or "channels_last"
    precision: str = "float32"  # as the model comes; "bfloat16" or "float16" for autocast
    threads: int | None = None  # of torch on the CPU, for the whole process; None to leave them
    compile: str | None = None  # mode of torch.compile for the model; None for no compilation
    # From wrap on and for the whole process, freed memory is kept for the next call (with glibc).
    keep_memory: bool = False
    speedup: float | None = None  # plain seconds over those of this setting
    difference: float | None = None  # largest, of logits from the plain ones over a short stream
    agreement: float | None = None  # share of equal decisions over that stream, 0 to 1

    def __post_init__(self) -> None:
        one_of("memory_format", self.memory_format, MEMORY_FORMATS)
        one_of("precision", self.precision, PRECISIONS)
        if self.threads is not None:
            threads = whole_number("threads", self.threads, 1, 1024)
            object.__setattr__(self, "threads", threads)
        if self.compile is not None:
            one_of("compile", self.compile, COMPILE_MODES)
        boolean("keep_memory", self.keep_memory)
        for name in ("speedup", "difference", "agreement"):
            value = getattr(self, name)
            if value is not None and (
                isinstance(value, bool) or not isinstance(value, (int, float))
            ):
                raise TypeError(
                    f"`{name}` must be a number or None, got {type(value).__name__}: leave it out."
                )

    def to_dict(self) -> dict[str, Any]:
        """Every field, as JSON types."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Setting:
        """The inverse of :meth:`to_dict`; a key that is not there keeps its default.

        Raises:
            TypeError: When ``data`` is no dict, or a value of the wrong kind.
            ValueError: For an unknown key, naming the nearest one.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        values = dict(mapping("data", "a setting", data))
        for key in values:
            if key not in known:
                raise ValueError(f"`{told(key)}` is not a key of a setting: " + nearest(key, known))
        return cls(**values)

    def images(self, x: Tensor) -> Tensor:
        """Images (B, ...) in the memory format of this setting."""
        if self.memory_format == "channels_last" and x.ndim == 4:
            return x.contiguous(memory_format=torch.channels_last)
        return x

    def logits(self, logits: Tensor, x: Tensor) -> Tensor:
        """Logits (B, C) in the precision of the images ``x``, as without this setting.

        Half precision is how passes run, and no reason for a caller to get another dtype.
        """
        if self.precision == "float32" or not x.is_floating_point():
            return logits
        return logits.to(x.dtype)

    @contextmanager
    def running(self, device: str) -> Iterator[None]:
        """Within the block, passes on this kind of device run with this precision and threads."""
        before = torch.get_num_threads()
        if self.threads is not None and self.threads != before:
            torch.set_num_threads(self.threads)
        dtype = DTYPES.get(self.precision)
        try:
            if dtype is None:
                yield
            else:
                with torch.autocast(device, dtype):
                    yield
        finally:
            if torch.get_num_threads() != before:
                torch.set_num_threads(before)
