"""MODEL strings of the command line: a model, with its transform and the names of its classes.

* ``timm:NAME``, ``torchvision:NAME``: with the library's weights, or a file's: ``NAME@FILE``;
* ``MODULE:CALLABLE``: a function of your own, called without arguments, that returns a model, or
  ``(model, transform)``, or ``(model, transform, class names)``;
* a bundled name, such as ``cifar10_resnet20_bn``, where this project's ``models`` can be imported.

Files of weights are safetensors, or what ``torch.save`` wrote; objects that could run code are not
loaded. The number of classes is read off the file.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tta.core.checks import nearest, path_like, shown, string, told
from tta.core.classifier import num_classes
from tta.core.source import SourceStatistics
from tta.runtime.checkpoint import fill, read_checkpoint
from tta.runtime.extras import needed
from tta.runtime.libraries import EXTRA, LIBRARIES, classes_of, make

__all__ = [
    "OpenedModel",
    "Pixels",
    "Transform",
    "open_model",
    "own_transform",
    "pick_device",
    "read_class_names",
]

Transform = Callable[[Any], Tensor]
RANDOM = "random"  # in place of a file of weights
OURS = "bundled.py"  # beside our own `models/__init__.py`
MOST_BYTES = 2**24  # of a file of names


@dataclass(kw_only=True)
class OpenedModel:
    """A model, and what there is to know to serve it.

    Args:
        name: The MODEL string.
        model: In eval mode, on its device.
        transform: From a picture of Pillow in RGB to what the model takes, (3, H, W), on the CPU.
        mean: Which the transform takes off each channel of pixels in [0, 1], for ``tta.wrap``; None
            where nobody knows.
        std: By which it divides then.
        class_names: In the order of labels; None where nobody knows them.
        source: Artefacts that come with the model.
    """

    name: str
    model: nn.Module
    transform: Transform
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    class_names: tuple[str, ...] | None = None
    source: SourceStatistics | None = None

    def class_name(self, label: int) -> str | None:
        """The name of a label, where it is known."""
        names = self.class_names
        return names[label] if names is not None and 0 <= label < len(names) else None


@dataclass(frozen=True)
class Pixels:
    """A transform from pictures to pixels in [0, 1].

    Args:
        size: Height and width of what it makes: the shorter side is resized and the middle cut out.
            None leaves pictures as large as they are.
    """

    size: tuple[int, int] | None = None
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)

    def __call__(self, picture: Any) -> Tensor:
        """Transform a picture of Pillow in RGB to float32 (3, H, W)."""
        if self.size is not None and picture.size != self.size[::-1]:
            ops = needed("PIL.ImageOps", EXTRA)
            picture = ops.fit(picture, self.size[::-1])
        levels = torch.from_numpy(np.array(picture, dtype=np.float32))
        return levels.permute(2, 0, 1).contiguous() / 255


def open_model(
    text: str,
    *,
    weights: str | Path | None = None,
    device: str | torch.device | None = None,
    class_names: Sequence[str] | None = None,
) -> OpenedModel:
    """Open what a MODEL string says.

    Args:
        text: See above.
        weights: A file of weights, as behind an ``@``; "random" leaves those that the model is
            made with.
        device: Where the model goes; None for CUDA where there is one, else the CPU.
        class_names: In the order of labels, in place of those that come with the model.

    Raises:
        TypeError: When an argument is of the wrong kind.
        ValueError: For an unknown name, a function that raises or returns something else, weights
            that do not fit, or another number of class names than classes.
        FileNotFoundError: When the file of weights is not there.
        ImportError: When a library is not installed.
        RuntimeError: When weights cannot be fetched.
    """
    name, at, file = string("model", text).partition("@")
    if at and weights is not None:
        raise ValueError(
            f"`weights` must be left out where the model names a file, got {shown(str(weights))} "
            f"and {shown(text)}: keep one of them."
        )
    place = file if at else weights
    where = pick_device(device)
    opened = _opened(name, text, place)
    if any(t.is_meta for t in (*opened.model.parameters(), *opened.model.buffers())):
        raise ValueError(
            f"`model` must hold weights, got {shown(text, 80)}, which is on the meta device: build "
            "it on a device with memory."
        )
    opened.model = opened.model.to(where).eval()
    if class_names is not None:
        opened.class_names = tuple(class_names)
    if opened.class_names is not None:
        opened.class_names = _checked_names(opened, class_names is not None)
    return opened


def pick_device(name: str | torch.device | None) -> torch.device:
    """The device of a name; None for CUDA where there is one, else the CPU.

    Raises:
        ValueError: When torch cannot use it here.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"`device` must be one that torch can use here, got {shown(name)} ({told(error)}): "
            "leave it out to have it chosen"
        ) from error
    return device


def read_class_names(path: str | Path) -> tuple[str, ...]:
    """Names of classes from a text file, a line each, in the order of labels.

    Raises:
        ValueError: When the file is no such text.
        OSError: When it cannot be read.
    """
    place = path_like("classes", path)
    try:
        if place.stat().st_size > MOST_BYTES:
            raise ValueError("it is too large")
        lines = place.read_text(encoding="utf-8-sig").splitlines()
    except (ValueError, OSError) as error:
        kind: Any = ValueError if isinstance(error, ValueError) else type(error)
        raise kind(
            f"`classes` must be a text file with a name a line, but {told(place)} is not "
            f"({told(getattr(error, 'strerror', None) or error)}): write one."
        ) from None
    return tuple(line.strip() for line in lines if line.strip())


def _opened(name: str, text: str, place: str | Path | None) -> OpenedModel:
    library, colon, rest = name.partition(":")
    if library in LIBRARIES and colon:
        return _from_library(library, rest, text, place)
    if colon:
        return _from_function(library, rest, text, place)
    return _bundled(name, text, place)


def _from_library(library: str, name: str, text: str, place: str | Path | None) -> OpenedModel:
    if place is None or place == RANDOM:
        made = make(library, name, pretrained=place is None)
    else:
        found = read_checkpoint(path_like("weights", place))
        made = make(library, name, False, classes_of(found, library, name))
        fill(made.model, found, f"{library}:{name}", Path(place))
    return OpenedModel(
        name=text,
        model=made.model,
        transform=made.transform,
        mean=made.mean,
        std=made.std,
        class_names=made.class_names,
    )


def _from_function(module: str, name: str, text: str, place: str | Path | None) -> OpenedModel:
    """Call a function of the user's own."""
    try:
        function: Any = import_module(module)
        for part in name.split("."):
            function = getattr(function, part)
    except Exception as error:  # whatever a module of the user's raises, SyntaxError too
        raise ValueError(
            f"`model` must be timm:NAME, torchvision:NAME or MODULE:CALLABLE, got {shown(text)} "
            f"({told(error)}): run where MODULE can be imported, or correct the name."
        ) from error
    if not callable(function):
        raise ValueError(
            f"`model` must name a function or a class, got {shown(text)}, which is a "
            f"{type(function).__name__}: define a function that returns the model."
        )
    try:
        given = function()
    except Exception as error:
        raise ValueError(
            f"`model` must be a function that returns a model, but {shown(text)} raised "
            f"{type(error).__name__} ({told(error)}): correct it."
        ) from error
    parts: tuple[Any, ...] = given if isinstance(given, tuple) else (given,)
    model, transform, names, *more = *parts, *(None,) * max(0, 3 - len(parts))
    fits = not more and (transform is None or callable(transform))
    if not (isinstance(model, nn.Module) and fits):
        raise ValueError(
            f"`model` must be a function that returns a torch.nn.Module, or (model, transform), or "
            f"(model, transform, class names), but {shown(text)} returned "
            f"{', '.join(type(part).__name__ for part in parts)[:60]}: correct it."
        )
    if place is not None and place != RANDOM:
        fill(model, read_checkpoint(path_like("weights", place)), name, Path(place))
    chosen: Any = transform or own_transform(model)
    mean, std = _scale(chosen)
    names = None if names is None else tuple(str(n) for n in names)
    return OpenedModel(
        name=text, model=model, transform=chosen, mean=mean, std=std, class_names=names
    )


def _bundled(name: str, text: str, place: str | Path | None) -> OpenedModel:
    spec = find_spec("models")
    ours = spec is not None and Path(spec.origin or "").with_name(OURS).is_file()
    if not ours:  # many have a folder of that name
        raise ValueError(
            f"`model` must be timm:NAME, torchvision:NAME or MODULE:CALLABLE, got {shown(text)}: "
            "bundled models are in the repository, and not in the package."
        )
    models: Any = import_module("models")
    options = [*models.list_models(), "timm:NAME", "torchvision:NAME", "MODULE:CALLABLE"]
    if name not in options[:-3]:
        raise ValueError(f"`model` must be one of those known here, got {shown(text)}: "
                         + nearest(name, options))  # fmt: skip
    file = None if place in (None, RANDOM) else place
    model, info = models.load(name, pretrained=place != RANDOM, checkpoint=file)
    return OpenedModel(
        name=text,
        model=model,
        transform=Pixels(tuple(info.input_size[1:]), info.mean, info.std),
        mean=info.mean,
        std=info.std,
        class_names=info.class_names,
        source=info.source,
    )


def own_transform(model: nn.Module) -> Transform:
    """Of a model that came without one: that of its timm config, or plain pixels."""
    if isinstance(vars(model).get("pretrained_cfg"), dict):
        data = needed("timm.data", EXTRA)
        return data.create_transform(**data.resolve_model_data_config(model), is_training=False)
    return Pixels()


def _scale(transform: Any) -> tuple[tuple[float, ...] | None, tuple[float, ...] | None]:
    """Mean and standard deviation that a transform, or the last of its steps, uses."""
    for step in reversed([transform, *getattr(transform, "transforms", ())]):
        values: list[Any] = [getattr(step, name, None) for name in ("mean", "std")]
        if all(isinstance(value, (Tensor, list, tuple)) for value in values):
            mean, std = (tuple(float(v) for v in value) for value in values)
            return mean, std
    return None, None


def _checked_names(opened: OpenedModel, given: bool) -> tuple[str, ...] | None:
    """Class names, if there are as many as classes, where these can be counted."""
    assert opened.class_names is not None
    try:
        classes = num_classes(opened.model)
    except (ValueError, TypeError):  # no linear layer says it
        return opened.class_names
    if len(opened.class_names) == classes:
        return opened.class_names
    if given:
        raise ValueError(
            f"`classes` must name the model's {classes} classes, got {len(opened.class_names)}: "
            "one line for each, in the order of labels."
        )
    return None
