"""Streams: published test-time evaluations, as orders of (dataset, domains).

A scenario is a choice of parts: a *schedule* says in which order domains are visited, a
*selection* which samples a visit shows, an *arrangement* in which order, a batch policy how they
are cut into batches, and a clock which batches come too late to learn from. Streams yield pixels
in [0, 1] and know nothing of models or corruptions: what changes the pixels is passed in.

>>> list_scenarios("l*")
['lifelong', 'lame_imbalance', 'lame_noniid', 'label_shift', 'long_tailed']
"""

from .batch import Batch
from .clock import Clock, Stopwatch
from .draws import Draws
from .factory import build, from_config
from .parts import ARRANGEMENTS, SCHEDULES, SELECTIONS
from .preview import Preview, Stay
from .scenarios import SCENARIOS, Scenario, list_scenarios
from .schedules import CANONICAL_ORDER, ROTTA_ORDER
from .stream import Stream

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
