"""Give components what they need from the source, at wrap or from a saved adapter."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from torch import Tensor

from tta.core.adapter import Adapter
from tta.core.backbone import Backbone
from tta.core.checks import told
from tta.core.image_checks import ImagesRefusedError, KindRefusedError
from tta.core.norm_layers import normalize_by_source, with_statistics
from tta.core.source import SourceStatistics
from tta.core.source_checks import checked
from tta.core.update import Update

__all__ = ["fit", "load_constants"]


def fit(adapter: Adapter, source: SourceStatistics) -> None:
    """Give the components what they need from the source, and note in the config what that was.

    Args:
        adapter: The adapter, before it serves.
        source: As the caller gave it.

    Raises:
        ValueError: When something is missing or does not fit the model.
    """
    network, wrappers = adapter.network, adapter.norm_layers.values()
    source = _checked(adapter, network, source)
    before = {key: v for key, v in adapter.state().items() if key.startswith("norm/")}
    try:
        for part in (adapter.input, adapter.output, adapter.update, adapter.guard):
            if isinstance(part, Update):
                part.fit(source)
            elif part is not None:
                with with_statistics(wrappers, normalize_by_source):
                    part.fit(source, network)
    except (ImagesRefusedError, KindRefusedError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(
            "`source` must give pairs (images, labels), but a batch has images that this model "
            f"cannot take: {told(error)}"
        ) from error
    # Source passes go through the norm rule and the model's own buffers, and must leave no trace.
    adapter.load_state(before, allow_nonfinite=True)
    network.buffers.put_back_all()
    for wrapper in wrappers:
        wrapper.rule.fell_back = False  # source batches may have been short
    used = [part.source_used for part in adapter.parts.values()]
    words = "; ".join(text for text in used if text) or None
    adapter.config = dataclasses.replace(adapter.config, source=words)


def load_constants(
    adapter: Adapter, source: SourceStatistics, constants: Mapping[str, Tensor]
) -> None:
    """Give the components the constants that were saved.

    Args:
        adapter: The adapter, before it serves.
        source: For methods that go on reading source batches.
        constants: The constants, by the names of :meth:`tta.Adapter.constants`.

    Raises:
        ValueError: When constants are missing or do not fit the model.
    """
    for slot, part in adapter.parts.items():
        prefix = f"{slot}/"
        mine = {k[len(prefix) :]: v for k, v in constants.items() if k.startswith(prefix)}
        try:
            part.load_constants(mine)
            missing = min(set(part.constants()) - set(mine), default=None)
            reason = f"{missing!r} is missing"
        except (KeyError, RuntimeError) as error:
            missing, reason = "", str(error)
        if missing is not None:
            raise ValueError(
                f"`folder` must hold the constants of {part.name} for this model, but does not "
                f"({reason}): another version may have saved it; do so again with this one."
            )
    source = _checked(adapter, adapter.network, source)
    for part in adapter.parts.values():
        part.attach(source)


def _checked(adapter: Adapter, network: Backbone, source: SourceStatistics) -> SourceStatistics:
    """Return the same source, with batches that are checked as they are read."""
    parts = adapter.parts.values()
    if source.batches is None or not parts:
        return source
    classes = adapter.num_classes if any(part.uses_labels for part in parts) else None
    # A guard's estimate of accuracy is worse without labels, and nothing else of it needs them.
    optional = not any(part.uses_labels for part in parts if part is not adapter.guard)
    batches = checked(source.batches, network.check, classes, optional)
    return dataclasses.replace(source, batches=batches)
