"""Tiny networks for tests: the ones the golden traces describe, and one of each norm family."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

__all__ = ["FAMILIES", "affine", "batch_statistics", "cnn", "tiny", "trace_model"]


class Cnn(nn.Module):
    """Stages of convolution, norm, ReLU; then the spatial mean and a linear layer."""

    def __init__(
        self, widths: Sequence[int], norm: Callable[[int], nn.Module], classes: int
    ) -> None:
        super().__init__()
        self.stages: list[str] = []
        inputs = 3
        for i, width in enumerate(widths):
            stage = nn.Sequential(
                nn.Conv2d(inputs, width, 3, 1 if i == 0 else 2, 1, bias=False),
                norm(width),
                nn.ReLU(),
            )
            name = f"layer{i + 1}"
            self.add_module(name, stage)
            self.stages.append(name)
            inputs = width
        self.fc = nn.Linear(inputs, classes)

    def forward(self, x: Tensor) -> Tensor:
        for name in self.stages:
            x = getattr(self, name)(x)
        return self.fc(x.mean(dim=(2, 3)))


class BnCnn(nn.Module):
    """The model ``bn_cnn`` of set-b, ``bn_cnn_b`` of later sets: layers side by side."""

    def __init__(
        self,
        widths: Sequence[int],
        classes: int,
        strides: Sequence[int] = (1, 2, 2),
        first_bias: bool = False,
    ) -> None:
        super().__init__()
        inputs = 3
        for i, (width, stride) in enumerate(zip(widths, strides, strict=True), 1):
            bias = first_bias and i == 1
            setattr(self, f"conv{i}", nn.Conv2d(inputs, width, 3, stride, 1, bias=bias))
            setattr(self, f"bn{i}", nn.BatchNorm2d(width))
            inputs = width
        self.stages = len(widths)
        self.fc = nn.Linear(inputs, classes)

    def forward(self, x: Tensor) -> Tensor:
        for i in range(1, self.stages + 1):
            x = getattr(self, f"bn{i}")(getattr(self, f"conv{i}")(x)).relu()
        return self.fc(x.mean(dim=(2, 3)))


def cnn(widths: Sequence[int], norm: Callable[[int], nn.Module], classes: int = 10) -> nn.Module:
    """A :class:`Cnn`."""
    return Cnn(widths, norm, classes)


def trace_model(model: dict) -> nn.Module:
    """The network a trace's ``hparams["model"]`` describes: random weights, eval mode."""
    kind, classes = model["kind"], model["num_classes"]
    if kind == "bn_cnn":
        net = cnn(model["widths"], nn.BatchNorm2d, classes)
    elif kind == "bn_cnn_b":
        net = BnCnn(model["widths"], classes, **model.get("more", {}))
    elif kind == "gn_cnn":
        net = cnn(model["widths"], lambda c: nn.GroupNorm(model["groups"], c), classes)
    elif kind == "timm_resnet":
        from timm.models import resnet

        net: nn.Module = resnet.ResNet(
            getattr(resnet, model["block"]),
            model["layers"],
            num_classes=classes,
            channels=model["channels"],
            stem_width=model["stem_width"],
        )
        net.maxpool = nn.Identity()
    elif kind == "ln_vit":
        import timm

        net = timm.create_model(
            "vit_tiny_patch16_224",
            img_size=32,
            patch_size=8,
            embed_dim=model["dim"],
            depth=model["depth"],
            num_heads=model["heads"],
            num_classes=classes,
        )
    else:
        raise ValueError(f"unknown kind of model {kind!r}")
    return net.eval()


def _vit() -> nn.Module:
    return trace_model({"kind": "ln_vit", "dim": 16, "depth": 2, "heads": 2, "num_classes": 10})


def _bn_act() -> nn.Module:
    from timm.layers.norm_act import BatchNormAct2d

    net = Cnn((4, 8), lambda c: BatchNormAct2d(c, act_layer=nn.SiLU), 10)
    for name in net.stages:  # the norm layer brings the activation, as in timm's networks
        getattr(net, name)[2] = nn.Identity()
    return net


FAMILIES: dict[str, Callable[[], nn.Module]] = {
    "bn": lambda: cnn((4, 8), nn.BatchNorm2d),
    "bn_act": _bn_act,
    "gn": lambda: cnn((4, 8), lambda c: nn.GroupNorm(2, c)),
    "ln": _vit,
}


def tiny(family: str, seed: int = 0) -> nn.Module:
    """A small network of a norm family with random weights and moved statistics, in eval mode."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = FAMILIES[family]()
        for module in net.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                assert module.running_mean is not None and module.running_var is not None
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 1.5)
    return net.eval()


def batch_statistics(net: nn.Module) -> nn.Module:
    """The net with BatchNorm layers that know only their batch, by torch's own means."""
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.track_running_stats = False
            module.running_mean = module.running_var = None
    return net


def affine(net: nn.Module) -> dict[str, nn.Parameter]:
    """Weight and bias of BatchNorm layers, by name."""
    return {
        f"{name}.{key}": p
        for name, module in net.named_modules()
        if isinstance(module, nn.BatchNorm2d)
        for key, p in module.named_parameters()
    }
