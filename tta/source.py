"""Source artefacts: what some methods need of the training data, computed once and kept.

A method never loads data. It takes a :class:`SourceStatistics`, made by :func:`collect_source`
from batches of source images, read from a file, or built by keyword.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tta.checks import nearest

__all__ = ["SourceStatistics", "collect_source"]

_DICTS = ("fisher", "posterior_mean", "posterior_variance")


@dataclass(kw_only=True)
class SourceStatistics:
    """Any subset of the artefacts; what a method needs and does not find, it asks for at wrap.

    Args:
        fisher: Diagonal Fisher information by parameter name (EATA).
        posterior_mean: Mean of the source posterior by parameter name (PETAL).
        posterior_variance: Its variance, likewise.
        prototypes: Class means of features (C, D) under batch statistics (RMT, CAFA).
        features: Features as the classifier sees them (N, D), not normalised (AdaNPC).
        feature_labels: Their labels (N,).
        memory_init: First row of AdaNPC's memory in the official code (D,).
        covariance: Covariance of features within classes (D, D), or (C, D, D) of each (CAFA).
        batches: Source batches ``(images, labels)``, kept for methods that run the model on them,
            in the order given.
    """

    fisher: dict[str, Tensor] | None = None
    posterior_mean: dict[str, Tensor] | None = None
    posterior_variance: dict[str, Tensor] | None = None
    prototypes: Tensor | None = None
    features: Tensor | None = None
    feature_labels: Tensor | None = None
    memory_init: Tensor | None = None
    covariance: Tensor | None = None
    batches: Iterable[tuple[Tensor, Tensor]] | None = None

    def __post_init__(self) -> None:
        features, labels = self.features, self.feature_labels
        if (features is None) != (labels is None) or (
            features is not None and labels is not None and len(features) != len(labels)
        ):
            raise ValueError(
                "`features` and `feature_labels` must come together and be equally long, got "
                f"{None if features is None else len(features)} and "
                f"{None if labels is None else len(labels)}: pass one label for each row."
            )

    @property
    def contents(self) -> list[str]:
        """Names of the artefacts that are there."""
        names = [f.name for f in dataclasses.fields(self)]
        return [n for n in names if getattr(self, n) is not None]

    def iter_batches(self, limit: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """One pass over ``batches``, cut after ``limit`` images."""
        seen = 0
        for images, labels in self.batches or ():
            if limit is not None and seen + len(images) > limit:
                images, labels = images[: limit - seen], labels[: limit - seen]
            if len(images):
                yield images, labels
            seen += len(images)
            if limit is not None and seen >= limit:
                return

    def save(self, path: str | Path) -> None:
        """Write everything but ``batches`` to one safetensors file."""
        tensors: dict[str, Tensor] = {}
        for name in self.contents:
            value = getattr(self, name)
            if name in _DICTS:
                tensors |= {f"{name}/{key}": t.contiguous() for key, t in value.items()}
            elif name != "batches":
                tensors[name] = value.contiguous()
        save_file(tensors, str(path))

    @classmethod
    def load(cls, path: str | Path) -> SourceStatistics:
        """Read what :meth:`save` wrote; half-precision values become float32.

        Raises:
            ValueError: When the file holds something that is no source artefact.
        """
        known = [f.name for f in dataclasses.fields(cls)]
        values: dict[str, Any] = {}
        for key, tensor in load_file(str(path)).items():
            name, _, parameter = key.partition("/")
            if name not in known:
                raise ValueError(
                    f"`path` must be a file of source artefacts, but {path} holds {key!r}: "
                    + nearest(name, known)
                )
            tensor = tensor.float() if tensor.is_floating_point() else tensor
            if parameter:
                values.setdefault(name, {})[parameter] = tensor
            else:
                values[name] = tensor
        return cls(**values)


def as_source(source: Any) -> SourceStatistics:
    """What the caller gave as ``source=``, as :class:`SourceStatistics`.

    Raises:
        TypeError: When it is neither that nor an iterable of pairs.
    """
    if source is None:
        return SourceStatistics()
    if isinstance(source, SourceStatistics):
        return source
    if isinstance(source, Iterable) and not isinstance(source, (str, Tensor, dict)):
        return SourceStatistics(batches=source)
    raise TypeError(
        "`source` must be an iterable of (images, labels) or a tta.SourceStatistics, got "
        f"{type(source).__name__}: pass a data loader or what tta.collect_source returns."
    )


def collect_source(
    model: nn.Module,
    loader: Iterable[tuple[Tensor, Tensor]],
    for_methods: list[str] | str,
    **wrap_arguments: Any,
) -> SourceStatistics:
    """Compute the artefacts that methods need, from source batches, and leave the model alone.

    Args:
        model: The classifier, as it will be wrapped.
        loader: Batches ``(images, labels)`` of source images; read once per method.
        for_methods: Names as ``wrap`` takes them, presets included.
        **wrap_arguments: Passed to ``wrap``, such as ``norm=``: the Fisher information is taken
            under the norm rule that will be used.

    Returns:
        The artefacts, to be given to ``wrap(..., source=)`` and saved with ``.save``.

    Raises:
        TypeError: When ``loader`` is not iterable.
        ValueError: For an unknown method.
    """
    from tta.registry import component, get_config  # both use this module
    from tta.wrap import wrap

    if wrap_arguments.get("mean") is None and wrap_arguments.get("std") is None:
        wrap_arguments |= {"mean": (0.0,), "std": (1.0,)}  # no artefact depends on augmentation
    collected = SourceStatistics()
    for name in [for_methods] if isinstance(for_methods, str) else for_methods:
        with warnings.catch_warnings():
            # Thresholds of a preset play no part in source artefacts.
            warnings.filterwarnings("ignore", message=".*preset, made for")
            fields = getattr(component(name.partition(".")[0]), "for_artefacts", {})
            recipe = get_config(name).replace(**fields) if fields else name
            adapter = wrap(model, recipe, source=loader, **wrap_arguments)
        try:
            for part in (adapter.update, adapter.output):
                found = {} if part is None else part.source_artefacts()
                for key, value in found.items():
                    setattr(collected, key, _cloned(value))
        finally:
            adapter.unwrap()
    return collected


def _cloned(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: v.detach().clone() for key, v in value.items()}
    return value.detach().clone() if torch.is_tensor(value) else value
