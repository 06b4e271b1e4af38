"""Models of kinds that come from elsewhere, around the tiny networks that they agree with."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tta
from tests.helpers.batches import source_batches, surroundings
from tests.helpers.compositions import LOOSE, given
from tests.helpers.nets import tiny

__all__ = [
    "RETURNS",
    "Cosine",
    "Counting",
    "Normalised",
    "Returns",
    "Rnn",
    "in_place",
    "out_of_place",
    "wrapped",
]

MEAN, STD = 0.5, 0.25


def wrapped(net: nn.Module, method: str, dtype: torch.dtype = torch.float32, **more: Any) -> Any:
    """An adapter whose filters let samples pass, with a learning rate that moves things."""
    fields = tta.get_config(method).to_dict()
    loose = {key: value for key, value in LOOSE.items() if key in fields and key not in more}
    if "lr" in fields and "lr" not in more:
        loose["lr"] = 0.05
    source = [(x.to(dtype), y) for x, y in source_batches()]
    parts = {"recipe": method.partition(".")[0]}
    return tta.wrap(
        net, method, **surroundings() | given(parts) | {"source": source} | loose | more
    )


class Normalised(nn.Module):
    """A network behind a normalisation, done in one of several ways."""

    def __init__(self, net: nn.Module, normalise: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.net = net
        self.normalise = normalise

    def forward(self, x: Tensor) -> Tensor:
        return self.net(self.normalise(x))


def out_of_place(x: Tensor) -> Tensor:
    return (x - MEAN) / STD


def _methods(x: Tensor) -> Tensor:
    return x.sub_(MEAN).div_(STD)


def _data(x: Tensor) -> Tensor:
    x.data.sub_(MEAN).div_(STD)
    return x


def _view(x: Tensor) -> Tensor:
    for channel in range(x.shape[1]):
        x[:, channel].sub_(MEAN).div_(STD)
    return x


def _numpy(x: Tensor) -> Tensor:
    array = x.detach().numpy()
    array -= MEAN
    array /= STD
    return x


def _items(x: Tensor) -> Tensor:
    x[:] = (x - MEAN) / STD
    return x


in_place: dict[str, Callable[[Tensor], Tensor]] = {
    "methods": _methods,
    "data": _data,
    "view": _view,
    "numpy": _numpy,
    "items": _items,
}


@dataclass
class Answer:
    """What some libraries return."""

    logits: Tensor
    hidden: Tensor


Named = namedtuple("Named", ["hidden", "scores"])


class Returns(nn.Module):
    """A network whose logits are in something."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.net = tiny("bn")
        self.kind = kind

    def forward(self, pixel_values: Tensor, scale: float = 1.0, *, double: bool = False) -> Any:
        z = self.net(pixel_values) * scale * (2 if double else 1)
        h = pixel_values.mean((1, 2, 3))
        kinds = {
            "dict": {"logits": z, "h": h},
            "out": {"out": z, "aux": h},
            "tuple": (z, h),
            "last": (h, z),
            "list": [z, h],
            "dataclass": Answer(z, h),
            "namedtuple": Named(h, z),
        }
        return kinds[self.kind]


# Kind, `logits=`, and the logits in what is returned.
RETURNS: list[tuple[str, Any, Callable[[Any], Tensor]]] = [
    ("dict", None, lambda r: r["logits"]),
    ("out", "out", lambda r: r["out"]),
    ("out", lambda r: r["out"], lambda r: r["out"]),
    ("tuple", 0, lambda r: r[0]),
    ("last", -1, lambda r: r[1]),
    ("list", 0, lambda r: r[0]),
    ("dataclass", None, lambda r: r.logits),
    ("namedtuple", "scores", lambda r: r.scores),
]


class Counting(nn.Module):
    """A network with buffers that it changes itself: a counter and a moving average.

    Args:
        way: How the average is written: "in place", "assigned", "data", or "bright", which is in
            place and for batches brighter than 0.9 alone.
    """

    def __init__(self, way: str) -> None:
        super().__init__()
        self.net = tiny("gn")
        self.way = way
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.register_buffer("average", torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean((0, 2, 3))
        if self.way == "assigned":
            self.average = 0.9 * self.average + 0.1 * mean
        elif self.way == "data":
            self.average.data.mul_(0.9).add_(mean, alpha=0.1)
        elif self.way == "in place" or float(mean.min()) > 0.9:
            self.count += 1
            self.average.mul_(0.9).add_(mean, alpha=0.1)
        return self.net(x) + self.average.mean()


class Cosine(nn.Module):
    """A body and prototypes, compared by the cosine; no linear layer."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.body = nn.Sequential(
                nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.AdaptiveAvgPool2d(1), nn.Flatten()
            )
            self.neck = nn.Identity()
            self.prototypes = nn.Parameter(torch.randn(10, 6))
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        features = F.normalize(self.neck(self.body(x)), dim=1)
        return 10 * features @ F.normalize(self.prototypes, dim=1).t()


class Rnn(nn.Module):
    """A recurrent network over patches, whose layer keeps its weights in a list of its own."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.stem = nn.Conv2d(3, 8, 8, 8)
            self.norm = nn.BatchNorm2d(8)
            self.rnn = nn.LSTM(8, 12, batch_first=True, num_layers=2, bidirectional=True)
            self.fc = nn.Linear(24, 10)
        self.image_size = 32  # else the dry run takes 224, whose tokens torch unrolls in Python
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.norm(self.stem(x)).flatten(2).transpose(1, 2)
        return self.fc(self.rnn(tokens)[0][:, -1])
