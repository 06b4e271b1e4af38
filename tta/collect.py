"""``collect_source``: what methods need from the training data, computed once."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from tta.core.checks import is_iterable, shown
from tta.core.registry import component, get_config
from tta.core.source import SourceStatistics
from tta.core.source_checks import check_iterable
from tta.wrapping import wrap

__all__ = ["collect_source"]


def collect_source(
    model: nn.Module,
    loader: Iterable[tuple[Tensor, Tensor]],
    for_methods: list[str] | str,
    **wrap_arguments: Any,
) -> SourceStatistics:
    """Compute the artefacts that methods need from source batches; the model stays as it is.

    Args:
        model: The classifier, as it will be wrapped.
        loader: Batches ``(images, labels)`` of source images; read once per method.
        for_methods: Names as ``wrap`` takes them, presets included.
        **wrap_arguments: Passed to ``wrap``, such as ``norm=``: the Fisher information is taken
            under the norm rule that will be used.

    Returns:
        The artefacts, to be given to ``wrap(..., source=)`` and saved with ``.save``; for RMT with
        ``loader`` as their ``batches``, which it goes on reading and which are not saved.

    Raises:
        TypeError: When ``loader`` is not iterable, or ``for_methods`` holds anything but names.
        ValueError: For an unknown method, none at all, or batches that do not fit the model.
    """
    if wrap_arguments.get("mean") is None and wrap_arguments.get("std") is None:
        wrap_arguments |= {"mean": (0.0,), "std": (1.0,)}  # no artefact depends on augmentation
    check_iterable("loader", loader)
    listed = is_iterable(for_methods) and not isinstance(for_methods, (str, Tensor))
    names: list[Any] = list(islice(for_methods, 1000)) if listed else [for_methods]
    if not all(isinstance(name, str) for name in names):
        raise TypeError(
            f"`for_methods` must be a list of names, got {shown(for_methods)}: pass such as "
            "['eata']."
        )
    if not names:
        raise ValueError(
            "`for_methods` must name at least one method, got none: pass such as ['eata']."
        )
    collected = SourceStatistics()
    for name in names:
        with warnings.catch_warnings():
            # Thresholds of a preset play no part in source artefacts.
            warnings.filterwarnings("ignore", message=".*preset, made for")
            method = component(name.partition(".")[0])
            fields = method.artefact_fields
            recipe = get_config(name).replace(**fields) if fields else name
            spent = isinstance(loader, Iterator)  # by the passes that follow
            if method.replays_source and not spent:
                collected.batches = loader
            adapter = wrap(model, recipe, source=loader, **wrap_arguments)
        try:
            for part in adapter.parts.values():
                for key, value in part.source_artefacts().items():
                    setattr(collected, key, _cloned(value))
        finally:
            adapter.unwrap()
    return collected


def _cloned(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: v.detach().clone() for key, v in value.items()}
    return value.detach().clone() if torch.is_tensor(value) else value
