"""``load(name) -> (model, info)`` for bundled, timm and torchvision classifiers."""

from __future__ import annotations

import pickle
import textwrap
from collections import Counter
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
from safetensors.torch import load_file
from timm.data.config import resolve_model_data_config
from torch import Tensor, nn

import tta
from models.bundled import BUNDLED, CIFAR10_CLASSES, FOLDER
from tta.core.checks import flag, folder_or_file, nearest, text
from tta.core.classifier import find_classifier, num_classes
from tta.core.parameters import is_norm

__all__ = ["ModelInfo", "list_models", "load"]

LIBRARIES = ("timm", "torchvision")
SHOWN = 5  # names of a library in an error


@dataclass(frozen=True, kw_only=True)
class ModelInfo:
    """What a caller must know to feed a model.

    ``mean`` and ``std`` turn pixels in [0, 1] into what the model takes; 0 and 1 say that it takes
    pixels, as the bundled ones do. ``source`` holds artefacts made from training images.
    """

    name: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    input_size: tuple[int, int, int]  # channels, height, width
    num_classes: int
    class_names: tuple[str, ...] | None
    norm_types: dict[str, int]  # class name of each kind of norm layer -> how many
    source: tta.SourceStatistics | None = None


def list_models(pattern: str = "*") -> list[str]:
    """Names of the bundled classifiers; with a prefix ("timm:res*"), of that library's.

    Example:
        >>> list_models("*_bn")
        ['cifar10_resnet20_bn']
    """
    library, colon, rest = text("pattern", pattern).partition(":")
    if not colon:
        return sorted(n for n in BUNDLED if fnmatch(n, pattern))
    _check_library(library)
    if library == "timm":
        return [f"timm:{n}" for n in timm.list_models(rest)]
    names = torchvision.models.list_models(module=torchvision.models)
    return [f"torchvision:{n}" for n in names if fnmatch(n, rest)]


def load(
    name: str, pretrained: bool = True, *, checkpoint: str | Path | None = None
) -> tuple[nn.Module, ModelInfo]:
    """Load a classifier in eval mode.

    Args:
        name: A bundled name, "timm:<name>" or "torchvision:<name>"; "<name>@<path>" is short for
            ``checkpoint=<path>``.
        pretrained: Whether to load weights (of the library's default tag); False gives random
            ones. Weights of timm and torchvision are fetched by those libraries.
        checkpoint: A local ``.safetensors`` or ``.pt`` file with a state dict for this
            architecture; the number of classes is read off it.

    Returns:
        The model and its :class:`ModelInfo`.

    Raises:
        TypeError: When an argument is of the wrong kind.
        ValueError: For an unknown name, naming the nearest, or a checkpoint that is none or does
            not fit.
        FileNotFoundError: When the checkpoint is not there.
        RuntimeError: When weights cannot be fetched.
    """
    name, at, path = text("name", name).partition("@")
    flag("pretrained", pretrained)
    checkpoint = path if at else checkpoint
    state = None if checkpoint is None else _read(folder_or_file("checkpoint", checkpoint))
    library, colon, rest = name.partition(":")
    if colon:
        _check_library(library)
        make = _timm if library == "timm" else _torchvision
        if state is not None:
            model, about = make(rest, False, _classes_of(state, make, rest))
        else:
            model, about = make(rest, pretrained, None)
    else:
        model, about = _bundled(name, pretrained and state is None)
    if state is not None:
        _fill(model, state, name, Path(str(checkpoint)))
    norms = Counter(type(m).__name__ for m in model.modules() if is_norm(m))
    info = ModelInfo(name=name, num_classes=num_classes(model), norm_types=dict(norms), **about)
    return model.eval(), info


def _check_library(library: str) -> None:
    if library not in LIBRARIES:
        raise ValueError(f"unknown library {library!r}: " + nearest(library, LIBRARIES))


def _bundled(name: str, pretrained: bool) -> tuple[nn.Module, dict[str, Any]]:
    if name not in BUNDLED:
        options = [*BUNDLED, "timm:<name>", "torchvision:<name>"]
        raise ValueError(f"unknown model {name!r}: " + nearest(name, options))
    model, folder = BUNDLED[name](), FOLDER / name
    source = None
    if pretrained:
        weights = {k: v.float() if v.is_floating_point() else v for k, v in _weights(folder)}
        model.load_state_dict(weights)
        source = tta.SourceStatistics.load(folder / "source.safetensors")
    return model, {
        "mean": (0.0, 0.0, 0.0),
        "std": (1.0, 1.0, 1.0),
        "input_size": (3, 32, 32),
        "class_names": CIFAR10_CLASSES,
        "source": source,
    }


def _weights(folder: Path) -> list[tuple[str, Tensor]]:
    return list(load_file(str(folder / "weights.safetensors")).items())


def _timm(name: str, pretrained: bool, classes: int | None) -> tuple[nn.Module, dict[str, Any]]:
    known = timm.list_models()
    if name.partition(".")[0] not in known:
        raise ValueError(f"unknown timm model {name!r}: " + nearest(name, known, SHOWN))
    extra: dict[str, Any] = {} if classes is None else {"num_classes": classes}
    model = _fetched(name, pretrained, lambda: timm.create_model(name, pretrained, **extra))
    cfg = resolve_model_data_config(model)
    return model, {
        "mean": tuple(cfg["mean"]),
        "std": tuple(cfg["std"]),
        "input_size": tuple(cfg["input_size"]),
        "class_names": None,
    }


def _torchvision(
    name: str, pretrained: bool, classes: int | None
) -> tuple[nn.Module, dict[str, Any]]:
    known = torchvision.models.list_models(module=torchvision.models)
    if name not in known:
        raise ValueError(f"unknown torchvision model {name!r}: " + nearest(name, known, SHOWN))
    weights = torchvision.models.get_model_weights(name)["DEFAULT"]
    extra = {} if classes is None else {"num_classes": classes}
    model = _fetched(
        name,
        pretrained,
        lambda: torchvision.models.get_model(
            name, weights=weights if pretrained else None, **extra
        ),
    )
    transforms: Any = weights.transforms()
    size = transforms.crop_size[0]
    return model, {
        "mean": tuple(transforms.mean),
        "std": tuple(transforms.std),
        "input_size": (3, size, size),
        "class_names": tuple(weights.meta["categories"]) if classes is None else None,
    }


def _fetched(name: str, pretrained: bool, create: Any) -> nn.Module:
    try:
        return create()
    except Exception as error:
        if not pretrained:
            raise
        raise RuntimeError(
            f"`name`={name!r} must have weights that can be fetched, but fetching failed "
            f"({type(error).__name__}): check the network, or pass checkpoint= or "
            "pretrained=False."
        ) from error


def _read(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise FileNotFoundError(
            f"`checkpoint` must be a file, but {path} is not there: pass a .safetensors or "
            ".pt file."
        )
    try:
        if path.suffix == ".safetensors":
            return load_file(str(path))
        state: Any = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # junk makes an unpickler raise anything
        odd = isinstance(error, pickle.UnpicklingError) or not str(error)
        reason = "it holds no plain tensors" if odd else textwrap.shorten(str(error), 200)
        raise _no_checkpoint(path, reason) from None
    for key in ("state_dict", "model", "net"):  # where training scripts put it
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict):
        raise _no_checkpoint(path, f"it holds a {type(state).__name__}")
    found = {str(k).removeprefix("module."): v for k, v in state.items() if isinstance(v, Tensor)}
    if not found:
        raise _no_checkpoint(path, "it holds no tensors")
    return found


def _no_checkpoint(path: Path, reason: str) -> ValueError:
    return ValueError(
        f"`checkpoint` must be a .safetensors or .pt file with a state dict, but {path} is not "
        f"({reason}): save one with torch.save(model.state_dict(), path)."
    )


def _classes_of(state: dict[str, Tensor], make: Any, name: str) -> int | None:
    """Rows of the classifier's weight in the checkpoint, found by its place in the model."""
    model, _ = make(name, False, None)
    head = find_classifier(model)
    key = next(n for n, m in model.named_modules() if m is head)
    for candidate in (f"{key}.weight", f"{key}.fc.weight"):
        if candidate in state and state[candidate].ndim > 0:
            return int(state[candidate].shape[0])
    return None


def _fill(model: nn.Module, state: dict[str, Tensor], name: str, path: Path) -> None:
    try:
        model.load_state_dict(
            {k: v.float() if v.dtype == torch.half else v for k, v in state.items()}
        )
    except RuntimeError as error:
        detail = str(error).splitlines()[1].strip() if "\n" in str(error) else str(error)
        detail = textwrap.shorten(detail, 200, placeholder=" ...")
        raise ValueError(
            f"`checkpoint` must hold a state dict of {name}, but {path} does not fit ({detail}): "
            "pass the name of the architecture it was made with."
        ) from None
