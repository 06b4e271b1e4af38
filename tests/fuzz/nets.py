"""Models for the generator: small right ones, and many that no classifier looks like."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from random import Random
from typing import Any

import torch
from torch import Tensor, nn

from tests.fuzz.junk import junk
from tests.fuzz.oracle import Planted
from tests.helpers.nets import cnn

__all__ = ["CLASSES", "IMAGE", "good", "odd"]

CLASSES, IMAGE = 5, (3, 8, 8)
FAMILIES: dict[str, Callable[[], nn.Module]] = {
    "bn": lambda: cnn((3, 4), nn.BatchNorm2d, CLASSES),
    "gn": lambda: cnn((2, 4), lambda c: nn.GroupNorm(2, c), CLASSES),
}


@cache
def _weights(family: str) -> dict[str, Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        state = FAMILIES[family]().state_dict()
    return {k: v * 0.8 + 0.1 if k.endswith("running_var") else v for k, v in state.items()}


def good(family: str = "bn") -> nn.Module:
    """A small classifier, the same every time."""
    with torch.random.fork_rng(), torch.device("meta"):
        net = FAMILIES[family]()
    net.load_state_dict({k: v.clone() for k, v in _weights(family).items()}, assign=True)
    for name, parameter in net.named_parameters():
        parameter.requires_grad_(True)
        parameter.grad = torch.full_like(parameter, 0.5) if name.startswith("layer1") else None
    return net.eval()


class Returns(nn.Module):
    """A classifier whose result is changed on its way out."""

    def __init__(self, change: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.net, self.change = good(), change

    def forward(self, x: Tensor) -> Any:
        return self.change(self.net(x))


def _raise(_: Any) -> Any:
    raise Planted("forward")


def _holding_itself() -> nn.Module:
    net: Any = good()
    net.itself = net
    return net


def _with(change: Callable[[Any], Any]) -> Callable[[Random], Any]:
    def make(rng: Random) -> Any:
        net = good(rng.choice(["bn", "gn"]))
        result = change(net)
        return net if result is None else result

    return make


def _norms(change: Callable[[Any], Any]) -> Callable[[Any], None]:
    def each(net: nn.Module) -> None:
        for module in net.modules():
            if isinstance(module, (nn.BatchNorm2d, nn.GroupNorm)):
                change(module)

    return each


def _statistics(value: float) -> Callable[[Any], None]:
    def change(module: Any) -> None:
        if isinstance(module, nn.BatchNorm2d):
            module.running_var.fill_(value)  # type: ignore[union-attr]

    return _norms(change)


def _without_statistics(module: Any) -> None:
    module.running_mean = module.running_var = None


def _lazy(net: Any) -> None:
    net.more = nn.LazyLinear(3)


def _own_buffer(net: Any) -> None:
    net.register_buffer("holes", torch.full((3,), float("nan")))


ODD: list[Callable[[Random], Any]] = [
    junk,
    lambda rng: nn.ModuleList([good()]),
    lambda rng: nn.ModuleDict({"a": good()}),
    lambda rng: nn.ParameterList([torch.ones(3)]),
    lambda rng: nn.ParameterDict(),
    lambda rng: nn.Module(),
    lambda rng: nn.Identity(),
    lambda rng: nn.Sequential(),
    lambda rng: nn.Flatten(),
    lambda rng: nn.BatchNorm2d(3),
    lambda rng: nn.Linear(192, 5),
    lambda rng: nn.Sequential(nn.Flatten(), nn.Linear(192, rng.choice([0, 1, 2, 5]))),
    lambda rng: nn.Sequential(nn.Flatten(), nn.Linear(192, 5), nn.Softmax(1)),
    lambda rng: nn.Sequential(nn.Flatten(), nn.Linear(192, 5), nn.Sigmoid()),
    lambda rng: nn.Sequential(nn.Conv2d(3, 5, 8), nn.BatchNorm2d(5), nn.Flatten()),
    lambda rng: nn.Sequential(nn.BatchNorm2d(3, affine=False), nn.Flatten(), nn.Linear(192, 5)),
    lambda rng: nn.Embedding(3, 5),
    lambda rng: nn.LSTM(3, 5),
    lambda rng: nn.Transformer(8, 2, 1, 1),
    lambda rng: nn.CrossEntropyLoss(),
    lambda rng: Returns(lambda z: junk(rng)),
    lambda rng: Returns(_raise),
    lambda rng: Returns(lambda z: None),
    lambda rng: Returns(lambda z: z.sum()),
    lambda rng: Returns(lambda z: {"logits": z, "more": junk(rng)}),
    lambda rng: Returns(lambda z: {"out": z}),
    lambda rng: Returns(lambda z: (z, z)),
    lambda rng: Returns(lambda z: z.detach()),
    lambda rng: Returns(lambda z: z * float("nan")),
    lambda rng: Returns(lambda z: z[:, :2]),
    lambda rng: Returns(lambda z: z[None]),
    lambda rng: Returns(lambda z: z[:1]),
    lambda rng: Returns(lambda z: z.int()),
    lambda rng: Returns(lambda z: z.double()),
    lambda rng: Returns(lambda z: z.half()),
    lambda rng: Returns(lambda z: torch.complex(z, z)),
    lambda rng: Returns(lambda z: z.to_sparse()),
    lambda rng: Returns(lambda z: z.to("meta")),
    lambda rng: Returns(lambda z: [z]),
    lambda rng: Returns(lambda z: z.tolist()),
    lambda rng: Returns(lambda z: "logits"),
    _with(lambda net: net.half()),
    _with(lambda net: net.bfloat16()),
    _with(lambda net: net.double()),
    _with(lambda net: net.to("meta")),
    _with(lambda net: net.train()),
    _with(lambda net: net.requires_grad_(False)),
    _with(_lazy),
    _with(_own_buffer),
    _with(_statistics(0.0)),
    _with(_statistics(float("nan"))),
    _with(_statistics(-1.0)),
    _with(_norms(_without_statistics)),
    _with(_norms(lambda m: setattr(m, "eps", 0.0))),
    _with(_norms(lambda m: setattr(m, "momentum", None))),
    _with(_norms(lambda m: m.register_parameter("weight", None))),
    _with(_norms(lambda m: m.weight.data.fill_(float("nan")))),
    _with(lambda net: setattr(net, "num_classes", 0)),
    _with(lambda net: setattr(net, "forward", None)),
    _with(lambda net: setattr(net, "get_classifier", lambda: None)),
    _with(lambda net: net.register_forward_hook(lambda m, a, z: None)),
    _with(lambda net: net.register_forward_pre_hook(lambda m, a: (a[0] * 2,))),
    _with(lambda net: torch.jit.script(net.fc)),
    _with(lambda net: nn.DataParallel(net)),
    lambda rng: _holding_itself(),
    lambda rng: good,
    lambda rng: type(good()),
]


def odd(rng: Random) -> Any:
    """Something that is given as a model."""
    return rng.choice(ODD)(rng)
