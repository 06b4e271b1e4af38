"""What a run does, as data: every figure that decides its results."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from experiments.records.file import plain
from tta.core.checks import told
from tta.streams import Scenario, get_scenario

__all__ = ["BASELINE", "DEMO_METHODS", "RunConfig", "StreamConfig", "SweepConfig"]

BASELINE = "source"  # the method that all others are compared with: no adaptation
DEMO_METHODS = (
    BASELINE, "bn", "alpha_bn", "tent", "eata", "unmix_tns", "lame", "unmix_tns+eata",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class StreamConfig:
    """One stream.

    Args:
        name: For tables and file names.
        scenario: One of `tta.streams.list_scenarios()`.
        domains: Corruptions or stored domains, in stream order; empty for the scenario's own.
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

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> StreamConfig:
        """The stream of a configuration that `RunConfig.to_dict` wrote; see there."""
        _check_names(cls, values)
        return cls(**{**values, "domains": tuple(values["domains"])})

    @property
    def spec(self) -> Scenario:
        """The scenario, with the schedule that the options may put in place of its own."""
        return get_scenario(self.scenario).with_choices(schedule=self.options.get("schedule"))

    def size(self, default: int) -> int:
        """Images that a method sees at once, with `default` for streams that do not say."""
        fixed = self.spec.batch_size
        if fixed is not None:
            return int(self.options.get("window") or fixed)
        return default if self.batch_size is None else self.batch_size

    @property
    def severities(self) -> tuple[float, ...]:
        """All severities that the stream can ask for."""
        return self.spec.severities(self.severity, self.options)


# Of a `RunConfig`: what decides its results, but is not in the name of a result, and its default.
_USUAL = {
    "source": None, "clean": None, "classes": None, "labels": None, "on_error": "raise",
    "match": "name",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One run: every method on every stream.

    Args:
        name: Ends the name of the run's folder.
        model: A name for `models.load`.
        data: "bundled" or a path, see `experiments.data.open_data`.
        clean: Path of the clean images where `data` holds only shifted ones; None for none.
        classes: File of class folders' names in label order, a line each, where `data` has folders
            that do not say it, see `experiments.data.label_order`.
        source: File of source artefacts; None for those that come with the model.
        methods: Method strings, see `experiments.run.method_strings`.
        streams: What they are run on, in turn.
        batch_size: Of streams that have no other; learning rates are scaled for it.
        seed: Of corruptions, streams and adapters.
        device: "cpu", "cuda" or the like.
        tuned: How fields of methods were chosen, see `experiments.sweep.tune`.
        imports: Modules that register components of a user's own, imported wherever the run is.
        labels: File of the label of each picture where `data` is a folder without class folders,
            see `experiments.data.labels.read_labels`; None for none.
        on_error: What to do about pictures that cannot be read: "raise", or "skip" to leave them
            out.
        match: How a checkpoint's tensors are paired with the model's, see `models.load`.
        health: Whether methods without a guard have health figures too, see `tta.wrap`.
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
    tuned: tuple[dict[str, Any], ...] = ()
    classes: str | None = None
    imports: tuple[str, ...] = ()
    labels: str | None = None
    on_error: str = "raise"
    match: str = "name"
    health: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Nested JSON types."""
        return plain(dataclasses.asdict(self))

    @staticmethod
    def told_of(values: Mapping[str, Any]) -> dict[str, Any]:
        """What decides results besides model, data, streams, methods and seed, where it is special.

        Args:
            values: A configuration as `to_dict` wrote it, of this version or a former one.
        """
        return {
            name: values[name]
            for name, usual in _USUAL.items()
            if values.get(name, usual) not in (usual, None)
        }

    def is_that_of(self, header: dict[str, Any]) -> bool:
        """Whether a results file with that header, perhaps of a former version, is of this run."""
        try:
            return RunConfig.from_dict(header["config"]).to_dict() == self.to_dict()
        except (KeyError, TypeError, ValueError):
            return False

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RunConfig:
        """The configuration that `to_dict` wrote, of this version or a former one.

        Raises:
            ValueError: For settings that this version does not have, or others than it needs.
        """
        _check_names(cls, values)
        streams = [StreamConfig.from_dict(stream) for stream in values["streams"]]
        lists = {name: tuple(values.get(name, ())) for name in ("methods", "tuned", "imports")}
        return cls(**{**values, **lists, "streams": tuple(streams)})


@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """Runs that differ in model, stream, severity, batch size, method and seed.

    Args:
        run: What they have in common.
        models: Empty for the run's.
        severities: Empty for the streams' own; streams with severities of their own have no other.
        batch_sizes: Empty for the streams' own.
        seeds: Empty for the run's.
    """

    run: RunConfig
    models: tuple[str, ...] = ()
    severities: tuple[int, ...] = ()
    batch_sizes: tuple[int, ...] = ()
    seeds: tuple[int, ...] = ()

    def cells(self) -> list[RunConfig]:
        """One configuration for each run of one method on one stream.

        In an order in which runs of the same model and images follow each other.
        """
        cells = []
        for model, seed, stream, severity, size, method in itertools.product(
            self.models or (self.run.model,),
            self.seeds or (self.run.seed,),
            self.run.streams,
            self.severities or (None,),
            self.batch_sizes or (None,),
            self.run.methods,
        ):
            if severity is not None and not stream.spec.own_severities:
                stream = dataclasses.replace(stream, severity=severity)
            if size is not None and stream.spec.batch_size is None:
                stream = dataclasses.replace(stream, batch_size=size)
            cell = dataclasses.replace(
                self.run, model=model, seed=seed, streams=(stream,), methods=(method,)
            )
            if cell not in cells:  # severities of a stream that has its own
                cells.append(cell)
        return cells


def _check_names(kind: type[StreamConfig] | type[RunConfig], values: Mapping[str, Any]) -> None:
    """Raise for settings of another version than this one, which are unknown or missing."""
    known = {f.name: f for f in dataclasses.fields(kind)}
    strange = [name for name in values if name not in known]
    strange += [
        name
        for name, f in known.items()
        if name not in values and f.default is f.default_factory is dataclasses.MISSING
    ]
    if strange:
        raise ValueError(
            f"`config` of the results must have the settings of this version, which differ in "
            f"{told(', '.join(strange), 100)}: use the version that wrote them, or begin a new run"
        )
