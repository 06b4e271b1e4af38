"""``load(name) -> (model, info)`` for bundled, timm and torchvision classifiers."""

from __future__ import annotations

import importlib
import socket
import urllib.error
import urllib.request
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Literal, get_args

import timm
import torchvision
from safetensors.torch import load_file
from timm.data.config import resolve_model_data_config
from torch import Tensor, nn

import tta
from models.bundled import BUNDLED, CIFAR10_CLASSES, FOLDER
from models.card import SourceCard, of_file
from models.checkpoint import Weights, fit, read_checkpoint, rows_of
from tta.core.checks import boolean, nearest, path_like, shown, string
from tta.core.classifier import find_classifier, num_classes
from tta.core.parameters import is_norm

__all__ = ["ModelInfo", "list_models", "load"]

LIBRARIES = ("timm", "torchvision")
SHOWN = 5  # names of a library in an error
PATIENCE_S = 5.0  # seconds to wait for the first answer of a host
Match = Literal["name", "order"]
# Settings of the client by which timm fetches weights; it is needed for timm alone.
_HUB: Any = importlib.import_module("huggingface_hub.constants")


@dataclass(frozen=True, kw_only=True)
class ModelInfo:
    """What a caller must know to feed a model.

    ``mean`` and ``std`` turn pixels in [0, 1] into what the model takes; 0 and 1 say that it takes
    pixels, as the bundled ones do. ``source`` holds artefacts made from training images. ``card``
    says what an error of the unadapted model depends on.
    """

    name: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    input_size: tuple[int, int, int]  # channels, height, width
    num_classes: int
    class_names: tuple[str, ...] | None
    norm_types: dict[str, int]  # class name of each kind of norm layer -> how many
    source: tta.SourceStatistics | None = None
    matched: int | None = None  # tensors taken from a checkpoint
    card: SourceCard | None = None


def list_models(pattern: str = "*") -> list[str]:
    """Names of the bundled classifiers, or with a prefix ("timm:res*") those of that library.

    Example:
        >>> list_models("*_bn")
        ['cifar10_resnet20_bn']
    """
    library, colon, rest = string("pattern", pattern).partition(":")
    if not colon:
        return sorted(n for n in BUNDLED if fnmatch(n, pattern))
    _check_library(library)
    if library == "timm":
        return [f"timm:{n}" for n in timm.list_models(rest)]
    names = torchvision.models.list_models(module=torchvision.models)
    return [f"torchvision:{n}" for n in names if fnmatch(n, rest)]


def load(
    name: str,
    pretrained: bool = True,
    *,
    checkpoint: str | Path | None = None,
    match: Match = "name",
) -> tuple[nn.Module, ModelInfo]:
    """Load a classifier in eval mode.

    Args:
        name: A bundled name, "timm:<name>" or "torchvision:<name>"; "<name>@<path>" is short for
            ``checkpoint=<path>``.
        pretrained: Whether to load weights (of the library's default tag); False gives random
            ones. Weights of timm and torchvision are fetched by those libraries.
        checkpoint: A local ``.safetensors`` or ``.pt`` file with a state dict for this
            architecture; the number of classes is read off it. The state dict may lie in the
            dictionary of a training script (of several that fit an average of weights is preferred,
            as timm does), under names with a prefix ("module.", "_orig_mod.", "model.", ...), and
            together with buffers of profilers.
        match: "name" pairs the checkpoint's tensors with the model's by their names. "order" pairs
            them by their place, for a port of another framework whose names differ: there must be
            equally many, not counting ``num_batches_tracked``, and every shape must be equal. A
            warning and ``info.matched`` say how many matched.

    Returns:
        The model and its :class:`ModelInfo`.

    Raises:
        TypeError: When an argument is of the wrong kind.
        ValueError: For an unknown name, naming the nearest, or a file that is no checkpoint or does
            not fit.
        FileNotFoundError: When the checkpoint is not there.
        RuntimeError: When weights cannot be fetched.
    """
    name, at, path = string("name", name).partition("@")
    boolean("pretrained", pretrained)
    if match not in get_args(Match):
        raise ValueError(
            f'`match` must be one of {", ".join(get_args(Match))}, got {shown(match)}: "order" is '
            "for "
            "ports whose names differ."
        )
    by_order = match == "order"
    checkpoint = path if at else checkpoint
    if by_order and checkpoint is None:
        raise ValueError(
            '`match="order"` must come with a checkpoint, got none: pass checkpoint= or the name '
            "as NAME@PATH."
        )
    found = None if checkpoint is None else read_checkpoint(path_like("checkpoint", checkpoint))
    library, colon, rest = name.partition(":")
    if colon:
        _check_library(library)
        make = _timm if library == "timm" else _torchvision
        if found is not None:
            model, about = make(rest, False, _classes_of(found, make, rest, by_order))
        else:
            model, about = make(rest, pretrained, None)
    else:
        model, about = _bundled(name, pretrained and found is None)
    if found is not None:
        about["matched"] = _fill(model, found, name, Path(str(checkpoint)), by_order)
    if found is not None:
        about["weights"] = of_file(Path(str(checkpoint)))
    card = SourceCard(
        model=name,
        mean=about["mean"],
        std=about["std"],
        input_size=about["input_size"],
        **{field: about.pop(field) for field in ("weights", "crop", "interpolation")},
    )
    norms = Counter(type(m).__name__ for m in model.modules() if is_norm(m))
    info = ModelInfo(
        name=name, num_classes=num_classes(model), norm_types=dict(norms), card=card, **about
    )
    return model.eval(), info


def _check_library(library: str) -> None:
    if library not in LIBRARIES:
        raise ValueError(f"unknown library {shown(library)}: " + nearest(library, LIBRARIES))


def _bundled(name: str, pretrained: bool) -> tuple[nn.Module, dict[str, Any]]:
    if name not in BUNDLED:
        options = [*BUNDLED, "timm:<name>", "torchvision:<name>"]
        raise ValueError(f"unknown model {shown(name)}: " + nearest(name, options))
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
        "weights": "bundled" if pretrained else "random",
        "crop": 1.0,
        "interpolation": "",
    }


def _weights(folder: Path) -> list[tuple[str, Tensor]]:
    return list(load_file(str(folder / "weights.safetensors")).items())


def _timm(name: str, pretrained: bool, classes: int | None) -> tuple[nn.Module, dict[str, Any]]:
    known = timm.list_models()
    if name.partition(".")[0] not in known:
        raise ValueError(f"unknown timm model {shown(name)}: " + nearest(name, known, SHOWN))
    extra: dict[str, Any] = {} if classes is None else {"num_classes": classes}
    host = _HUB.ENDPOINT
    model = _fetched(
        f"timm:{name}", pretrained, host, lambda: timm.create_model(name, pretrained, **extra)
    )
    cfg = resolve_model_data_config(model)
    return model, {
        "mean": tuple(cfg["mean"]),
        "std": tuple(cfg["std"]),
        "input_size": tuple(cfg["input_size"]),
        "class_names": None,
        "weights": _tag(model) if pretrained else "random",
        "crop": float(cfg["crop_pct"]),
        "interpolation": str(cfg["interpolation"]),
    }


def _torchvision(
    name: str, pretrained: bool, classes: int | None
) -> tuple[nn.Module, dict[str, Any]]:
    known = torchvision.models.list_models(module=torchvision.models)
    if name not in known:
        raise ValueError(f"unknown torchvision model {shown(name)}: " + nearest(name, known, SHOWN))
    weights = torchvision.models.get_model_weights(name)["DEFAULT"]
    extra = {} if classes is None else {"num_classes": classes}
    model = _fetched(
        f"torchvision:{name}",
        pretrained,
        weights.url,
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
        "weights": str(weights) if pretrained else "random",
        "crop": size / transforms.resize_size[0],
        "interpolation": transforms.interpolation.value,
    }


def _tag(model: nn.Module) -> str:
    """The tag of the weights that timm has loaded, its name for the network's only ones if none."""
    cfg: Any = model.pretrained_cfg
    return str(cfg.get("tag") or "default")


def _fetched(name: str, pretrained: bool, host: str, create: Callable[[], nn.Module]) -> nn.Module:
    """Make a model, with weights from a cache or the network; without a network, fail at once."""
    if not pretrained:
        return create()
    try:
        with _offline(not _answers(host)):
            return create()
    except Exception as error:
        raise RuntimeError(
            f"`name`={shown(name)} must have weights on this machine or that can be fetched from "
            f"{host}, but fetching failed ({type(error).__name__}): check the network, or name a "
            f"file of weights as in {name}@PATH."
        ) from error


def _answers(url: str) -> bool:
    """Whether a host answers at all, even by an error, through the proxies that are set."""
    try:
        request = urllib.request.Request(url, method="HEAD")
        with urllib.request.urlopen(request, timeout=PATIENCE_S):
            return True
    except urllib.error.HTTPError:
        return True
    except (OSError, ValueError):
        return False


@contextmanager
def _offline(offline: bool) -> Iterator[None]:
    """Let libraries read their caches only, instead of trying the network for a minute."""
    before = _HUB.HF_HUB_OFFLINE, socket.getdefaulttimeout()
    if offline:
        _HUB.HF_HUB_OFFLINE = True
        socket.setdefaulttimeout(PATIENCE_S)
    try:
        yield
    finally:
        _HUB.HF_HUB_OFFLINE = before[0]
        socket.setdefaulttimeout(before[1])


def _classes_of(found: list[Weights], make: Any, name: str, by_order: bool) -> int | None:
    """Rows of the classifier's weight in the checkpoint, found by its place in the model."""
    model, _ = make(name, False, None)
    expected = model.state_dict()
    head = find_classifier(model)
    key = next(n for n, m in model.named_modules() if m is head)
    keys = [k for k in (f"{key}.weight", f"{key}.fc.weight") if k in expected]
    return rows_of(keys[0], found, expected, by_order) if keys else None


def _fill(model: nn.Module, found: list[Weights], name: str, path: Path, by_order: bool) -> int:
    """Load weights that fit; returns how many tensors these were."""
    expected = model.state_dict()
    state = fit(found, expected, by_order, name, path)
    model.load_state_dict(expected | state)  # old files lack counters of batches
    if by_order:
        warnings.warn(
            f'match="order": all {len(state)} tensors of {path} have the shapes of {name} in '
            "order; check the accuracy, since tensors of one shape may have changed places",
            stacklevel=3,
        )
    return len(state)
