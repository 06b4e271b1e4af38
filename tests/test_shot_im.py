"""SHOT-IM: its loss by hand, what it trains, and labels of which there are none."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import tta
from tests.helpers.batches import images
from tests.helpers.nets import FAMILIES, tiny
from tests.helpers.wild import Cosine
from tta.core.parameters import select
from tta.methods.shot_im import information_loss

ROWS = [[2.0, 0.0, -1.0], [0.0, 3.0, 0.0], [0.5, 0.0, 0.0]]


def _probabilities(row: list[float]) -> list[float]:
    total = sum(math.exp(v) for v in row)
    return [math.exp(v) / total for v in row]


def test_loss_by_hand() -> None:
    probs = [_probabilities(row) for row in ROWS]
    entropies = [-sum(p * math.log(p) for p in row) for row in probs]
    mean = [sum(column) / 3 for column in zip(*probs, strict=True)]
    expected = sum(entropies) / 3 + sum(m * math.log(m + 1e-5) for m in mean)
    assert float(information_loss(torch.tensor(ROWS))) == pytest.approx(expected, abs=1e-6)


class _Linear(nn.Module):
    """Logits that are the images times a weight, and a head that is the identity."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))
        self.fc = nn.Linear(3, 3, bias=False)
        with torch.no_grad():
            self.fc.weight.copy_(torch.eye(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x.flatten(1) * self.scale)


@pytest.mark.parametrize("threshold", [0.8, 0.9, 0.99])
def test_confident_labels_by_hand(threshold: float) -> None:
    probs = [_probabilities(row) for row in ROWS]
    losses = [-math.log(max(p)) for p in probs if max(p) > threshold]
    more = 0.1 * sum(losses) / len(losses) if losses else 0.0
    config = tta.get_config("shot_im.pseudo", pseudo_threshold=threshold)
    adapter = tta.wrap(_Linear(), update=config)
    adapter(torch.tensor(ROWS).view(3, 3, 1, 1))
    expected = float(information_loss(torch.tensor(ROWS))) + more
    assert adapter.report.loss == pytest.approx(expected, abs=1e-6)
    assert adapter.report.confident == len(losses) == {0.8: 2, 0.9: 1, 0.99: 0}[threshold]
    assert adapter.report.stepped and list(adapter.parameters_adapted) == ["scale"]


@pytest.mark.parametrize("family", FAMILIES)
def test_all_but_the_head_is_trained(family: str) -> None:
    net = tiny(family)
    names = {n for n, _ in net.named_parameters()}
    adapter = tta.wrap(net, "shot_im", lr=1e-3)
    assert adapter.config.norm is None
    head = names - set(adapter.parameters_adapted)
    assert len(head) == 2 and all(n.startswith(("fc.", "head.")) for n in head)
    before = adapter.state()
    adapter(images(0))
    after = adapter.state()
    assert not [n for n in names - head if torch.equal(before[f"param/{n}"], after[f"param/{n}"])]


def test_the_body_of_a_head_that_is_no_linear_layer() -> None:
    net = Cosine()
    assert set(select(net, "body")) == {n for n, _ in net.named_parameters()}
    adapter = tta.wrap(net, "shot_im", num_classes=10, features="neck")
    inside = {f"neck.{n}" for n, _ in net.get_submodule("neck").named_parameters()}
    trained = set(adapter.parameters_adapted)
    assert trained and not trained & inside


def test_one_image_teaches_nothing_without_a_confident_label() -> None:
    """Its prediction is the mean of all: certainty is paid for by diversity."""
    for weight, official, stepped in ((0, False, False), (0, True, True), (0.1, False, True)):
        fields = {"pseudo_weight": weight, "pseudo_threshold": 0.05, "official": official}
        adapter = tta.wrap(tiny("gn"), "shot_im", **fields)
        before = adapter.state()
        adapter(images(0, 1))
        after = adapter.state()
        assert adapter.report.stepped == stepped == (adapter.report.selected == 1)
        assert adapter.report.confident == 1 and math.isnan(adapter.report.loss) != stepped
        moved = [k for k in before if not torch.equal(before[k], after[k])]
        assert bool(moved) == stepped


def test_words() -> None:
    with pytest.raises(ValueError, match="`pseudo_threshold` must be"):
        tta.get_config("shot_im", pseudo_threshold=1.1)
    with pytest.raises(ValueError, match="must match at least one parameter"):
        tta.wrap(nn.Sequential(nn.Flatten(), nn.Linear(12, 3)), "shot_im")
