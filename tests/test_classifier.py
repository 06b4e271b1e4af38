"""The classifier of a model is found by structure: by calls, not by order of definition."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import tta
from tests.helpers.nets import tiny
from tta.core.classifier import feature_size, find_classifier, num_classes


class HeadFirst(nn.Module):
    """The classifier is defined before the rest."""

    def __init__(self, size: int = 32) -> None:
        super().__init__()
        self.head = nn.Linear(6, 10)
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        self.middle = nn.Linear(4, 6)
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        assert x.shape[-1] == self.size
        return self.head(self.middle(self.stem(x).mean((2, 3))))


@pytest.mark.parametrize("size", [224, 32, 64, 28])
def test_of_several_linear_layers_the_one_called_last(size: int) -> None:
    net = HeadFirst(size)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    assert find_classifier(net) is net.head
    assert (num_classes(net), feature_size(net)) == (10, 6)
    assert net.training and net.stem[1].training, "the dry run gives the flags back"
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())
    assert not any(m._forward_hooks for m in net.modules())


def test_the_adapter_learns_with_a_classifier_defined_first() -> None:
    x = torch.rand(8, 3, 32, 32)
    batches = [(x, torch.arange(8) % 10)]
    adapter = tta.wrap(HeadFirst(), "adanpc_bn", source=batches)
    assert adapter(x).shape == (8, 10)
    assert adapter.state()["output/memory"].shape[1] == 6


def test_an_odd_size_leaves_the_order_of_definition() -> None:
    net = HeadFirst(size=41)
    assert find_classifier(net) is net.middle
    with pytest.raises(ValueError, match=r"`model` must return logits of shape \(B, 6\)"):
        tta.wrap(net, "tent.cifar10")(torch.rand(4, 3, 41, 41))
    rare = HeadFirst(size=40)
    assert find_classifier(rare) is rare.head


def test_a_layer_of_another_size_called_later_is_not_the_classifier() -> None:
    class Probe(HeadFirst):
        def forward(self, x: Tensor) -> Tensor:
            features = self.stem(x).mean((2, 3))
            logits = self.head(self.middle(features))
            self.middle(features)
            return logits

    net = Probe()
    assert find_classifier(net) is net.head


def test_get_classifier_is_believed() -> None:
    net = tiny("ln")
    assert find_classifier(net) is net.get_classifier()


def test_a_convolution_that_classifies_every_place() -> None:
    class Fully(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.logits = nn.Conv2d(4, 10, 1)
            self.stem = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))

        def forward(self, x: Tensor) -> Tensor:
            return self.logits(self.stem(x)).mean((2, 3))

    net = Fully()
    assert find_classifier(net) is net.logits
    batches = [(torch.rand(8, 3, 32, 32), torch.arange(8) % 10)]
    adapter = tta.wrap(net, "adanpc", source=batches)
    features = adapter.network(batches[0][0]).features
    assert features.shape == (8, 4)
    torch.testing.assert_close(
        net.logits.weight.flatten(1) @ features.T + net.logits.bias[:, None], net(batches[0][0]).T
    )


def test_no_linear_layer() -> None:
    with pytest.raises(ValueError, match="must be a classifier with a linear layer, got Flatten"):
        find_classifier(nn.Flatten())


def test_a_layer_put_in_the_place_of_another_is_found() -> None:
    net = HeadFirst()
    assert find_classifier(net) is net.head
    net.head = nn.Linear(6, 7)
    assert find_classifier(net) is net.head and num_classes(net) == 7


def test_a_head_that_pools_is_read_after_pooling() -> None:
    class Pools(nn.Module):
        """A head of several layers, fed (B, D, H, W), as some of timm's are."""

        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
            self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10))

        def get_classifier(self) -> nn.Module:
            return self.head

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.stem(x))

    net = Pools()
    x = torch.rand(8, 3, 12, 12)
    adapter = tta.wrap(net, "adanpc", source=[(x, torch.arange(8))])
    features = adapter.network(x).features
    torch.testing.assert_close(net.head[2](features), net(x))
