"""Experiments: data loaders, the runner, its results files, tables and plots.

This package may import everything else in the repository; nothing imports it. It is not in the
wheel. ``python -m experiments --help`` lists its commands. From Python, `experiments.evaluate` runs
methods on a model and streams that are objects there.
"""

from typing import TYPE_CHECKING, Any

from tta.core.checks import shown

if TYPE_CHECKING:
    from experiments.run.evaluate import Evaluation, evaluate

__all__ = ["Evaluation", "evaluate"]


def __getattr__(name: str) -> Any:
    """Import the runner, which takes seconds, when it is first asked for."""
    if name in __all__:
        from experiments.run import evaluate as module

        return getattr(module, name)
    raise AttributeError(f"module {shown(__name__)} has no attribute {shown(name)}")
