"""What a forward pass gives, and the figures of a batch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from tta.core.checks import shown

__all__ = ["Prediction", "Report"]


@dataclass
class Prediction:
    """What a forward pass gives: logits (B, C), and features (B, D) if a component needs them."""

    logits: Tensor
    features: Tensor | None = None


class Report(dict[str, Any]):
    """Figures of the last batch, readable as keys or as attributes.

    Always there: ``seen`` (images in the batch), ``rejected`` (of these, those with pixels that are
    not finite or features that overflow), ``selected`` (samples in the loss), ``loss``,
    ``stepped``, ``resets`` (total since wrap or reset). Methods that learn from some samples have
    ``kept`` (B,) bool too: which ones ``selected`` counts. 0-dimensional tensors become Python
    numbers on reading, whichever way, so that writing a report never waits for a GPU.
    """

    def __iter__(self) -> Iterator[str]:
        # With `__iter__` defined here, `dict(report)` and `{**report}` read values by
        # `__getitem__`.
        return super().__iter__()

    def __repr__(self) -> str:
        return repr(dict(self))

    def __getitem__(self, key: str) -> Any:
        value = super().__getitem__(key)
        return value.item() if isinstance(value, Tensor) and value.ndim == 0 else value

    def __getattr__(self, key: str) -> Any:
        try:
            return self[key]
        except KeyError:
            raise AttributeError(
                f"no figure {shown(key)} in this report: {', '.join(self)}"
            ) from None

    def get(self, key: str, default: Any = None) -> Any:
        """As ``dict.get``, with tensors read as numbers."""
        return self[key] if key in self else default  # noqa: SIM401

    def items(self) -> Any:
        """As ``dict.items``, with tensors read as numbers."""
        return [(key, self[key]) for key in self]

    def values(self) -> Any:
        """As ``dict.values``, with tensors read as numbers."""
        return [self[key] for key in self]

    def copy(self) -> Report:
        """As ``dict.copy``, still a report."""
        return Report(self.raw())

    def raw(self) -> dict[str, Any]:
        """What was written, tensors included; does not wait for a GPU."""
        return dict(dict.items(self))
