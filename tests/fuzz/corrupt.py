"""Cases of corruptions."""

from __future__ import annotations

import math
from random import Random
from typing import Any

import numpy as np
import torch
from torch import Tensor

import corruptions
from tests.fuzz.junk import bent, junk, spoilt, tensor, words
from tests.fuzz.oracle import Case, unchanged
from tta.core.checks import shown

__all__ = ["corrupts"]


def corrupts(rng: Random) -> Case:
    """A corruption of images, whole or in its two halves."""
    name: Any = rng.choice(corruptions.list_corruptions(extra=True))
    images: Any = tensor(rng, (2, 3, 16, 16))
    if rng.random() < 0.5:
        images = (images * 255).to(torch.uint8)
    severity: Any = rng.choice([1, 3, 5, 0.5])
    seeds: Any = [1, 2]
    if rng.random() < 0.4:
        params: Any = corruptions.sample(name, images.shape, severity, seeds)
        for _ in range(rng.choice([1, 1, 2])):
            params = _bent_params(rng, params) if isinstance(params, dict) else params
        if rng.random() < 0.2:
            images = spoilt(rng, images)
        told = f"apply({_tensor(images)}, {name!r}, {shown(params)})"
        watched = {"the images": lambda: unchanged(images), "the draws": lambda: unchanged(params)}
        if rng.random() < 0.1:
            name = bent(rng, name)
        return Case(told, lambda: corruptions.apply(images, name, params), always=watched)
    more: dict[str, Any] = {"seeds": seeds}
    for _ in range(rng.choice([1, 1, 2])):
        change = rng.randrange(8)
        if change < 3:
            images = spoilt(rng, images)
        elif change == 3:
            name = bent(rng, name)
        elif change == 4:
            severity = bent(rng, severity)
        elif change == 5:
            more["seeds"] = rng.choice([bent(rng, seeds), spoilt(rng, torch.tensor([1, 2]))])
        elif change == 6:
            more = {"generator": rng.choice([torch.Generator().manual_seed(1), junk(rng),
                                             np.random.default_rng(1), 3])}  # fmt: skip
        else:
            more[rng.choice(["parameters", "frost_pictures"])] = rng.choice(
                ["cifar", "imagenet", junk(rng), words(rng)]
            )
    how = rng.randrange(5)
    if how == 0:
        shape: Any = bent(rng, rng.choice([(2, 3, 16, 16), [2, 3, 16, 16], images]))
        given = more.pop("seeds", None)
        more.pop("generator", None)
        told = f"sample({shown([name, shape, severity, given, more])})"
        return Case(told, lambda: corruptions.sample(name, shape, severity, given, **more))
    if how == 1:
        more.pop("seeds", None)
        told = f"Corrupt({shown(name)}, {shown(severity)}, {shown(more)})({_tensor(images)})"

        def call() -> None:
            transform = corruptions.Corrupt(name, severity, **more)
            if isinstance(images, Tensor):  # of other things torchvision makes what it likes
                transform(images)

        return Case(told, call)
    told = f"corrupt({_tensor(images)}, {shown(name)}, {shown(severity)}, {shown(more)})"
    return Case(told, lambda: corruptions.corrupt(images, name, severity, **more),
                always={"the images": lambda: unchanged(images)})  # fmt: skip


def _tensor(value: Any) -> str:
    if isinstance(value, Tensor) and not value.is_nested:
        return f"{type(value).__name__} {tuple(value.shape)} {value.dtype} {value.layout}"
    return shown(value)


def _bent_params(rng: Random, params: dict[str, Any]) -> Any:
    if not params:
        return params
    key = rng.choice(list(params))
    value = params[key]
    change = rng.randrange(6)
    if change < 3 and isinstance(value, Tensor):  # of the same shape, with a value out of range
        number = rng.choice([-1, 0, 1, 3, 100, 1e4, 1e9, -1e9, 2**31, math.nan, math.inf, 1e300])
        try:
            return params | {key: torch.full_like(value, number)}
        except (RuntimeError, ValueError, OverflowError):
            return params
    if change == 3 and isinstance(value, Tensor):
        return params | {key: spoilt(rng, value)}
    return bent(rng, params)
