"""ROID against its definition: weights, losses, ensembling, prior, and their order."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import tta
from tests.helpers.batches import images
from tests.helpers.nets import affine, batch_statistics, tiny
from tta.core.component import Context
from tta.core.prediction import Prediction
from tta.core.random import CountedDraws, fork
from tta.methods.roid import PriorCorrection, PriorCorrectionConfig, sample_weights
from tta.parts.augment import Augmenter, draw_view, make_view
from tta.parts.losses import soft_likelihood_ratio
from tta.parts.teachers import ensemble

# What the keys of its traces are, see `tests/helpers/trace_keys.py`.
TRACE_KEYS = {
    "set-e": {
        "arrays": {
            "kept": "report.kept",
            "sample_weights": "none: the loss depends on them",
            "ema_probs": "state: update/ema_probs",
        },
        "hparams": {
            "params.configured_batch": "wrap: batch_size",
            "params.use_consistency": "field: consistency",
            "params.use_prior_correction": "wrap: output",
        },
    },
}

RAW = {"mean": (0.0,), "std": (1.0,)}
close = torch.testing.assert_close


def _view(x: Tensor, index: int = 0) -> Tensor:
    return x.roll(1 + index, dims=3) * 0.9


def _roid(**arguments) -> tta.Adapter:
    fields = {k: arguments.pop(k) for k in list(arguments) if k in tta.get_config("roid").to_dict()}
    config = tta.get_config("roid.cifar10", lr=0.02, **fields)
    return tta.wrap(tiny("bn"), update=config, **RAW | {"augment": _view} | arguments)


def _plain(batches: list[Tensor], divisor: int | None) -> dict[str, list]:
    """The whole method in one loop, with torch's Adam and nothing of the library."""
    net = batch_statistics(tiny("bn"))
    theta = list(affine(net).values())
    theta_0 = [p.detach().clone() for p in theta]
    adam = torch.optim.Adam(theta, lr=0.02)
    q = torch.full((10,), 0.1)
    seen: dict[str, list] = {"outputs": [], "loss": [], "kept": [], "q": []}
    for t, x in enumerate(batches):
        z = net(x)
        p = z.softmax(1)
        h = -(p * p.log()).sum(1)
        with torch.no_grad():
            div = 1 - (p @ q) / (p.norm(dim=1) * q.norm())
            div = (div - div.min()) / (div.max() - div.min())
            cert = (-h - (-h).min()) / ((-h).max() - (-h).min())
            kept = div >= div.mean()
            w = torch.exp(div * cert / (1 / 3))
            q = 0.9 * q + 0.1 * p.mean(0)
            m = p.mean(0)
            e = max(1 / len(x), 1 / 10) / m.max()
            seen["outputs"].append(z * (m + e) / (1 + e * 10))
        clipped = p.clamp(max=0.99)
        slr = -(clipped * torch.log(clipped / (1 - clipped) + 1e-5)).sum(1)[kept]
        a, b = net(_view(x[kept], t)), z[kept]
        sce = -0.5 * (b.softmax(1) * a.log_softmax(1)).sum(1)
        sce = sce - 0.5 * (a.softmax(1) * b.log_softmax(1)).sum(1)
        loss = (w[kept] * slr).sum() / (divisor or len(x))
        loss = loss + (w[kept] * sce).sum() / (divisor or len(x))
        adam.zero_grad()
        loss.backward()
        adam.step()
        with torch.no_grad():
            for value, source in zip(theta, theta_0, strict=True):
                value.copy_(0.99 * value + 0.01 * source)
        seen["loss"].append(loss.item())
        seen["kept"].append(int(kept.sum()))
        seen["q"].append(q)
    seen["theta"] = [p.detach() for p in theta]
    return seen


@pytest.mark.parametrize("configured", [None, 12])
def test_three_steps_are_those_of_the_definition(configured: int | None) -> None:
    """The last batch is short, and is divided by the configured size where there is one."""
    batches = [images(0, 12), images(1, 12), images(2, 7)]
    expected = _plain(batches, configured)
    adapter = _roid(batch_size=configured)
    for t, x in enumerate(batches):
        close(adapter(x), expected["outputs"][t], atol=1e-5, rtol=1e-5)
        assert adapter.report.selected == expected["kept"][t]
        assert 0 < expected["kept"][t] < len(x)
        # log(p / (1 - p)) magnifies rounding, which processors do not share.
        assert adapter.report.loss == pytest.approx(expected["loss"][t], rel=2e-4)
        close(adapter.state()["update/ema_probs"], expected["q"][t], atol=1e-6, rtol=0)
    for p, value in zip(adapter.parameters_adapted.values(), expected["theta"], strict=True):
        close(p.detach(), value, atol=2e-5, rtol=0)


@pytest.mark.parametrize("seed", [4, 2])
def test_a_view_of_one_kept_image_has_its_own_statistics(seed: int, recwarn) -> None:
    """The batch has more images, so neither the source's statistics nor a warning are due."""
    batches = [images(seed, 3), images(seed + 20, 3)]
    expected = _plain(batches, None)
    assert expected["kept"] == {4: [1, 1], 2: [1, 2]}[seed]
    adapter = _roid()
    for t, x in enumerate(batches):
        close(adapter(x), expected["outputs"][t], atol=1e-5, rtol=1e-5)
        assert adapter.report.loss == pytest.approx(expected["loss"][t], rel=2e-4)
    for p, value in zip(adapter.parameters_adapted.values(), expected["theta"], strict=True):
        close(p.detach(), value, atol=2e-5, rtol=0)
    assert not [w for w in recwarn if "at least 2 images" in str(w.message)]


def test_weights_by_hand() -> None:
    logits = torch.tensor([[4.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 3.0]])
    q = [0.6, 0.3, 0.1]
    div, cert = [], []
    for row in logits.tolist():
        total = sum(math.exp(v) for v in row)
        p = [math.exp(v) / total for v in row]
        dot = sum(a * b for a, b in zip(p, q, strict=True))
        lengths = math.sqrt(sum(a * a for a in p)) * math.sqrt(sum(b * b for b in q))
        div.append(1 - dot / lengths)
        cert.append(sum(a * math.log(a) for a in p))
    div = [(d - min(div)) / (max(div) - min(div)) for d in div]
    cert = [(c - min(cert)) / (max(cert) - min(cert)) for c in cert]
    weights, kept = sample_weights(logits, torch.tensor(q), 0.5)
    expected = [math.exp(d * c / 0.5) for d, c in zip(div, cert, strict=True)]
    close(weights, torch.tensor(expected), atol=1e-5, rtol=1e-5)
    assert kept.tolist() == [d >= sum(div) / 3 for d in div]
    assert kept.any() and not kept.all()


def test_samples_without_a_range_weigh_one() -> None:
    """Where the official scaling is 0/0: one image, and images that are all alike."""
    q = torch.full((5,), 0.2)
    for logits in (torch.randn(1, 5), torch.zeros(4, 5)):
        weights, kept = sample_weights(logits, q, 1 / 3)
        assert torch.equal(weights, torch.ones(len(logits))) and kept.all()


def test_soft_likelihood_ratio_by_hand() -> None:
    rows = [[0.0, 0.0], [9.0, 0.0]]
    expected = []
    for row in rows:
        total = sum(math.exp(v) for v in row)
        p = [min(math.exp(v) / total, 0.99) for v in row]
        expected.append(-sum(v * math.log(v / (1 - v) + 1e-5) for v in p))
    close(soft_likelihood_ratio(torch.tensor(rows)), torch.tensor(expected), atol=1e-5, rtol=1e-5)


def test_the_prior_by_hand() -> None:
    rows, classes = [[2.0, 0.0, -1.0], [1.0, 1.0, 0.0]], 3
    probs = []
    for row in rows:
        total = sum(math.exp(v) for v in row)
        probs.append([math.exp(v) / total for v in row])
    m = [(probs[0][k] + probs[1][k]) / 2 for k in range(classes)]
    e = max(1 / 2, 1 / 3) / max(m)
    expected = [[v * (m[k] + e) / (1 + e * classes) for k, v in enumerate(row)] for row in rows]
    rule = PriorCorrection(PriorCorrectionConfig(), Context(num_classes=classes))
    close(rule.correct(Prediction(torch.tensor(rows))), torch.tensor(expected))


def test_many_images_smooth_by_the_number_of_classes() -> None:
    logits = torch.zeros(50, 4)
    rule = PriorCorrection(PriorCorrectionConfig(), Context(num_classes=4))
    assert torch.equal(rule.correct(Prediction(logits)), logits)
    logits[:, 0] = 2.0
    share = logits[0].softmax(0)
    e = (1 / 4) / share.max()
    close(rule.correct(Prediction(logits))[0], logits[0] * (share + e) / (1 + 4 * e))


def test_weights_are_drawn_back_by_a_hundredth() -> None:
    p, source = torch.tensor([1.0, 2.0]), torch.tensor([0.0, 4.0])
    ensemble([p], [source], 0.01)
    close(p, torch.tensor([0.99, 2.02]))
    adapter = _roid()
    adapter.update.optimizer.param_groups[0]["lr"] = 0.0  # type: ignore[union-attr]
    name = "param/layer1.1.weight"
    source = adapter.state()[name]
    adapter.load_state({name: source + 1})
    adapter(images(0))
    close(adapter.state()[name], source + 0.99)


def test_the_recipe_brings_the_correction_and_it_can_be_replaced() -> None:
    def outputs(*args, **kwargs) -> str | None:
        found = tta.wrap(tiny("bn"), *args, **RAW, **kwargs).config.output
        return None if found is None else found.name

    assert outputs("roid.cifar10") == outputs(update="roid.cifar10") == "prior_correction"
    assert outputs("roid.cifar10", output="lame") == "lame"
    assert outputs("roid.cifar10", output="source") is None
    assert outputs("tent.cifar10", output="prior_correction") == "prior_correction"
    assert outputs("tent.cifar10") is None


def test_without_the_view_no_pixel_space_is_needed() -> None:
    config = tta.get_config("roid.cifar10", consistency=False)
    adapter = tta.wrap(tiny("gn"), update=config)
    assert torch.isfinite(adapter(images(0))).all() and "consistency" not in adapter.report
    with pytest.raises(ValueError, match="`mean` and `std`"):
        tta.wrap(tiny("gn"), "roid.cifar10")


def test_views_have_reflected_borders_and_neither_blur_nor_noise() -> None:
    x = images(0, 3)
    augmenter = Augmenter(tiny("bn"), Context(num_classes=10, **RAW), "reflect", soften=False)
    (view,) = augmenter.views(x, 1, CountedDraws(4))
    drawn = draw_view(32, 32, CountedDraws(4))
    assert torch.equal(view, make_view(x, drawn._replace(sigma=0.0), None, "reflect"))
    assert not torch.equal(view, make_view(x, drawn._replace(sigma=0.0), None, "edge"))


def test_views_come_from_the_adapters_generator() -> None:
    """One draw a batch, whatever is kept; the same seed gives the same views."""
    adapters = [_roid(augment=None, seed=5) for _ in range(2)]
    first, second = (a(images(0)) for a in adapters)
    assert torch.equal(first, second)
    generator = torch.Generator().manual_seed(5)
    fork(generator, torch.device("cpu"))
    assert torch.equal(adapters[0].state()["rng"], generator.get_state())
