"""AdaNPC beyond its traces: a bounded memory, the official one that grows, what it refuses."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import tta
from tests.helpers.batches import images, source_batches
from tests.helpers.nets import tiny
from tta.parts.neighbours import largest

OFFICIAL = {"official": True, "confidence_threshold": 0.0, "neighbours": 4}


def _wrap(name: str = "adanpc", family: str = "bn", source=None, **fields) -> tta.Adapter:
    config = tta.get_config(name, **fields)
    return tta.wrap(tiny(family), output=config, source=source or source_batches())


def _features(x: Tensor) -> Tensor:
    adapter = _wrap()
    with torch.no_grad():
        return adapter.network(x).features


def test_a_vote_by_hand() -> None:
    """Three source rows, two neighbours, against the definition in plain Python."""
    x = images(3, 2)
    rows, labels = _features(images(4, 3)), torch.tensor([1, 1, 7])
    source = tta.SourceStatistics(features=rows, feature_labels=labels)
    y = _wrap(source=source, neighbours=2, temperature=0.1, confidence_threshold=2.0)(x)
    for i, feature in enumerate(_features(x)):
        cosine = [float(F.cosine_similarity(feature, row, dim=0)) for row in rows]
        best = sorted(range(3), key=lambda j: -cosine[j])[:2]
        weights = torch.softmax(torch.tensor([cosine[j] / 0.1 for j in best]), 0)
        expected = torch.full((10,), 1e-5)
        for w, j in zip(weights, best, strict=True):
            expected[labels[j]] += w
        torch.testing.assert_close(y[i].exp(), expected.clamp(max=1), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["adanpc", "adanpc_bn"])
def test_memory_is_bounded_and_the_oldest_give_way(name: str) -> None:
    adapter = _wrap(name, capacity=10, confidence_threshold=0.0)
    shapes = {k: v.shape for k, v in adapter.state().items()}
    for t in range(4):
        adapter(images(t))
        assert {k: v.shape for k, v in adapter.state().items()} == shapes
        assert adapter.report.added == 8
    assert adapter.report.memory_size == 16 + 10
    assert int(adapter.state()["output/remembered"]) == 32
    if name == "adanpc":
        latest = F.normalize(torch.cat([_features(images(t)) for t in (2, 3)])[-10:], dim=1)
        # Row r holds the image of place r modulo 10: images 30 and 31 came round to 0 and 1.
        expected = torch.cat([latest[-2:], latest[:-2]])
        torch.testing.assert_close(adapter.state()["output/memory"], expected)


def test_a_batch_larger_than_the_memory_leaves_its_last_images() -> None:
    adapter = _wrap(capacity=3, confidence_threshold=0.0)
    adapter(images(0))
    kept = F.normalize(_features(images(0))[-3:], dim=1)
    memory = adapter.state()["output/memory"]
    assert {tuple(r.tolist()) for r in memory.round(decimals=4)} == {
        tuple(r.tolist()) for r in kept.round(decimals=4)
    }


def test_only_confident_images_are_remembered() -> None:
    confidence = _wrap(neighbours=3)(images(0)).exp().amax(1)
    threshold = float(confidence.sort().values[2:4].mean())
    adapter = _wrap(confidence_threshold=threshold, neighbours=3)
    adapter(images(0))
    assert adapter.report.added == 5
    assert torch.equal(
        adapter.state()["output/memory"][:5],
        F.normalize(_features(images(0)), dim=1)[confidence >= threshold],
    )


def test_thresholds_differ_on_the_vote_and_on_its_softmax() -> None:
    """A second softmax over 10 classes never reaches 0.25."""
    assert _added(official=False) > 0
    assert _added(official=True) == 0


def _added(official: bool) -> int:
    adapter = _wrap(confidence_threshold=0.25, official=official)
    adapter(images(0))
    return adapter.report.added


@pytest.mark.parametrize("name", ["adanpc", "adanpc_bn"])
def test_the_official_memory_grows_and_stays_consistent(name: str, tmp_path) -> None:
    adapter = _wrap(name, **OFFICIAL)
    start = adapter.state()
    first = [adapter(images(t)) for t in range(3)]
    saved = adapter.state()
    assert saved["output/memory"].shape[0] == 24 and start["output/memory"].shape[0] == 0
    tta.save(adapter, tmp_path)
    twins = [copy.deepcopy(adapter), pickle.loads(pickle.dumps(adapter))]
    expected = adapter(images(3))
    fresh = _wrap(name, **OFFICIAL)
    fresh.load_state(saved)
    loaded = tta.load(tiny("bn"), tmp_path)
    for other in (fresh, loaded, *twins):
        assert torch.equal(other(images(3)), expected)
        other.reset()
        assert all(torch.equal(v, start[k]) for k, v in other.state().items() if "nan" not in k)
        assert all(torch.equal(a, other(images(t))) for t, a in enumerate(first))
    fresh.load_state(saved, as_source=True)
    fresh(images(5))
    fresh.reset()
    assert torch.equal(fresh(images(3)), expected)


def test_a_growing_state_comes_whole_or_not_at_all() -> None:
    adapter = _wrap(**OFFICIAL)
    adapter(images(0))
    before = adapter.state()
    with pytest.raises(ValueError, match="as many rows"):
        adapter.load_state({"output/memory": torch.zeros(3, before["output/memory"].shape[1])})
    with pytest.raises(ValueError, match="must have shape"):
        adapter.load_state({"output/memory": torch.zeros(3, 5)})
    with pytest.raises(ValueError, match="must have shape"):
        _wrap().load_state({"output/memory": torch.zeros(3, 8)})  # fixed without official
    assert all(torch.equal(v, before[k]) for k, v in adapter.state().items())


def test_the_random_first_row_is_given_or_drawn_from_the_seed() -> None:
    row = torch.arange(8.0)
    features = _features(images(1))
    source = tta.SourceStatistics(
        features=features, feature_labels=torch.arange(8), memory_init=row
    )
    held = _wrap(source=source, **OFFICIAL).constants()
    assert torch.equal(held["output/source_features"][0], row)
    assert held["output/source_scale"][0] == 1 and held["output/source_labels"][0] == 0
    assert len(_wrap(source=source).constants()["output/source_features"]) == 8
    drawn = _wrap(**OFFICIAL).constants()["output/source_features"][0]
    assert torch.equal(drawn, _wrap(**OFFICIAL).constants()["output/source_features"][0])
    assert float(drawn.abs().max()) <= (3 / 8) ** 0.5 and float(drawn.std()) > 0.1


@pytest.mark.parametrize("name", ["adanpc.cifar10", "adanpc_bn.cifar10", "adanpc.domainbed"])
def test_collected_features_are_as_good_as_batches(name: str, tmp_path) -> None:
    collected = tta.collect_source(tiny("bn"), source_batches(), for_methods=[name])
    assert {"features", "feature_labels"} <= set(collected.contents)
    collected.save(tmp_path / "source.safetensors")
    read = tta.SourceStatistics.load(tmp_path / "source.safetensors")
    net = tiny("bn")
    expected = tta.wrap(tiny("bn"), output=name, source=source_batches())(images(0))
    assert torch.equal(tta.wrap(net, output=name, source=read)(images(0)), expected)


@pytest.mark.parametrize("norm", ["bn", "alpha_bn", "unmix_tns"])
def test_source_features_are_taken_under_running_statistics(norm: str) -> None:
    config = tta.get_config("adanpc")
    held = [
        tta.wrap(tiny("bn"), norm=rule, output=config, source=source_batches()).constants()
        for rule in ("source", norm)
    ]
    assert torch.equal(held[0]["output/source_features"], held[1]["output/source_features"])


def test_affine_part_moves_by_adams_first_step() -> None:
    adapter = _wrap("adanpc_bn", rounds=1, lr=0.01, neighbours=10)
    adapter(images(0))
    moved = adapter.state()["output/weight"] - 1
    slope = adapter.state()["output/exp_avg"][0]
    assert (slope != 0).any()
    sizes = moved[slope.abs() > 1e-5].abs()  # a step has size lr whatever the slope is
    torch.testing.assert_close(sizes, torch.full_like(sizes, 0.01), atol=2e-5, rtol=0)
    assert torch.equal(moved.sign(), -slope.sign())


def test_rounds_make_the_vote_more_confident() -> None:
    entropies = []
    for rounds in (1, 20):
        fields = {"neighbours": 24, "confidence_threshold": 2.0}  # all vote: no jumps
        adapter = _wrap("adanpc_bn", rounds=rounds, lr=0.01, **fields)
        adapter(images(0))
        entropies.append(adapter.report.vote_entropy)
    assert entropies[1] < entropies[0]


def test_what_is_missing_or_wrong_is_named() -> None:
    with pytest.raises(ValueError, match=r"collect_source\(model, loader, for_methods=\['adanpc'"):
        tta.wrap(tiny("bn"), "adanpc.cifar10")
    with pytest.raises(ValueError, match="at least one batch"):
        tta.wrap(tiny("bn"), "adanpc.cifar10", source=[])
    for features, labels in (
        (torch.rand(4, 5), torch.zeros(4)),
        (torch.rand(4, 8), torch.tensor([0, 1, 2, 10])),
        (torch.rand(4, 8), torch.tensor([0, 1, 2, -1])),
    ):
        net = tiny("bn")
        source = tta.SourceStatistics(features=features, feature_labels=labels.long())
        with pytest.raises(ValueError, match=r"must be \(N, 8\) with labels below 10"):
            tta.wrap(net, "adanpc.cifar10", source=source)
        assert not any(m._forward_pre_hooks for m in net.modules())
    for field, value in {
        "neighbours": 0,
        "temperature": 0.0,
        "capacity": 0,
        "confidence_threshold": -1.0,
    }.items():
        with pytest.raises(ValueError, match=f"`{field}`"):
            tta.get_config("adanpc", **{field: value})


def test_source_samples_limits_what_is_read() -> None:
    held = _wrap(source_samples=11).constants()
    assert len(held["output/source_features"]) == 11 == len(held["output/source_labels"])


@pytest.mark.parametrize("size", [1, 63, 64, 2_000, 6_400, 6_437])
def test_the_largest_are_those_of_a_full_sort(size: int) -> None:
    generator = torch.Generator().manual_seed(size)
    values = torch.randn(5, size, generator=generator)
    values[1, size // 2 :] = float("-inf")
    values[2] = values[2].sort().values  # all of the largest in one block
    for count in {1, min(7, size), min(20, size)}:
        nearest, index = largest(values, count)
        expected = values.sort(dim=1, descending=True).values[:, :count]
        assert torch.equal(nearest, expected)
        assert torch.equal(values.gather(1, index), expected)
        assert all(len(set(row.tolist())) == count for row in index)
