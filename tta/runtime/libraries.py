"""Classifiers of timm and torchvision, with their weights, the transform and names of classes.

Both libraries are imported when a model is asked for.
"""

from __future__ import annotations

import importlib
import socket
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

from tta.core.checks import nearest, shown
from tta.core.classifier import find_classifier
from tta.runtime.checkpoint import Weights, rows_of
from tta.runtime.extras import needed

__all__ = ["EXTRA", "LIBRARIES", "LibraryModel", "check_library", "classes_of", "make"]

LIBRARIES = ("timm", "torchvision")
EXTRA = "models"  # brings both
SHOWN = 5  # names of a library in an error
PATIENCE_S = 5.0  # seconds to wait for the first answer of a host


@dataclass(frozen=True, kw_only=True)
class LibraryModel:
    """A model as its library gives it.

    Args:
        model: In the mode in which it was made.
        transform: From a picture of Pillow in RGB to what the model takes, (3, H, W).
        mean: Which the transform takes off each channel of pixels in [0, 1].
        std: By which it divides then.
        input_size: Channels, height and width after the transform.
        class_names: In the order of labels; None where the library does not know them.
        weights: What the library calls them; "random" where none were loaded.
        crop: Share of the shorter side that is cut out.
        interpolation: Of the resizing before that.
    """

    model: nn.Module
    transform: Callable[[Any], Any]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    input_size: tuple[int, int, int]
    class_names: tuple[str, ...] | None
    weights: str
    crop: float
    interpolation: str


def make(library: str, name: str, pretrained: bool, classes: int | None = None) -> LibraryModel:
    """Make a model.

    Args:
        library: One of ``LIBRARIES``.
        name: As the library calls it.
        pretrained: Whether to load weights (of the library's default tag), which it fetches where
            they are not on this machine.
        classes: Rows of the classifier, where these are not the library's.

    Raises:
        ImportError: When the library is not installed.
        ValueError: For an unknown name, naming the nearest.
        RuntimeError: When weights cannot be fetched.
    """
    check_library(library)
    return (_timm if library == "timm" else _torchvision)(name, pretrained, classes)


def check_library(library: str) -> None:
    """Refuse a prefix that is no library.

    Raises:
        ValueError: Naming the nearest.
    """
    if library not in LIBRARIES:
        raise ValueError(f"unknown library {shown(library)}: " + nearest(library, LIBRARIES))


def classes_of(found: list[Weights], library: str, name: str, by_order: bool = False) -> int | None:
    """Rows of the classifier's weight in a checkpoint, found by its place in the model.

    Args:
        found: See :func:`tta.runtime.checkpoint.read_checkpoint`.
        library: As for :func:`make`.
        name: As for :func:`make`.
        by_order: Whether tensors are paired by their place, and not by their name.
    """
    model = make(library, name, False).model
    expected = model.state_dict()
    head = find_classifier(model)
    key = next(n for n, m in model.named_modules() if m is head)
    keys = [k for k in (f"{key}.weight", f"{key}.fc.weight") if k in expected]
    return rows_of(keys[0], found, expected, by_order) if keys else None


def _timm(name: str, pretrained: bool, classes: int | None) -> LibraryModel:
    timm = needed("timm", EXTRA)
    known = timm.list_models()
    if name.partition(".")[0] not in known:
        raise ValueError(f"unknown timm model {shown(name)}: " + nearest(name, known, SHOWN))
    extra: dict[str, Any] = {} if classes is None else {"num_classes": classes}
    host = _hub().ENDPOINT
    model = _fetched(
        f"timm:{name}", pretrained, host, lambda: timm.create_model(name, pretrained, **extra)
    )
    data = needed("timm.data", EXTRA)
    cfg = data.resolve_model_data_config(model)
    subset = data.infer_imagenet_subset(model)  # by the number of classes
    about = None if subset is None else data.ImageNetInfo(subset)
    return LibraryModel(
        model=model,
        transform=data.create_transform(**cfg, is_training=False),
        mean=tuple(cfg["mean"]),
        std=tuple(cfg["std"]),
        input_size=tuple(cfg["input_size"]),
        class_names=about and tuple(about.label_descriptions(detailed=False)),
        weights=_tag(model) if pretrained else "random",
        crop=float(cfg["crop_pct"]),
        interpolation=str(cfg["interpolation"]),
    )


def _torchvision(name: str, pretrained: bool, classes: int | None) -> LibraryModel:
    zoo = needed("torchvision", EXTRA).models
    known = zoo.list_models(module=zoo)
    if name not in known:
        raise ValueError(f"unknown torchvision model {shown(name)}: " + nearest(name, known, SHOWN))
    weights = zoo.get_model_weights(name)["DEFAULT"]
    extra = {} if classes is None else {"num_classes": classes}
    model = _fetched(
        f"torchvision:{name}",
        pretrained,
        weights.url,
        lambda: zoo.get_model(name, weights=weights if pretrained else None, **extra),
    )
    transforms = weights.transforms()
    size = transforms.crop_size[0]
    names = tuple(weights.meta["categories"])
    return LibraryModel(
        model=model,
        transform=transforms,
        mean=tuple(transforms.mean),
        std=tuple(transforms.std),
        input_size=(3, size, size),
        class_names=names if classes in (None, len(names)) else None,
        weights=str(weights) if pretrained else "random",
        crop=size / transforms.resize_size[0],
        interpolation=transforms.interpolation.value,
    )


def _tag(model: nn.Module) -> str:
    """The tag of the weights that timm has loaded, its name for the network's only ones if none."""
    cfg: Any = model.pretrained_cfg
    return str(cfg.get("tag") or "default")


def _hub() -> Any:
    """Settings of the client by which timm fetches weights; it is needed for timm alone."""
    return importlib.import_module("huggingface_hub.constants")


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
    try:
        hub = _hub()
    except ModuleNotFoundError:  # torchvision without timm
        hub = None
    before = getattr(hub, "HF_HUB_OFFLINE", None), socket.getdefaulttimeout()
    if offline:
        if hub is not None:
            hub.HF_HUB_OFFLINE = True
        socket.setdefaulttimeout(PATIENCE_S)
    try:
        yield
    finally:
        if hub is not None:
            hub.HF_HUB_OFFLINE = before[0]
        socket.setdefaulttimeout(before[1])
