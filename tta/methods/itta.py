"""ITTA: a consistency loss that was learned on the source trains small blocks between the stages.

Chen, Zhang, Song, Shan, Liu: Improved Test-Time Adaptation for Domain Generalization, CVPR 2023,
arXiv 2304.04494.

Which unsupervised loss helps is not left to chance: a loss with parameters w of its own is learned
on the source, so that its gradient points where that of the classification does. At test time the
model stays as it is, and element-wise maps after its stages, Theta, are trained by that loss on
each batch, before the answer.

    L = mean w(z' - z)^2,   Theta <- Theta - lr dL/dTheta,   answer: f with the new Theta

z are the features, z' those of the same images with styles (mean and deviation of maps) mixed with
those of another image, after the first or the second stage. The answer comes after the step, unlike
TENT's. Theta is ``block_depth`` maps with one number for each place, so images keep one size.

The authors scale the loss by 1e-6, which brings its gradients below Adam's eps: with their rate of
5e-6 nothing moves to speak of (preset ``domainbed``). Here ``loss_scale`` is 0.1, theirs for
DomainNet. They evaluate on single images, whose styles are mixed with themselves and give no
gradient: nothing is learned from such a batch here, and ``stepped`` is False. There is no anchor:
at large rates the loss falls as Theta shrinks the features, and accuracy with it.

In the paper w is learned while the network is trained, so that the network has seen the loss
(`tta.parts.itta.learn`). ``tta.collect_source`` learns w alone, on the network as it is, which is a
deviation. Both take second derivatives, which torch lacks for some layers (hard sigmoids, as in
MobileNetV3): there w must be given.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tta.core import random
from tta.core.backbone import Backbone
from tta.core.batch_split import current_split
from tta.core.checks import LARGE, fraction, number, shown, whole_number
from tta.core.component import Context
from tta.core.config import UpdateConfig
from tta.core.norm_layers import frozen_statistics
from tta.core.prediction import Prediction, Report
from tta.core.registry import register
from tta.core.source import SourceStatistics, missing_artefact
from tta.core.update import Update
from tta.parts import itta as parts
from tta.parts.blocks import block_names

__all__ = ["Itta", "IttaConfig"]

UPDATES, CONSISTENCY_LR = 300, 1e-4  # of learning w on source batches


@dataclass(frozen=True, kw_only=True)
class IttaConfig(UpdateConfig):
    """Fields of ``itta``."""

    lr: float = 5e-6  # of Theta
    optimizer: str = "adam"  # "sgd", "adam" or "adamw"
    loss_scale: float = 0.1  # factor of the loss; 1e-6 is the authors', which learns nothing
    consistency_depth: int = 10  # L, maps of w where it is learned here
    block_depth: int = 5  # T, maps of each block of Theta
    blocks: tuple[str, ...] | None = None  # modules that Theta comes after; None = the stages
    coin: float = 0.5  # above it styles are mixed after the first stage, else after the second
    beta: float = 0.1  # of the Beta distribution of shares of an image's own style

    def __post_init__(self) -> None:
        super().__post_init__()
        number("loss_scale", self.loss_scale, 0, LARGE)
        whole_number("consistency_depth", self.consistency_depth, 1, 1000)
        whole_number("block_depth", self.block_depth, 1, 1000)
        fraction("coin", self.coin)
        number("beta", self.beta, 1e-3, LARGE)
        block_names("blocks", self.blocks)
        if self.blocks is not None and len(self.blocks) < 2:
            raise ValueError(
                f"`blocks` must name at least two modules, got {shown(self.blocks)}: name the "
                "stages of the network."
            )


class Block(nn.Module):
    """Maps after one stage, empty until the first batch.

    Args:
        depth: Number of maps.
    """

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(depth, 0, 0, 0, dtype=torch.float32))
        self.bias = nn.Parameter(torch.zeros(depth, 0, 0, 0, dtype=torch.float32))


@register("itta")
class Itta(Update):
    """Blocks between the stages, trained by a loss that was learned on the source."""

    Config = IttaConfig
    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "domainbed": {"loss_scale": 1e-6},
        "domainnet": {"loss_scale": 0.1},
    }
    default_norm: ClassVar[str | None] = None
    needs_features: ClassVar[bool] = True
    trains_model: ClassVar[bool] = False
    takes_draws: ClassVar[bool] = True
    takes_softmax: ClassVar[bool] = False
    cost: ClassVar[float] = 4.0

    consistency: Tensor  # w (2, L, D)

    def __init__(self, config: IttaConfig, network: Backbone, context: Context) -> None:
        names = config.blocks or parts.stages(network.model)
        known = dict(network.model.named_modules())
        if len(names) < 2 or not all(name in known for name in names):
            raise ValueError(
                "`blocks` must name two stages or more with maps (B, c, H, W) for itta, got "
                f"{shown(names) if names else 'a ' + type(network.model).__name__ + ' without any'}"
                ": name the modules, or use another method."
            )
        self._names = tuple(names)
        self._depth = config.block_depth
        super().__init__(config, network, context)
        for k in range(1, len(names) + 1):
            self.add_module(f"block{k}", Block(config.block_depth))
        self.optimizer = self._make_optimizer()

    @classmethod
    def suits(cls, model: nn.Module) -> bool:
        """Whether stages are found in the model."""
        return len(parts.stages(model)) > 1

    def lazy_parameters(self) -> tuple[str, ...]:
        """Theta: its maps have the size of the network's."""
        return tuple(name for name, _ in self.named_parameters())

    def fit(self, source: SourceStatistics) -> None:
        """Take w, or learn it on source batches.

        Raises:
            ValueError: When ``source`` has neither, or has w for another number of features.
        """
        if source.consistency is not None:
            self._hold(source.consistency)
            self.source_used = "consistency as given"
        elif source.batches is not None:
            width = self.context.feature_size
            w, count = parts.identity(self.config.consistency_depth, width), 0
            device = next((p.device for p in self.network.model.parameters()), w.device)
            shown: list[Tensor] = []  # the batch that is learned from, whose dtype may be another

            def batches() -> Iterator[tuple[Tensor, Tensor]]:
                for x, y in self._checked(source):
                    shown[:] = [x]
                    yield x.to(device), y.to(device)

            seed = int(torch.randint(2**62, (), generator=self.context.generator))
            learned = parts.learn(
                self.network.model,
                w.to(device),
                islice(batches(), UPDATES),
                consistency_lr=CONSISTENCY_LR,
                blocks=self._names,
                train_model=False,
                seed=seed,
                reader=self.network.reader,
            )
            try:
                for found in learned:
                    w, count = found["consistency"], count + 1
            except RuntimeError as error:
                refusal = self.network.images.refusal(error, shown[0]) if shown else None
                missing = re.match(r"derivative for (?:aten::)?(\w+)", str(error))
                if missing is not None:
                    refusal = ValueError(
                        "`source` must have a consistency for itta with this model, which has no "
                        f"second derivative to learn one by, got batches ({missing[1]} has none): "
                        "pass SourceStatistics(consistency=...), or use another method."
                    )
                if "use_reentrant" in str(error):
                    refusal = ValueError(
                        "`model` must have no reentrant checkpoints for itta to learn its "
                        "consistency, got some: pass use_reentrant=False to torch's checkpoint, or "
                        "SourceStatistics(consistency=...)."
                    )
                if refusal is None:
                    raise
                raise refusal from error
            if count == 0:
                raise ValueError(
                    "`source` must hold at least one batch, got none: pass an iterable of "
                    "(images, labels) that was not read to its end."
                )
            self._hold(w)
            self.source_used = f"consistency from {count} source batches"
        else:
            raise missing_artefact(
                source, self.name, "its consistency loss", "source batches with labels"
            )

    def source_artefacts(self) -> dict[str, Any]:
        """W, as ``consistency``."""
        return {"consistency": self.consistency}

    def load_constants(self, values: dict[str, Tensor]) -> None:
        """Set what ``constants`` returned."""
        self._hold(values["consistency"])

    def _checked(self, source: SourceStatistics) -> Iterator[tuple[Tensor, Tensor]]:
        """Source batches, of which the first passes the network: it refuses in words."""
        for step, (x, y) in enumerate(source.iter_batches()):
            if step == 0:
                with torch.no_grad():
                    self.network(x)
            yield x, y

    def _hold(self, consistency: Tensor) -> None:
        width = self.context.width
        fits = len(consistency) == 2 and width in (None, consistency.shape[2])
        if not fits:
            raise ValueError(
                f"`source.consistency` must be weights and biases (2, L, {width}), got shape "
                f"{tuple(consistency.shape)}: make it for this model with tta.collect_source."
            )
        device = next((p.device for p in self.network.model.parameters()), consistency.device)
        value = consistency.detach().to(device, torch.float32).clone()
        self.register_buffer("consistency", value, persistent=False)

    def learn(self, x: Tensor) -> Prediction:
        """Take ``steps`` steps, and predict afterwards."""
        for _ in range(self.config.steps):
            self.adapt(x)
        with torch.no_grad(), frozen_statistics(self.network.wrappers):
            return self.predict(x)

    def adapt(self, x: Tensor) -> Prediction:
        """One step of Theta on the consistency loss; none for a single image."""
        mixing = None
        if len(x) > 1:
            mixing = parts.draw_mixing(
                self.context.draws,
                len(x),
                x.device,
                lambda: random.fork(self.context.generator, torch.device("cpu")),
                self.config.coin,
                self.config.beta,
            )
        with torch.autocast(x.device.type, enabled=False):
            with self._inserted(None, fill=True):
                plain = self.network(x)
            if any(p.numel() == 0 for p in self.parameters()):
                raise ValueError(
                    "`blocks` must name modules that the model calls, got "
                    f"{shown(list(self._names))}: name others, or use another method."
                )
            if mixing is None:
                mixed = plain  # an image's style mixed with itself
            else:
                with self._inserted(mixing), frozen_statistics(self.network.wrappers):
                    mixed = self.network(x)
            assert plain.features is not None and mixed.features is not None
            z, other = plain.features.float(), mixed.features.float()
            loss = parts.consistency_loss(z, other, self.consistency)
        if not loss.requires_grad:
            raise ValueError(
                "`blocks` must name modules on the way to the features, got "
                f"{shown(list(self._names))}, on which these do not depend: name others."
            )
        stepped = mixing is not None and self.step(self.config.loss_scale * loss)
        selected = 0 if mixing is None else len(x)
        self.report = Report(selected=selected, loss=loss.detach(), stepped=stepped)
        return plain

    def predict(self, x: Tensor) -> Prediction:
        """Predict with Theta as it is."""
        with self._inserted(None):
            return self.network(x)

    @contextmanager
    def _inserted(self, mixing: parts.Mixing | None, fill: bool = False) -> Iterator[None]:
        """Put Theta, and mixed styles before it, behind the stages for the passes within."""
        model, handles = self.network.model, []
        try:
            for k, name in enumerate(self._names):
                hook = self._hook(k, mixing, fill)
                handles.append(model.get_submodule(name).register_forward_hook(hook))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, k: int, mixing: parts.Mixing | None, fill: bool) -> Any:
        def insert(module: nn.Module, args: Any, output: Any) -> Tensor:
            u = parts.check_maps(self._names[k], output)
            if mixing is not None and mixing.place == k:
                u = parts.mix_style(u, mixing)
            return self._block(k, u, fill).to(u.dtype)

        return insert

    def _block(self, k: int, u: Tensor, fill: bool) -> Tensor:
        name = f"block{k + 1}"
        block: Any = self.get_submodule(name)
        if block.weight.numel() == 0:
            if not fill:  # nothing was learned yet: all maps are the identity
                return u.relu() if self._depth > 1 else u
            ones = torch.ones(self._depth, *u.shape[1:], dtype=torch.float32, device=u.device)
            self.give_shape(f"{name}.weight", ones)
            self.give_shape(f"{name}.bias", torch.zeros_like(ones))
        if block.weight.shape[1:] != u.shape[1:]:
            raise ValueError(
                f"`images` must have the size of the first batch for itta, whose maps after "
                f"{shown(self._names[k], 40)} were {tuple(block.weight.shape[1:])}, got "
                f"{tuple(u.shape[1:])}: resize them, or reset."
            )
        weights, split = [block.weight, block.bias], current_split()
        if split is not None and torch.is_grad_enabled():
            weights = split.share(weights)
        return parts.maps(u.float(), *weights)
