"""Reading the traces of set-c: ITTA, NHL and LSA."""

from __future__ import annotations

from torch import nn

from tests.helpers.nets import trace_model
from tests.helpers.recorded import GOLDEN, Recorded

__all__ = ["FOLDER", "SheetTrace"]

FOLDER = GOLDEN / "set-c"


class SheetTrace(Recorded):
    """A trace whose network is ``bn_cnn`` of set-b."""

    def model(self) -> nn.Module:
        """The source model with its weights."""
        about = self.hparams["model"]
        more = {"strides": about["strides"], "first_bias": about.get("conv1_bias", False)}
        shape = {"widths": about["widths"], "num_classes": about["classes"], "more": more}
        net = trace_model({"kind": "bn_cnn_b"} | shape)
        net.load_state_dict(self.group("weights"))
        return net
