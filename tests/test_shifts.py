"""NEO, FOA's shift and BN-EMA: what they do beyond their traces."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import tta
from tests.helpers.batches import images, source_batches
from tests.helpers.nets import tiny
from tests.helpers.wild import Cosine, wrapped
from tta.parts.far_features import FarFeatures

SHIFTS = ["neo", "foa_shift"]
close = torch.testing.assert_close


def _features(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
    adapter = tta.wrap(net, "neo")
    with torch.no_grad():
        found = adapter.network(x).features
    adapter.unwrap()
    assert found is not None
    return found


def test_a_batch_of_one_is_centred_on_itself() -> None:
    """The batch is in the mean, so that a first image is left with the bias alone."""
    net: Any = tiny("gn")
    bias = net.fc.bias.detach().clone()
    close(tta.wrap(net, "neo")(images(0, 1))[0], bias, atol=1e-5, rtol=1e-5)


def test_neo_does_not_depend_on_how_the_stream_is_cut() -> None:
    whole, parts = tta.wrap(tiny("ln"), "neo"), tta.wrap(tiny("ln"), "neo")
    whole(images(0, 8))
    for x in images(0, 8).split([1, 4, 3]):
        parts(x)
    close(whole.state()["output/centre"], parts.state()["output/centre"])
    assert whole.state()["output/count"] == parts.state()["output/count"] == 8


@pytest.mark.parametrize("momentum", [None, 0.1])
def test_with_the_source_mean_nothing_moves_before_the_first_batch(momentum: float | None) -> None:
    net = tiny("gn")
    expected = net(images(0)).detach()
    adapter = wrapped(net, "neo", momentum=momentum, use_source_mean=True)
    mean = torch.cat([_features(tiny("gn"), x) for x, _ in source_batches()]).mean(0)
    close(adapter.state()["output/centre"], mean)
    with adapter.frozen():
        close(adapter(images(0)), expected)


def test_an_official_moving_average_starts_at_zero_with_the_source_mean_too() -> None:
    """Features less a tenth of their mean, plus the source's mean."""
    net: Any = tiny("gn")
    mean = torch.cat([_features(tiny("gn"), x) for x, _ in source_batches()]).mean(0)
    h = _features(tiny("gn"), images(0))
    adapter = wrapped(net, "neo", momentum=0.1, use_source_mean=True, official=True)
    close(adapter.state()["output/centre"], torch.zeros_like(mean))
    expected = (h - 0.1 * h.mean(0) + mean) @ net.fc.weight.T.detach() + net.fc.bias.detach()
    close(adapter(images(0)), expected)


def test_balanced_is_the_mean_over_classes_of_a_loop() -> None:
    net: Any = tiny("gn")
    reference = torch.cat([_features(net, x) for x, _ in source_batches()]).mean(0)
    with torch.no_grad():
        net.fc.bias.copy_(-net.fc.weight @ reference)  # several classes are predicted
    adapter = wrapped(net, "neo", balanced=True, use_source_mean=True)
    seen: dict[int, list[torch.Tensor]] = {}
    for t in range(3):
        with adapter.frozen(), torch.no_grad():
            prediction = adapter.network(images(t))
        assert prediction.features is not None
        for h, label in zip(prediction.features, prediction.logits.argmax(1).tolist(), strict=True):
            seen.setdefault(label, []).append(h - reference)
        y = adapter(images(t))
    assert len(seen) > 1
    displacement = sum((sum(hs) / (len(hs) + 4) for hs in seen.values()), torch.zeros(8)) / 10
    close(adapter.state()["output/centre"], reference + displacement)
    close(y, (prediction.features - displacement) @ net.fc.weight.T.detach() + net.fc.bias.detach())


@pytest.mark.parametrize("method", SHIFTS)
def test_one_class_moves_a_balanced_rule_by_one_part_in_c(method: str) -> None:
    net: Any = tiny("gn")
    with torch.no_grad():
        net.fc.bias[3] = 100.0  # one class alone is predicted
    moved = {}
    for balanced in (False, True):
        more = {"use_source_mean": True} if method == "neo" else {}
        adapter = wrapped(net, method, balanced=balanced, **more)
        for t in range(20):
            adapter(2 * images(t))
        assert adapter.output is not None
        moved[balanced] = adapter.output.offset().norm()  # type: ignore[operator]
        net = adapter.unwrap()
    assert 0 < moved[True] <= 0.11 * moved[False]


@pytest.mark.parametrize("norm", ["source", "bn_ema"])
@pytest.mark.parametrize("method", [None, "tent.cifar10"])
@pytest.mark.parametrize("output", SHIFTS)
def test_unwrap_keeps_the_shift_in_the_bias(output: str, method: str | None, norm: str) -> None:
    net = tiny("bn")
    more: dict[str, Any] = {} if method is None else {"update": method}
    adapter = tta.wrap(net, norm=norm, output=output, source=source_batches(), **more)
    for t in range(3):
        adapter(images(t))
    with adapter.frozen():
        expected = adapter(images(9))
    assert adapter.unwrap(keep=True) is net
    close(net(images(9)).detach(), expected)


def test_a_linear_layer_without_a_bias_gets_one_when_the_shift_is_kept() -> None:
    net: Any = tiny("gn")
    net.fc = nn.Linear(8, 10, bias=False)
    adapter = tta.wrap(net, "neo")
    adapter(images(0))
    with adapter.frozen():
        expected = adapter(images(1))
    adapter.unwrap(keep=True)
    assert isinstance(net.fc.bias, nn.Parameter)
    close(net(images(1)).detach(), expected)


def test_a_convolution_of_one_pixel_is_a_linear_layer() -> None:
    class Convolutional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            net: Any = tiny("gn")
            self.body = nn.Sequential(net.layer1, net.layer2)
            self.head = nn.Conv2d(8, 10, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.body(x)).mean((2, 3))

    net = Convolutional().eval()
    adapter = tta.wrap(net, "neo")
    with torch.no_grad():
        h = net.body(images(0)).mean((2, 3))
        expected = (h - h.mean(0)) @ net.head.weight.flatten(1).T + net.head.bias
    close(adapter(images(0)), expected)


@pytest.mark.parametrize("output", SHIFTS)
def test_heads_that_are_no_linear_layer_are_refused(output: str) -> None:
    words = "must make its logits by a linear layer for "
    for arguments in ({"features": "neck"}, {"features": lambda m, x: m.body(x)}, {}):
        with pytest.raises(ValueError, match=words + output):
            tta.wrap(Cosine(), output=output, num_classes=10, source=source_batches(), **arguments)
    quantised = torch.ao.quantization.quantize_dynamic(tiny("gn"), {nn.Linear}, dtype=torch.qint8)
    with pytest.raises(ValueError, match=words + output):
        tta.wrap(quantised, output=output, source=source_batches())

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = tiny("gn")

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 3 * self.net(x)

    adapter = tta.wrap(Scaled(), output=output, source=source_batches())
    before = adapter.state()
    with pytest.raises(ValueError, match="got other logits than those of its Linear"):
        adapter(images(0))
    assert all(
        torch.equal(v.nan_to_num(9.0), adapter.state()[k].nan_to_num(9.0))
        for k, v in before.items()
    )


@pytest.mark.parametrize("output", SHIFTS)
def test_what_is_missing_or_of_another_model_is_refused(output: str) -> None:
    fields = {"use_source_mean": True} if output == "neo" else {}
    with pytest.raises(ValueError, match=r"`source` must give \w+ the mean of the features"):
        tta.wrap(tiny("gn"), output, **fields)
    with pytest.raises(ValueError, match=r"`source.feature_mean` must be of shape \(8,\)"):
        given = tta.SourceStatistics(feature_mean=torch.zeros(7))
        tta.wrap(tiny("gn"), output, source=given, **fields)
    with pytest.raises(ValueError, match="`source` must hold at least one batch"):
        tta.wrap(tiny("gn"), output, source=[], **fields)
    with pytest.raises(ValueError, match="`feature_mean` must be"):
        tta.SourceStatistics(feature_mean=torch.zeros(2, 8))


def test_the_mean_is_saved_loaded_and_taken_from_features(tmp_path) -> None:
    net = tiny("gn")
    found = tta.collect_source(net, source_batches(), for_methods=["foa_shift"])
    found.save(tmp_path / "source.safetensors")
    again = tta.SourceStatistics.load(tmp_path / "source.safetensors")
    assert again.feature_mean is not None and found.feature_mean is not None
    assert torch.equal(again.feature_mean, found.feature_mean)
    features = tta.collect_source(net, source_batches(), for_methods=["adanpc.cifar10"])
    adapter = tta.wrap(net, "foa_shift", source=features)
    close(adapter.constants()["output/feature_mean"], found.feature_mean)
    assert adapter.config.source == "feature mean from features"


@pytest.mark.parametrize("output", SHIFTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(output: str, dtype: torch.dtype) -> None:
    single = wrapped(tiny("gn"), output)
    half = wrapped(tiny("gn").to(dtype), output, dtype)
    for t in range(3):
        y, expected = half(images(t).to(dtype)), single(images(t))
        assert y.dtype == dtype
        close(y.float(), expected, atol=0.05, rtol=0.05)
    state = {k: v for k, v in half.state().items() if k[:7] == "output/" and "count" not in k}
    assert state and all(v.dtype == torch.float32 for v in state.values())
    half.unwrap(keep=True)


def test_bn_ema_moves_then_normalises_layer_by_layer() -> None:
    base = nn.BatchNorm2d(3).eval()
    net = nn.Sequential(base, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 10)).eval()
    adapter = tta.wrap(net, norm="bn_ema", momentum=0.25)
    x = images(0)
    mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=1)
    adapter(x)
    close(adapter.state()["norm/0.mean"], 0.25 * mean)
    close(adapter.state()["norm/0.var"], 0.75 + 0.25 * var)
    kept = adapter.unwrap(keep=True)
    close(base.running_mean, 0.25 * mean)
    assert kept is net


@pytest.mark.parametrize("official", [False, True])
def test_bn_ema_takes_one_image_and_freezes(official: bool) -> None:
    config = tta.get_config("bn_ema", official=official)
    adapter = tta.wrap(tiny("bn"), norm=config)
    start = adapter.state()
    with adapter.frozen():
        close(adapter(images(0)), tiny("bn")(images(0)).detach())
    assert all(torch.equal(v, adapter.state()[k]) for k, v in start.items())
    assert adapter(images(0, 1)).isfinite().all()
    moved = [k for k, v in adapter.state().items() if not torch.equal(v, start[k])]
    assert moved and all(k.startswith("norm/") for k in moved)


def test_the_first_of_two_passes_runs_once_for_each_that_may_move() -> None:
    """It is left out where statistics are at rest, and gradients flow through the second."""
    calls: list[int] = []
    net: Any = tiny("bn")
    net.fc.register_forward_pre_hook(lambda module, args: calls.append(len(args[0])))
    config = tta.get_config("bn_ema", official=True)
    adapter = tta.wrap(net, norm=config, update="tent.cifar10", output="neo")
    calls.clear()
    adapter(images(0))
    assert calls == [8, 8] and adapter.report.stepped
    with adapter.frozen():
        adapter(images(0))
    assert calls == [8, 8, 8]


@pytest.mark.parametrize("output", SHIFTS)
@pytest.mark.parametrize("update", ["eata.cifar10", "cotta.cifar10", "rotta.cifar10"])
def test_norm_update_and_shift_together(output: str, update: str) -> None:
    """The shift is added to what the update gives, of the same features."""
    small = {"lr": 1e-4, "norm": "bn_ema"}  # features that explode are left out of shifts
    with_shift = wrapped(tiny("bn"), update, **small, output=output)
    without = wrapped(tiny("bn"), update, **small)
    for t in range(3):
        y, plain = with_shift(images(t)), without(images(t))
        difference = y - plain  # one vector for all rows
        close(difference, difference[:1].expand_as(difference), atol=1e-4, rtol=1e-3)
    assert difference.abs().max() > 1e-3


@pytest.mark.parametrize(
    ("output", "fields"),
    [
        ("drift", {}),
        ("neo", {}),
        ("neo.continual", {}),
        ("neo", {"balanced": True}),
        ("foa_shift", {}),
        ("foa_shift", {"balanced": True}),
        ("t3a", {}),
    ],
)
def test_a_bad_frame_moves_no_shift(output: str, fields: dict[str, Any]) -> None:
    """One image in eight has values up to 255, and once a whole batch."""
    rule = tta.get_config(output, **fields)
    clean, shown = (wrapped(tiny("bn"), "source", output=rule) for _ in range(2))
    for t in range(6):
        x = images(t)
        clean(x)
        bad = x.clone()
        bad[3::8] *= 255
        shown(bad * 1e4 if t == 3 else bad)
    good, after = clean(images(9)), shown(images(9))
    assert float((good - after).abs().max()) < 0.1 * float(good.std())


def test_a_camera_that_hangs_moves_no_shift() -> None:
    """The same image in whole batches and one by one, and then the stream goes on."""
    clean, shown = (wrapped(tiny("bn"), "source", output="drift") for _ in range(2))
    for t in range(3):
        clean(images(t))
        shown(images(t))
    still = images(3)[:1]
    shown(still)
    clean(still)
    before = clean.state()["output/centre"].clone()
    for size in (8, 1, 1, 8):
        shown(still.expand(size, -1, -1, -1))
    close(shown.state()["output/centre"], before, atol=1e-6, rtol=1e-5)
    shown(images(4))
    assert float((shown.state()["output/centre"] - before).abs().max()) > 1e-5


def test_ordinary_images_after_a_camera_that_hung_are_not_left_out_for_good() -> None:
    """The same image again and again leaves no distance that any other could be within."""
    far, centre = FarFeatures(), torch.zeros(8)
    for _ in range(100):
        far.left_out(torch.full((64, 8), 1e-6), centre)
    generator = torch.Generator().manual_seed(0)
    kept = []
    for _ in range(8):
        x = torch.randn(64, 8, generator=generator)
        kept.append(bool(torch.equal(far.left_out(x, centre), x)))
    assert kept == [False] * 4 + [True] * 4
    x[3] *= 255
    assert torch.equal(far.left_out(x, centre)[3], centre)


@pytest.mark.parametrize("output", ["neo", "foa_shift"])
def test_official_shifts_follow_every_image(output: str) -> None:
    rules = (tta.get_config(output, official=official) for official in (False, True))
    plain, official = (wrapped(tiny("bn"), "source", output=rule) for rule in rules)
    for t in range(3):  # no image is bad
        assert torch.equal(plain(images(t)), official(images(t)))
    x = images(3)
    x[3::8] *= 255
    plain(x), official(x)
    assert not torch.allclose(plain(images(4)), official(images(4)), atol=1e-2)
