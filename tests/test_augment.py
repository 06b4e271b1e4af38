"""Views: their parameters, the space of pixels, and what a caller may put in their place."""

from __future__ import annotations

import colorsys
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import tta
from tests.helpers.batches import images, source_batches
from tests.helpers.nets import tiny
from tta.core.component import Context
from tta.core.random import CountedDraws, fork
from tta.parts import augment
from tta.parts.augment import Augmenter, View, draw_view, make_view, pixel_space

PLAIN = View((0, 1, 2, 3, 4), (1.0, 1.0, 1.0, 0.0, 1.0), 0.0, (0, 0), 1.0, 0.0, False)


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_parameters_fill_their_ranges_and_no_more() -> None:
    draws = CountedDraws(0)
    views = [draw_view(32, 64, draws) for _ in range(400)]
    for i, (low, high) in enumerate(augment.RANGES):
        drawn = [v.factors[i] for v in views]
        assert low <= min(drawn) < low + 0.05 * (high - low)
        assert high >= max(drawn) > high - 0.05 * (high - low)
    assert {v.shift[0] for v in views} == set(range(-8, 9))
    assert {v.shift[1] for v in views} == set(range(-4, 5))
    assert all(abs(v.angle) <= 15 and 0.9 <= v.scale <= 1.1 and v.sigma <= 0.5 for v in views)
    assert len({v.order for v in views}) > 80  # of 120
    assert 150 < sum(v.flip for v in views) < 250


def test_the_neutral_view_is_the_image() -> None:
    x = images(0)
    torch.testing.assert_close(make_view(x, PLAIN), x, atol=2e-6, rtol=0)
    tiny_blur = make_view(x, PLAIN._replace(sigma=0.001))
    torch.testing.assert_close(tiny_blur, x, atol=2e-6, rtol=0)
    torch.testing.assert_close(
        make_view(x, PLAIN._replace(flip=True)), x.flip(3), atol=2e-6, rtol=0
    )


def test_a_shift_moves_the_image_and_repeats_its_edge() -> None:
    x = images(0)
    moved = make_view(x, PLAIN._replace(shift=(3, -2)))
    torch.testing.assert_close(moved[:, :, :-2, 3:], x[:, :, 2:, :-3], atol=5e-6, rtol=0)
    torch.testing.assert_close(moved[:, :, :-2, 0], x[:, :, 2:, 0], atol=5e-6, rtol=0)


def test_hue_against_the_standard_library() -> None:
    x = images(3, 2)
    x[0, :, 0, 0] = 0.4  # grey has no hue
    turned = make_view(x, PLAIN._replace(factors=(1.0, 1.0, 1.0, 0.3, 1.0)))
    for b in range(2):
        for i in range(0, 32, 5):
            h, s, v = colorsys.rgb_to_hsv(*x[b, :, i, i].tolist())
            expected = colorsys.hsv_to_rgb((h + 0.3) % 1, s, v)
            assert turned[b, :, i, i].tolist() == pytest.approx(expected, abs=1e-5)


def test_blur_against_its_definition() -> None:
    x, sigma = images(1, 1), 0.5
    taps = [math.exp(-0.5 * (k / sigma) ** 2) for k in range(-2, 3)]
    row = torch.tensor([t / sum(taps) for t in taps])
    kernel = (row[:, None] * row)[None, None]
    expected = nn.functional.conv2d(x.view(3, 1, 32, 32), kernel).view(1, 3, 28, 28)
    torch.testing.assert_close(augment.blur(x, sigma), expected)


@pytest.mark.parametrize("shape", [(2, 3, 17, 24), (2, 1, 32, 32), (2, 4, 9, 9)])
def test_other_sizes_and_channels(shape) -> None:
    view = draw_view(*shape[2:], CountedDraws(0))
    y = make_view(torch.rand(shape, generator=_generator()), view)
    assert y.shape == shape and y.min() >= 0 and y.max() <= 1


def test_a_fork_advances_its_parent_by_one_draw() -> None:
    one, two = _generator(), _generator()
    fork(one, torch.device("cpu")).normals(1000)
    fork(two, torch.device("cpu"))
    assert torch.equal(one.get_state(), two.get_state())


def test_pixel_space() -> None:
    net = nn.Module()
    assert pixel_space(net, None, None) is None
    assert pixel_space(net, [0.5], [0.2]) == ((0.5,), (0.2,))
    net.default_cfg = {"mean": (0.1, 0.2, 0.3), "std": (1, 1, 1)}  # type: ignore[assignment]
    assert pixel_space(net, None, None) == ((0.1, 0.2, 0.3), (1.0, 1.0, 1.0))
    net.pretrained_cfg = SimpleNamespace(mean=(0.5,), std=(0.5,))  # type: ignore[assignment]
    assert pixel_space(net, None, None) == ((0.5,), (0.5,))
    assert pixel_space(net, (0, 0, 0), (1, 1, 1)) == ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    with pytest.raises(ValueError, match="together"):
        pixel_space(net, (0,), None)
    with pytest.raises(ValueError, match="above 0"):
        pixel_space(net, (0,), (0,))


def test_views_are_made_on_pixels_and_given_in_the_models_space() -> None:
    seen = []

    def identity(pixels: torch.Tensor, index: int) -> torch.Tensor:
        seen.append((pixels.clone(), index))
        return pixels

    mean, std = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
    augmenter = Augmenter(nn.Module(), Context(10, mean=mean, std=std, augment=identity))
    pixels = images(0)
    shape = (1, 3, 1, 1)
    x = (pixels - torch.tensor(mean).view(shape)) / torch.tensor(std).view(shape)
    for view in augmenter.views(x, 3, CountedDraws(0)):
        torch.testing.assert_close(view, x, atol=1e-6, rtol=0)
    assert [index for _, index in seen] == [0, 1, 2]
    torch.testing.assert_close(seen[0][0], pixels, atol=1e-6, rtol=0)


def test_the_index_counts_on_over_a_reset() -> None:
    indices: list[int] = []

    def augmentation(pixels: torch.Tensor, index: int) -> torch.Tensor:
        indices.append(index)
        return pixels

    config = tta.get_config("cotta.cifar10", views=2, confidence_threshold=1.0)
    space = {"mean": (0.0,), "std": (1.0,)}
    adapter = tta.wrap(tiny("bn"), update=config, augment=augmentation, **space)
    adapter(images(0))
    adapter.reset()
    adapter(images(0))
    assert indices == [0, 1, 2, 3]


def test_what_is_refused() -> None:
    space = {"mean": (0.0,), "std": (1.0,)}
    with pytest.raises(ValueError, match=r"`mean` and `std`.*Cnn has no pretrained_cfg"):
        tta.wrap(tiny("bn"), "cotta.cifar10")
    net = tiny("bn")
    assert not any(m._forward_pre_hooks for m in net.modules())
    with pytest.raises(ValueError, match=r"`augment`.*got bn, tent"):
        tta.wrap(net, "tent.cifar10", augment=lambda x, i: x)
    with pytest.raises(ValueError, match=r"`restore_mask`.*got bn, rmt"):
        tta.wrap(net, "rmt.cifar10", source=source_batches(), restore_mask=lambda n, s: s, **space)
    with pytest.raises(TypeError, match=r"`augment` must be callable"):
        tta.wrap(net, "cotta.cifar10", augment=3, **space)  # type: ignore[arg-type]
    adapter = tta.wrap(net, "cotta.cifar10", mean=(0.0, 0.0), std=(1.0, 1.0))
    before = adapter.state()
    with pytest.raises(ValueError, match="each of 3 channels"):
        adapter(images(0))
    assert all(torch.equal(v, adapter.state()[k]) for k, v in before.items())
    assert tta.wrap(tiny("ln"), "cotta.cifar10").config.mean is None  # timm's own figures are read
