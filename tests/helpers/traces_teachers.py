"""Traces of CoTTA, PETAL and RMT: reading them, and how they become arguments of ``tta.wrap``.

What each of their keys is here says ``tests/helpers/trace_keys.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import tta
from tests.helpers.nets import BnCnn
from tests.helpers.recorded import GOLDEN, Recorded

__all__ = ["FOLDER", "TeacherTrace"]

FOLDER = GOLDEN / "set-b"
RAW = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}


class TeacherTrace(Recorded):
    """One recorded run of an official implementation.

    Args:
        path: The ``.npz``; ``FOLDER / "name.npz"`` for those in the repository.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.method: str = self.hparams.get("method", self.hparams.get("kind"))
        self.updates = 0

    def model(self) -> nn.Module:
        """The source model with its weights."""
        net = BnCnn(self.hparams["widths"], self.hparams["num_classes"])
        net.load_state_dict(self.group("weights"))
        return net.eval()

    def masks(self) -> Callable[[str, torch.Size], Tensor] | None:
        """The recorded restoration masks, one set for every update, in turn."""
        recorded = self.group("restore_masks")
        if not recorded:
            return None
        count = dict.fromkeys(recorded, 0)

        def restore_mask(name: str, shape: torch.Size) -> Tensor:
            mask = recorded[name][count[name]]
            count[name] += 1
            assert mask.shape == shape
            return mask

        return restore_mask

    def config(self) -> tta.core.config.ComponentConfig:
        """The config that replays the trace."""
        h, optim = self.hparams, self.hparams["optim"]
        fields: dict[str, Any] = {
            "optimizer": optim["method"].lower(),
            "lr": optim["lr"],
            "betas": (optim["beta"], 0.999),
            "momentum": optim["momentum"],
            "nesterov": optim["nesterov"],
            "weight_decay": optim["wd"],
            "steps": h["steps"],
            "teacher_momentum": h["mt"],
        }
        if self.method in ("cotta", "petal"):
            fields |= {
                "restore_probability": h["rst"],
                "confidence_threshold": h["ap"],
                "views": h["n_aug"],
                "symmetric_loss": h["variant"] == "imagenet",
            }
        if self.method == "petal":
            fields |= {
                "prior_weight": h["spw"],
                "damping": h["damp"],
                "restore": "fisher" if h["algo"] == "fim" else "random",
                "restore_quantile": h["perc"],
            }
        if self.method == "rmt":
            fields |= {
                "weight_source": h["lambda_ce_src"],
                "weight_target": h["lambda_ce_trg"],
                "weight_contrastive": h["lambda_cont"],
                "temperature": h["temperature"],
                "projection_dim": h["projection_dim"],
                "warmup_samples": h["num_samples_warm_up"],
            }
        return tta.get_config(self.method, **fields, official=True)

    def source(self) -> tta.SourceStatistics | None:
        """What the trace gives of the source."""
        found: dict[str, Any] = {}
        names = dict(self.model().named_parameters())
        if "source_inputs" in self:
            pairs = zip(self.tensor("source_inputs"), self.tensor("source_labels"), strict=True)
            found["batches"] = list(pairs)
        elif "prototypes" in self:
            found["prototypes"] = self.tensor("prototypes")
        for key, field in (("cov", "posterior_variance"), ("mean", "posterior_mean")):
            if values := self.group(key):
                found[field] = {n: v for n, v in values.items() if n in names}
        return tta.SourceStatistics(**found) if found else None

    def adapter(self) -> tta.Adapter:
        """The adapter that replays this trace."""
        adapter = tta.wrap(
            self.model(),
            update=self.config(),
            source=self.source(),
            augment=self.augment,
            restore_mask=self.masks(),
            **RAW,
        )
        projector = {f"update/projector.{n}": v for n, v in self.group("projector_init").items()}
        adapter.load_state(projector, as_source=True)
        return adapter
