"""The layer of a model that makes logits, found by structure and never by architecture name.

timm's ``get_classifier`` says which it is. Elsewhere it is the only linear layer there is or, of
several, the one that is called last: the order of definition says little, and the order of calls
is read off one forward pass on the ``meta`` device, which computes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from tta.core import functional
from tta.core.compiled import has_graphs, without_graphs
from tta.core.outputs import LogitsReader

__all__ = [
    "DryRun",
    "declared_sizes",
    "dry_run",
    "evaluating",
    "feature_size",
    "find_classifier",
    "first_layer",
    "num_classes",
    "size_in",
    "size_out",
    "timm_configs",
]

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
# A dry run of a large network takes a second or more, so its result is kept for the next wrap.
_FOUND: WeakKeyDictionary[nn.Module, tuple[tuple[int, ...], nn.Module]] = WeakKeyDictionary()
PROBE_SIZES = (224, 32, 64, 28, 299)  # of the images that the dry run tries, in pixels
# Those that it tries for a model which takes a single size, and has refused all of the above.
RARE_SIZES = (
    8, 10, 12, 14, 16, 20, 24, 36, 40, 48, 50, 56, 60, 72, 80, 84, 96, 100, 112, 120, 128, 144, 160,
    192, 200, 240, 256, 288, 320, 336, 384, 448, 512,
)  # fmt: skip
DECLARED_SIZES = ("img_size", "image_size")  # where a module says what it takes


def find_classifier(model: nn.Module, reader: LogitsReader | None = None) -> nn.Module:
    """The layer that makes logits out of features.

    Args:
        model: A classifier.
        reader: Takes logits out of what it returns; by default as :class:`LogitsReader` does.

    Raises:
        ValueError: When the model has neither ``get_classifier()`` nor a linear layer.
    """
    if (head := _declared(model)) is not None:
        return head
    candidates = [
        m
        for m in model.modules()
        if isinstance(m, (nn.Linear, nn.Conv2d)) or (m is not model and _says_linear(m))
    ]
    if not candidates:
        raise ValueError(
            f"`model` must be a classifier with a linear layer, got {type(model).__name__} without "
            "one: pass wrap(..., num_classes=...) and, to methods that read features, features=, "
            "the module that they go into or a function of model and images."
        )
    linear = [m for m in candidates if not isinstance(m, nn.Conv2d)]
    if len(linear) == 1:
        return linear[0]
    layers, found = tuple(map(id, candidates)), _FOUND.get(model)
    if found is None or found[0] != layers:
        # A module inside may declare it, as where a normaliser is around a timm model.
        inside = (head for m in model.modules() if (head := _declared(m)) is not None)
        head = _called_last(model, candidates, reader) or next(inside, (linear or candidates)[-1])
        found = _FOUND[model] = (layers, head)
    return found[1]


def _says_linear(module: nn.Module) -> bool:
    """Whether a module has what linear layers have, as quantised ones do."""
    sizes = [getattr(module, name, None) for name in ("in_features", "out_features")]
    return all(isinstance(size, int) for size in sizes) and hasattr(module, "weight")


def _declared(model: nn.Module) -> nn.Module | None:
    """Return what ``get_classifier()`` returns, if anything; of several heads, the first."""
    get_classifier: Any = getattr(model, "get_classifier", None)
    head = get_classifier() if callable(get_classifier) else None
    if isinstance(head, nn.ModuleDict):
        head = list(head.values())
    if isinstance(head, (tuple, list, nn.ModuleList)):
        head = head[0] if len(head) else None
    return head if isinstance(head, nn.Module) and not isinstance(head, nn.Identity) else None


def num_classes(model: nn.Module) -> int:
    """Number of classes, read off the classifier."""
    return size_out(find_classifier(model))


def feature_size(model: nn.Module) -> int:
    """Length of the features that the classifier takes, read off its first layer.

    Raises:
        ValueError: When no layer of the classifier declares it.
    """
    return size_in(find_classifier(model))


def size_out(head: nn.Module) -> int:
    """Length of what a classifier returns, read off its last layer."""
    return _size([head, *reversed(list(head.modules()))], "out_features", "out_channels")


def size_in(head: nn.Module) -> int:
    """Length of what a classifier takes, read off its first layer."""
    return _size([head, *head.modules()], "in_features", "in_channels")


def first_layer(model: nn.Module) -> Any:
    """The layer that images probably meet first: the first convolution, else the first linear."""
    layers = [m for m in model.modules() if isinstance(m, (*CONVOLUTIONS, nn.Linear))]
    layers = [m for m in layers if m.weight.dtype.is_floating_point]
    convolutions = [m for m in layers if isinstance(m, CONVOLUTIONS)]
    return next(iter(convolutions or layers), None)


def _size(layers: list[nn.Module], *names: str) -> int:
    for layer in layers:
        for name in names:
            if isinstance(size := getattr(layer, name, None), int):
                return size
    raise ValueError(
        f"`model` must have a classifier with {names[0]}, got a {type(layers[0]).__name__}: pass "
        "wrap(..., num_classes=...) and, to methods that read features, features=, the module that "
        "they go into or a function of model and images."
    )


def _called_last(
    model: nn.Module, candidates: Sequence[nn.Module], reader: LogitsReader | None
) -> nn.Module | None:
    """The candidate called last in a dry run, of those whose size is that of the logits.

    It is None where no dry run succeeds, as with control flow that depends on values.
    """
    calls: list[nn.Module] = []
    handles = [m.register_forward_hook(lambda *_, m=m: calls.append(m)) for m in candidates]
    try:
        run = dry_run(model, reader, calls.clear)
    finally:
        for handle in handles:
            handle.remove()
    if run is None:
        return None
    size = run.logits.shape[-1] if run.logits is not None and run.logits.ndim else None
    fitting = [m for m in calls if size is None or size_out(m) == size]
    if calls and not fitting:
        raise ValueError(
            f"`model` must make its logits by a linear layer, but no layer of this "
            f"{type(model).__name__} has {size} outputs: pass wrap(..., num_classes={size}) and, "
            "to methods that read features, features=, the module that they go into or a function "
            "of model and images."
        )
    return fitting[-1] if fitting else None


@dataclass(frozen=True)
class DryRun:
    """What a pass on the ``meta`` device shows.

    Args:
        logits: (2, C) on the ``meta`` device, a shape without values; None where none were found.
        moving: Names of the buffers and parameters that the model itself has changed.
    """

    logits: Tensor | None
    moving: tuple[str, ...]


def dry_run(
    model: nn.Module,
    reader: LogitsReader | None = None,
    before: Callable[[], None] | None = None,
    unseen: bool = False,
) -> DryRun | None:
    """One pass of two images on the ``meta`` device, which computes nothing.

    It is that of a copy of the modules, which calls the hooks of the model: what a model keeps of a
    pass, such as positions for the size of the images, would be without values. Where the copy does
    not run, as it may refer to the model from outside, the model itself does.

    Args:
        model: A classifier.
        reader: Takes logits out of what it returns.
        before: Called before every size of image that is tried.
        unseen: Leave out the hooks, and the model itself where the copy does not run.

    Returns:
        What the pass shows; None where no size succeeds, as with control flow that depends on
        values.
    """
    found = None
    if not has_graphs(model):
        with suppress(Exception):  # whatever an attribute of the caller's raises
            copied = functional.copy_structure(model, buffers=False)
            for module in copied.modules() if unseen else ():
                functional.take_hooks_off(module)
            found = _dry_run(copied, reader, before)
    return _dry_run(model, reader, before) if found is None and not unseen else found


def _dry_run(
    model: nn.Module, reader: LogitsReader | None, before: Callable[[], None] | None
) -> DryRun | None:
    reader = LogitsReader() if reader is None else reader
    tensors = [*model.parameters(), *model.buffers()]
    places = functional.names(model, tensors)
    by_value = False
    with torch.no_grad(), evaluating(model), without_graphs():
        usual, rare = list(_probe_shapes(model)), list(_rare_shapes(model))
        for place, shape in enumerate(usual + rare):
            if by_value and place >= len(usual):
                break  # it looks at values, whatever the size
            if before is not None:
                before()
            try:
                x = torch.empty(shape, device="meta", dtype=_dtype(model))
                meta = [torch.empty_like(t, device="meta") for t in tensors]
                held = functional.named(places, meta)
                storages = [t.untyped_storage()._cdata for t in meta]
                result = torch.func.functional_call(model, held, (x,), tie_weights=False)
            except Exception as error:  # whatever a model raises on an image that it does not take
                by_value = "meta" in str(error).lower()
                continue
            # A tensor is written to in place, gets other data, or another is put into its place.
            moving = [
                names[0]
                for names, tensor, storage in zip(places, meta, storages, strict=True)
                if tensor._version > 0
                or tensor.untyped_storage()._cdata != storage
                or held[names[0]] is not tensor
            ]
            try:
                return DryRun(reader.read(result), tuple(moving))
            except Exception:  # the caller's own function may raise anything
                return DryRun(None, tuple(moving))
    return None


def _probe_shapes(model: nn.Module) -> Iterator[tuple[int, ...]]:
    entry = first_layer(model)
    if isinstance(entry, CONVOLUTIONS):
        axes = entry.weight.ndim - 2
        for sizes in (*declared_sizes(model, axes), *((size,) * axes for size in PROBE_SIZES)):
            yield (2, entry.in_channels, *sizes)
    for size in PROBE_SIZES:
        yield (2, 3, size, size)
    if isinstance(entry, nn.Linear):
        yield (2, entry.in_features)


def _rare_shapes(model: nn.Module) -> Iterator[tuple[int, ...]]:
    entry = first_layer(model)
    if isinstance(entry, nn.Conv2d):
        for size in RARE_SIZES:
            yield (2, entry.in_channels, size, size)


def declared_sizes(model: nn.Module, axes: int) -> list[tuple[int, ...]]:
    """Sizes of images that modules say they take, as vision transformers do."""
    found: dict[tuple[int, ...], None] = {}
    for module in model.modules():
        for name in DECLARED_SIZES:
            size = getattr(module, name, None)
            sizes: Any = (size,) * axes if isinstance(size, int) else size
            whole = isinstance(sizes, (tuple, list)) and len(sizes) == axes
            if whole and all(isinstance(n, int) and n > 0 for n in sizes):
                found[tuple(sizes)] = None
    return list(found)


def timm_configs(model: nn.Module) -> Iterator[dict[str, Any]]:
    """What a model says of its weights and images, under both of timm's names for it."""
    for name in ("pretrained_cfg", "default_cfg"):
        said = getattr(model, name, None)
        if isinstance(said, dict):
            yield said


def _dtype(model: nn.Module) -> torch.dtype:
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put the model in eval mode, and afterwards every module back in the mode it was in."""
    modes = [(m, m.training) for m in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
