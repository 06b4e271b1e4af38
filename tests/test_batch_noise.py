"""Statistics of too few images: how that is seen, and what the guard does about it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import corruptions
import models
import tta
from experiments.data import open_data
from tests.helpers.nets import tiny
from tta.methods import _statistics_watch
from tta.parts.batch_noise import BatchNoise


def _other(labels: torch.Tensor, count: int) -> torch.Tensor:
    """Labels of which the first ``count`` are others."""
    return torch.where(torch.arange(len(labels)) < count, labels + 1, labels)


def _sure(labels: torch.Tensor, confidence: float = 0.5) -> torch.Tensor:
    """Logits (B, 101) of the labels (B,) with a confidence."""
    share = nn.functional.one_hot(labels, 101) * (confidence - (1 - confidence) / 100)
    return (share + (1 - confidence) / 100).log()


@pytest.mark.parametrize(
    ("noise", "changed", "harmful"),
    [(50, 50, True), (40, 55, True), (50, 90, False), (20, 20, False), (0, 0, False)],
)
def test_noise_is_harmful_where_it_is_most_of_what_changes(
    noise: int, changed: int, harmful: bool
) -> None:
    seen, labels = BatchNoise(), torch.arange(100)
    assert not seen.harmful(1)
    for _ in range(3):
        seen.see(*(_sure(y) for y in (labels, _other(labels, noise), _other(labels, changed))))
    assert float(seen.kept) == pytest.approx(1 - noise / 100)
    assert float(seen.agreed) == pytest.approx(1 - changed / 100)
    assert seen.harmful(256) is harmful and not seen.harmful(257)


def test_the_averages_go_back_over_so_many_images() -> None:
    seen, labels = BatchNoise(), torch.arange(64)
    for change in (64, 0, 0, 0, 0, 0):
        seen.see(_sure(labels), _sure(_other(labels, change)), _sure(labels))
    assert float(seen.kept) == pytest.approx(1 - 0.75**2 / 4) and float(seen.agreed) == 1


@pytest.mark.parametrize(
    ("whole", "halves", "noise", "unlike"),
    [(0.3, 0.2, 50, False), (0.25, 0.2, 50, True), (0.3, 0.15, 50, False), (0.25, 0.2, 20, False)],
)
def test_images_are_unlike_where_confidence_is_low_even_without_noise(
    whole: float, halves: float, noise: int, unlike: bool
) -> None:
    seen, labels = BatchNoise(), torch.arange(100)
    assert not seen.unlike(0)
    for _ in range(3):
        seen.see(_sure(labels, whole), _sure(_other(labels, noise), halves), _sure(labels, 0.5))
    assert seen.sure.tolist() == pytest.approx([whole, halves, 0.5], abs=1e-4)
    assert seen.unlike(256) is unlike and not seen.unlike(257)
    seen.see(torch.full((100, 101), float("inf")), _sure(labels), _sure(labels))
    assert bool(seen.sure.isfinite().all())


@pytest.fixture(scope="module")
def shown() -> tuple[torch.Tensor, torch.Tensor]:
    """240 images, and their labels."""
    data = open_data("bundled").clean
    assert data is not None
    pairs = [data[i] for i in range(240)]
    return torch.stack([p[0] for p in pairs]).float() / 255, torch.tensor([p[1] for p in pairs])


@pytest.mark.parametrize("recipe", ["bn", "tent"])
def test_the_source_answers_while_statistics_are_of_too_few_images(
    recipe: str, shown: tuple[torch.Tensor, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Ten classes bear more noise than a thousand: statistics of four images make them little surer.
    monkeypatch.setattr(_statistics_watch, "LESS_SURE", -0.05)
    clean, labels = shown
    far = corruptions.corrupt(clean, "contrast", 5)
    model, _ = models.load("cifar10_resnet20_bn")
    with torch.no_grad():
        source = [(model(x).argmax(1) != labels).float().mean().item() for x in (clean, far)]
    adapter = tta.wrap(model, recipe, guard="steady", seed=0)
    guard: Any = adapter.guard
    clean_error = torch.cat([adapter(x).argmax(1) for x in clean.split(4)]) != labels
    assert bool(guard.runs_seen) and clean_error.float().mean().item() <= source[0] + 0.01
    assert any(e["reason"] == _statistics_watch.NOISY for e in adapter.events)
    # It is tried beside the source, and answers where its statistics put more right than wrong.
    again = [adapter(x).argmax(1) for x in far.repeat(4, 1, 1, 1).split(4)]
    wrong = torch.cat(again).reshape(4, -1)
    last = (wrong[-1] != labels).float().mean().item()
    assert not bool(guard.runs_seen) and last < source[1] - 0.1


class _Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = tiny("bn")

    def forward(self, x: torch.Tensor, scale: torch.Tensor) -> Any:
        return self.net(x * scale[:, None, None, None])


def test_a_batch_with_arguments_of_its_own_is_not_halved() -> None:
    adapter = tta.wrap(_Scaled(), "bn", guard="steady", logits=lambda z: z, num_classes=10)
    assert adapter(torch.rand(8, 3, 32, 32), torch.rand(8)).shape == (8, 10)
    guard: Any = adapter.guard
    assert int(guard.surer.images) == 8 and int(guard.noise.images) == 0


def test_halves_are_looked_at_where_they_have_statistics_of_their_own() -> None:
    for recipe, size, asks in (("bn", 3, False), ("bn", 5, True), ("robust_bn", 8, False)):
        adapter = tta.wrap(tiny("bn"), recipe, guard="steady", seed=0)
        adapter(torch.rand(size, 3, 32, 32))
        guard: Any = adapter.guard
        assert bool(guard.noise.images > 0) is asks, recipe
