"""DeYO against its definition: what is destroyed, both thresholds, weights, and their order."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import tta
from tests.helpers.batches import images
from tests.helpers.nets import affine, batch_statistics, tiny
from tta.core.random import CountedDraws
from tta.methods import deyo
from tta.parts.losses import entropy
from tta.parts.occlusion import occlude, random_orders, shuffle_patches, shuffle_pixels

# What the keys of its traces are, see `tests/helpers/trace_keys.py`.
TRACE_KEYS = {
    "set-e": {
        "arrays": {
            "plpd": "none: the counts depend on it",
            "reliable": "none: counted in n_reliable",
            "selected": "report.kept",
            "n_reliable": "report.reliable",
            "n_selected": "report.selected",
            "patch_order": "wrap: draws=",
        },
        "hparams": {
            r"params\.(entropy_margin|weight_margin|plpd_threshold)": "field: of the same name",
            "params.aug_type": "field: destroy",
            "params.patch_len": "field: patches",
            "params.occlusion_size": "field: occlusion, its share of the side",
            r"params\.(row_start|column_start)": "none: the middle",
            r"params\.(reweight|filter)_(ent|plpd)": "none: always 1, the others are not offered",
        },
    },
}

close = torch.testing.assert_close


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _orders(count: int, length: int) -> Tensor:
    return random_orders(count, length, CountedDraws(0))


# Destroying --------------------------------------------------------------------------------


def test_patches_stay_whole_and_each_image_has_an_order_of_its_own() -> None:
    x = torch.arange(3 * 2 * 8 * 12, dtype=torch.float32).view(3, 2, 8, 12)
    y = shuffle_patches(x, 4, _orders(3, 16))

    def patches(image: Tensor) -> list[list[float]]:
        corners = [(r, c) for r in range(0, 8, 2) for c in range(0, 12, 3)]
        return [image[:, r : r + 2, c : c + 3].flatten().tolist() for r, c in corners]

    orders = []
    for before, after in zip(x, y, strict=True):
        assert sorted(patches(before)) == sorted(patches(after))
        orders.append([patches(before).index(p) for p in patches(after)])
    assert orders[0] != orders[1] != orders[2] and list(range(16)) not in orders
    assert torch.equal(y, shuffle_patches(x, 4, _orders(3, 16)))
    assert torch.equal(shuffle_patches(x, 1, _orders(3, 1)), x)


def test_other_sizes_are_resized_and_come_back() -> None:
    y = shuffle_patches(torch.rand(2, 3, 33, 50, generator=_generator()), 4, _orders(2, 16))
    assert y.shape == (2, 3, 33, 50) and y.min() >= 0 and y.max() <= 1
    flat = torch.rand(2, 3, 1, 1, generator=_generator()).expand(2, 3, 33, 50)
    close(shuffle_patches(flat, 4, _orders(2, 16)), flat)


def test_pixels_move_with_all_their_channels() -> None:
    x = torch.arange(2 * 3 * 4 * 5, dtype=torch.float32).view(2, 3, 4, 5)
    y = shuffle_pixels(x, _orders(2, 20))
    for before, after in zip(x.flatten(2), y.flatten(2), strict=True):
        assert sorted(before.t().tolist()) == sorted(after.t().tolist())
        assert not torch.equal(before, after)


def test_the_middle_is_covered_with_the_mean() -> None:
    x = torch.rand(2, 3, 8, 6, generator=_generator())
    y = occlude(x, 0.5)
    for b in range(2):
        for c in range(3):
            mean = sum(x[b, c].flatten().tolist()) / 48
            for r in range(8):
                for s in range(6):
                    inside = 2 <= r < 6 and 1 <= s < 4
                    expected = mean if inside else float(x[b, c, r, s])
                    assert float(y[b, c, r, s]) == pytest.approx(expected, abs=1e-6)


# The method --------------------------------------------------------------------------------


def _roll(x: Tensor, grid: int, orders: Tensor | None = None) -> Tensor:
    return x.roll(5, dims=2).flip(3)


def _measure(net, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, entropies and probabilities."""
    z = net(x)
    p = z.softmax(1)
    return z, -(p * p.log()).sum(1), p


def _thresholds(x: Tensor, keep: int) -> tuple[float, float]:
    """Shares of ln C and PLPD that split a batch of the tiny network."""
    net = batch_statistics(tiny("bn"))
    with torch.no_grad():
        _, h, p = _measure(net, x)
        ordered = h.sort().values
        margin = float(ordered[keep - 1] + ordered[keep]) / 2
        some = h < margin
        after = net(_roll(x[some], 4)).softmax(1)
        drop = p[some].max(1).values - after.gather(1, p[some].argmax(1)[:, None])[:, 0]
    ordered = drop.sort().values
    return margin / math.log(10), float(ordered[keep // 2 - 1] + ordered[keep // 2]) / 2


def test_two_steps_are_those_of_the_definition(monkeypatch) -> None:
    monkeypatch.setattr(deyo, "shuffle_patches", _roll)
    batches = [images(t, 12) for t in range(2)]
    margin, threshold = _thresholds(batches[0], 8)
    net = batch_statistics(tiny("bn"))
    theta = list(affine(net).values())[:2]  # of two norm layers, the last one is left out
    adam = torch.optim.Adam(theta, lr=0.02)
    adapter = tta.wrap(
        tiny("bn"),
        update=tta.get_config(
            "deyo.cifar10", lr=0.02, entropy_margin=margin, plpd_threshold=threshold
        ),
    )
    for t, x in enumerate(batches):
        z, h, p = _measure(net, x)
        first = [i for i in range(12) if h[i].item() < margin * math.log(10)]
        with torch.no_grad():
            after = net(_roll(x[first], 4)).softmax(1)
        labels = p.argmax(1)
        drops = {i: (p[i, labels[i]] - after[j, labels[i]]).item() for j, i in enumerate(first)}
        second = [i for i in first if drops[i] > threshold]
        weights = [math.exp(0.4 * math.log(10) - h[i].item()) + math.exp(drops[i]) for i in second]
        loss = sum(w * h[i] for w, i in zip(weights, second, strict=True)) / len(second)
        adam.zero_grad()
        loss.backward()
        adam.step()
        close(adapter(x), z.detach(), atol=1e-5, rtol=1e-5)
        assert adapter.report.reliable == len(first) and adapter.report.selected == len(second)
        if t == 0:
            assert (len(first), len(second)) == (8, 4)
        assert adapter.report.loss == pytest.approx(loss.item(), rel=1e-5)
    assert list(adapter.parameters_adapted) == ["layer1.1.weight", "layer1.1.bias"]
    for p, value in zip(adapter.parameters_adapted.values(), theta, strict=True):
        close(p.detach(), value.detach(), atol=2e-5, rtol=0)
    source = dict(tiny("bn").named_parameters())
    for name in ("layer2.1.weight", "layer2.1.bias"):
        assert torch.equal(adapter.state()[f"param/{name}"], source[name])


def test_one_reliable_image_is_destroyed_under_its_own_statistics(monkeypatch, recwarn) -> None:
    monkeypatch.setattr(deyo, "shuffle_patches", _roll)
    x, net = images(3, 6), batch_statistics(tiny("bn"))
    with torch.no_grad():
        _, h, p = _measure(net, x)
        first = int(h.argmin())
        after = net(_roll(x[first : first + 1], 4)).softmax(1)
    label = int(p[first].argmax())
    drop = float(p[first, label] - after[0, label])
    ordered = h.sort().values
    margin = float(ordered[0] + ordered[1]) / 2 / math.log(10)
    for shift, selected in ((-1e-4, 1), (1e-4, 0)):
        fields = {"entropy_margin": margin, "plpd_threshold": drop + shift}
        adapter = tta.wrap(tiny("bn"), update=tta.get_config("deyo.cifar10", lr=0.02, **fields))
        adapter(x)
        assert adapter.report.reliable == 1 and adapter.report.selected == selected
    assert not [w for w in recwarn if "at least 2 images" in str(w.message)]


def _once(x: Tensor, **fields) -> tta.Adapter:
    values = {"lr": 0.05, "entropy_margin": 10.0, "plpd_threshold": -1.0} | fields
    adapter = tta.wrap(tiny("gn"), update=tta.get_config("deyo", **values))
    adapter(x)
    return adapter


def test_both_thresholds_are_strict(monkeypatch) -> None:
    monkeypatch.setattr(deyo, "shuffle_patches", _roll)
    x, net = images(0, 10), tiny("gn")
    with torch.no_grad():
        _, _, p = _measure(net, x)
        after = net(_roll(x, 4)).softmax(1)
    labels = p.argmax(1)
    drops = sorted(float(p[i, labels[i]] - after[i, labels[i]]) for i in range(10))
    assert drops == sorted(set(drops))
    for rank in (0, 4, 9):
        assert _once(x, plpd_threshold=drops[rank]).report.selected == 9 - rank
        assert _once(x, plpd_threshold=drops[rank] - 1e-6).report.selected == 10 - rank
    nats = sorted(entropy(net(x).detach()).tolist())
    for rank in (0, 4, 9):
        for shift, expected in ((0.0, rank), (1e-5, rank + 1)):
            margin = (nats[rank] + shift) / math.log(10)
            assert _once(x, entropy_margin=margin).report.reliable == expected


def test_nothing_moves_when_no_label_is_lost() -> None:
    adapter = _once(images(0), plpd_threshold=1.0)
    assert adapter.report.reliable == 8 and adapter.report.selected == 0
    assert not adapter.report.stepped and math.isnan(adapter.report.loss)
    source = dict(tiny("gn").named_parameters())
    state = adapter.state()
    assert all(torch.equal(state[f"param/{n}"], source[n]) for n in adapter.parameters_adapted)


@pytest.mark.parametrize("kind", ["patch", "pixel", "occlusion"])
def test_every_way_of_destroying_predicts_and_steps(kind: str) -> None:
    adapter = _once(images(0), destroy=kind)
    assert adapter.report.selected == 8 and adapter.report.stepped


def test_images_too_small_for_the_grid_are_refused() -> None:
    adapter = tta.wrap(tiny("gn"), "deyo.cifar10", patches=40)
    before = adapter.state()
    with pytest.raises(ValueError, match="sides of at least 40 pixels"):
        adapter(images(0))
    assert all(torch.equal(v, adapter.state()[k]) for k, v in before.items())


@pytest.mark.parametrize(
    ("preset", "batch_size", "lr"),
    [
        ("imagenet", None, 2.5e-4),
        ("imagenet", 64, 2.5e-4),
        ("imagenet", 16, 2.5e-4 / 64 * 16 * 2),
        ("imagenet", 1, 2 * 2.5e-4 / 64 * 2),
        ("imagenet_vit", 16, 1e-3 / 64 * 16),
        ("imagenet_vit", 1, 2 * 1e-3 / 64),
        ("coloredmnist", 64, 5 * 2.5e-4),
        ("waterbirds", 64, 5 * 2.5e-4),
        ("cifar10", 200, 1e-3),
        ("cifar10", 1, 1e-3 / 200),  # no rule of the authors: ours
    ],
)
@pytest.mark.filterwarnings("ignore:.*preset, made for:UserWarning")
def test_learning_rates_of_the_scripts(preset: str, batch_size: int | None, lr: float) -> None:
    adapter = tta.wrap(tiny("gn"), f"deyo.{preset}", batch_size=batch_size)
    assert adapter.config.update.lr == pytest.approx(lr)  # type: ignore[union-attr]


# Orders ------------------------------------------------------------------------------------


def test_one_order_of_pixels_for_all_images_is_official(monkeypatch) -> None:
    seen = []

    def shuffle(x: Tensor, orders: Tensor) -> Tensor:
        seen.append(orders)
        return shuffle_pixels(x, orders)

    monkeypatch.setattr(deyo, "shuffle_pixels", shuffle)
    for official in (False, True):
        _once(images(0), destroy="pixel", official=official)
    own, one = seen
    assert own.shape == one.shape == (8, 1024)
    assert (one == one[0]).all() and not (own == own[0]).all()
    assert torch.equal(one[0].sort().values, torch.arange(1024))


def test_orders_of_the_caller() -> None:
    asked = []

    def draws(name: str, shape: torch.Size, call: int) -> Tensor | None:
        asked.append((name, tuple(shape), call))
        return torch.arange(16).flip(0).expand(shape) if call == 0 else None

    config = tta.get_config("deyo", lr=0.05, entropy_margin=10.0, plpd_threshold=-1.0)
    adapter = tta.wrap(tiny("gn"), update=config, draws=draws)
    start = adapter.state()["rng"]
    adapter(images(0))
    assert torch.equal(adapter.state()["rng"], start)
    adapter(images(1, 5))
    assert not torch.equal(adapter.state()["rng"], start)
    assert asked == [("patch_order", (8, 16), 0), ("patch_order", (5, 16), 1)]


def test_an_order_that_leaves_out_a_patch_is_refused() -> None:
    adapter = tta.wrap(
        tiny("gn"),
        update=tta.get_config("deyo", entropy_margin=10.0),
        draws=lambda name, shape, call: torch.zeros(shape, dtype=torch.int64),
    )
    before = adapter.state()
    with pytest.raises(ValueError, match="`draws` must return permutations of 0 to 15"):
        adapter(images(0))
    assert all(torch.equal(v, adapter.state()[k]) for k, v in before.items())


def test_rows_that_are_kept_are_those_of_the_batch() -> None:
    x = images(0)
    adapter = _once(x)
    assert adapter.report.kept.tolist() == [True] * 8
    x[2] = float("nan")
    with pytest.warns(UserWarning, match="1 of 8 with NaN"):
        adapter(x)
    assert adapter.report.kept.tolist() == [i != 2 for i in range(8)]
