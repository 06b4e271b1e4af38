"""Classifiers to adapt: three small bundled ones, and loaders for everything else.

``load("cifar10_resnet20_bn")`` needs no network; ``load("timm:resnet50")`` and
``load("torchvision:resnet50")`` fetch weights with those libraries, or read a local checkpoint.
"""

from models.card import SourceCard
from models.denoiser import load_diffusion
from models.load import ModelInfo, list_models, load

__all__ = ["ModelInfo", "SourceCard", "list_models", "load", "load_diffusion"]
