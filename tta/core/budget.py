"""How a recipe is made to fit into a budget of memory, by measuring what its forms take.

In this order: as it is; in micro-batches, where no image affects another; with checkpoints; then
with only the last layers trained, half as many each time. The first that fits is taken.
"""

from __future__ import annotations

import dataclasses
import re
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from tta.core.adapter import Adapter
from tta.core.build import Injected, build
from tta.core.checks import is_iterable, told, whole_number
from tta.core.classifier import (
    CONVOLUTIONS,
    declared_sizes,
    evaluating,
    first_layer,
    timm_configs,
)
from tta.core.config import UpdateConfig
from tta.core.memory_use import PeakBytes, held_bytes
from tta.core.model_buffers import ModelBuffers
from tta.core.outputs import LogitsReader
from tta.core.recipe import MOST_BYTES, AdapterConfig
from tta.core.source import SourceStatistics, as_source
from tta.core.warn import warn

__all__ = ["example_shape", "within_budget"]

BATCH = 64  # images of a batch where nobody says
SIZES = {True: 224, False: 32}  # of images where nobody says, by whether the first layer strides
CALLS = 2  # the first one makes what later ones use again


def within_budget(
    model: nn.Module, config: AdapterConfig, source: Any, injected: Injected, budget: int
) -> tuple[AdapterConfig, Any]:
    """The config of the first form of a recipe that takes no more than the budget.

    Args:
        model: The classifier, which is left as it was.
        config: As the caller asked for it.
        source: As for :func:`tta.wrap`.
        injected: Functions and modules of the caller.
        budget: Bytes of weights, state, and tensors of a call at their peak.

    Returns:
        The config, and the source that it is to be built with.

    Raises:
        TypeError: When the budget is no whole number.
        ValueError: When nothing fits.
    """
    budget = whole_number("memory_budget", budget, 1, MOST_BYTES)
    statistics = as_source(source)
    if isinstance(statistics.batches, Iterator):  # they are read once for each form
        statistics = dataclasses.replace(statistics, batches=list(statistics.batches))
    device = _device(model)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):  # some models draw
        return _first_that_fits(model, config, statistics, injected, budget)


def _first_that_fits(
    model: nn.Module,
    config: AdapterConfig,
    statistics: SourceStatistics,
    injected: Injected,
    budget: int,
) -> tuple[AdapterConfig, SourceStatistics]:
    x, plain = _plain_bytes(model, _examples(model, config, statistics))
    images = f"a batch of {tuple(x.shape)}"
    if plain > budget:
        raise ValueError(
            f"`memory_budget` must be at least {plain:,} bytes, which {images} takes in the plain "
            f"model, got {budget:,}: use smaller batches (batch_size=) or images, or a smaller "
            "model."
        )
    config = dataclasses.replace(config, memory_budget=budget)
    injected = dataclasses.replace(injected, on_event=None)
    least = None
    for form, words in _forms(model, config, statistics, injected, len(x)):
        taken = _bytes(model, form, statistics, injected, x)
        if taken <= budget:
            if words:
                warn(
                    f"`memory_budget` of {budget:,} bytes is kept by {words}: {images} takes "
                    f"{taken:,} at its peak."
                )
            return form, statistics
        least = taken if least is None else min(least, taken)
    raise ValueError(
        f"`memory_budget` must be at least {least:,} bytes for {config.label} with {images}, got "
        f"{budget:,}: use smaller batches (batch_size=), or a recipe that trains nothing."
    )


def example_shape(
    model: nn.Module, config: AdapterConfig, source: SourceStatistics
) -> tuple[int, ...]:
    """Shape (B, ...) of the batches that a recipe is measured with.

    Images are those of the source batches, or of the size that a module declares as ``img_size``,
    or the model in timm's ``pretrained_cfg``; else 224 pixels where the first layer strides, and 32
    where it does not. Batches are those of ``batch_size``, of the window if that is more; else 64.
    """
    rows = max(config.batch_size or 0, config.window or 0) or BATCH
    if (given := _source_images(source)) is not None:
        return (rows, *given.shape[1:])
    entry: Any = first_layer(model)
    if isinstance(entry, nn.Linear):
        return (rows, entry.in_features)
    axes = entry.weight.ndim - 2 if isinstance(entry, CONVOLUTIONS) else 2
    if sizes := declared_sizes(model, axes):
        return (rows, getattr(entry, "in_channels", 3), *sizes[0])
    for said in timm_configs(model):
        size = said.get("input_size")
        if isinstance(size, (tuple, list)) and all(isinstance(n, int) for n in size):
            return (rows, *size)
    if not isinstance(entry, CONVOLUTIONS):
        return (rows, 3, 224, 224)
    side = SIZES[any(step > 1 for step in entry.stride)]
    return (rows, entry.in_channels, *(side,) * axes)


def _forms(
    model: nn.Module,
    config: AdapterConfig,
    source: SourceStatistics,
    injected: Injected,
    rows: int,
) -> Iterator[tuple[AdapterConfig, str]]:
    """Configs in the order in which they are tried, with what they do in words."""
    yield config, ""
    if not isinstance(config.update, UpdateConfig):
        return
    adapter = _built(model, config, source, injected)
    assert adapter.update is not None
    alone = adapter.update.selection_pass.rows_independent
    trained = list(dict.fromkeys(n.rpartition(".")[0] for n in adapter.parameters_adapted))
    adapter.unwrap()
    frugal, words = config, ""
    while alone and rows > 1:
        rows = (rows + 1) // 2
        frugal = dataclasses.replace(config, micro_batch=rows)
        words = f"micro-batches of {rows}"
        yield frugal, words
    frugal = dataclasses.replace(frugal, checkpointing=True)
    words = f"{words} and activation checkpointing" if words else "activation checkpointing"
    yield frugal, words
    while len(trained) > 1:
        trained = trained[-(len(trained) // 2) :]
        pattern = rf"^(?:{'|'.join(map(re.escape, trained))})\.[^.]+$"
        late = config.update.replace(params=pattern)
        which = trained[0] if len(trained) == 1 else f"{trained[0]} to {trained[-1]}"
        yield (
            dataclasses.replace(frugal, update=late),
            f"{words}, and adapting {len(trained)} late layers alone ({which})",
        )


def _built(
    model: nn.Module, config: AdapterConfig, source: SourceStatistics, injected: Injected
) -> Adapter:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the adapter that the caller gets says it again
        return build(model, config, source, injected)


def _bytes(
    model: nn.Module,
    config: AdapterConfig,
    source: SourceStatistics,
    injected: Injected,
    x: Tensor,
) -> int:
    """What a form takes at its peak, with the weights of the model."""
    before = held_bytes([*model.parameters(), *model.buffers(), x])
    with PeakBytes(x.device) as peak:
        adapter = _built(model, config, source, injected)
        try:
            peak.forget()  # of passes over source batches, which may be large
            with warnings.catch_warnings(), torch.no_grad():
                warnings.simplefilter("ignore")
                for _ in range(CALLS):
                    adapter(x)
            return before + peak.read()
        finally:
            adapter.unwrap()


def _source_images(source: SourceStatistics) -> Tensor | None:
    """The images of the first source batch, if there is one."""
    first = next(iter(source.batches), None) if is_iterable(source.batches) else None
    found = first[0] if isinstance(first, (tuple, list)) and first else None
    return found if isinstance(found, Tensor) else None


def _examples(model: nn.Module, config: AdapterConfig, source: SourceStatistics) -> list[Tensor]:
    """Random images of each kind that the model may take, the likeliest first."""
    generator = torch.Generator().manual_seed(config.seed)
    pixels = torch.rand(example_shape(model, config, source), generator=generator)
    eight_bits = (pixels * 255).to(_device(model), torch.uint8)
    given = _source_images(source)
    if given is not None and given.dtype == torch.uint8:
        return [eight_bits]
    return [pixels.to(_device(model), _dtype(model)), eight_bits]


def _plain_bytes(model: nn.Module, examples: list[Tensor]) -> tuple[Tensor, int]:
    """The first batch that the model takes, and its bytes at their peak in a plain pass."""
    buffers = ModelBuffers(model, LogitsReader(), set())
    errors = []
    for x in examples:
        try:
            with evaluating(model), torch.no_grad(), buffers.kept(), PeakBytes(x.device) as peak:
                model(x)
        except Exception as error:
            errors.append(error)
            continue
        finally:
            buffers.empty()
        held = held_bytes([*model.parameters(), *model.buffers(), x])
        return x, held + peak.read()
    raise ValueError(
        f"`memory_budget` must be measured with images that the model takes, but it refuses shape "
        f"{tuple(examples[0].shape)} ({type(errors[0]).__name__}: {told(errors[0], 50)}): pass "
        "source batches, give the model a pretrained_cfg with input_size, or leave it out."
    ) from errors[0]


def _device(model: nn.Module) -> torch.device:
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def _dtype(model: nn.Module) -> torch.dtype:
    entry: Any = first_layer(model)
    return torch.float32 if entry is None else entry.weight.dtype
