"""Estimates of accuracy without labels."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import tta
from tests.helpers.batches import images
from tests.helpers.nets import tiny
from tta.core.health import EVERY
from tta.core.random import CountedDraws
from tta.parts.dropout import dropped, dropping, keep_mask
from tta.parts.estimates import (
    AgreementEstimate,
    ConfidenceEstimate,
    FeatureDropoutEstimate,
    confidence_accuracy,
)


def _certain(labels: Tensor, classes: int = 10, scale: float = 20.0) -> Tensor:
    return scale * nn.functional.one_hot(labels, classes).float()


def test_as_confident_as_on_source_images_is_as_accurate() -> None:
    logits = torch.randn(500, 10, generator=torch.Generator().manual_seed(0))
    confidence = logits.softmax(1).amax(1).mean()
    assert float(confidence_accuracy(logits, 0.8, confidence, 1.0)) == pytest.approx(0.8)
    less = confidence_accuracy(logits, 0.8, confidence + 0.1, 1.0)
    assert float(less) == pytest.approx(0.8 - 0.3)
    assert float(confidence_accuracy(logits, 0.8, confidence, 0.0)) == pytest.approx(0.1)
    assert float(confidence_accuracy(logits, 0.8, 2.0, 1.0)) == pytest.approx(0.1)


def test_the_reference_comes_from_features_or_from_images() -> None:
    net = tiny("gn")
    labels = torch.arange(64) % 10
    x = images(3, 64)
    logits = net(x).detach()
    accuracy = float((logits.argmax(1) == labels).float().mean())
    features = []
    handle = net.fc.register_forward_pre_hook(lambda module, args: features.append(args[0]))
    net(x)
    handle.remove()
    given = tta.SourceStatistics(features=features[0], feature_labels=labels)
    for source in (given, [(x, labels)]):
        adapter = tta.wrap(tiny("gn"), "source", health=True, source=source)
        held = adapter.constants()
        assert float(held["guard/estimator.accuracy"]) == pytest.approx(accuracy)
        confidence = float(logits.softmax(1).amax(1).mean())
        assert float(held["guard/estimator.confidence"]) == pytest.approx(confidence, rel=1e-5)
        assert adapter.config.source == "accuracy and confidence on 64 images"
        adapter(x)
        assert adapter.health["estimator"] == "confidence"
        expected = max(accuracy, 0.1)
        assert adapter.health["estimated_accuracy"] == pytest.approx(expected, rel=1e-4)


def test_the_reference_is_saved(tmp_path) -> None:
    source = [(images(3), torch.arange(8))]
    adapter = tta.wrap(tiny("gn"), "tent.cifar10", health=True, source=source)
    tta.save(adapter, tmp_path)
    loaded = tta.load(tiny("gn"), tmp_path)
    assert loaded.constants() == adapter.constants()
    adapter(images(0)), loaded(images(0))
    assert repr(loaded.health) == repr(adapter.health)  # NaN included


def _estimates(estimator: tta.core.guard.Estimator, logits: list[Tensor]) -> list[float]:
    """What an estimator says of batches of given logits, and a source that says 0, 1, ..., 9."""
    net = nn.Sequential(nn.Identity(), nn.Linear(10, 10, bias=False))
    with torch.no_grad():
        net[1].weight.copy_(torch.eye(10))
    adapter = tta.wrap(net, "source", shadow=True)
    adapter.guard.estimator = estimator
    source = _certain(torch.arange(40) % 10)
    passes = adapter._serving.oversight.passes
    passes.source = lambda x: tta.Prediction(source, source)
    passes.result = source
    found = []
    for z in logits:
        adapter(z)
        found.append(adapter.health["estimated_accuracy"])
    return found


def test_a_collapse_is_seen_though_the_model_is_certain() -> None:
    healthy = _certain(torch.arange(40) % 10)
    collapsed = _certain(torch.zeros(40, dtype=torch.int64))
    for estimator in (ConfidenceEstimate(), AgreementEstimate()):
        before, *_, after = _estimates(estimator, [healthy, *[collapsed] * 60])
        assert before == pytest.approx(1.0) and after < 0.2, estimator.name


def test_a_stream_of_one_class_is_no_collapse_where_the_source_says_the_same() -> None:
    net = nn.Sequential(nn.Identity(), nn.Linear(10, 10, bias=False))
    with torch.no_grad():
        net[1].weight.copy_(torch.eye(10))
    adapter = tta.wrap(net, "source", shadow=True)
    for _ in range(20):
        adapter(_certain(torch.tensor([3] * 15 + [4])))
    assert adapter.health["estimated_accuracy"] == pytest.approx(1.0)
    assert adapter.health["concentration"] > -0.3


def test_what_is_compared_with_the_source_is_of_the_same_batches() -> None:
    """Batches that the source does not see may show fewer classes than those that it sees."""
    net = nn.Sequential(nn.Identity(), nn.Linear(10, 10, bias=False))
    with torch.no_grad():
        net[1].weight.copy_(torch.eye(10))
    adapter = tta.wrap(net, "source", health=True)
    asked = 0
    for step in range(45):
        few = step % EVERY != EVERY - 1
        adapter(_certain(torch.zeros(16).long() if few else torch.arange(16) % 10))
        asked += not math.isnan(adapter.health["agreement"])
        assert adapter.health["estimated_accuracy"] == pytest.approx(1.0)
    assert asked == 2


def test_dropout_on_features_tells_sure_from_unsure() -> None:
    net = tiny("gn")
    adapter = tta.wrap(net, "tent.cifar10", guard="aetta")
    adapter.guard.admit = lambda batch: tta.Verdict()
    adapter.guard.judge = lambda batch: tta.Verdict()
    found = []
    for scale in (20.0, 0.01):
        estimator = FeatureDropoutEstimate(adapter.network, adapter.guard.context)
        adapter.guard.estimator = estimator
        with torch.no_grad():
            net.fc.bias.copy_(scale * torch.randn(10, generator=torch.Generator().manual_seed(0)))
        adapter(images(0))
        assert adapter.health["estimator"] == "feature_dropout" and adapter.health["passes"] == 0
        found.append(adapter.health["estimated_accuracy"])
    assert found[0] == 1.0 > found[1]


def test_masks_keep_their_share_and_are_the_same_for_one_seed() -> None:
    mask = keep_mask(torch.Size((300, 401)), 0.3, CountedDraws(5))
    assert float(mask.float().mean()) == pytest.approx(0.7, abs=0.01)
    assert torch.equal(mask, keep_mask(torch.Size((300, 401)), 0.3, CountedDraws(5)))
    x = torch.ones(300, 401)
    assert float(dropped(x, mask, 0.3).mean()) == pytest.approx(1.0, abs=0.02)


def test_dropout_in_the_model_ends_with_its_block() -> None:
    net = tiny("gn")
    x = images(0)
    expected = net(x)
    nothing = dropping(
        net, ("layer1",), 0.5, lambda place, y: torch.zeros_like(y, dtype=torch.bool)
    )
    with nothing:
        assert not torch.allclose(net(x), expected)
    assert torch.equal(net(x), expected)


def test_guards_leave_the_updates_random_draws_alone() -> None:
    for guard in ("watch", "aetta", "asr"):
        pixels = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
        plain = tta.wrap(tiny("bn"), "cotta.cifar10", views=2, **pixels)
        config = tta.get_config(guard, **({"threshold": 1e-9} if guard == "asr" else {}))
        guarded = tta.wrap(tiny("bn"), "cotta.cifar10", views=2, guard=config, **pixels)
        for t in range(3):
            assert torch.equal(guarded(images(t)), plain(images(t)))
