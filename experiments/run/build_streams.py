"""The streams of a run, from their configurations and the run's images."""

from __future__ import annotations

from typing import Any

import corruptions
import tta.streams
from experiments.data import LabelledSet
from experiments.data.surfaces import read_surface
from experiments.records.config import RunConfig, StreamConfig
from experiments.run.domains import Shifts
from tta.streams import Stream

__all__ = ["build_stream", "read_options"]


def build_stream(config: StreamConfig, run: RunConfig, shifts: Shifts, crop: int) -> Stream:
    """Build one stream of a run.

    Args:
        config: The stream.
        run: The run; its batch size and seed are used.
        shifts: The images of the domains.
        crop: Height and width to which the published CCC pipeline crops images.

    Raises:
        ValueError: For options that the scenario does not have or that do not fit the images.
    """
    smooth = config.spec.smooth
    options = read_options(config)
    if options.pop("ccc", False):  # functions, which no file of settings can hold
        if not smooth:
            known = [name for name, spec in tta.streams.SCENARIOS.items() if spec.smooth]
            raise ValueError(
                f"`ccc` must go with the scenario {' or '.join(known)}, got {config.scenario}: "
                "elsewhere images are corrupted before they are cropped; leave it out"
            )
        options |= {"before": corruptions.CropAndFlip(crop), "after": corruptions.Jpeg()}

    def choose(images: LabelledSet) -> LabelledSet:
        return images if config.images is None else images.balanced(config.images)

    arguments = shifts.build_arguments(config.domains, config.severities, choose, smooth)
    _check_num_samples(config.options.get("num_samples"), arguments)
    return tta.streams.build(
        config.scenario,
        severity=config.severity,
        batch_size=run.batch_size if config.batch_size is None else config.batch_size,
        seed=run.seed,
        **arguments,
        **options,
    )


def read_options(config: StreamConfig) -> dict[str, Any]:
    """The options of a stream, with what is in the files that they name."""
    options = dict(config.options)
    if isinstance(options.get("surface"), str):
        options["surface"] = read_surface(options["surface"])
    return options


def _check_num_samples(wanted: Any, arguments: dict[str, Any]) -> None:
    """Reject more samples than there are images, of which a stream would silently show all."""
    sets = [arguments["dataset"]]
    if arguments["transform"] is None:
        sets = [entry for levels in arguments["domains"].values() for entry in levels.values()]
    have = min(len(entry[1]) if isinstance(entry, tuple) else len(entry) for entry in sets)
    if isinstance(wanted, int) and wanted > have:
        raise ValueError(
            f"`num_samples` must be at most the {have} images of each domain, got {wanted}: ask "
            "for fewer, or for more by --images"
        )
