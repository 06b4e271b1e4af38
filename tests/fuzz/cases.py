"""From a number to a case."""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Callable
from random import Random

from tests.fuzz import adapters, commands, corrupt, data, stream
from tests.fuzz.oracle import Case, problem_of
from tta.core.checks import told

__all__ = ["SURFACES", "look_at", "make"]

# What is called, with its share of the cases.
SURFACES: dict[str, tuple[Callable[[Random], Case], int]] = {
    "wrap": (adapters.wraps, 5),
    "call": (adapters.calls, 4),
    "state": (adapters.states, 3),
    "source": (data.sources, 3),
    "file": (data.files, 3),
    "stream": (stream.streams, 5),
    "corruption": (corrupt.corrupts, 4),
    "command": (commands.commands, 1),
    "toml": (commands.settings, 2),
}


def make(number: int) -> Case:
    """The case of a number."""
    rng = Random(number)
    shares = [share for _, share in SURFACES.values()]
    (name,) = rng.choices(list(SURFACES), shares)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        case = SURFACES[name][0](rng)
    case.words = told(f"{number} {name}: {case.words}", 600)
    return case


def look_at(number: int) -> str | None:
    """Run the case of a number; what is wrong with it, in words.

    Paths of cases may be relative, so that they are run in a folder that goes afterwards.
    """
    case, before = make(number), os.getcwd()
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        os.chdir(folder)
        try:
            problem = problem_of(case)
        finally:
            os.chdir(before)
    return None if problem is None else f"{case.words}\n{problem}"
