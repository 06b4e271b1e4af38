"""Models as other people write them: what they do to images, to their own buffers, to gradients."""

from __future__ import annotations

import copy
import io
import pickle
import threading
import types
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune

import tta
from tests.helpers.batches import images, source_batches
from tests.helpers.compositions import suiting
from tests.helpers.faults import same
from tests.helpers.nets import cnn, tiny
from tests.helpers.wild import Counting, Normalised, Rnn, in_place, out_of_place, wrapped
from tta.core.registry import component

close = torch.testing.assert_close


# Images -------------------------------------------------------------------------------------

RECIPES = suiting("bn")
TRAINING = [name for name in RECIPES if getattr(component(name), "trains_model", False)]
UPDATES: dict[str, Any] = {name: component(name) for name in tta.list_methods(slot="update")}


@pytest.mark.parametrize("way", in_place)
@pytest.mark.parametrize("method", RECIPES)
def test_a_model_that_writes_to_its_images_is_the_one_that_does_not(method: str, way: str) -> None:
    adapter = wrapped(Normalised(tiny("bn"), in_place[way]), method)
    plain = wrapped(Normalised(tiny("bn"), out_of_place), method)
    # Writes that autograd does not see are none that a gradient to the images goes through.
    unseen = way in ("data", "numpy") and getattr(component(method), "follows_images", False)
    for t in range(1 if unseen else 2):
        x = images(t)
        assert torch.equal(adapter(x), plain(images(t)))
        assert torch.equal(x, images(t))
    assert unseen or same(adapter.state(), plain.state())


class Caching(nn.Module):
    """Keeps in eval mode what it made of its weight, as the attention of LeViT does."""

    def __init__(self, keeps: bool) -> None:
        super().__init__()
        self.keeps, self.bias_cache = keeps, {}
        self.bias = nn.Parameter(torch.full((3, 1, 1), 0.3))
        self.net = tiny("bn")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.keeps or x.device not in self.bias_cache:
            self.bias_cache[x.device] = self.bias.tanh()
        return self.net(x + self.bias_cache[x.device])


@pytest.mark.parametrize("method", TRAINING)
def test_a_model_that_keeps_what_it_made_of_its_weights(method: str) -> None:
    every = {"params": "all"} if hasattr(tta.get_config(method), "params") else {}
    found = []
    for keeps in (True, False):
        net = Caching(keeps)
        adapter = wrapped(net, method, **every)
        found.append([adapter(images(t)).detach() for t in range(3)])
        adapter.unwrap()
        assert not any(net._forward_pre_hooks)
        close(net(images(0)), Caching(False).net(images(0) + net.bias.tanh()), rtol=0, atol=0)
    for mine, its in zip(*found, strict=True):
        close(mine, its, rtol=0, atol=0)


def test_an_activation_that_writes_to_the_images() -> None:
    def net(inplace: bool) -> nn.Module:
        return nn.Sequential(nn.ReLU(inplace=inplace), tiny("bn"))

    for method in ("tent.cifar10", "cotta.cifar10", "sar.cifar10"):
        adapter, plain = wrapped(net(True), method), wrapped(net(False), method)
        for t in range(2):
            x = images(t) - 0.5
            assert torch.equal(adapter(x), plain(images(t) - 0.5))
            assert torch.equal(x, images(t) - 0.5)


def test_a_model_that_begins_to_write_to_its_images_is_told_of_and_then_given_copies() -> None:
    def bright(x: torch.Tensor) -> torch.Tensor:
        return x.sub_(0.1) if float(x.max()) > 2 else x

    adapter = tta.wrap(Normalised(tiny("bn"), bright), "bn")
    plain = tta.wrap(Normalised(tiny("bn"), lambda x: x - 0.1 if float(x.max()) > 2 else x), "bn")
    assert torch.equal(adapter(images(0)), plain(images(0)))
    with pytest.raises(RuntimeError, match="changed by the model in place"):
        adapter(3 * images(1))
    x = 3 * images(2)
    assert torch.equal(adapter(x), plain(3 * images(2))) and torch.equal(x, 3 * images(2))


def test_the_images_are_copied_only_where_the_model_writes() -> None:
    seen: list[int] = []

    def look(x: torch.Tensor) -> torch.Tensor:
        seen.append(x.data_ptr())
        return x

    adapter = tta.wrap(Normalised(tiny("bn"), look), "bn")
    batches = [images(t) for t in range(3)]
    for x in batches:
        adapter(x)
    assert seen[-2:] == [x.data_ptr() for x in batches[1:]]


class Bytes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = tiny("bn")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x.float() / 255)


@pytest.mark.parametrize("method", RECIPES)
def test_a_model_of_bytes_takes_bytes(method: str) -> None:
    """Results are those on floats of the same values, where no view is made of the images."""
    batches = [((255 * x).byte(), y) for x, y in source_batches()]
    adapter = wrapped(Bytes(), method, source=batches)
    x = (255 * images(0)).byte()
    result = adapter(x)
    assert result.shape == (8, 10) and result.is_floating_point() and result.isfinite().all()
    if method in ("source", "bn", "tent", "eata", "lame", "robust_bn"):
        floats = [(x.float() / 255, y) for x, y in batches]
        assert torch.equal(result, wrapped(tiny("bn"), method, source=floats)(x.float() / 255))


def test_grey_images_and_a_model_that_makes_three_channels_of_them() -> None:
    class Grey(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = tiny("bn")

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.net(x.expand(-1, 3, -1, -1))

    grey = [(x[:, :1], y) for x, y in source_batches()]
    for method in RECIPES:
        net = wrapped(Grey(), method, source=grey, mean=(0.0,), std=(1.0,))
        result = net(images(0)[:, :1])
        assert result.shape == (8, 10) and result.isfinite().all(), method


@pytest.mark.parametrize("family", ["bn", "ln"])
@pytest.mark.parametrize("method", RECIPES)
def test_one_frame_of_1e20_is_rejected_and_the_others_are_right(method: str, family: str) -> None:
    if not component(method).suits(tiny(family)):
        return
    adapter, without = wrapped(tiny(family), method), wrapped(tiny(family), method)
    x = images(0)
    x[3] *= 1e20
    rest = [0, 1, 2, 4, 5, 6, 7]
    result = adapter(x)
    if adapter.config.norm is not None or family == "ln":  # source statistics: all is finite
        assert torch.equal(result[rest], without(images(0)[rest]))
        if method == "prompt":  # which cuts pixels off at the ends of their range
            assert adapter.report["rejected"] == 0 and result.isfinite().all()
        else:
            assert adapter.report["rejected"] == 1 and result[3].isnan().all()
        assert torch.equal(adapter(images(1)), without(images(1)))
    else:
        assert result.isfinite().all() and adapter(images(1)).isfinite().all()


# Precision ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", TRAINING)
def test_a_model_in_half_precision_learns_as_in_single(method: str, dtype: torch.dtype) -> None:
    """What moves, moves by steps that half precision has no numbers for."""
    if getattr(component(method), "episodic", False):
        return  # nothing stays moved
    margin = {"entropy_margin": 3.0} if "entropy_margin" in tta.get_config(method).to_dict() else {}
    single = wrapped(tiny("bn"), method, lr=1e-5, **margin)
    net = tiny("bn").to(dtype)
    before = {name: p.clone() for name, p in net.named_parameters()}
    objects = dict(net.named_parameters())
    half = wrapped(net, method, dtype, lr=1e-5, **margin)
    start, start_single = half.state(), single.state()
    for t in range(2):
        single(images(t))
        assert half(images(t).to(dtype)).dtype == dtype
    now, now_single = half.state(), single.state()
    trained = [key for key in now if key.startswith("param/")]
    assert trained and all(now[key].dtype == torch.float32 for key in trained)
    teachers = [key for key in now if key.startswith("update/teacher.")]
    assert all(now[key].dtype == torch.float32 for key in teachers if "running" not in key)

    def moved(after: dict[str, torch.Tensor], first: dict[str, torch.Tensor]) -> int:
        return sum(int((after[key] != first[key]).sum()) for key in trained)

    assert moved(now_single, start_single) > 0
    # Adam moves even what has a gradient of rounding alone, which half precision makes 0.
    assert moved(now, start) >= 0.6 * moved(now_single, start_single)
    for key in trained:  # the model computes with the rounded values
        assert torch.equal(objects[key.partition("/")[2]], now[key].to(dtype))
    back = dict(half.unwrap().named_parameters())
    assert all(torch.equal(back[name], before[name]) for name in before)
    assert all(back[name] is objects[name] for name in before)


@pytest.mark.parametrize("method", ["source", "bn", "tent.cifar10", "cotta.cifar10"])
def test_a_model_that_converts_its_images_itself(method: str) -> None:
    """Its first layer is in half precision, and single precision is what it is given."""

    class Mixed(nn.Module):
        def __init__(self, converts: bool) -> None:
            super().__init__()
            net: Any = tiny("bn")
            self.body = nn.Sequential(net.layer1, net.layer2).bfloat16()
            self.fc, self.converts = net.fc, converts

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x.bfloat16() if self.converts else x
            return self.fc(self.body(x).float().mean((2, 3)))

    for t in range(2):
        result = wrapped(Mixed(True), method)(images(t))
        assert result.dtype == torch.float32 and result.isfinite().all()
    with pytest.raises(
        TypeError, match=r"must be torch.bfloat16 like the model, got torch.float32"
    ):
        wrapped(Mixed(False), method)(images(0))


class Autocast(nn.Module):
    """Runs in half precision by itself, with weights in float32."""

    def __init__(self) -> None:
        super().__init__()
        self.net = tiny("bn")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return self.net(x)


@pytest.mark.parametrize("method", RECIPES)
def test_a_model_with_autocast_inside(method: str) -> None:
    net = Autocast().eval()
    if not component(method).suits(net):
        pytest.skip("needs another kind of network")
    adapter = wrapped(net, method)
    outputs = [adapter(images(t)) for t in range(2)]
    assert all(o.isfinite().all() for o in outputs)
    adapter.reset()
    assert all(torch.equal(adapter(images(t)), o) for t, o in enumerate(outputs))


def test_draws_do_not_depend_on_the_default_dtype() -> None:
    expected = [wrapped(tiny("bn"), method)(images(0)) for method in RECIPES]
    torch.set_default_dtype(torch.float64)
    try:
        with torch.no_grad():
            net = [tiny("bn").float() for _ in RECIPES]
        start = {k: v for k, v in _float32_net().items()}
        for each in net:
            each.load_state_dict(start)
        results = []
        for each, method in zip(net, RECIPES, strict=True):
            batches = [(x.float(), y) for x, y in BATCHES]
            results.append(wrapped(each, method, source=batches)(FIRST))
    finally:
        torch.set_default_dtype(torch.float32)
    for method, a, b in zip(RECIPES, results, expected, strict=True):
        close(a, b, atol=1e-4, rtol=1e-4, msg=lambda text, m=method: f"{m}: {text}")


BATCHES, FIRST = source_batches(), images(0)


def _float32_net() -> dict[str, torch.Tensor]:
    torch.set_default_dtype(torch.float32)
    try:
        return tiny("bn").state_dict()
    finally:
        torch.set_default_dtype(torch.float64)


# Gradients ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        {"method": "tent.cifar10", "norm": "robust_bn"},
        {"method": "tent.cifar10", "norm": "unmix_tns"},
        {"method": "rotta.cifar10"},
        {"method": "rmt.cifar10"},
        {"method": "sar.cifar10", "norm": "robust_bn"},
        {"method": "deyo.cifar10", "norm": "robust_bn"},
    ],
    ids=lambda a: "-".join(a.values()),
)
def test_gradient_checkpointing_changes_nothing(arguments: dict[str, str]) -> None:
    import timm

    results = []
    for on in (False, True):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            net = timm.create_model("test_resnet", num_classes=10)
        net.set_grad_checkpointing(on)
        adapter = wrapped(net.eval(), **arguments)
        results.append([adapter(images(t)) for t in range(2)])
        results[-1] += [v for k, v in adapter.state().items() if k != "rng"]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("method", ["source", "bn", "tent.cifar10", "robust_bn", "cotta.cifar10"])
def test_gradients_to_images_are_those_of_the_adapted_model(method: str) -> None:
    adapter = wrapped(tiny("bn"), method, **({"norm": "source"} if "cotta" in method else {}))
    for t in range(2):
        adapter(images(t))
    adapter.freeze()
    x = images(5).requires_grad_()
    logits = adapter(x)
    logits[:, 0].sum().backward()
    assert x.grad is not None and x.grad.abs().sum() > 0
    assert all(p.grad is None for p in adapter.parameters())
    assert all(p.grad is None for p in adapter.parameters_adapted.values())
    plain = tiny("bn")
    with torch.no_grad():
        for name, p in plain.named_parameters():
            teacher = adapter.state().get(f"update/teacher.{name}")
            value = adapter.state().get(f"param/{name}", p) if teacher is None else teacher
            p.copy_(value)
    if method in ("bn", "tent.cifar10"):
        plain.train()
    if method == "robust_bn":
        for name, layer in adapter.norm_layers.items():
            layer.rule.write_to(plain.get_submodule(name))
    y = images(5).requires_grad_()
    expected = plain(y)
    expected[:, 0].sum().backward()
    close(logits, expected, atol=1e-5, rtol=1e-4)
    close(x.grad, y.grad, atol=1e-5, rtol=1e-3)
    adapter.unfreeze()
    assert not adapter(images(6).requires_grad_()).requires_grad


@pytest.mark.parametrize("method", TRAINING)
def test_a_model_that_runs_without_a_graph_is_refused_by_whatever_trains(method: str) -> None:
    class NoGraph(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = tiny("bn")

        @torch.no_grad()
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.net(x)

    if component_trains_nothing(method):
        return
    with pytest.raises(ValueError, match="`model` must let gradients flow"):
        wrapped(NoGraph(), method)(images(0))


def component_trains_nothing(method: str) -> bool:
    return not wrapped(tiny("bn"), method).parameters_adapted


# Buffers ------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["source", "tent.cifar10", "eata.cifar10", "rmt.cifar10"])
@pytest.mark.parametrize("way", ["in place", "assigned", "data", "bright"])
def test_buffers_that_a_model_changes_itself_move_with_the_adapter(
    way: str, method: str, tmp_path: Any
) -> None:
    def batch(t: int) -> torch.Tensor:
        return 0.95 + 0.05 * images(t)  # bright from the second batch on

    net = Counting(way)
    before, objects = copy.deepcopy(net.state_dict()), dict(net.named_buffers())
    adapter = wrapped(net, method)
    assert torch.equal(net.average, torch.zeros(3)), "source batches leave no trace"
    outputs = [adapter(images(0)), *(adapter(batch(t)) for t in (1, 2))]
    middle = adapter.state()
    assert "model/average" in middle and middle["model/average"].abs().sum() > 0
    if way in ("in place", "bright"):
        assert middle["model/count"] == net.count > 0
    with adapter.frozen():
        assert torch.equal(adapter(batch(5)), adapter(batch(5)))
    assert same(adapter.state(), middle)

    following = adapter(batch(6))
    for other in (copy.deepcopy(adapter), pickle.loads(pickle.dumps(adapter))):
        other.load_state(middle)
        assert torch.equal(other(batch(6)), following)
    adapter.load_state(middle)
    tta.save(adapter, tmp_path / "saved")
    again = tta.load(Counting(way), tmp_path / "saved", source=source_batches())
    assert torch.equal(again(batch(6)), following)
    adapter.reset()
    assert torch.equal(net.average, torch.zeros(3))
    replayed = [adapter(images(0)), *(adapter(batch(t)) for t in (1, 2))]
    assert all(torch.equal(a, b) for a, b in zip(outputs, replayed, strict=True))
    assert adapter.unwrap() is net and same(net.state_dict(), before)
    assert all(value is objects[name] for name, value in net.named_buffers())


class Prototypes(nn.Module):
    """Compares what a network returns with prototypes that it itself brings to length one."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.net = tiny("bn")
        self.way = way
        self.prototypes = nn.Parameter(torch.randn(10, 10, generator=torch.manual_seed(3)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        z = self.net(x)
        with torch.no_grad():
            if self.way == "in place":
                self.prototypes.copy_(F.normalize(self.prototypes + 0.1, dim=1))
            else:
                self.prototypes.data = F.normalize(self.prototypes.data + 0.1, dim=1)
        return z @ self.prototypes.T


@pytest.mark.parametrize("method", ["source", "tent.cifar10", "roid.cifar10", "cotta.cifar10"])
@pytest.mark.parametrize("way", ["in place", "data"])
def test_parameters_that_a_model_writes_to_itself_move_with_the_adapter(
    way: str, method: str
) -> None:
    """Passes of one call, whose graphs hold other values, do not disturb each other."""
    net, plain = Prototypes(way).eval(), Prototypes(way).eval()
    own, before = net.prototypes, net.prototypes.detach().clone()
    adapter = wrapped(net, method)
    assert torch.equal(own, before), "source batches leave no trace"
    outputs = [adapter(images(0))]
    if method == "source":
        close(outputs[0], plain(images(0)))
    state = adapter.state()
    assert not torch.equal(own, before)
    outputs += [adapter(images(t)) for t in (1, 2)]
    adapter.load_state(state)
    assert torch.equal(adapter(images(1)), outputs[1])
    adapter.reset()
    assert torch.equal(own, before)
    assert all(torch.equal(adapter(images(t)), outputs[t]) for t in range(3))
    assert adapter.unwrap() is net and net.prototypes is own and torch.equal(own, before)


class AlwaysTraining(nn.Module):
    """Keeps its BatchNorm layers in training mode, whatever it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.net = tiny("bn")
        self.eval()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)

    def train(self, mode: bool = True) -> AlwaysTraining:
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.train()
        return self


class Functional(nn.Module):
    """A batch norm by a function with buffers of its own, which leaves no trace of its writing."""

    def __init__(self) -> None:
        super().__init__()
        self.net = tiny("gn")
        self.register_buffer("mean", torch.zeros(10))
        self.register_buffer("var", torch.ones(10))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.batch_norm(self.net(x), self.mean, self.var, training=True)


@pytest.mark.parametrize("method", ["source", "eta.cifar10", "lame"])
@pytest.mark.parametrize("kind", [AlwaysTraining, Functional])
def test_statistics_in_training_mode_move_with_the_adapter(kind: Any, method: str) -> None:
    net = kind()
    before = copy.deepcopy(net.state_dict())
    adapter = wrapped(net, method, **({"norm": "source"} if method == "eta.cifar10" else {}))
    outputs = [adapter(images(t)) for t in range(2)]
    state = adapter.state()
    assert any(key.startswith("model/") for key in state)
    with adapter.frozen():
        adapter(images(4))
    assert same(adapter.state(), state)
    adapter.reset()
    assert all(torch.equal(adapter(images(t)), outputs[t]) for t in range(2))
    assert same(adapter.unwrap().state_dict(), before)


def test_state_dicts_under_torchs_protocol_resume_exactly() -> None:
    for method in ("unmix_tns", "rotta", "tent", "adanpc_bn", "eata"):
        adapter = wrapped(tiny("bn"), method)
        for t in range(2):
            adapter(images(t))
        file = io.BytesIO()
        torch.save(adapter.state_dict(), file)
        file.seek(0)
        other = wrapped(tiny("bn"), method)
        other.load_state_dict(torch.load(file, weights_only=True))
        assert torch.equal(adapter(images(3)), other(images(3))), method
        assert same(adapter.state(), other.state())
    with pytest.raises(ValueError, match=r"plain model: unwrap\(\) the adapter, load it .* wrap"):
        adapter.load_state_dict(tiny("bn").state_dict())


def test_facts_of_the_model_are_read_through_the_adapter() -> None:
    import timm

    net = timm.create_model("test_efficientnet")
    net.pretrained_cfg = net.pretrained_cfg | {"input_size": (3, 380, 380), "crop_pct": 0.922}
    expected = timm.data.resolve_model_data_config(net)
    assert expected["input_size"] == (3, 380, 380)
    assert timm.data.resolve_model_data_config(tta.wrap(net, "bn")) == expected


def test_a_normaliser_that_passes_attributes_on_is_none_to_undo() -> None:
    """The model inside says how its images are normalised; the one outside has done so already."""
    import timm

    class Outside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            with torch.random.fork_rng():
                torch.manual_seed(0)
                self.net = timm.create_model("test_efficientnet", num_classes=10).eval()

        def __getattr__(self, name: str) -> Any:
            try:
                return super().__getattr__(name)
            except AttributeError:
                return getattr(super().__getattr__("net"), name)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.net((x - 0.5) / 0.25)

    assert Outside().pretrained_cfg["mean"] != (0.0, 0.0, 0.0)
    with pytest.raises(ValueError, match="Outside has no pretrained_cfg: pass wrap"):
        tta.wrap(Outside(), "cotta.cifar10", views=2)
    adapter = tta.wrap(Outside(), "cotta.cifar10", views=2, mean=(0.0,), std=(1.0,))
    assert adapter(images(0)).isfinite().all()


# Keeping ------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["source", "robust_bn"])
@pytest.mark.parametrize("method", ["tent.cifar10", "sar.cifar10", "eata.cifar10"])
def test_what_was_learned_is_kept_in_the_model(method: str, norm: str) -> None:
    net = tiny("bn")
    adapter = wrapped(net, method, norm=norm)
    for t in range(3):
        adapter(images(t))
    with adapter.frozen():
        expected = adapter(images(9))
    assert adapter.unwrap(keep=True) is net
    close(net(images(9)).detach(), expected)
    assert not any(torch.equal(a, b) for a, b in [(net(images(9)), tiny("bn")(images(9)))])


def test_what_a_plain_model_cannot_hold_is_not_kept() -> None:
    for arguments in ({"recipe": "bn"}, {"recipe": "lame"}, {"recipe": "unmix_tns"}):
        adapter = tta.wrap(tiny("bn"), **arguments)
        with pytest.raises(ValueError, match=r"`keep` must be False for .* keep='parameters'"):
            adapter.unwrap(keep=True)
        adapter(images(0))  # nothing has changed
    adapter = wrapped(tiny("bn"), "tent.cifar10")
    adapter(images(0))
    learned = {k: v for k, v in adapter.state().items() if k.startswith("param/")}
    for keep in ("weights", 1):
        with pytest.raises(ValueError, match="`keep` must be False, True or"):
            adapter.unwrap(keep=keep)
    with pytest.warns(UserWarning, match="go with the source statistics"):
        net = adapter.unwrap(keep="parameters")
    assert all(torch.equal(p, learned.get(f"param/{n}", p)) for n, p in net.named_parameters())


# Kinds of models ----------------------------------------------------------------------------


class Lightning(nn.Module):
    """Steps and properties around a network, some of which raise outside of training."""

    def __init__(self) -> None:
        super().__init__()
        self.model = tiny("bn")

    @property
    def trainer(self) -> Any:
        raise RuntimeError("not attached to a trainer")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model(x)

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])


def _auxiliary_heads() -> nn.Module:
    """Linear layers and BatchNorm that eval mode does not call, as in GoogLeNet."""

    class Auxiliary(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            net: Any = tiny("bn")
            self.layer1, self.layer2, self.fc = net.layer1, net.layer2, net.fc
            self.aux = nn.Sequential(nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4096, 10))

        def forward(self, x: torch.Tensor) -> Any:
            h = self.layer1(x)
            z = self.fc(self.layer2(h).mean((2, 3)))
            return (z, self.aux(h)) if self.training else z

    return Auxiliary()


def _two_heads() -> nn.Module:
    import timm

    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = timm.create_model(
            "deit_tiny_distilled_patch16_224",
            img_size=32,
            patch_size=8,
            embed_dim=16,
            depth=2,
            num_heads=2,
            num_classes=10,
        )
        for head in (net.head, net.head_dist):
            nn.init.normal_(head.weight, 0, 0.3)
    return net


def _parametrised(function: Any) -> nn.Module:
    net = tiny("bn")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for module in [m for m in net.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]:
            function(module)
    return net


class Ensemble(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.nets = nn.ModuleList(tiny("bn", seed) for seed in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack([net(x) for net in self.nets]).mean(0)


class ByValue(nn.Module):
    """Control flow that depends on values, so that no dry run succeeds."""

    def __init__(self) -> None:
        super().__init__()
        self.net = tiny("bn")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x / 255 if float(x.mean()) > 100 else x)


KINDS: dict[str, Any] = {
    "lightning": Lightning,
    "auxiliary heads": _auxiliary_heads,
    "two heads": _two_heads,
    "weight norm": lambda: _parametrised(nn.utils.parametrizations.weight_norm),
    "spectral norm": lambda: _parametrised(nn.utils.parametrizations.spectral_norm),
    "recurrent": Rnn,
    "ensemble": Ensemble,
    "by value": ByValue,
    "traced": lambda: torch.fx.symbolic_trace(tiny("bn")),
}


MEAN_OF_HEADS = ("two heads", "ensemble")  # no single linear layer makes their logits


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", RECIPES)
def test_a_model_of_every_kind_goes_through_every_recipe_and_back(method: str, kind: str) -> None:
    net = KINDS[kind]().eval()
    if kind == "two heads" and method in tta.list_methods(slot="norm"):
        return
    if not component(method).suits(net):
        with pytest.raises(ValueError, match=r"`(model|blocks|norm)`"):
            wrapped(net, method)
        return
    before = copy.deepcopy(net.state_dict())
    adapter = wrapped(net, method)
    start, outputs, stepped = adapter.state(), [], False
    if kind in MEAN_OF_HEADS and component(method).needs_linear_head:
        with pytest.raises(ValueError, match="other logits than those of its Linear"):
            adapter(images(0))
        now = {key: value.nan_to_num(9.0) for key, value in adapter.state().items()}
        assert same(now, {key: value.nan_to_num(9.0) for key, value in start.items()})
        assert adapter.unwrap() is net and same(net.state_dict(), before)
        return
    if kind == "ensemble" and method in UPDATES and method not in TRAINING:
        with pytest.raises(ValueError, match="`blocks` must name modules on the way"):
            adapter(images(0))
        return
    for t in range(2):
        outputs.append(adapter(images(t)))
        stepped |= bool(adapter.report.get("stepped"))
    assert all(o.shape == (8, 10) and o.isfinite().all() for o in outputs)
    now = adapter.state()
    stepped &= not getattr(adapter.update, "episodic", False)  # which puts parameters back
    own = "param/" if method in TRAINING or method not in UPDATES else "update/block"
    assert stepped == any(not torch.equal(now[k], start[k]) for k in now if k.startswith(own))
    other = copy.deepcopy(adapter)
    assert torch.equal(other(images(5)), adapter(images(5)))
    adapter.reset()
    assert all(torch.equal(adapter(images(t)), outputs[t]) for t in range(2))
    assert adapter.unwrap() is net and same(net.state_dict(), before)


class Scaled(nn.BatchNorm2d):
    """A BatchNorm with something behind it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).relu() * 0.5


def _hooked(kind: str, layer: Any) -> None:
    if kind == "before":
        layer.register_forward_pre_hook(lambda m, args: (args[0] * 1.5 + 0.2,))
    elif kind == "after":
        layer.register_forward_hook(lambda m, args, y: 0.5 * y + m.weight.mean())
    elif kind == "pruned":
        prune.random_unstructured(layer, "weight", 0.5)
    elif kind == "parametrised":
        nn.utils.parametrize.register_parametrization(layer, "weight", nn.Softplus())
    else:

        def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
            return 3 * type(self).forward(self, x)

        layer.forward = types.MethodType(forward, layer)


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, Scaled])
@pytest.mark.parametrize("kind", ["before", "after", "pruned", "parametrised", "other forward"])
def test_what_was_done_to_norm_layers_holds_under_every_rule(kind: str, norm: Any) -> None:
    """With all weight on the source statistics the logits are those of the model itself."""

    def net() -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            net: Any = cnn((4, 8), norm).eval()
            for layer in (net.layer1[1], net.layer2[1]):
                layer.running_mean.normal_(0, 0.3)
                layer.running_var.uniform_(0.5, 2)
            _hooked(kind, net.layer1[1])
        return net

    plain = net()
    with torch.no_grad():
        expected = plain(images(0))
    adapter = tta.wrap(plain, norm=tta.get_config("alpha_bn", source_weight=1.0))
    close(adapter(images(0)), expected, atol=1e-6, rtol=1e-5)
    with torch.no_grad():
        assert torch.equal(adapter.unwrap()(images(0)), expected)
    for method in ("tent.cifar10", "cotta.cifar10"):
        adapter = wrapped(net(), method)
        outputs = [adapter(images(t)) for t in range(3)]
        with adapter.frozen():
            adapter(images(0))  # what hooks compute then has no graph, which has no copy
        other = copy.deepcopy(adapter)
        assert torch.equal(other(images(5)), adapter(images(5)))
        adapter.reset()
        assert all(torch.equal(adapter(images(t)), outputs[t]) for t in range(3))


class Positions(nn.Module):
    """Adds positions, which it makes when it meets the first images of a size, and keeps."""

    def __init__(self, place: str) -> None:
        super().__init__()
        self.net, self.place = tiny("bn"), place
        self.kept: Any = None
        self.by_size: dict[int, torch.Tensor] = {}
        self.helper = types.SimpleNamespace(kept=None)

    def _positions(self, x: torch.Tensor) -> torch.Tensor:
        return torch.linspace(0, 0.1, x.shape[-1], device=x.device)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.place == "dict":
            if x.shape[-1] not in self.by_size:
                self.by_size[x.shape[-1]] = self._positions(x)
            return self.net(x + self.by_size[x.shape[-1]])
        if self.place == "buffer" and not hasattr(self, "grid"):
            self.register_buffer("grid", self._positions(x), persistent=False)
        if self.place == "buffer":
            return self.net(x + self.grid)
        holder = self.helper if self.place == "helper" else self
        if holder.kept is None:
            holder.kept = self._positions(x)
        return self.net(x + holder.kept)


@pytest.mark.parametrize("method", ["source", "cotta", "t3a"])
@pytest.mark.parametrize("place", ["attribute", "dict", "buffer", "helper"])
def test_what_a_model_keeps_of_a_pass_is_of_images_that_came(place: str, method: str) -> None:
    """The first pass that a wrap makes is one without values, of images of common sizes."""
    plain, net = Positions(place).eval(), Positions(place).eval()
    x = torch.rand(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    keys = list(net.state_dict())
    source = [(x, torch.tensor([0, 1]))]
    adapter = wrapped(net, method, source=source)
    logits = adapter(x)
    assert logits.isfinite().all()
    if method == "source":
        with torch.no_grad():
            close(logits, plain(x))
    adapter(x)
    assert list(adapter.unwrap().state_dict()) == keys
    kept = (net.kept, net.helper.kept, getattr(net, "grid", None), *net.by_size.values())
    assert not any(t.is_meta for t in kept if t is not None)


def test_weights_that_hooks_compute_have_values_when_wrap_returns() -> None:
    net = tiny("bn")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is deprecated, and met all the same
        nn.utils.weight_norm(net.fc)
    weight = net.fc.weight.detach().clone()
    adapter = wrapped(net, "t3a")
    assert adapter(images(0)).isfinite().all()
    assert torch.equal(adapter.unwrap().fc.weight, weight)


def test_hooks_on_norm_layers_know_their_layer() -> None:
    net, seen = tiny("bn"), []
    layer = net.layer1[1]
    layer.register_forward_hook(lambda module, *_: seen.append(module))
    adapter = tta.wrap(net, "unmix_tns.cifar10")
    adapter(images(0))
    adapter.unwrap()(images(0))
    assert [module is layer for module in seen] == [True, True]


def test_the_teacher_of_a_recurrent_network_has_weights_of_its_own() -> None:
    net = Rnn()
    adapter = wrapped(net, "cotta.cifar10", norm="source", params="all")
    adapter(images(0))
    state = adapter.state()
    teacher = Rnn()
    with torch.no_grad():
        for name, p in teacher.named_parameters():
            p.copy_(state[f"update/teacher.{name}"])
    assert not torch.equal(teacher(images(1)), Rnn()(images(1)))
    with adapter.frozen():
        close(adapter(images(1)), teacher(images(1)).detach())


@pytest.mark.parametrize("pair", [("tent", "eata"), ("cotta", "rotta"), ("unmix_tns", "sar")])
def test_two_adapters_in_two_threads_are_as_each_alone(pair: tuple[str, str]) -> None:
    nets = [lambda: tiny("bn"), Rnn] if pair[0] != "unmix_tns" else [Ensemble, Lightning]
    alone = []
    for make, method in zip(nets, pair, strict=True):
        adapter = wrapped(make().eval(), method)
        alone.append([adapter(images(t)) for t in range(6)])
    adapters = [wrapped(make().eval(), m) for make, m in zip(nets, pair, strict=True)]
    results: list[list[torch.Tensor]] = [[], []]
    gate = threading.Barrier(2)

    def serve(place: int) -> None:
        gate.wait()
        for t in range(6):
            results[place].append(adapters[place](images(t)))

    threads = [threading.Thread(target=serve, args=(place,)) for place in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for expected, got in zip(alone, results, strict=True):
        assert len(got) == 6 and all(map(torch.equal, expected, got))


# Refusals -----------------------------------------------------------------------------------


def _lazy() -> nn.Module:
    return nn.Sequential(nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d(), nn.Flatten(), nn.LazyLinear(10))


class Keywords(nn.Module):
    """Takes its images by name alone."""

    def __init__(self) -> None:
        super().__init__()
        self.net = tiny("bn")

    def forward(self, *, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.net(pixel_values)


class Parts(nn.Module):
    """Shows its network a few images at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.net = tiny("bn")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.net(part) for part in x.split(3)])


def test_maps_of_some_of_the_images_are_no_maps_of_all() -> None:
    with pytest.raises(ValueError, match=r"get all images of a batch at once, got .* 3 of 8"):
        wrapped(Parts().eval(), "itta")


REFUSED = [
    (_lazy, r"'0.weight' is not initialised yet: call the model with one batch"),
    (lambda: tiny("bn").to("meta"), r"'layer1.0.weight' is on the meta device: load the weights"),
    (
        lambda: torch.export.export(tiny("bn"), (images(0),)).module(),
        r"GraphModule that refuses eval\(\), as exported programs do: wrap the network",
    ),
    (lambda: Keywords().eval(), r"whose forward\(\) takes keywords alone: wrap a module"),
]


@pytest.mark.parametrize(("make", "words"), REFUSED, ids=["lazy", "meta", "exported", "keywords"])
def test_models_without_weights_or_layers_are_refused_in_words(make: Any, words: str) -> None:
    for method in ("source", "tent.cifar10"):
        with pytest.raises(ValueError, match=f"`model` must .*{words}"):
            tta.wrap(make(), method)


def _with_norm(make: Any) -> nn.Module:
    net: Any = tiny("bn")
    for stage in (net.layer1, net.layer2):
        stage[1] = make(stage[1].num_features)
    return net


class Normalise(nn.Module):
    """Scales images; called by the name of a norm layer, and none."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x - 0.5) / 0.25


def test_norm_layers_are_called_what_they_are() -> None:
    from torchvision.ops import FrozenBatchNorm2d

    class InputNorm(Normalise):
        pass

    fixed = "FrozenBatchNorm2d, whose figures are fixed, unlike those of nn.BatchNorm2d"
    for method in ("bn", "tent.cifar10", "robust_bn"):
        with pytest.raises(ValueError, match=f"has {fixed}"):
            tta.wrap(_with_norm(FrozenBatchNorm2d), method)
    with pytest.raises(ValueError, match="it has BatchNorm2d without weights"):
        tta.wrap(_with_norm(lambda n: nn.BatchNorm2d(n, affine=False)), "tent.cifar10")
    no_norm = nn.Sequential(InputNorm(), nn.Flatten(), nn.Linear(3072, 10))
    for method in ("bn", "tent.cifar10"):
        with pytest.raises(ValueError, match="has no norm layers") as caught:
            tta.wrap(no_norm, method)
        assert "InputNorm" not in str(caught.value)


def test_batch_norm_whose_weights_the_caller_froze_is_trained_all_the_same() -> None:
    net = tiny("bn")
    for p in net.parameters():
        p.requires_grad_(False)
    adapter = tta.wrap(net, "tent.cifar10")
    adapter(images(0))
    assert adapter.report["stepped"] and len(adapter.parameters_adapted) == 4
    assert not any(p.requires_grad for p in adapter.unwrap().parameters())


def test_copies_of_an_adapter_for_several_devices_are_refused(tmp_path: Any) -> None:
    adapter = tta.wrap(tiny("bn"), "tent.cifar10")
    with pytest.raises(RuntimeError, match="`module` of DataParallel must not be an adapter"):
        adapter._replicate_for_data_parallel()  # what torch calls first, for every device
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        for net in (adapter, nn.Sequential(nn.Identity(), adapter)):
            outside = nn.parallel.DistributedDataParallel(net)
            before = adapter.state()
            with pytest.raises(RuntimeError, match="of DistributedDataParallel must not be an ad"):
                outside(images(0))
            assert same(adapter.state(), before)
    finally:
        torch.distributed.destroy_process_group()
    assert adapter(images(0)).isfinite().all()


def test_a_batch_of_one_is_told_the_rules_that_work() -> None:
    words = r"at least 2 images.* norm='robust_bn' or norm='unmix_tns'"
    with pytest.warns(UserWarning, match=words):
        tta.wrap(tiny("bn"), norm="bn")(images(0, 1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for advised in ("robust_bn", "unmix_tns.cifar10"):
            tta.wrap(tiny("bn"), norm=advised)(images(0, 1))
