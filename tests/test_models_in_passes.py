"""What a model keeps, gives and is given from one pass to the next."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import tta
from tests.helpers.batches import images
from tests.helpers.faults import same
from tests.helpers.nets import tiny
from tests.helpers.wild import wrapped

close = torch.testing.assert_close


class Around(nn.Module):
    """A network within a function."""

    def __init__(self, forward: Callable[..., Any], family: str = "bn") -> None:
        super().__init__()
        self.net, self.run = tiny(family), forward

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        return self.run(self.net, x, *args, **kwargs)


# What goes in --------------------------------------------------------------------------------


def _doubled(net: nn.Module, x: Tensor, scale: Tensor) -> Tensor:
    return net(x * scale[:, None, None, None] * 2)


def _doubling(net: nn.Module, x: Tensor, scale: Tensor) -> Tensor:
    return net(x * scale.mul_(2)[:, None, None, None])


@pytest.mark.parametrize("by_name", [False, True])
@pytest.mark.parametrize("method", ["sar.cifar10", "cotta.cifar10", "robust_bn"])
def test_arguments_that_a_model_writes_to_come_to_every_pass_as_they_were(
    method: str, by_name: bool
) -> None:
    writing, plain = wrapped(Around(_doubling), method), wrapped(Around(_doubled), method)
    for t in range(2):
        scale = torch.linspace(0.5, 1.5, 8)
        more: Any = {"scale": scale} if by_name else {}
        args = () if by_name else (scale,)
        assert torch.equal(
            writing(images(t), *args, **more), plain(images(t), torch.linspace(0.5, 1.5, 8))
        )
        assert torch.equal(scale, torch.linspace(0.5, 1.5, 8))
    assert same(writing.state(), plain.state())


def test_an_argument_for_each_image_is_refused_in_words_where_a_pass_has_other_images() -> None:
    adapter = wrapped(Around(_doubled), "rotta.cifar10")
    before = adapter.state()
    for batch in (images(0), images(0)):
        batch[0, 0, 0, 0] = float("nan")  # whose row is left out
        with pytest.raises(ValueError, match=r"`scale` must fit every pass .* 8 rows in a pass"):
            adapter(batch, scale=torch.ones(8))
    assert same(adapter.state(), before)


# What comes out ------------------------------------------------------------------------------


class Static(nn.Module):
    """Gives its logits in a tensor that the next pass without a graph writes to."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.held = tiny("bn"), {}

    def forward(self, x: Tensor) -> Tensor:
        z = self.net(x)
        if torch.is_grad_enabled():
            return z
        return self.held.setdefault(len(z), torch.empty_like(z)).copy_(z)


@pytest.mark.parametrize(
    ("method", "more"),
    [("tent.cifar10", {"guard": True}), ("rotta.cifar10", {}), ("tent.cifar10", {"shadow": True})],
    ids=["guard", "rotta", "shadow"],
)
def test_logits_are_those_of_their_pass_where_the_model_gives_one_tensor(
    method: str, more: Any
) -> None:
    adapter, plain = wrapped(Static(), method, **more), wrapped(tiny("bn"), method, **more)
    answers = [adapter(images(t)) for t in range(3)]
    assert all(torch.equal(answers[t], plain(images(t))) for t in range(3))


class ReadOnly:
    def __init__(self, z: Tensor) -> None:
        self._z = z

    @property
    def logits(self) -> Tensor:
        return self._z


class Computed(ReadOnly):
    @property
    def logits(self) -> Tensor:
        return self._z + 0


def test_logits_behind_a_property_or_in_a_read_only_mapping_are_replaced_or_refused() -> None:
    plain = wrapped(tiny("bn"), "tent.cifar10")
    expected = [plain(images(t)) for t in range(2)]
    ways: list[tuple[Any, Any]] = [
        (ReadOnly, lambda r: r.logits),
        (lambda z: types.MappingProxyType({"logits": z}), lambda r: r["logits"]),
    ]
    for make, read in ways:
        adapter = wrapped(Around(lambda net, x, make=make: make(net(x))), "tent.cifar10")
        assert all(torch.equal(read(adapter(images(t))), expected[t]) for t in range(2))
    adapter = wrapped(Around(lambda net, x: Computed(net(x))), "tent.cifar10")
    with pytest.raises(TypeError, match="a Computed with 'logits' that cannot be set"):
        adapter(images(0))


def _sorted(net: nn.Module, x: Tensor) -> Tensor:
    order = x.mean((1, 2, 3)).argsort()
    return net(x[order])[order.argsort()]


@pytest.mark.parametrize("method", ["lame", "adanpc", "t3a"])
def test_features_in_another_order_than_the_images_are_refused(method: str) -> None:
    adapter = wrapped(Around(_sorted), method)
    with pytest.raises(ValueError, match="`features` must have rows in the order of the images"):
        adapter(images(0))
    fine = wrapped(Around(lambda net, x: net(x)), method)
    assert torch.equal(fine(images(0)), wrapped(tiny("bn"), method)(images(0)))


def test_logits_of_minus_infinity_are_warned_of_once() -> None:
    masked = torch.arange(10) > 7

    def run(net: nn.Module, x: Tensor) -> Tensor:
        return net(x).masked_fill(masked, float("-inf"))

    adapter = wrapped(Around(run), "tent.cifar10")
    with pytest.warns(UserWarning, match="some are -inf") as caught:
        adapter(images(0))
        adapter(images(1))
    assert len([w for w in caught if "-inf" in str(w.message)]) == 1
    assert adapter.report["stepped"] is False


@pytest.mark.parametrize("method", ["unmix_tns", "alpha_bn", "iabn"])
def test_gradients_to_images_are_the_slope_of_the_logits(method: str) -> None:
    adapter = wrapped(tiny("bn"), method)
    for t in range(2):
        adapter(images(t))
    adapter.freeze()
    weights, x = torch.arange(10.0), images(3).requires_grad_()
    (gradient,) = torch.autograd.grad((adapter(x) * weights).sum(), x)
    way = 1e-3 * gradient / gradient.abs().mean()
    with torch.no_grad():
        slope = ((adapter(x + way) - adapter(x - way)) * weights).sum() / 2
    close(slope, (gradient * way).sum(), rtol=0.05, atol=0)


# What is computed twice ----------------------------------------------------------------------


def _reentrant(net: Any, x: Tensor) -> Tensor:
    h = checkpoint(net.layer1, x.clone().requires_grad_(), use_reentrant=True)
    return net.fc(checkpoint(net.layer2, h, use_reentrant=True).mean((2, 3)))


@pytest.mark.parametrize("method", ["sar.cifar10", "tent.cifar10"])
def test_reentrant_checkpoints_change_nothing(method: str) -> None:
    adapter, plain = wrapped(Around(_reentrant), method), wrapped(tiny("bn"), method)
    for t in range(2):
        close(adapter(images(t)), plain(images(t)), atol=1e-6, rtol=1e-5)
        assert adapter.report["stepped"]
    moved = [(k, v) for k, v in adapter.state().items() if k.startswith("param/")]
    state = plain.state()
    for key, value in moved:
        close(value, state[key.replace("net.", "")], atol=1e-6, rtol=1e-5)
    assert all(p.grad is None for p in adapter.unwrap().parameters())


def _checkpointed(net: Any, x: Tensor) -> Tensor:
    return checkpoint(net, x, use_reentrant=False)


def test_a_pass_of_one_chosen_image_is_computed_again_as_it_was() -> None:
    """Of three images one is kept, whose view has its own statistics in the backward pass too."""
    adapter, plain = (wrapped(net, "roid.cifar10") for net in (Around(_checkpointed), tiny("bn")))
    for t in range(2):
        close(adapter(images(4 + 20 * t, 3)), plain(images(4 + 20 * t, 3)), atol=1e-6, rtol=1e-5)
        assert adapter.report["selected"] == 1
    state = plain.state()
    for key, value in adapter.state().items():
        if key.startswith("param/"):
            close(value, state[key.replace("net.", "")], atol=1e-6, rtol=1e-5)


class Averaging(nn.Module):
    """An average of its own, which it reads and writes in a part that may be checkpointed."""

    average: Any
    count: Any

    def __init__(self, checkpointed: bool) -> None:
        super().__init__()
        self.net, self.checkpointed = tiny("gn"), checkpointed
        self.register_buffer("average", torch.zeros(3))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def part(self, x: Tensor) -> Tensor:
        self.count += 1
        self.average.mul_(0.9).add_(x.detach().mean((0, 2, 3)), alpha=0.1)
        return self.net(x + self.average[:, None, None])

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.part, x, use_reentrant=False) if self.checkpointed else self.part(x)


@pytest.mark.parametrize("method", ["tent.cifar10", "sar.cifar10", "cotta.cifar10"])
def test_buffers_that_a_checkpointed_part_writes_to_move_once(method: str) -> None:
    adapter, plain = wrapped(Averaging(True), method), wrapped(Averaging(False), method)
    for t in range(3):
        assert torch.equal(adapter(images(t)), plain(images(t)))
    assert same(adapter.state(), plain.state())


# What stays ----------------------------------------------------------------------------------


class Filled(nn.Module):
    """A buffer without a tensor until the first images."""

    average: Any

    def __init__(self) -> None:
        super().__init__()
        self.net = tiny("bn")
        self.register_buffer("average", None)

    def forward(self, x: Tensor) -> Tensor:
        mean = x.detach().mean((0, 2, 3))
        self.average = mean if self.average is None else 0.9 * self.average + 0.1 * mean
        return self.net(x + self.average[:, None, None])


@pytest.mark.parametrize("method", ["source", "tent.cifar10", "cotta.cifar10"])
def test_a_buffer_that_was_empty_at_wrap_is_empty_after_reset_and_unwrap(method: str) -> None:
    net = Filled().eval()
    adapter = wrapped(net, method)
    outputs = [adapter(images(t)) for t in range(3)]
    adapter.reset()
    assert net.average is None
    assert all(torch.equal(adapter(images(t)), outputs[t]) for t in range(3))
    assert adapter.unwrap().average is None


class Growing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = tiny("bn")
        self.register_buffer("seen", torch.zeros(0, 3))

    def forward(self, x: Tensor) -> Tensor:
        self.seen = torch.cat([self.seen, x.detach().mean((0, 2, 3))[None]])
        return self.net(x)


@pytest.mark.parametrize("method", ["source", "tent.cifar10", "cotta.cifar10"])
def test_a_buffer_that_grows_is_refused_in_words(method: str) -> None:
    net = Growing().eval()
    with pytest.raises(ValueError, match=r"but 'seen' went from \(0, 3\) to \(\d, 3\) in a"):
        wrapped(net, method)(images(0))
    assert net.seen.shape == (0, 3)


def test_parameters_that_are_expanded_are_refused_where_they_are_trained() -> None:
    net: Any = tiny("bn")
    net.layer1[1].weight = nn.Parameter(torch.ones(1).expand(4))
    with pytest.raises(ValueError, match=r"but 'layer1\.1\.weight' is expanded from fewer"):
        tta.wrap(net, "tent.cifar10")
    assert wrapped(net, "robust_bn")(images(0)).isfinite().all()


@pytest.mark.parametrize("keep", [True, "parameters"])
def test_keeping_what_a_student_learned_says_that_a_teacher_answered(keep: Any) -> None:
    net = tiny("bn")
    adapter = wrapped(net, "rotta.cifar10")
    for t in range(3):
        adapter(images(t))
    state = adapter.state()
    with pytest.warns(
        UserWarning, match="student's parameters, but robust_bn.rotta answers with its"
    ):
        assert adapter.unwrap(keep=keep) is net
    weights = dict(net.named_parameters())
    assert all(torch.equal(p, state[f"param/{n}"]) for n, p in weights.items() if ".1." in n)
