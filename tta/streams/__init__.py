"""Streams: published test-time evaluations, as orders of (dataset, domains).

A scenario is a choice of parts: a *schedule* says in which order domains are visited, a
*selection* which samples a visit shows, an *arrangement* in which order, a batch policy how they
are cut into batches, and a clock which batches come too late to learn from. Streams yield pixels
in [0, 1] and know nothing of models or corruptions: what changes the pixels is passed in.

>>> list_scenarios("l*")
['lifelong', 'lame_imbalance', 'lame_noniid', 'label_shift', 'long_tailed']
"""

from tta.streams.batch import Batch
from tta.streams.building_blocks import ARRANGEMENTS, SCHEDULES, SELECTIONS
from tta.streams.clock import Clock, Stopwatch
from tta.streams.draws import Draws
from tta.streams.factory import build, from_config
from tta.streams.preview import Preview, Stay
from tta.streams.scenarios import SCENARIOS, Scenario, list_scenarios
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
    "Stay",
    "Stopwatch",
    "Stream",
    "build",
    "from_config",
    "list_scenarios",
]
