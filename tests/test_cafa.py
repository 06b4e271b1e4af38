"""CAFA against its definition: class moments, distances, the loss, and two steps."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import tta
from tests.helpers.batches import images, source_batches
from tests.helpers.nets import affine, batch_statistics, tiny
from tta.methods.cafa import alignment
from tta.parts.class_moments import mahalanobis, whitening

close = torch.testing.assert_close
LABELS = torch.arange(40) % 8  # two classes have no image


def _source() -> list[tuple[Tensor, Tensor]]:
    return [(images(50 + i, 20), LABELS[20 * i : 20 * i + 20]) for i in range(2)]


def _features(net, x: Tensor) -> Tensor:
    found: list[Tensor] = []
    handle = net.fc.register_forward_pre_hook(lambda module, args: found.append(args[0]))
    net(x)
    handle.remove()
    return found[0]


def _moments(kind: str) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
    """Mean and covariance of each class, by loops over images, in double precision."""
    net = batch_statistics(tiny("bn"))
    rows: dict[int, list[Tensor]] = {}
    with torch.no_grad():
        for x, y in _source():
            for row, label in zip(_features(net, x).double(), y.tolist(), strict=True):
                rows.setdefault(label, []).append(row)
    means = {c: sum(r) / len(r) for c, r in rows.items()}
    outer = {c: sum(torch.outer(v - means[c], v - means[c]) for v in r) for c, r in rows.items()}
    count = {c: len(r) for c, r in rows.items()}
    if kind == "tied":
        one = sum(outer.values()) / sum(count.values())
        return means, dict.fromkeys(means, one)  # type: ignore[arg-type, return-value]
    return means, {c: outer[c] / count[c] for c in means}  # type: ignore[return-value]


@pytest.mark.parametrize("kind", ["tied", "class"])
def test_collected_moments_are_those_of_loops(kind: str, tmp_path) -> None:
    net = tiny("bn")
    found = tta.collect_source(net, _source(), ["cafa"])
    assert found.contents == ["prototypes", "covariance"]
    if kind == "class":
        adapter = tta.wrap(net, update=_config(covariance="class"), source=_source())
        found = tta.SourceStatistics(**adapter.update.source_artefacts())  # type: ignore
    means, covariances = _moments(kind)
    assert found.prototypes is not None and found.covariance is not None
    for c in range(10):
        if c not in means:
            assert found.prototypes[c].isnan().all()
            continue
        close(found.prototypes[c].double(), means[c], atol=1e-5, rtol=1e-5)
        one = found.covariance if kind == "tied" else found.covariance[c]
        close(one.double(), covariances[c], atol=1e-6, rtol=1e-4)
    found.save(tmp_path / "source.safetensors")
    again = tta.SourceStatistics.load(tmp_path / "source.safetensors")
    assert again.covariance is not None and torch.equal(again.covariance, found.covariance)


def test_rmt_and_cafa_share_their_prototypes() -> None:
    both = tta.collect_source(tiny("bn"), _source(), ["rmt.cifar10", "cafa.cifar10"])
    alone = tta.collect_source(tiny("bn"), _source(), ["rmt.cifar10"])
    assert both.prototypes is not None and alone.prototypes is not None
    assert torch.equal(both.prototypes.nan_to_num(9), alone.prototypes.nan_to_num(9))


@pytest.mark.parametrize("norm", ["alpha_bn", "robust_bn", "unmix_tns"])
def test_moments_are_under_batch_statistics_whatever_the_rule(norm: str) -> None:
    plain = tta.collect_source(tiny("bn"), _source(), "cafa.cifar10")
    found = tta.collect_source(tiny("bn"), _source(), "cafa.cifar10", norm=norm)
    assert found.prototypes is not None and plain.prototypes is not None
    assert torch.equal(found.prototypes.nan_to_num(9), plain.prototypes.nan_to_num(9))


def test_distances_are_those_of_the_inverse() -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(30, 6, generator=generator) + 100
    means = torch.randn(5, 6, generator=generator) + 100
    root = torch.randn(5, 6, 6, generator=generator)
    covariance = root @ root.transpose(1, 2)
    for spread, ridge in ((covariance[0], 0.1), (covariance, 1e-3)):
        found = mahalanobis(features, means, whitening(spread, ridge))
        for c in range(5):
            one = (spread if spread.ndim == 2 else spread[c]).double()
            one = one + ridge * one.trace() / 6 * torch.eye(6)
            offset = (features - means[c]).double()
            expected = (offset * torch.linalg.solve(one, offset.t()).t()).sum(1)
            close(found[:, c].double(), expected, atol=1e-3, rtol=2e-3)


def test_the_loss_by_hand() -> None:
    distances = torch.tensor([[1.0, 4.0, 5.0], [8.0, 2.0, 100.0]])
    labels = torch.tensor([0, 1])
    known = torch.tensor([True, True, True])
    expected = [math.log(1 / 9), math.log(2 / 108)]
    close(alignment(distances, labels, known), torch.tensor(expected))
    known[2] = False
    expected = [math.log(1 / 4), math.log(2 / 8)]
    close(alignment(distances, labels, known), torch.tensor(expected))


def _config(**fields):
    return tta.get_config("cafa.cifar10", **{"lr": 0.02} | fields)


@pytest.mark.parametrize("kind", ["tied", "class"])
def test_two_steps_are_those_of_the_definition(kind: str) -> None:
    """A ridge of a tenth, so that plain inverses are exact enough for classes of 5 images."""
    means, covariances = _moments(kind)
    size = len(means[0])
    inverse = {}
    for c, one in covariances.items():
        inverse[c] = torch.linalg.inv(one + 0.1 * one.trace() / size * torch.eye(size))
    net = batch_statistics(tiny("bn"))
    theta = list(affine(net).values())
    adam = torch.optim.Adam(theta, lr=0.02)
    config = _config(covariance=kind, shrinkage=0.1)
    adapter = tta.wrap(tiny("bn"), update=config, source=_source())
    for t in range(2):
        x = images(t, 12)
        z, features = net(x), _features(net, x).double()
        terms = []
        for row, label in zip(features, z.argmax(1).tolist(), strict=True):
            if label not in means:
                continue
            distance = {c: (row - m) @ inverse[c] @ (row - m) for c, m in means.items()}
            others = sum(d for c, d in distance.items() if c != label)
            terms.append(torch.log(distance[label] / others))  # type: ignore[operator]
        loss = torch.stack(terms).mean()
        adam.zero_grad()
        loss.backward()
        adam.step()
        close(adapter(x), z.detach(), atol=1e-4, rtol=1e-4)
        assert adapter.report.selected == len(terms) and adapter.report.stepped
        assert adapter.report.loss == pytest.approx(loss.item(), abs=1e-4)
    for p, value in zip(adapter.parameters_adapted.values(), theta, strict=True):
        close(p.detach(), value.detach(), atol=1e-4, rtol=0)


def test_given_moments_are_what_batches_give(tmp_path) -> None:
    one = tta.wrap(tiny("bn"), update=_config(), source=_source())
    given = tta.collect_source(tiny("bn"), _source(), "cafa.cifar10")
    two = tta.wrap(tiny("bn"), update=_config(), source=given)
    tta.save(two, tmp_path)
    three = tta.load(tiny("bn"), tmp_path)
    for t in range(2):
        y = one(images(t))
        assert torch.equal(two(images(t)), y) and torch.equal(three(images(t)), y)
    assert set(two.constants()) == {
        f"update/{n}" for n in ("prototypes", "covariance", "whitening")
    }


def test_a_class_without_images_teaches_nothing() -> None:
    """Only the class that the network never predicts has a Gaussian."""
    x = images(0)
    with torch.no_grad():
        predicted = set(batch_statistics(tiny("bn"))(x).argmax(1).tolist())
    rare = next(c for c in range(10) if c not in predicted)
    labels = torch.full((20,), rare)
    adapter = tta.wrap(tiny("bn"), update=_config(), source=[(images(50, 20), labels)])
    before = adapter.state()
    assert torch.isfinite(adapter(x)).all()
    assert adapter.report.selected == 0 and not adapter.report.stepped
    assert all(torch.equal(v, adapter.state()[k]) for k, v in before.items())


def test_what_is_missing_or_of_another_model_is_refused() -> None:
    good = tta.collect_source(tiny("bn"), _source(), "cafa.cifar10")
    for source, match in (
        (None, "must give cafa prototypes and covariance"),
        (tta.SourceStatistics(prototypes=good.prototypes), "got \\['prototypes'\\]"),
        (
            tta.SourceStatistics(prototypes=good.prototypes, covariance=torch.eye(5)),
            r"`source.covariance` must be of shape \(8, 8\)",
        ),
        (
            tta.SourceStatistics(prototypes=good.prototypes, covariance=torch.zeros(8, 8)),
            "must be positive definite",
        ),
        (
            tta.SourceStatistics(
                prototypes=torch.full((10, 8), float("nan")), covariance=torch.eye(8)
            ),
            "at least one class",
        ),
        ([], "at least one batch"),
    ):
        net = tiny("bn")
        with pytest.raises(ValueError, match=match):
            tta.wrap(net, update=_config(), source=source)
        assert tta.wrap(net, "source").unwrap() is net
    assert tta.wrap(tiny("bn"), update=_config(), source=source_batches()) is not None
