"""A small vision transformer with a convolutional stem, for 32 x 32 images.

Xiao et al.: Early Convolutions Help Transformers See Better, NeurIPS 2021, arXiv 2106.14881: the
patch projection is a short stack of strided convolutions. Everything after the stem is timm's
``VisionTransformer`` (pre-norm blocks, LayerNorm), average-pooled. No layer of it uses batch
statistics, so it stands for the transformers that test-time adaptation meets.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from models.resnet import Normalize

__all__ = ["ConvViT"]


class ConvStem(nn.Module):
    """Two strided 3 x 3 convolutions: ``(B, 3, H, W)`` to ``(B, H/4 * W/4, embed_dim)`` tokens."""

    def __init__(
        self,
        img_size: int = 32,
        patch_size: int = 4,
        in_chans: int = 3,
        embed_dim: int = 96,
        **_: object,  # timm passes more (bias, dynamic_img_pad, ...), none of which applies here
    ) -> None:
        super().__init__()
        self.grid_size = (img_size // 4, img_size // 4)
        self.num_patches = self.grid_size[0] * self.grid_size[1]
        self.conv1 = nn.Conv2d(in_chans, embed_dim // 2, 3, 2, 1)
        self.conv2 = nn.Conv2d(embed_dim // 2, embed_dim, 3, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(F.gelu(self.conv1(x))).flatten(2).transpose(1, 2)


class ConvViT(VisionTransformer):
    """Conv-stem ViT on pixels: ``(B, 3, 32, 32)`` in [0, 1] to ``(B, num_classes)`` logits.

    Args:
        mean: Channel means of the training set, on the scale 0..1.
        std: Channel standard deviations of the training set, on the scale 0..1.
        num_classes: Number of classes.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float], num_classes: int = 10) -> None:
        super().__init__(
            img_size=32,
            patch_size=4,
            embed_dim=96,
            depth=4,
            num_heads=3,
            mlp_ratio=2,
            num_classes=num_classes,
            class_token=False,
            global_pool="avg",
            embed_layer=ConvStem,
        )
        self.normalize = Normalize(mean, std)

    def forward_features(self, x: Tensor, *args, **kwargs) -> Tensor:
        return super().forward_features(self.normalize(x), *args, **kwargs)
