"""What a guard costs that has nothing to do: a recipe with and without it, timed in turn."""

from __future__ import annotations

import copy
import statistics
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch

from experiments.run.method_strings import parse_method
from experiments.run.subject import Subject
from tta import Adapter
from tta.streams import Batch

__all__ = ["measure"]

WARM_UP = 3  # rounds that are not counted


def measure(
    subject: Subject, guarded: str, plain: str, batches: Sequence[Batch], rounds: int, seed: int
) -> dict[str, Any]:
    """Time a guarded recipe beside the plain one and beside a second plain one.

    Args:
        subject: Its model is copied.
        guarded: A method string.
        plain: The same without the guard.
        batches: Shown in turn, to all at the same time.
        rounds: How often each has its turn.
        seed: Of the adapters.

    Returns:
        ``ratio``: the median over rounds of the guarded recipe's time to the plain one's, ``twin``:
        the same of the second plain one, ``milliseconds`` of the plain one, and ``actions``.
    """
    adapters: dict[str, Adapter] = {}
    for name, method in (("plain", plain), ("twin", plain), ("guarded", guarded)):
        own = copy.copy(subject)
        own.model = copy.deepcopy(subject.model)
        found = parse_method(method, subject.info.num_classes)
        adapters[name] = found.wrap_subject(own, len(batches[0]), seed)
    times: dict[str, list[float]] = {name: [] for name in adapters}
    actions: Counter[str] = Counter()
    names = list(adapters)
    for turn in range(rounds + WARM_UP):
        batch = batches[turn % len(batches)]
        images = subject.preprocess(batch.images.to(subject.device))
        first = turn % len(names)  # nobody always follows the same neighbour
        for name in (*names[first:], *names[:first]):
            seconds = _seconds(adapters[name], images)
            if turn >= WARM_UP:
                times[name].append(seconds)
        actions[str(adapters["guarded"].health["action"])] += 1

    def ratio(name: str) -> float:
        return statistics.median(a / b for a, b in zip(times[name], times["plain"], strict=True))

    return {
        "ratio": ratio("guarded"),
        "twin": ratio("twin"),
        "milliseconds": 1000 * statistics.median(times["plain"]),
        "actions": dict(actions),
    }


def _seconds(adapter: Adapter, images: torch.Tensor) -> float:
    def now() -> float:
        if images.device.type == "cuda":
            torch.cuda.synchronize(images.device)
        return time.perf_counter()

    start = now()
    adapter(images)
    return now() - start
