"""`build` makes a stream from the name of a scenario and data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from tta.core.checks import LARGEST, boolean, mapping, number, told, whole_number
from tta.streams.arguments import fit_options, list_domains, merge_options, named_datasets
from tta.streams.building_blocks import options_of
from tta.streams.clock import Clock, as_clock
from tta.streams.draws import Draws
from tta.streams.orders import Orders
from tta.streams.plan import Plan, Segment, interleaved
from tta.streams.scenarios import Scenario, get_scenario
from tta.streams.schedules import PlannedVisit
from tta.streams.sources import Domains, Transform
from tta.streams.stream import Stream

__all__ = ["build", "from_config"]


def build(
    scenario: str,
    dataset: Any | None = None,
    domains: Sequence[Any] | Mapping[str, Any] | None = None,
    severity: float = 5,
    batch_size: int = 64,
    seed: int = 0,
    transform: Transform | None = None,
    *,
    labels: Any | None = None,
    before: Transform | None = None,
    after: Transform | None = None,
    shared_order: bool = False,
    shuffle_domains: bool = False,
    num_samples: int | None = None,
    reset: str | None = None,
    last_batch: str | None = None,
    clock: Clock | Mapping[str, Any] | None = None,
    window: int | None = None,
    schedule: str | None = None,
    select: str | None = None,
    arrange: str | None = None,
    **options: Any,
) -> Stream:
    """Make the stream of a scenario.

    Args:
        scenario: One of `list_scenarios()`.
        dataset: Anything with `__len__` and `__getitem__ -> (image, label)`, where items may also
            be dictionaries such as ``{"image": ..., "label": ...}`` and images Pillow pictures of
            any mode, arrays or tensors, uint8 or in [0, 1]; or a pair of arrays (N, H, W, 3) uint8
            and (N,), which may be those of an HDF5 file. Images of one batch have one size. May be
            None where `domains` brings the datasets.
        domains: Names for `transform` ("clean" is the dataset as it is), or a mapping from name
            to a dataset, or from name to a mapping from severity to a dataset, or a list of
            datasets or of pairs (name, dataset); without names they are "0", "1", ... Default: the
            corruptions that the scenario was published with, or "clean" without `transform`.
        severity: 0 to 5, for all domains; `gradual` and `walk` have their own.
        batch_size: Samples per batch; `single` always has 1.
        seed: Seed of all draws; the global generators are neither read nor advanced.
        transform: `transform(images, domain, severity, generator=g)`, applied to each batch; its
            generator depends on seed, domain, severity and step alone.
        labels: (N,) labels of `dataset`, to spare reading a dataset that has them only in its
            items.
        before: `before(images, generator=g)` on every batch as it was read, (B, 3, H, W) in
            [0, 1] or a list of (3, H, W) where items may differ in size; returns (B, 3, H, W). The
            generator is the transform's. CCC has `corruptions.CropAndFlip(224)` here.
        after: `after(images)` on every batch once it is transformed; `corruptions.Jpeg(85)` in CCC.
        shared_order: Show all domains in the same sample order, as published protocols do by
            reseeding; by default each visit has its own.
        shuffle_domains: Draw the order of the domains from the seed.
        num_samples: Use a random subset of this size of each domain, drawn for each visit.
        reset: Set `Batch.reset` at the first batch only ("start"), also whenever the domain
            changes ("shift"), or not at all ("never"). Default: the scenario's.
        last_batch: "keep" a short batch at the end of each visit, "drop" it, or let batches
            "span" visits up to the next reset. Default: "keep"; `walk`: "span".
        clock: Time budget, a `Clock` or its fields.
        window: For batches of one: keep the last `window` images in `Batch.window` and set
            `Batch.adapt` once every `window` samples.
        schedule: Replaces the scenario's order of domains: a name in `SCHEDULES`.
        select: Replaces its choice of samples: a name in `SELECTIONS`.
        arrange: Replaces its order of samples: a name in `ARRANGEMENTS`. So
            `build("mixed", ..., arrange="dirichlet")` orders the pool of all domains.
        options: Those of the scenario's schedule, selection and arrangement, such as `delta`; see
            the docstrings of these functions.

    Returns:
        The stream.

    Raises:
        ValueError: A value that cannot work, or an unknown name.
        TypeError: A value of the wrong kind.

    >>> import numpy as np
    >>> data = np.zeros((20, 8, 8, 3), dtype=np.uint8), np.arange(20) % 4
    >>> stream = build("sorted", data, domains=["clean"], batch_size=10)
    >>> [batch.labels.unique().tolist() for batch in stream]
    [[0, 1], [2, 3]]
    """
    spec = get_scenario(scenario).with_choices(
        schedule=schedule, select=select, arrange=arrange, reset=reset, last_batch=last_batch
    )
    chosen = merge_options(spec, options)
    given, listed = list_domains(spec, domains, transform, chosen)
    source = Domains(dataset, given, transform, labels, before, after)
    timing = as_clock(clock)
    config: dict[str, Any] = {
        "scenario": spec.name,
        "domains": listed,
        "severity": number("severity", severity, 0.0, 5.0),
        "batch_size": spec.batch_size or whole_number("batch_size", batch_size, 1, LARGEST),
        "seed": whole_number("seed", seed, 0, 2**64 - 1),
        "shared_order": boolean("shared_order", shared_order),
        "shuffle_domains": boolean("shuffle_domains", shuffle_domains),
        "num_samples": None
        if num_samples is None
        else whole_number("num_samples", num_samples, 1, LARGEST),
        "reset": spec.reset,
        "last_batch": spec.last_batch,
        "clock": None if timing is None else asdict(timing),
        "window": None if window is None else whole_number("window", window, 1, LARGEST),
        "schedule": spec.schedule,
        "select": spec.select,
        "arrange": spec.arrange,
    }
    if window is not None and config["batch_size"] != 1:
        raise ValueError(
            f"`window` must be None unless batches hold one image, got {window} with batch_size="
            f'{config["batch_size"]}; use the scenario "single" or batch_size=1'
        )
    fit_options(spec, source, listed, chosen)
    order = Draws(config["seed"], "domains").permutation(len(listed)) if shuffle_domains else None
    shown = listed if order is None else [listed[i] for i in order]
    plan = _plan(spec, source, shown, config, chosen)
    return Stream(plan, source, _plain({**config, **chosen}), timing, config["window"])


def from_config(
    config: Mapping[str, Any],
    dataset: Any | None = None,
    *,
    domains: Mapping[str, Any] | list[Any] | None = None,
    transform: Transform | None = None,
    labels: Any | None = None,
    before: Transform | None = None,
    after: Transform | None = None,
) -> Stream:
    """Make the stream that a `Stream.config` describes, from the same data.

    Args:
        config: As `Stream.config` gave it, perhaps by way of JSON.
        dataset: As given to `build`.
        domains: The mapping, or the list of datasets, given to `build`, if it was one.
        transform: As given to `build`.
        labels: As given to `build`.
        before: As given to `build`.
        after: As given to `build`.

    >>> import numpy as np
    >>> data = np.zeros((20, 8, 8, 3), dtype=np.uint8), np.arange(20) % 4
    >>> stream = build("continual", data, domains=["clean"], batch_size=10)
    >>> from_config(stream.config, data).config == stream.config
    True
    """
    arguments = dict(mapping("config", "a stream", config))
    if "scenario" not in arguments:
        raise ValueError(
            "`config` must name the scenario of a stream, got the keys "
            f"{told(', '.join(map(str, arguments))) or 'none'}: pass what Stream.config gave"
        )
    unknown = {str(name) for name in arguments} & {"dataset", "transform", "labels", "before"}
    if unknown or not all(isinstance(name, str) for name in arguments):
        raise ValueError(
            "`config` must hold the figures of a stream by name, got "
            f"{told(', '.join(map(str, arguments)))}: pass what Stream.config gave"
        )
    if domains is not None:
        given = named_datasets(domains)
        wanted = list(arguments.get("domains") or ())
        if not isinstance(given, Mapping) or not given.keys() >= set(wanted):
            got = list(given) if isinstance(given, Mapping) else type(given).__name__
            raise ValueError(
                f"`domains` must hold a dataset for each of {told(wanted)}, got {told(got)}; pass "
                "what `build` "
                "was given"
            )
        arguments["domains"] = {name: given[name] for name in wanted}
    return build(
        dataset=dataset,
        transform=transform,
        labels=labels,
        before=before,
        after=after,
        **arguments,
    )


def _plan(
    scenario: Scenario,
    source: Domains,
    names: list[str],
    config: Mapping[str, Any],
    options: Mapping[str, Any],
) -> Plan:
    """Plan the visits, find the order of each, and cut them into batches.

    Args:
        scenario: Its building blocks plan and order.
        source: The data.
        names: Names of the domains, in the order of the stream.
        config: The arguments of `build`, checked.
        options: The scenario's options, complete.
    """
    seed = config["seed"]
    schedule, _, _ = scenario.blocks
    visits: list[PlannedVisit] = schedule.function(
        names,
        config["severity"],
        Draws(seed, "schedule"),
        **{name: options[name] for name in options_of(schedule)},
    )
    orders = Orders(
        visits,
        source,
        select=scenario.select,
        arrange=scenario.arrange,
        options=options,
        seed=seed,
        shared_order=config["shared_order"],
        num_samples=config["num_samples"],
    )
    orders.check()
    counts = [orders.count(i) for i in range(len(visits))]
    if options.get("interleave"):
        segments = interleaved(visits, counts, config["batch_size"], seed)
    else:
        segments = [Segment(i, 0, count) for i, count in enumerate(counts)]
    # A segment that makes no batch is not seen, so no reset can be before it.
    least = config["batch_size"] if scenario.last_batch == "drop" else 1
    segments = _with_resets(segments, visits, scenario.reset, least)
    return Plan(visits, segments, orders.order, config["batch_size"], scenario.last_batch)


def _with_resets(
    segments: list[Segment], visits: Sequence[PlannedVisit], reset: str, least: int
) -> list[Segment]:
    """Mark the segments, of `least` samples or more, before which the model is reset."""
    marked: list[Segment] = []
    before: tuple[str, ...] | None = None
    for segment in segments:
        if segment.stop - segment.start < least:
            marked.append(segment)
            continue
        domains = tuple(c.domain for c in visits[segment.visit].conditions)
        due = reset != "never" and (before is None or (reset == "shift" and domains != before))
        marked.append(Segment(segment.visit, segment.start, segment.stop, due))
        before = domains
    return marked


def _plain(value: Any) -> Any:
    """Turn a configuration into plain JSON types."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and value == int(value) and abs(value) < 2**53:
        return int(value)
    return value
