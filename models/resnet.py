"""ResNets for 32 x 32 images, with the normalisation layer as an argument.

He, Zhang, Ren, Sun: Deep Residual Learning for Image Recognition, CVPR 2016, arXiv 1512.03385,
section 4.2 (the 6n + 2 layers family for CIFAR). Two deliberate differences: a shortcut that
changes shape is a 1 x 1 convolution with norm instead of zero padding, and the input is pixel
values in [0, 1], normalised by the model itself, so that a stream of pixels is all it needs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tta.core.norm_layers import batch_stats
from tta.parts.statistics import instance_aware

__all__ = ["CifarResNet", "InstanceAwareBatchNorm2d", "Normalize"]


class Normalize(nn.Module):
    """Per-channel ``(x - mean) / std`` as the first step of a model that takes pixels.

    The statistics are constants of the architecture and therefore not in the ``state_dict``.
    """

    mean: Tensor  # (1, C, 1, 1)
    std: Tensor  # (1, C, 1, 1)

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std


class InstanceAwareBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm corrected by each image's own statistics, where they differ by more than chance.

    Gong et al.: NOTE, NeurIPS 2022, arXiv 2208.05117; `tta.parts.statistics.instance_aware` has the
    formula, with k = 4. In training mode the batch's statistics take the place of the running ones,
    and gradients flow through them.
    """

    only_normalises = True  # a norm rule takes the place of all that the layer does

    def forward(self, input: Tensor) -> Tensor:
        mean, var = self.running_mean, self.running_var
        if self.training or mean is None or var is None:
            rest, (mean, var) = (mean, var), batch_stats(input, unbiased=True)
            with torch.no_grad():
                for average, value in zip(rest, (mean, var), strict=True):
                    if average is not None:
                        average.lerp_(value, self.momentum or 0.0)
        return instance_aware(input, mean, var, self.weight, self.bias, alpha=4.0, eps=self.eps)


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions and a shortcut."""

    def __init__(
        self, inputs: int, outputs: int, stride: int, norm: Callable[[int], nn.Module]
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm1 = norm(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm2 = norm(outputs)
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.shortcut.append(nn.Conv2d(inputs, outputs, 1, stride, bias=False))
            self.shortcut.append(norm(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


class CifarResNet(nn.Module):
    """ResNet-(6n + 2) on pixels: ``(B, 3, 32, 32)`` in [0, 1] to ``(B, num_classes)`` logits.

    Args:
        mean: Channel means of the training set, on the scale 0..1.
        std: Channel standard deviations of the training set, on the scale 0..1.
        norm: Makes the normalisation layer for a number of channels.
        blocks: Residual blocks per stage (n); 3 gives ResNet-20.
        widths: Channels of the stages; each stage after the first halves the resolution.
        num_classes: Number of classes.
    """

    def __init__(
        self,
        mean: Sequence[float],
        std: Sequence[float],
        norm: Callable[[int], nn.Module] = nn.BatchNorm2d,
        blocks: int = 3,
        widths: Sequence[int] = (16, 32, 64),
        num_classes: int = 10,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.normalize = Normalize(mean, std)
        self.conv1 = nn.Conv2d(3, widths[0], 3, 1, 1, bias=False)
        self.norm1 = norm(widths[0])
        stages, inputs = [], widths[0]
        for i, width in enumerate(widths):
            stage = nn.Sequential()
            for j in range(blocks):
                stage.append(BasicBlock(inputs, width, 2 if i > 0 and j == 0 else 1, norm))
                inputs = width
            stages.append(stage)
        self.stages = nn.Sequential(*stages)
        self.fc = nn.Linear(widths[-1], num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def get_classifier(self) -> nn.Module:
        """The last linear layer, under the name timm uses for it."""
        return self.fc

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm1(self.conv1(self.normalize(x))))
        return self.fc(self.stages(x).mean(dim=(2, 3)))
