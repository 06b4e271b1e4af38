"""Reading the traces of set-c: ITTA, NHL and LSA."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.helpers.nets import trace_model
from tests.helpers.recorded import GOLDEN, Recorded

__all__ = ["FOLDER", "IttaCnn", "IttaTrace", "SheetTrace"]

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


class IttaCnn(nn.Module):
    """The network of the traces of ITTA: a stem with pooling, then four stages."""

    def __init__(self, widths: list[int], classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, widths[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        for i, stride in enumerate((1, 2, 2, 1)):
            convolution = nn.Conv2d(widths[i], widths[i + 1], 3, stride, 1, bias=False)
            stage = nn.Sequential(convolution, nn.BatchNorm2d(widths[i + 1]), nn.ReLU())
            self.add_module(f"layer{i + 1}", stage)
        self.head = nn.Linear(widths[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.max_pool2d(self.bn1(self.conv1(x)).relu(), 2)
        for i in range(1, 5):
            x = self.get_submodule(f"layer{i}")(x)
        return self.head(x.mean((2, 3)))


class IttaTrace(Recorded):
    """A trace of ITTA."""

    def model(self) -> nn.Module:
        """The source model with its weights."""
        net = IttaCnn(self.hparams["widths"], self.hparams["classes"])
        net.load_state_dict(self.group("weights"), strict=False)
        return net.eval()
