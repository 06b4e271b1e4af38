"""Checks of source artefacts and source batches, against themselves and against a model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tta.core.checks import dense, is_iterable, nearest, real, shown, told
from tta.core.denoiser import Diffusion

__all__ = [
    "BY_NAME",
    "BY_PARAMETER",
    "MODULES",
    "check_denoiser",
    "check_iterable",
    "check_module",
    "check_named",
    "check_parameters",
    "check_tensor",
    "checked",
]

MODULES = ("style_net",)
BY_PARAMETER = ("fisher", "posterior_mean", "posterior_variance")
BY_MODULE = ("block_mean", "block_variance", "block_covariance_root")
BY_NAME = (*BY_PARAMETER, *BY_MODULE, "label_shift")  # dicts of tensors
SHAPES = {  # of the tensors, as errors name them, by number of axes
    "prototypes": {2: "(C, D)"},
    "features": {2: "(N, D)"},
    "feature_labels": {1: "(N,)"},
    "memory_init": {1: "(D,)"},
    "feature_mean": {1: "(D,)"},
    "feature_std": {1: "(D,)"},
    "layer_mean": {2: "(L, D)"},
    "layer_std": {2: "(L, D)"},
    "class_mean": {2: "(C, D)"},
    "class_variance": {2: "(C, D)"},
    "style_mean": {1: "(S,)"},
    "style_threshold": {0: "()"},
    "covariance": {2: "(D, D)", 3: "(C, D, D)"},
    "source_prior": {1: "(C,)"},
    "consistency": {3: "(2, L, D)"},
}


def check_parameters(source: Any, model: nn.Module) -> None:
    """Compare artefacts that go by parameter name with an unwrapped model.

    Raises:
        ValueError: For a name that the model does not have, or another shape.
    """
    names = dict(model.named_parameters(remove_duplicate=False))
    mine = names | dict(model.named_buffers(remove_duplicate=False))  # for a posterior
    for kind in BY_PARAMETER:
        for name, value in (getattr(source, kind) or {}).items():
            if name not in mine:
                raise ValueError(
                    f"`source.{kind}` must go by the names of this {type(model).__name__}'s "
                    f"parameters, got {shown(name)}: {nearest(name, names, limit=10)}"
                )
            if value.shape != mine[name].shape:
                raise ValueError(
                    f"`source.{kind}` must hold {shown(name)} of shape {tuple(mine[name].shape)}, "
                    "got "
                    f"{tuple(value.shape)}: make it for this model with tta.collect_source."
                )


def checked(
    batches: Any, check: Callable[[Any], None], classes: int | None, optional: bool = False
) -> Any:
    """The same batches, each checked before it is used, with labels of int64.

    Args:
        batches: Source batches. A list or tuple is checked at once and returned as it is; of
            anything else, every batch is checked when it is read.
        check: Raises for images that the model cannot take.
        classes: Number of classes, or None where labels are not used.
        optional: Whether None may stand for labels that nobody has.

    Raises:
        TypeError: When a batch is no pair, or its images or labels are of the wrong kind.
        ValueError: When images do not fit the model, or labels do not fit the images or the
            classes.
    """
    if isinstance(batches, (list, tuple)):
        found = [_batch(i, batch, check, classes, optional) for i, batch in enumerate(batches)]
        same = all(a is b for a, b in zip(found, batches, strict=True))
        return batches if same else found
    kind = _CheckedSequence if isinstance(batches, Sequence) else _Checked
    return kind(batches, check, classes, optional)


class _Checked:
    """Batches that are checked as they are read."""

    def __init__(
        self, batches: Any, check: Callable[[Any], None], classes: int | None, optional: bool
    ) -> None:
        self.batches, self.how = batches, (check, classes, optional)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for place, batch in enumerate(self.batches):
            yield _batch(place, batch, *self.how)


class _CheckedSequence(_Checked, Sequence[Any]):
    """Batches at any position, checked as they are read."""

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, place: Any) -> Any:
        return _batch(place, self.batches[place], *self.how)


def _batch(
    place: int, batch: Any, check: Callable[[Any], None], classes: int | None, optional: bool
) -> Any:
    """The batch, checked; copied if it was made in inference mode, where no gradient flows."""
    if optional and isinstance(batch, (tuple, list)) and len(batch) == 2 and batch[1] is None:
        classes = None
    _check_batch(place, batch, check, classes)
    if classes is not None and batch[1].dtype != torch.int64:
        batch = (batch[0], batch[1].to(torch.int64))
    if not any(isinstance(part, Tensor) and part.is_inference() for part in batch):
        return batch
    with torch.inference_mode(False):
        return tuple(part.clone() if isinstance(part, Tensor) else part for part in batch)


def _check_batch(place: int, batch: Any, check: Callable[[Any], None], classes: int | None) -> None:
    where = f"`source` must give pairs (images, labels), but batch {place}"
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        got = type(batch).__name__
        got += f" of {len(batch)}" if isinstance(batch, (tuple, list)) else ""
        raise TypeError(f"{where} is a {got}: pass a loader that gives two tensors.")
    images, labels = batch
    try:
        check(images)
    except (TypeError, ValueError) as error:
        raise type(error)(
            f"{where} has images that this model cannot take: {told(error)}"
        ) from None
    # One such pixel would spoil every mean, Fisher information or fitted network.
    wrong = int((~images.isfinite()).flatten(1).any(1).sum()) if images.is_floating_point() else 0
    if wrong:
        raise ValueError(
            f"{where} has NaN or infinite values in {wrong} of {len(images)} images: leave these "
            "out."
        )
    if classes is None:
        return
    if isinstance(labels, Tensor):
        dense(f"source[{place}][1]", labels)
    if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.is_complex():
        got = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
        raise TypeError(f"{where} has labels of {got}: pass class numbers as an int64 tensor.")
    if labels.shape != images.shape[:1]:
        raise ValueError(
            f"{where} has labels of shape {tuple(labels.shape)} for {len(images)} images: pass one "
            "class number for each image."
        )
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= classes:
        raise ValueError(
            f"{where} has labels from {low} to {high}, and this model has {classes} classes: pass "
            f"class numbers from 0 to {classes - 1}."
        )


def check_denoiser(value: Any) -> None:
    """Refuse what is no denoiser with its noise."""
    if not isinstance(value, Diffusion):
        raise TypeError(
            f"`denoiser` must be a tta.Diffusion, got {type(value).__name__}: pass "
            "tta.Diffusion(denoiser, betas), with the variances of its training."
        )


def check_iterable(name: str, value: Any) -> None:
    """Refuse what cannot hold source batches."""
    if isinstance(value, (str, bytes, Tensor, Mapping)) or not is_iterable(value):
        what = "an iterable of (images, labels)"
        what += " or a tta.SourceStatistics" if name == "source" else ""
        raise TypeError(
            f"`{name}` must be {what}, got {type(value).__name__}: pass a data loader or what "
            "tta.collect_source returns."
        )


def check_module(name: str, value: Any) -> None:
    """Refuse what is no module."""
    if not isinstance(value, nn.Module):
        raise TypeError(
            f"`{name}` must be a torch.nn.Module, got {type(value).__name__}: write one around it."
        )


def check_named(name: str, value: Any) -> None:
    """Refuse what is no dict of finite tensors by parameter name."""
    if not isinstance(value, Mapping):
        raise TypeError(
            f"`{name}` must be a dict of tensors by name, got {type(value).__name__}: "
            "pass what tta.collect_source returns."
        )
    for key, tensor in value.items():
        if not isinstance(key, str) or not isinstance(tensor, Tensor):
            raise TypeError(
                f"`{name}` must be a dict of tensors by name, got "
                f"{type(tensor).__name__} under {shown(key)}: pass what tta.collect_source returns."
            )
        dense(f"{name}[{told(key)}]", tensor)
        real(f"{name}[{told(key)}]", tensor)
        # Rounding may leave a variance just below 0, but never the square of a gradient.
        negative = name == "fisher" and bool((tensor < 0).any())
        if negative or not bool(torch.isfinite(tensor).all()):
            raise ValueError(
                f"`{name}` must be finite{' and not below 0' if name == 'fisher' else ''}, got "
                f"{'negative' if negative else 'NaN or infinite'} values under {shown(key)}: make "
                "it "
                "again with tta.collect_source."
            )


def check_tensor(name: str, value: Any) -> None:
    """Refuse a tensor of another shape or kind than the artefact `name` has."""
    shapes = SHAPES[name]
    expected = f"a tensor of shape {' or '.join(shapes.values())}"
    if not isinstance(value, Tensor):
        raise TypeError(f"`{name}` must be {expected}, got {type(value).__name__}: convert it.")
    dense(name, value)
    if value.ndim not in shapes:
        raise ValueError(
            f"`{name}` must be {expected}, got shape {tuple(value.shape)}: reshape it."
        )
    if name == "feature_labels":
        if value.is_floating_point() or value.is_complex():
            raise TypeError(f"`{name}` must be whole numbers, got {value.dtype}: use .long().")
        return
    real(name, value)
    by_class = name in ("prototypes", "class_mean", "class_variance")
    wrong = value.isinf() if by_class else ~value.isfinite()
    if bool(wrong.any()):  # a class without images has a row of NaN
        raise ValueError(
            f"`{name}` must be finite, got NaN or infinite values: make it again with "
            "tta.collect_source."
        )
