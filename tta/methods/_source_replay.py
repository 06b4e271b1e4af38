"""What RMT and GTTA share: labelled source batches that are read while the adapter serves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from tta.core.backbone import Backbone
from tta.core.component import Context
from tta.core.source import SourceStatistics
from tta.core.update import Update
from tta.parts.replay import Replay

__all__ = ["SourceReplay"]


class SourceReplay(Update):
    """An update that reads source batches in the order given, starting over at the end."""

    replays_source: ClassVar[bool] = True
    without_batches: ClassVar[str] = ""  # how to do without, for the message that none are there

    source_position: Tensor  # 0-dimensional: position of the next source batch

    def __init__(self, config: Any, network: Backbone, context: Context) -> None:
        super().__init__(config, network, context)
        self.replay: Replay | None = None
        self.register_buffer("source_position", torch.zeros((), dtype=torch.int64))

    @property
    def reads_source(self) -> bool:
        """Whether batches are read after wrap."""
        return True

    def attach(self, source: SourceStatistics) -> None:
        """Take the batches to replay again, if the saved adapter could not hold them."""
        if self.reads_source and self.replay is None:
            self.keep_batches(source)

    def constants(self) -> dict[str, Tensor]:
        """``source.<i>.images`` and ``.labels`` of batches that were a list, beside the buffers."""
        found = super().constants()
        if self.replay is not None and self.replay.in_memory and self.reads_source:
            for i, (images, labels) in enumerate(self.replay.batches):
                found |= {f"source.{i}.images": images, f"source.{i}.labels": labels}
        return found

    def load_constants(self, values: dict[str, Tensor]) -> None:
        """Set what :meth:`constants` returned."""
        super().load_constants({k: v for k, v in values.items() if not k.startswith("source.")})
        count = sum(k.startswith("source.") for k in values) // 2
        pairs = [(values[f"source.{i}.images"], values[f"source.{i}.labels"]) for i in range(count)]
        if pairs:
            self.replay = Replay(pairs)

    def survives_reset(self) -> tuple[str, ...]:
        """Return the position under ``official=True``, whose reset does not rewind it."""
        return ("source_position",) if self.config.official else ()

    def keep_batches(self, source: SourceStatistics) -> None:
        """Keep the batches of ``source``, or raise ``ValueError`` if there are none."""
        if source.batches is None:
            raise ValueError(
                f"`source` must give {self.name} labelled batches, got "
                f"{source.contents or 'nothing'}: pass source= batches or SourceStatistics("
                f"batches=...){self.without_batches}."
            )
        if isinstance(source.batches, Sequence) and len(source.batches) == 0:
            raise ValueError(
                f"`source` must give {self.name} at least one labelled batch, got none: pass a "
                f"list or a data loader of (images, labels){self.without_batches}."
            )
        self.replay = Replay(source.batches)

    def next_batch(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return images and labels of the next batch, on a device."""
        assert self.replay is not None
        images, labels = self.replay[int(self.source_position)]
        self.source_position += 1
        return images.to(device), labels.to(device)
