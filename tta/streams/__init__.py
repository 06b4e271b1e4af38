"""Streams: published test-time evaluations, as orders of (dataset, domains).

A scenario is a choice of building blocks: a *schedule* says in which order the stream visits the
domains, a *selection* which samples a visit shows, and an *arrangement* in which order it shows
them. A batch policy cuts them into batches, and a clock says which batches come too late to learn
from. Streams yield pixels in [0, 1] and know nothing of models or corruptions: the function that
changes the pixels is an argument.

>>> list_scenarios("l*")
['lifelong', 'lame_imbalance', 'lame_noniid', 'label_shift', 'long_tailed']
"""

import warnings
from typing import Any

from tta.core.checks import shown
from tta.streams.batch import Batch
from tta.streams.building_blocks import ARRANGEMENTS, SCHEDULES, SELECTIONS
from tta.streams.clock import Clock, Stopwatch
from tta.streams.draws import Draws
from tta.streams.factory import build, from_config
from tta.streams.preview import Preview, Visit
from tta.streams.scenarios import SCENARIOS, Scenario, get_scenario, list_scenarios
from tta.streams.schedules import CANONICAL_ORDER, ROTTA_ORDER
from tta.streams.stream import Stream

__all__ = [
    "ARRANGEMENTS",
    "CANONICAL_ORDER",
    "ROTTA_ORDER",
    "SCENARIOS",
    "SCHEDULES",
    "SELECTIONS",
    "Batch",
    "Clock",
    "Draws",
    "Preview",
    "Scenario",
    "Stopwatch",
    "Stream",
    "Visit",
    "build",
    "from_config",
    "get_scenario",
    "list_scenarios",
]


def __getattr__(name: str) -> Any:
    """Answer for the former name of `Visit`."""
    if name == "Stay":
        warnings.warn(
            "tta.streams.Stay is called tta.streams.Visit: use the new name.",
            DeprecationWarning,
            stacklevel=2,
        )
        return Visit
    raise AttributeError(f"module {shown(__name__)} has no attribute {shown(name)}")
