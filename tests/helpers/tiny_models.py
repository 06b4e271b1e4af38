"""Tiny networks in place of the bundled classifiers, for tests of the runner."""

from __future__ import annotations

import pytest
import torch

import models
import tta
from models.load import ModelInfo
from tests.helpers.nets import tiny

__all__ = ["fake_load", "use_tiny_models"]


def fake_load(name):
    """A tiny network in place of the bundled ones, with a Fisher of ones."""
    family = name.rpartition("_")[2]
    if name not in models.list_models():
        return models.load(name)
    net = tiny(family)
    fisher = {key: torch.ones_like(p) for key, p in net.named_parameters()}
    info = ModelInfo(
        name=name,
        mean=(0.0, 0.0, 0.0),
        std=(1.0, 1.0, 1.0),
        input_size=(3, 32, 32),
        num_classes=10,
        class_names=None,
        norm_types={"BatchNorm2d": 2},
        source=tta.SourceStatistics(fisher=fisher),
    )
    return net, info


def use_tiny_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the runner load tiny networks."""
    real = models.load
    monkeypatch.setattr(
        "experiments.run.subject.models.load",
        lambda name: fake_load(name) if name in models.list_models() else real(name),
    )
    monkeypatch.setenv("COLUMNS", "140")
