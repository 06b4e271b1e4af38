"""What models return that is no tensor, and heads that are no linear layer."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import tta
from tests.helpers.batches import images, source_batches
from tests.helpers.compositions import arguments, suiting
from tests.helpers.nets import tiny
from tests.helpers.wild import RETURNS, Cosine, Returns, wrapped

METHODS = ["source", "tent", "cotta", "lame", "adanpc"]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("kind", "logits", "read"), RETURNS)
def test_logits_are_those_of_the_same_model_that_returns_a_tensor(
    kind: str, logits: Any, read: Any, method: str
) -> None:
    adapter = wrapped(Returns(kind), method, logits=logits)
    plain = wrapped(tiny("bn"), method)
    for t in range(2):
        result = adapter(images(t))
        assert type(result) is type(Returns(kind)(images(t)))
        assert torch.equal(read(result), plain(images(t)))
        assert not read(result).requires_grad
    bad = images(3)
    bad[2, 0, 0, 0] = float("nan")
    result = adapter(bad)
    assert torch.isnan(read(result)).any(1).nonzero().flatten().tolist() == [2]
    for value in _items(result):
        assert len(value) == 8


class WithMeans(nn.Module):
    """A network that also returns a figure of each image."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"logits": self.net(x), "means": x.mean((1, 2, 3))}


@pytest.mark.parametrize("name", tta.list_methods(slot="update"))
def test_what_else_the_model_returns_is_of_the_images_that_were_given(name: str) -> None:
    """Not of views, selected images or a memory, which go through the model too."""
    family = next(f for f in ("gn", "bn", "ln") if name in suiting(f))
    net = WithMeans(tiny(family))
    adapter = tta.wrap(net, **arguments({"update": name}))
    for t, count in enumerate((8, 5)):
        x = images(t, count)
        assert torch.equal(adapter(x)["means"], x.mean((1, 2, 3))), t


def _items(result: Any) -> list[torch.Tensor]:
    if isinstance(result, tuple | list):
        return list(result)
    return list((result if isinstance(result, dict) else vars(result)).values())


def test_a_list_that_holds_itself_is_given_back() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = tiny("bn")

        def forward(self, x: torch.Tensor) -> list[Any]:
            found = [self.net(x)]
            found.append(found)
            return found

    adapter = wrapped(Own(), "tent", logits=0)
    expected = wrapped(tiny("bn"), "tent")(images(0))
    first, rest = adapter(images(0))
    assert torch.equal(first, expected) and not rest[0].requires_grad


@dataclass(slots=True)
class Slotted:
    logits: torch.Tensor
    features: torch.Tensor


@dataclass(frozen=True)
class Derived:
    logits: torch.Tensor
    features: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "features", self.logits * 2)
        object.__setattr__(self, "top", self.logits.argmax(1))


class With(nn.Module):
    """A network whose answer a function makes of logits."""

    def __init__(self, make: Callable[[torch.Tensor], Any]) -> None:
        super().__init__()
        self.net = tiny("bn")
        self.make = make

    def forward(self, x: torch.Tensor) -> Any:
        return self.make(self.net(x))


Read = Callable[[Any], torch.Tensor]
NESTS: list[tuple[Callable[[torch.Tensor], Any], Any, Read, Read]] = [
    (lambda z: {"logits": z, "more": {"h": z * 2}}, None, lambda r: r["logits"],
     lambda r: r["more"]["h"]),
    (lambda z: (z, SimpleNamespace(h=z * 2)), 0, lambda r: r[0], lambda r: r[1].h),
    (lambda z: [z, Slotted(z, z * 2)], 0, lambda r: r[0], lambda r: r[1].features),
    (lambda z: Slotted(z, z * 2), None, lambda r: r.logits, lambda r: r.features),
    (Derived, None, lambda r: r.logits, lambda r: r.features),
    (lambda z: {"a": {"b": z}, "h": z * 2}, lambda r: r["a"]["b"], lambda r: r["a"]["b"],
     lambda r: r["h"]),
]  # fmt: skip


@pytest.mark.parametrize("method", ["tent", "rotta", "memo", "lame"])
@pytest.mark.parametrize(("make", "logits", "read", "other"), NESTS)
def test_what_lies_deeper_is_replaced_and_has_neither_gradient_nor_other_rows(
    make: Callable[[torch.Tensor], Any], logits: Any, read: Read, other: Read, method: str
) -> None:
    adapter = wrapped(With(make), method, logits=logits)
    plain = wrapped(tiny("bn"), method)
    assert torch.equal(read(adapter(images(0))), plain(images(0)))
    bad = images(1)
    bad[2, 0, 0, 0] = float("nan")
    result = adapter(bad)
    assert torch.isnan(read(result)).any(1).nonzero().flatten().tolist() == [2]
    assert other(result).shape == (8, 10) and not other(result).requires_grad
    assert torch.isnan(other(result)).any(1).nonzero().flatten().tolist() == [2]


def test_what_holds_no_tensor_is_given_back_as_it_is() -> None:
    rest = SimpleNamespace(name="net", sizes={"a": (1, 2)})
    net = With(lambda z: {"logits": z, "rest": rest, "module": nn.Identity})
    result = wrapped(net, "tent")(images(0))
    assert result["rest"] is rest and result["module"] is nn.Identity


def test_a_tuple_is_refused_with_the_place_of_its_logits() -> None:
    adapter = tta.wrap(Returns("last"), "tent.cifar10")
    with pytest.raises(TypeError, match=r"got tuple with 0, 1: .* wrap\(..., logits=1\)"):
        adapter(images(0))
    with pytest.raises(TypeError, match=r"`logits`='nothing' must lead to a tensor"):
        tta.wrap(Returns("dict"), "bn", logits="nothing", num_classes=10)(images(0))


def test_arguments_of_the_model_are_passed_on() -> None:
    def logits(*args: Any, **kwargs: Any) -> torch.Tensor:
        return tta.wrap(Returns("dict"), "bn")(*args, **kwargs)["logits"]

    expected = logits(images(0), 3.0, double=True)
    assert torch.equal(expected, logits(pixel_values=images(0), scale=3.0, double=True))
    assert torch.equal(expected, logits(images=images(0), scale=6.0))
    with pytest.raises(TypeError, match="`images` must be the first argument"):
        logits(scale=2.0)


def _prototypes_of(model: Any, x: torch.Tensor) -> torch.Tensor:
    return model.body(x)


@pytest.mark.parametrize("method", ["tent.cifar10", "lame", "adanpc.cifar10", "rmt.cifar10"])
def test_features_of_a_head_without_a_linear_layer_by_every_name(method: str) -> None:
    """The module, its name, and a function of model and images say the same."""
    results = []
    for features in ("neck", _prototypes_of, "module"):
        net = Cosine()
        given = net.neck if features == "module" else features
        adapter = wrapped(net, method, num_classes=10, features=given)
        results.append([adapter(images(t)) for t in range(2)])
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_a_zero_shot_head_of_text_embeddings_adapts() -> None:
    class ZeroShot(nn.Module):
        """An image tower, embeddings of ten texts, and a scale, as CLIP has them."""

        def __init__(self) -> None:
            super().__init__()
            self.visual = tiny("ln")
            self.visual.reset_classifier(0)
            generator = torch.Generator().manual_seed(0)
            self.register_buffer("texts", torch.randn(10, 16, generator=generator))
            self.logit_scale = nn.Parameter(torch.tensor(3.0))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            z = F.normalize(self.visual(x), dim=-1) @ F.normalize(self.texts, dim=-1).T
            return self.logit_scale.exp() * z

    def function(model: Any, x: torch.Tensor) -> torch.Tensor:
        return model.visual(x)

    for method in ("tent.cifar10", "lame", "adanpc.cifar10", "sar.cifar10"):
        net = ZeroShot().eval()
        expected = net(images(0))
        adapter = wrapped(net, method, num_classes=10, features=function)
        if method == "tent.cifar10":
            torch.testing.assert_close(adapter(images(0)), expected.detach())
        assert torch.isfinite(adapter(images(1))).all()


@pytest.mark.parametrize("family", ["bn", "gn"])
def test_a_quantised_head_is_found(family: str) -> None:
    net = torch.ao.quantization.quantize_dynamic(tiny(family), {nn.Linear}, dtype=torch.qint8)
    expected = net(images(0))
    for method in ("source", "lame", "prior_correction"):
        adapter = tta.wrap(copy.deepcopy(net), method)
        assert adapter.num_classes == 10
        if method == "source":
            assert torch.equal(adapter(images(0)), expected)
        assert adapter(images(0)).shape == (8, 10)


def test_an_update_through_a_quantised_head_says_that_nothing_can_move() -> None:
    net = torch.ao.quantization.quantize_dynamic(tiny("bn"), {nn.Linear}, dtype=torch.qint8)
    before = {name: p.clone() for name, p in net.named_parameters()}
    adapter = tta.wrap(net, "tent.cifar10")
    try:
        adapter(images(0))
        assert not adapter.report["stepped"]
    except ValueError as error:
        assert "must let gradients flow" in str(error)
    assert all(torch.equal(p, before[name]) for name, p in adapter.unwrap().named_parameters())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, r"no layer of this Cosine has 10 outputs: pass wrap\(..., num_classes=10\)"),
        ({"num_classes": 10}, r"`features` must say .* since lame reads them"),
        ({"num_classes": 10, "features": "nek"}, r"got 'nek': did you mean 'neck'"),
        ({"num_classes": 10, "features": nn.Identity()}, "that is not in it"),
    ],
)
def test_a_head_without_a_linear_layer_is_refused_with_the_way(arguments: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        tta.wrap(Cosine(), "lame", **arguments)
    assert "get_classifier" not in str(caught.value)


class OneByOne(nn.Module):
    """Shows its images to the network one by one."""

    def __init__(self) -> None:
        super().__init__()
        self.net = tiny("gn")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.net(image[None]) for image in x])


class TwoViews(OneByOne):
    """Shows its images twice, in one batch."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(torch.cat([x, x.flip(-1)])).view(2, len(x), -1).mean(0)


@pytest.mark.parametrize("method", ["lame", "adanpc.cifar10", "rmt.cifar10"])
def test_features_of_images_that_go_through_one_by_one(method: str) -> None:
    parts = wrapped(OneByOne(), method)
    whole = wrapped(tiny("gn"), method)
    for t in range(2):
        torch.testing.assert_close(parts(images(t)), whole(images(t)), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("method", ["lame", "cafa.cifar10"])
def test_features_without_a_row_for_each_image_are_refused_in_words(method: str) -> None:
    with pytest.raises(ValueError, match="`features` must have a row for each image, got 16"):
        wrapped(TwoViews(), method)(images(0))


@pytest.mark.parametrize(
    "found", [None, "features", torch.ones(8, 4, 2)], ids=["none", "text", "3d"]
)
def test_a_function_that_gives_no_features_is_refused_in_words(found: Any) -> None:
    given = {"source": source_batches(), "features": lambda model, x: found}
    with pytest.raises(TypeError, match=r"`features` must be a function that returns features"):
        tta.wrap(tiny("bn"), "adanpc", **given)


def test_one_logit_and_no_logits_are_refused() -> None:
    import timm

    for method in ("tent.cifar10", "lame", "adanpc.cifar10", "bn"):
        one = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(3600, 1))
        with pytest.raises(ValueError, match="at least 2 classes apart, got 1"):
            tta.wrap(one, method, source=source_batches())
    for name in ("test_vit", "test_efficientnet"):
        with pytest.raises(ValueError, match="with num_classes=0, which returns features"):
            tta.wrap(timm.create_model(name, num_classes=0), "tent.cifar10")


@pytest.mark.parametrize("method", ["bn", "tent.cifar10", "lame"])
def test_a_softmax_at_the_end_is_warned_of_once(method: str) -> None:
    adapter = tta.wrap(nn.Sequential(tiny("bn"), nn.Softmax(1)), method)
    with pytest.warns(UserWarning, match="sums to 1, as after a softmax") as caught:
        adapter(images(0))
        adapter(images(1))
    assert len([w for w in caught if "softmax" in str(w.message)]) == 1


@pytest.mark.parametrize("recipe", ["tent.cifar10", "neo", "lame", "robust_bn", "note", "itta"])
def test_small_positive_logits_of_a_linear_layer_are_no_probabilities(recipe: str) -> None:
    net = tiny("bn")
    with torch.no_grad():
        net.fc.weight.mul_(0.01)
        net.fc.bias.fill_(0.5)
    other = copy.deepcopy(net)
    with torch.no_grad():  # the same, out of the range of probabilities
        other.fc.bias.add_(1.0)
    found = []
    for model in (net, other):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            adapter = tta.wrap(model, recipe, source=source_batches(), seed=1)
        start = adapter.state()
        found.append([adapter(images(t)).softmax(1) for t in range(2)])
        adapter.reset()
        assert all(torch.equal(v, adapter.state()[k]) for k, v in start.items())
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two, atol=1e-5, rtol=0.0)


@pytest.mark.parametrize("way", ["in place", "assigned"])
def test_the_pass_that_tells_a_linear_layer_from_a_sigmoid_leaves_no_trace(way: str) -> None:
    class Own(nn.Module):
        """Has a parameter and a buffer that it changes itself, and logits within [0, 1]."""

        def __init__(self) -> None:
            super().__init__()
            self.net = tiny("bn")
            self.shift = nn.Parameter(torch.zeros(3))
            self.register_buffer("count", torch.zeros(()))
            with torch.no_grad():
                self.net.fc.weight.mul_(0.01)
                self.net.fc.bias.fill_(0.5)

        @property
        def fc(self) -> nn.Linear:
            return self.net.fc

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                self.shift.add_(0.001)
                if way == "in place":
                    self.count.add_(1)
                else:
                    self.count = self.count + 1
            return self.net(x + self.shift.view(3, 1, 1))

    net = Own().eval()
    adapter = tta.wrap(net, "robust_bn", num_classes=10)
    adapter(images(0))
    assert net.count == 1 and torch.equal(net.shift, torch.full((3,), 0.001))


def test_a_sigmoid_at_the_end_goes_with_norm_rules_when_said() -> None:
    net = nn.Sequential(tiny("bn"), nn.Sigmoid())
    adapter = tta.wrap(copy.deepcopy(net), "tent.cifar10")
    before = adapter.state()
    with pytest.raises(ValueError, match="as after a sigmoid: take the sigmoid out"):
        adapter(images(0))
    assert all(torch.equal(v, before[k]) for k, v in adapter.state().items())
    for method in ("tent.cifar10", "lame", "sar.cifar10"):
        with pytest.raises(ValueError, match="`activation` must be 'softmax' for"):
            tta.wrap(copy.deepcopy(net), method, activation="sigmoid")
    adapted = tta.wrap(copy.deepcopy(net), "bn", activation="sigmoid")(images(0))
    assert torch.equal(adapted, tta.wrap(tiny("bn"), "bn")(images(0)).sigmoid())
