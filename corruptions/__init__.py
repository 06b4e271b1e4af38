"""The common corruptions of CIFAR-10-C and ImageNet-C as batched tensor code.

Source: Hendrycks & Dietterich, "Benchmarking Neural Network Robustness to Common Corruptions and
Perturbations", ICLR 2019, arXiv 1903.12261.
"""

from corruptions.api import apply, corrupt, list_corruptions, sample
from corruptions.ccc import CropAndFlip, Jpeg
from corruptions.transform import Corrupt, CorruptedDataset

__all__ = [
    "Corrupt",
    "CorruptedDataset",
    "CropAndFlip",
    "Jpeg",
    "apply",
    "corrupt",
    "list_corruptions",
    "sample",
]
