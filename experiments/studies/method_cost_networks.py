"""Networks and recipes that the bench measures, and what each is fed."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

import models
import tta

__all__ = ["BARE", "SETTINGS", "TWIN", "Setting", "make_batch", "make_subject"]

KEPT = 0.3  # share of samples that pass the filters of eata and sar
MEMORY_FEATURES = 50_000  # rows of AdaNPC's memory
TWIN = "plain (twin)"
BARE = "bare forward and backward"


@dataclass(frozen=True)
class Setting:
    """A network and what it is fed."""

    make: Callable[[], nn.Module]
    batch: int
    size: int
    recipes: tuple[str, ...]


def _cifar(norm: Callable[[int], nn.Module] = nn.BatchNorm2d) -> nn.Module:
    """ResNet-18 as it is used on CIFAR: a stem of 3x3 and no pooling."""
    net = torchvision.models.resnet18(num_classes=10, norm_layer=norm)
    net.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
    net.maxpool = nn.Identity()  # type: ignore[assignment]
    return net


def _group_norm(channels: int) -> nn.Module:
    return nn.GroupNorm(32, channels)


ON_BATCH_NORM = ("source", "bn", "alpha_bn", "unmix_tns", "lame", "adanpc", BARE, "tent", "eata")
ON_GROUP_NORM = (BARE, "eata", "sar")
TEACHERS = ("cotta", "petal", "rmt")

SETTINGS = {
    "cifar_bn": Setting(_cifar, 64, 32, ON_BATCH_NORM),
    "cifar_gn": Setting(lambda: _cifar(_group_norm), 64, 32, ON_GROUP_NORM),
    "imagenet_bn": Setting(lambda: torchvision.models.resnet18(), 16, 224, ON_BATCH_NORM),
    "imagenet_gn": Setting(
        lambda: torchvision.models.resnet18(norm_layer=_group_norm), 16, 224, ON_GROUP_NORM
    ),
    "bundled_bn": Setting(lambda: models.load("cifar10_resnet20_bn")[0], 64, 32, ON_BATCH_NORM),
    "bundled_gn": Setting(lambda: models.load("cifar10_resnet20_gn")[0], 64, 32, ON_GROUP_NORM),
    "cifar_teachers": Setting(_cifar, 64, 32, TEACHERS),
    "bundled_teachers": Setting(lambda: models.load("cifar10_resnet20_bn")[0], 64, 32, TEACHERS),
    "gpu_bn": Setting(lambda: torchvision.models.resnet50(), 64, 224, ON_BATCH_NORM),
    "gpu_gn": Setting(
        lambda: torchvision.models.resnet50(norm_layer=_group_norm), 64, 224, ON_GROUP_NORM
    ),
    "gpu_teachers": Setting(lambda: torchvision.models.resnet50(), 64, 224, TEACHERS),
}


class Bare:
    """The least that any entropy update does: forward, entropy, backward to the norm parameters."""

    def __init__(self, net: nn.Module) -> None:
        self.adapter = tta.wrap(net, update=tta.get_config("tent", lr=0.0))
        self.net = net
        self.params = list(self.adapter.parameters_adapted.values())

    def __call__(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            logits = self.net(x)
            torch.autograd.grad(tta.parts.losses.entropy(logits).mean(), self.params)
        return logits.detach()


def make_batch(setting: Setting, seed: int, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    shape = (setting.batch, 3, setting.size, setting.size)
    return torch.rand(shape, generator=generator).to(device)


def make_subject(setting: Setting, name: str, device: torch.device) -> Callable[[Tensor], Tensor]:
    """A callable on batches: the plain network in eval mode, or the recipe around it."""
    torch.manual_seed(0)
    net = setting.make().eval().to(device)
    if name in ("plain", TWIN):
        return net
    if name == BARE:
        return Bare(net)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of presets for another number of classes
        return tta.wrap(net, name, **_arguments(setting, name, net, device))


def _arguments(setting: Setting, name: str, net: nn.Module, device: torch.device) -> dict[str, Any]:
    make = ARGUMENTS.get(name)
    return {} if make is None else make(setting, net, device)


def _all_kept(setting: Setting, net: nn.Module, device: torch.device) -> dict[str, Any]:
    """An entropy margin that keeps all samples on BatchNorm, and a fixed share elsewhere."""
    config: dict[str, Any] = {"entropy_margin": 10.0}
    if not tta.core.norm_layers.batch_norm_layers(net):
        with torch.no_grad():
            entropy = tta.parts.losses.entropy(net(make_batch(setting, 1000, device)))
        ceiling = torch.tensor(float(tta.core.classifier.num_classes(net))).log()
        config["entropy_margin"] = float(entropy.quantile(KEPT) / ceiling)
        config["lr"] = 0.0  # steps as usual; a network that learned would keep more and more
    return config


def _sar(setting: Setting, net: nn.Module, device: torch.device) -> dict[str, Any]:
    return _all_kept(setting, net, device) | {"reset_threshold": 0.0}


def _eata(setting: Setting, net: nn.Module, device: torch.device) -> dict[str, Any]:
    config = _all_kept(setting, net, device)
    fisher = {n: torch.ones_like(p) for n, p in tta.core.parameters.select(net, "norm").items()}
    return config | {"redundancy_margin": 10.0, "source": tta.SourceStatistics(fisher=fisher)}


def _adanpc(setting: Setting, net: nn.Module, device: torch.device) -> dict[str, Any]:
    width, classes = tta.core.classifier.feature_size(net), tta.core.classifier.num_classes(net)
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(MEMORY_FEATURES, width, generator=generator)
    labels = torch.randint(classes, (MEMORY_FEATURES,), generator=generator)
    return {"source": tta.SourceStatistics(features=features, feature_labels=labels)}


def _cotta(setting: Setting, net: nn.Module, device: torch.device) -> dict[str, Any]:
    # All views are made, which a confident source would save.
    return {**PIXELS, "confidence_threshold": 10.0}


def _petal(setting: Setting, net: nn.Module, device: torch.device) -> dict[str, Any]:
    mean = {n: p.detach().clone() for n, p in net.named_parameters()}
    variance = {n: torch.full_like(p, 1e-4) for n, p in mean.items()}
    source = tta.SourceStatistics(posterior_mean=mean, posterior_variance=variance)
    return {**_cotta(setting, net, device), "source": source}


def _rmt(setting: Setting, net: nn.Module, device: torch.device) -> dict[str, Any]:
    x = make_batch(setting, 1000, device)
    labels = torch.arange(len(x)) % tta.core.classifier.num_classes(net)
    return {**PIXELS, "source": [(x.cpu(), labels)], "warmup_samples": 0}


PIXELS: dict[str, Any] = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
# Arguments of `tta.wrap` for methods that need some, to be measured at their full cost.
ARGUMENTS: dict[str, Callable[[Setting, nn.Module, torch.device], dict[str, Any]]] = {
    "adanpc": _adanpc,
    "cotta": _cotta,
    "eata": _eata,
    "petal": _petal,
    "rmt": _rmt,
    "sar": _sar,
}
