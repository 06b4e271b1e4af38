"""Reading golden traces, and how each trace's hyper-parameters become arguments of ``tta.wrap``."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import nn

import tta
from tests.helpers.nets import trace_model
from tests.helpers.recorded import GOLDEN, Recorded

__all__ = ["FOLDER", "TRACES", "Trace"]

FOLDER = GOLDEN / "set-a"
TRACES = sorted(FOLDER.glob("*.npz"))


class Trace(Recorded):
    """One recorded run of an official implementation.

    Args:
        path: The ``.npz``; ``FOLDER / "name.npz"`` for those in the repository.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.params: dict[str, Any] = self.hparams.get("params", {})

    def model(self) -> nn.Module:
        """The source model with its weights."""
        net = trace_model(self.hparams["model"])
        net.load_state_dict(self.group("weights"))
        return net

    @property
    def log_classes(self) -> float:
        """The largest entropy, ln C."""
        return math.log(self.hparams["model"]["num_classes"])

    def optimizer(self) -> dict[str, Any]:
        """The optimiser's fields."""
        entry = dict(self.hparams.get("optimizer", {}))
        if not entry:
            return {}
        entry.pop("state", None)  # in words
        entry["optimizer"] = entry.pop("name").lower().removeprefix("sam(").removesuffix(")")
        return entry

    def source(self) -> tta.SourceStatistics | None:
        """The clean batches of a Fisher pass, the last one cut where the trace says so."""
        if "fisher_inputs" not in self.arrays:
            return None
        batches = list(self.tensor("fisher_inputs"))
        last = self.params.get("fisher_last_batch")
        if last is not None:
            batches[-1] = batches[-1][:last]
        return tta.SourceStatistics(
            batches=[(x, torch.zeros(len(x), dtype=torch.int64)) for x in batches]
        )

    def adapters(self) -> list[tuple[str, tta.Adapter]]:
        """The adapters that replay this trace, each with the key of its outputs."""
        method, p = self.hparams["method"], self.params
        if method == "source":
            return [("outputs", tta.wrap(self.model(), "source"))]
        if method == "norm":
            return [("outputs", tta.wrap(self.model(), "bn", official=True))]
        if method == "alphabn":
            w = 1 - p["alpha_test"]
            biased = tta.wrap(self.model(), "alpha_bn", source_weight=w, unbiased=False)
            return [
                ("outputs", tta.wrap(self.model(), "alpha_bn", source_weight=w)),
                ("outputs_bethgelab", tta.wrap(self.model(), "alpha_bn", source_weight=w)),
                ("unofficial/outputs_biased_var", biased),
            ]
        if method == "tent":
            fields = {"steps": p["steps"]} | self.optimizer()
            return [("outputs", tta.wrap(self.model(), update=tta.get_config("tent", **fields)))]
        if method in ("eta", "eata"):
            config = tta.get_config(
                "eata",
                entropy_margin=p["e_margin"] / self.log_classes,
                redundancy_margin=p["d_margin"],
                fisher_weight=p["fisher_alpha"],
                official=True,
                **self.optimizer(),
            )
            return [("outputs", tta.wrap(self.model(), update=config, source=self.source()))]
        if method == "rdumb":
            config = tta.get_config(
                "rdumb",
                entropy_margin=p["e_margin"] / self.log_classes,
                redundancy_margin=p["d_margin"],
                reset_every=p["reset_every"],
                **self.optimizer(),
            )
            return [("outputs", tta.wrap(self.model(), update=config))]
        if method == "sar":
            config = tta.get_config(
                "sar",
                entropy_margin=p["margin_e0"] / self.log_classes,
                official=True,
                **self.optimizer(),
            )
            return [("outputs", tta.wrap(self.model(), update=config))]
        if method == "lame":
            return [
                (
                    f"outputs/{v['name']}",
                    tta.wrap(
                        self.model(),
                        "lame",
                        affinity=v["affinity"].lower(),
                        neighbours=v["knn"],
                        symmetric=v["force_symmetry"],
                        official=True,
                    ),
                )
                for v in p["variants"]
            ]
        if method == "unmixtns":
            adapter = tta.wrap(
                self.model(),
                norm=tta.get_config(
                    "unmix_tns", components=p["K"], batch_size=p["bs"], batch_size_max=p["bs_max"]
                ),
                update=self._inner(),
            )
            adapter.load_state(
                {f"norm/{k}": v for k, v in self.group("init").items()}, as_source=True
            )
            return [("outputs", adapter)]
        raise ValueError(f"no adapter for traces of {method!r}")

    def _inner(self) -> Any:
        if self.params.get("inner") != "tent":
            return None
        cfg = self.params["tent_cfg"]
        known = {"lr", "momentum", "nesterov", "weight_decay", "betas", "steps"}
        fields = {k: v for k, v in cfg.items() if k in known}
        return tta.get_config("tent", optimizer=str(cfg.get("name", "sgd")).lower(), **fields)
