"""Source artefacts: what some methods need from the training data, computed once and kept.

A method never loads data. It takes a :class:`SourceStatistics`, made by :func:`tta.collect_source`
from batches of source images, read from a file, or built by keyword.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from tta.core.checks import nearest, new_file, path_like, shown, told
from tta.core.denoiser import Diffusion
from tta.core.files import replacing, writing
from tta.core.source_checks import (
    BY_NAME,
    MODULES,
    check_denoiser,
    check_iterable,
    check_module,
    check_named,
    check_tensor,
)
from tta.core.warn import warn

__all__ = ["SourceStatistics", "as_source", "missing_artefact", "preserving_rng"]

NOT_SAVED = ("batches", "denoiser", *MODULES)


@dataclass(kw_only=True, repr=False)
class SourceStatistics:
    """Any subset of the artefacts; ``wrap`` raises when a method needs one that is missing.

    Args:
        fisher: Diagonal Fisher information by parameter name (EATA).
        posterior_mean: Mean of the source posterior by parameter name (PETAL).
        posterior_variance: Variance of the source posterior by parameter name (PETAL).
        prototypes: Class means of features (C, D) under batch statistics (RMT, CAFA).
        features: Features as the classifier sees them (N, D), not normalised (AdaNPC).
        feature_labels: Labels of ``features`` (N,), whole numbers (AdaNPC).
        memory_init: First row of AdaNPC's memory in the official code (D,).
        feature_mean: Mean of the features under running statistics (D,) (NEO, FOA's shift, DPCore).
        feature_std: Unbiased standard deviation of the features (D,) (DPCore).
        block_mean: Mean of what each block gives (d,), by module name (PEA).
        block_variance: Its variance (d,), by module name (PEA).
        block_covariance_root: Symmetric root of its covariance (d, d), by module name (PEA).
        layer_mean: Mean of the class token after each block (L, D) (FOA).
        layer_std: Its unbiased standard deviation (L, D) (FOA).
        class_mean: Means of the features of images that are predicted as each class (C, D), under
            running statistics (PeTTA).
        class_variance: Unbiased variances of the same (C, D) (PeTTA).
        covariance: Covariance of features within classes (D, D), or (C, D, D) of each (CAFA).
        label_shift: Network that was fitted on the source, as A1 (Hd, 1 or C), c1 (Hd,), A2 (O, Hd)
            and c2 (O,) (LSA).
        source_prior: Class shares of the source (C,) (LSA).
        consistency: Weights and biases of L element-wise maps on features (2, L, D) (ITTA).
        denoiser: A :class:`tta.Diffusion` that was trained on the source (DDA, SDA).
        style_mean: Mean style of source batches (S,) (ReservoirTTA).
        style_threshold: Distance of styles above which a cluster is new, without axes
            (ReservoirTTA).
        style_net: Module from pixels (B, C, H, W) in [0, 1] to a list of maps (B, C_i, ...), whose
            variances are the style (ReservoirTTA).
        batches: Source batches ``(images, labels)``, kept for methods that run the model on them,
            in the order given.

    Raises:
        TypeError: When an artefact is not a tensor, or a dict of tensors.
        ValueError: For a wrong number of axes, values that are not finite (except NaN in what has a
            row for each class, which may have no images), negative Fisher information, or features
            without labels.
    """

    fisher: dict[str, Tensor] | None = None
    posterior_mean: dict[str, Tensor] | None = None
    posterior_variance: dict[str, Tensor] | None = None
    prototypes: Tensor | None = None
    features: Tensor | None = None
    feature_labels: Tensor | None = None
    memory_init: Tensor | None = None
    feature_mean: Tensor | None = None
    feature_std: Tensor | None = None
    block_mean: dict[str, Tensor] | None = None
    block_variance: dict[str, Tensor] | None = None
    block_covariance_root: dict[str, Tensor] | None = None
    layer_mean: Tensor | None = None
    layer_std: Tensor | None = None
    class_mean: Tensor | None = None
    class_variance: Tensor | None = None
    covariance: Tensor | None = None
    label_shift: dict[str, Tensor] | None = None
    source_prior: Tensor | None = None
    consistency: Tensor | None = None
    denoiser: Diffusion | None = None
    style_mean: Tensor | None = None
    style_threshold: Tensor | None = None
    style_net: nn.Module | None = None
    batches: Iterable[tuple[Tensor, Tensor]] | None = None

    def __post_init__(self) -> None:
        for name in self.contents:
            value = getattr(self, name)
            if name in BY_NAME:
                check_named(name, value)
                setattr(self, name, {key: tensor.detach() for key, tensor in value.items()})
            elif name == "batches":
                check_iterable("batches", value)
            elif name == "denoiser":
                check_denoiser(value)
            elif name in MODULES:
                check_module(name, value)
            else:
                check_tensor(name, value)
                setattr(self, name, value.detach())  # without the caller's graph
        features, labels = self.features, self.feature_labels
        if (features is None) != (labels is None) or (
            features is not None and labels is not None and len(features) != len(labels)
        ):
            raise ValueError(
                "`features` and `feature_labels` must come together and be equally long, got "
                f"{None if features is None else len(features)} and "
                f"{None if labels is None else len(labels)}: pass one label for each row."
            )

    def __repr__(self) -> str:
        """Show which artefacts there are, with shapes in place of values."""

        def shown(value: Any) -> str:
            if isinstance(value, Tensor):
                return str(tuple(value.shape))
            return f"{len(value)} tensors" if isinstance(value, dict) else type(value).__name__

        parts = (f"{name}: {shown(getattr(self, name))}" for name in self.contents)
        return f"SourceStatistics({', '.join(parts)})"

    @property
    def contents(self) -> list[str]:
        """Names of the artefacts that are there."""
        names = [f.name for f in dataclasses.fields(self)]
        return [n for n in names if getattr(self, n) is not None]

    def iter_batches(self, limit: int | None = None) -> Iterator[tuple[Tensor, Any]]:
        """Iterate once over ``batches``, up to ``limit`` images; labels may be None if unused."""
        seen = 0
        for images, labels in preserving_rng(self.batches or ()):
            if limit is not None and seen + len(images) > limit:
                images = images[: limit - seen]
                labels = None if labels is None else labels[: limit - seen]
            if len(images):
                yield images, labels
            seen += len(images)
            if limit is not None and seen >= limit:
                return

    def save(self, path: str | Path) -> None:
        """Write all tensors to one safetensors file, and warn of what is none.

        What the file held stays until the new content is whole.

        Raises:
            TypeError: When ``path`` is no path.
            FileNotFoundError: When its folder is not there.
            IsADirectoryError: When it is a folder itself.
            OSError: When it cannot be written to.
        """
        path = new_file("path", path)
        for name in (name for name in NOT_SAVED if name in self.contents):
            warn(
                f"`{name}` is not saved: give it again after load, by "
                f"dataclasses.replace(statistics, {name}=...)."
            )
        tensors: dict[str, Tensor] = {}
        for name in self.contents:
            value = getattr(self, name)
            if name in BY_NAME:
                tensors |= {f"{name}/{key}": t.contiguous() for key, t in value.items()}
            elif name not in NOT_SAVED:
                tensors[name] = value.contiguous()
        with writing("path", path), replacing(path) as part:
            part.write_bytes(to_bytes(tensors))

    @classmethod
    def load(cls, path: str | Path) -> SourceStatistics:
        """Read what :meth:`save` wrote; half-precision values become float32.

        Raises:
            TypeError: When ``path`` is no path.
            FileNotFoundError: When there is no such file.
            ValueError: When the file holds something that is no source artefact.
        """
        path = path_like("path", path)
        if not path.is_file():
            raise FileNotFoundError(
                f"`path` must be a file of source artefacts, but {path} is not there: make it with "
                "tta.collect_source(...).save(path)."
            )
        try:
            tensors = load_file(str(path))
        except SafetensorError as error:
            raise ValueError(
                f"`path` must be a file of source artefacts, but {path} is no whole safetensors "
                f"file ({told(error)}): make it with tta.collect_source(...).save(path)."
            ) from None
        known = [f.name for f in dataclasses.fields(cls) if f.name not in NOT_SAVED]
        values: dict[str, Any] = {}
        for key, tensor in tensors.items():
            name, slash, parameter = key.partition("/")
            if name not in known or bool(slash) != (name in BY_NAME):
                raise ValueError(
                    f"`path` must be a file of source artefacts, but {told(path, 60)} holds "
                    f"{told(shown(key), 50)}: {nearest(name, known, room=80)}"
                )
            tensor = tensor.float() if tensor.is_floating_point() else tensor
            if slash:
                values.setdefault(name, {})[parameter] = tensor
            else:
                values[name] = tensor
        return cls(**values)


def preserving_rng(batches: Iterable[Any]) -> Iterator[Any]:
    """Iterate once over ``batches`` without changing torch's global generator.

    Every pass over a data loader draws from that generator, and datasets may do so too. Here they
    draw from a copy of its state, which goes on from batch to batch.
    """
    reader, inside = None, torch.get_rng_state()
    while True:
        outside = torch.get_rng_state()
        torch.set_rng_state(inside)
        try:
            reader = iter(batches) if reader is None else reader
            batch = next(reader)
        except StopIteration:
            return
        finally:
            inside = torch.get_rng_state()
            torch.set_rng_state(outside)
        yield batch


def missing_artefact(
    source: SourceStatistics, method: str, what: str, instead: str = "source batches"
) -> ValueError:
    """What to raise where a source gives a method nothing to work with.

    Args:
        source: The source.
        method: The method's name.
        what: That it needs, in words.
        instead: What may be passed in its place, besides what ``collect_source`` returns.
    """
    contents = source.contents
    return ValueError(
        f"`source` must give {method} {what}, got {shown(contents) if contents else 'nothing'}: "
        f"pass {instead}, or what tta.collect_source(model, loader, for_methods=['{method}']) "
        "returns."
    )


def as_source(source: Any) -> SourceStatistics:
    """Convert the caller's ``source=`` to :class:`SourceStatistics`.

    Raises:
        TypeError: When it is neither that nor an iterable.
    """
    if source is None:
        return SourceStatistics()
    if isinstance(source, SourceStatistics):
        return source
    check_iterable("source", source)
    return SourceStatistics(batches=source)
