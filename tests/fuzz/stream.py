"""Cases of streams."""

from __future__ import annotations

from random import Random
from typing import Any

import numpy as np
import torch

import corruptions
import tta
from tests.fuzz.data import bent_json
from tests.fuzz.junk import Endless, bent, junk, spoilt, tensor, words
from tests.fuzz.oracle import Case, Planted
from tta.core.checks import shown

__all__ = ["streams"]


def _arrays(rng: Random, count: int = 20) -> tuple[np.ndarray, np.ndarray]:
    pixels = (tensor(rng, (count, 8, 8, 3)) * 255).to(torch.uint8).numpy()
    return pixels, np.arange(count) % 4


class _Set:
    """A dataset of items."""

    def __init__(self, items: list[Any], wrong: Any = None, place: int = -1) -> None:
        self.items, self.wrong, self.place = items, wrong, place

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, number: int) -> Any:
        if number == self.place:
            if isinstance(self.wrong, Planted):
                raise self.wrong
            return self.wrong
        return self.items[number]


def _dataset(rng: Random) -> Any:
    images, labels = _arrays(rng)
    items = [(torch.from_numpy(x).permute(2, 0, 1).float() / 255, int(y))
             for x, y in zip(images, labels, strict=True)]  # fmt: skip
    change = rng.randrange(12)
    if change < 3:
        return images, labels
    if change == 3:
        return bent(rng, images), labels
    if change == 4:
        return images, bent(rng, labels) if rng.random() < 0.5 else junk(rng)
    if change == 5:
        return junk(rng)
    if change == 6:
        return spoilt(rng, torch.from_numpy(images)), labels
    if change == 7:
        return images, spoilt(rng, torch.from_numpy(labels))
    x, y = items[3]
    wrong = rng.choice(
        [
            None,
            x,
            (x,),
            (x, y, y),
            (x, None),
            (None, y),
            (spoilt(rng, x), y),
            (x, junk(rng)),
            (junk(rng), y),
            {"image": x, "label": y},
            {"image": x},
            Planted("item"),
            (x[:, :4], y),
            (x.numpy(), np.int64(1)),
            junk(rng),
        ]
    )
    found: Any = _Set(items, wrong, 3)
    if change == 8:
        found.targets = rng.choice([labels.tolist(), junk(rng), None, labels[:3]])
    if change == 9:
        return bent(rng, found)
    if change == 10:
        return Endless()
    return found


def _transform(rng: Random) -> Any:
    return rng.choice([
        corruptions.corrupt, lambda x, name, severity, generator: x, None, junk(rng),
        lambda x, name, severity, generator: spoilt(rng, x),
        lambda x, name, severity, generator: junk(rng), lambda x: x,
    ])  # fmt: skip


def streams(rng: Random) -> Case:
    """A stream, and its first batches."""
    scenario: Any = rng.choice(tta.streams.list_scenarios())
    names: Any = rng.sample(corruptions.list_corruptions(), rng.choice([1, 2, 3]))
    chosen = tta.streams.get_scenario(scenario)
    arguments: dict[str, Any] = {
        "dataset": _arrays(rng), "domains": names, "batch_size": 4, "seed": 1,
        "transform": lambda x, name, severity, generator: x,
    }  # fmt: skip
    options = _options(chosen)
    for _ in range(rng.choice([1, 1, 2, 3])):
        change = rng.randrange(12)
        if change < 3 and options:
            key = rng.choice(list(options))
            arguments[key] = bent(rng, _example(rng, key, options[key]))
        elif change < 5:
            arguments["dataset"] = _dataset(rng)
        elif change == 5:
            arguments["domains"] = rng.choice(
                [
                    bent(rng, names),
                    {"a": _dataset(rng)},
                    [_dataset(rng), _dataset(rng)],
                    None,
                    {"a": {5: _dataset(rng), 1: _dataset(rng)}},
                ]
            )
            if rng.random() < 0.7:
                arguments["transform"] = None
        elif change == 6:
            arguments["transform"] = _transform(rng)
        elif change == 7:
            arguments[rng.choice(["before", "after"])] = rng.choice(
                [
                    _passed_on(junk(rng)),
                    lambda x, generator=None: spoilt(rng, x),
                    lambda x, generator=None: x,
                ]
            )
        elif change == 8:
            scenario = rng.choice([bent(rng, scenario), junk(rng), scenario])
        elif change == 9:
            arguments[words(rng)] = junk(rng)
        else:
            key, value = rng.choice(list(BUILD.items()))
            arguments[key] = bent(rng, value)
    told = f"streams.build({shown(scenario)}, {shown(arguments)})"
    then = rng.randrange(6)
    extra = junk(rng)

    def call() -> None:
        if then == 0:
            stream = tta.streams.build(scenario, **arguments)
            again = {k: arguments.get(k) for k in ("transform", "labels", "before", "after")}
            config = bent_json(rng, stream.config)
            tta.streams.from_config(config, arguments["dataset"], **again)
            return
        stream = tta.streams.build(scenario, **arguments)
        repr(stream)
        if then == 1:
            stream.from_step(extra)
        if then == 2:
            stream.preview()
        for count, _ in enumerate(stream):
            if count > 2:
                break

    return Case(told, call)


def _passed_on(function: Any) -> Any:
    """A function whose own errors, which are passed on as they are, count as none of ours."""
    if not callable(function):
        return function

    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except Exception as error:
            raise ValueError(f"a function of the user's raised a {type(error).__name__}") from None

    return call


BUILD: dict[str, Any] = {
    "severity": 5, "batch_size": 4, "seed": 1, "labels": [0, 1, 2, 3] * 5, "shared_order": True,
    "shuffle_domains": True, "num_samples": 8, "reset": "start", "last_batch": "keep",
    "clock": {"ratio": 3.0, "queue": 1, "overhead": 9.0}, "window": 4, "schedule": "in_turn",
    "select": "zipf", "arrange": "dirichlet",
}  # fmt: skip


def _options(scenario: Any) -> dict[str, Any]:
    from tta.streams.building_blocks import options_of

    found: dict[str, Any] = {}
    for block in scenario.blocks:
        found |= options_of(block)
    return found


def _example(rng: Random, key: str, value: Any) -> Any:
    examples = {"groups": [0, 1, 2, 3] * 5, "orders": [["fog"], ["snow"]], "severities": [1, 3, 5],
                "first_severities": [1], "surface": {"fog": 3}}  # fmt: skip
    return examples.get(key, rng.choice([3, 0.5, 20])) if value is None else value
