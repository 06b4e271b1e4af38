"""Reading the AdaNPC traces of set b; what each of their keys is here says ``trace_keys.py``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import tta

__all__ = ["FOLDER", "AdanpcTrace"]

FOLDER = Path(__file__).parents[1] / "golden" / "set-b"


class _Net(nn.Module):
    """The README's ``bn_cnn`` of set b."""

    def __init__(self, widths: list[int], classes: int) -> None:
        super().__init__()
        inputs = 3
        for i, width in enumerate(widths, start=1):
            stride = 1 if i == 1 else 2
            self.add_module(f"conv{i}", nn.Conv2d(inputs, width, 3, stride, 1, bias=False))
            self.add_module(f"bn{i}", nn.BatchNorm2d(width))
            inputs = width
        self.fc = nn.Linear(inputs, classes)

    def forward(self, x: Tensor) -> Tensor:
        for i in (1, 2, 3):
            x = getattr(self, f"bn{i}")(getattr(self, f"conv{i}")(x)).relu()
        return self.fc(x.mean(dim=(2, 3)))


class AdanpcTrace:
    """One recorded run of the official AdaNPC, or its pieces."""

    def __init__(self, path: Path) -> None:
        with np.load(path) as file:
            self.arrays = {key: file[key] for key in file.files}
        self.hparams: dict[str, Any] = json.loads(str(self.arrays["hparams_json"]))
        self.resets: list[int] = self.hparams.get("reset_before", [])

    def tensor(self, key: str) -> Tensor:
        """An array as float32 or int64; images as pixels in [0, 1]."""
        array = self.arrays[key]
        if array.dtype == np.uint8:
            return torch.from_numpy(array.astype(np.float32) / np.float32(255))
        return torch.from_numpy(array.astype(np.float32 if array.dtype.kind == "f" else np.int64))

    def model(self) -> nn.Module:
        """The source model with its weights."""
        weights = {
            k.removeprefix("weights/"): self.tensor(k)
            for k in self.arrays
            if k.startswith("weights/")
        }
        widths = [len(weights[f"conv{i}.weight"]) for i in (1, 2, 3)]
        net = _Net(widths, len(weights["fc.weight"]))
        net.load_state_dict(weights)
        return net.eval()

    def source(self) -> tta.SourceStatistics:
        """Source batches where the trace has images, features where it has only these."""
        given: dict[str, Any] = {"memory_init": self.tensor("memory_init").flatten()}
        labels = self.tensor("source_labels")
        if "source_inputs" in self.arrays:
            given["batches"] = list(zip(self.tensor("source_inputs"), labels, strict=True))
        else:
            given |= {
                "features": self.tensor("source_features"),
                "feature_labels": labels.flatten(),
            }
        return tta.SourceStatistics(**given)

    def adapter(self) -> tta.Adapter:
        """The adapter that replays the trace."""
        p = self.hparams
        fields = {
            "neighbours": p["k"],
            "temperature": p["temperature"],
            "confidence_threshold": p["beta"],
            "ball_radius": p.get("eps_ball", 1.1),
            "official": True,
        }
        if p["algo"] == "adanpc_bn":
            fields |= {"rounds": p["gamma"], "lr": p["lr"] * p["alpha"]}
            fields["weight_decay"] = p["weight_decay"]
        config = tta.get_config(p["algo"], **fields)
        return tta.wrap(self.model(), output=config, source=self.source())
