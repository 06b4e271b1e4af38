"""What a run does, as data: every figure that decides its results."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

__all__ = ["DEMO_METHODS", "RunConfig", "StreamConfig"]

DEMO_METHODS = (
    "source", "bn", "alpha_bn", "tent", "eata", "unmix_tns", "lame", "unmix_tns+eata",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class StreamConfig:
    """One stream.

    Args:
        name: For tables and file names.
        scenario: One of `tta.streams.list_scenarios()`.
        domains: Corruptions or stored domains, in stream order; empty for all there are.
        severity: 1 to 5.
        images: Images of each domain, as many of each class; None for all.
        batch_size: Images per batch; None for the run's.
        options: Further arguments of `tta.streams.build`, such as `delta`.
    """

    name: str
    scenario: str
    domains: tuple[str, ...]
    severity: int = 5
    images: int | None = None
    batch_size: int | None = None
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def severities(self) -> tuple[float, ...]:
        """All severities that the stream can ask for."""
        if self.scenario != "gradual":
            return (self.severity,)
        levels = [*self.options.get("severities", (1, 2, 3, 4, 5))]
        return tuple(sorted({*levels, *(self.options.get("first_severities") or ())}))


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One run: every method on every stream.

    Args:
        name: Ends the name of the run's folder.
        model: A name for `models.load`.
        data: "bundled" or a path, see `experiments.data.open_data`.
        clean: Path of the clean images where `data` holds only shifted ones; None for none.
        source: File of source artefacts; None for those that come with the model.
        methods: Method strings, see `experiments.methods`.
        streams: What they are run on, in turn.
        batch_size: Of streams that have no other; learning rates are scaled for it.
        seed: Of corruptions, streams and adapters.
        device: "cpu", "cuda" or the like.
    """

    name: str
    model: str
    data: str
    clean: str | None
    source: str | None
    methods: tuple[str, ...]
    streams: tuple[StreamConfig, ...]
    batch_size: int
    seed: int
    device: str

    def to_dict(self) -> dict[str, Any]:
        """Nested JSON types."""
        return dataclasses.asdict(self)
