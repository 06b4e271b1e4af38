"""Reading the AdaNPC traces of set b; what each of their keys is here says ``trace_keys.py``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

import tta
from tests.helpers.nets import BnCnn
from tests.helpers.recorded import GOLDEN, Recorded

__all__ = ["FOLDER", "AdanpcTrace"]

FOLDER = GOLDEN / "set-b"


class AdanpcTrace(Recorded):
    """One recorded run of the official AdaNPC, or its pieces."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.resets: list[int] = self.hparams.get("reset_before", [])

    def model(self) -> nn.Module:
        """The source model with its weights."""
        weights = self.group("weights")
        widths = [len(weights[f"conv{i}.weight"]) for i in (1, 2, 3)]
        net = BnCnn(widths, len(weights["fc.weight"]))
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
