"""All that a run needs: model, methods, streams and clean images, opened and checked."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from experiments.data import Collection, FolderSet, LabelledSet
from experiments.records.config import RunConfig, StreamConfig
from experiments.run.build_streams import build_stream, read_options
from experiments.run.cache import Cache
from experiments.run.domains import Shifts, resolve_domains
from experiments.run.method_strings import Method, parse_methods
from experiments.run.scoring import Images
from experiments.run.subject import Subject, load_subject, subject_arguments
from tta.core.checks import whole_number
from tta.core.plugins import import_modules
from tta.streams import Stream

__all__ = ["Setup", "load_setup"]

MOST_READERS = 8


@dataclass
class Setup:
    """The model, the methods and the streams of a run.

    Args:
        config: Describes the rest in the results file; its `streams` have the order of `streams`.
        subject: The model.
        methods: The methods.
        streams: The streams, each from its first batch on.
        clean: Clean images that are predicted before and after each stream; None for none.
        origin: Describes the images in the results file.
        readers: Threads that decode image files ahead of the model.
        shifts: Makes the images of the streams; None where the caller has made the streams.
    """

    config: RunConfig
    subject: Subject
    methods: Sequence[Method]
    streams: Sequence[Stream]
    clean: Images | None
    origin: dict[str, Any]
    readers: int = 0
    shifts: Shifts | None = None

    def on_corrupt(self, tell: Callable[[str, float], None]) -> None:
        """Have `tell` called with (domain, severity) before the images of a domain are made."""
        if self.shifts is not None:
            self.shifts.on_corrupt = tell


def load_setup(
    config: RunConfig, *, cache: Cache | None = None, readers: int | None = None
) -> Setup:
    """Open what a configuration names.

    Args:
        config: What to run.
        cache: Keeps model and images for the next run.
        readers: Threads that decode image files ahead of the model. None for as many as torch has,
            at most `MOST_READERS`, where the model is on a GPU, and for none on a CPU, which has
            nothing better to do than to run the model.

    Raises:
        ValueError: For names that are not known and figures that cannot be.
        FileNotFoundError: For missing data.
    """
    if readers is not None:
        whole_number("readers", readers, 0, 1024)
    import_modules(config.imports)  # also in a worker, or where the run is resumed
    cache = Cache() if cache is None else cache
    device = torch.device(config.device)
    wanted = subject_arguments(config, device)
    subject: Subject = cache.get("subject", wanted, lambda: load_subject(*wanted))
    data = subject.data
    methods = parse_methods(config.methods, subject.info.num_classes, config.health)
    config = replace(config, streams=tuple(_with_domains(s, data) for s in config.streams))
    _warn_of_tuned_domains(config)
    clean = _choose_clean(subject, [stream.images for stream in config.streams])
    shifts: Shifts = cache.get(
        "shifts",
        (wanted, None if clean is None else len(clean), config.seed),
        lambda: Shifts(data, clean, config.seed, device),
    )
    crop = subject.info.input_size[-1]
    streams = [build_stream(stream, config, shifts, crop) for stream in config.streams]
    origin = data.name if data.clean is None else data.clean.origin
    if shifts.left_out:
        origin += f" ({shifts.left_out} pictures left out, which cannot be read)"
    return Setup(
        config,
        subject,
        methods,
        streams,
        clean,
        {"name": data.name, "origin": origin, "domains_on_disk": bool(data.stored)},
        _pick_readers(readers, data.files or isinstance(clean, FolderSet), device),
        shifts,
    )


def _with_domains(stream: StreamConfig, data: Collection) -> StreamConfig:
    """The stream with the names of its domains, those of its scenario where it has none."""
    usual = stream.spec.default_domains(read_options(stream))
    return replace(stream, domains=resolve_domains(stream.domains, data, usual))


def _warn_of_tuned_domains(config: RunConfig) -> None:
    """Warn where a method is shown domains on which its fields were chosen, with their labels."""
    shown = {name for stream in config.streams for name in stream.domains}
    for record in config.tuned:
        both = [name for name in record.get("domains", ()) if name in shown]
        if both:
            warnings.warn(
                f"`tuned`: the fields of {record['chosen']} were chosen with labels on "
                f"{' '.join(both)}, which this run shows, so its errors there are no results: "
                "leave these domains out of `corruptions`",
                stacklevel=3,
            )


def _pick_readers(wanted: int | None, files: bool, device: torch.device) -> int:
    """Threads that decode files ahead: none for images in memory, else those wanted."""
    if not files:
        return 0
    threads = torch.get_num_threads() if device.type == "cuda" else 0
    return min(MOST_READERS, threads) if wanted is None else wanted


def _choose_clean(subject: Subject, counts: Sequence[int | None]) -> LabelledSet | None:
    """The clean images behind all streams: as many as the stream that has most.

    Args:
        subject: Has all clean images.
        counts: Images of each domain of each stream; None for all.
    """
    clean, numbers = subject.clean, [count for count in counts if count is not None]
    if clean is None or len(numbers) < len(counts):
        return clean
    if subject.data.stored:  # other images, perhaps of more classes than the domains'
        classes = len(np.unique(clean.labels))
        each = max(1, round(max(numbers) / classes))
        return clean.balanced(min(each * classes, len(clean) // classes * classes))
    return clean.balanced(max(numbers))
