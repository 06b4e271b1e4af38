"""PEA: after each block, activations are whitened and given the covariance of the source.

ICLR 2026, "PEA_TTA" by its authors' repository; no arXiv number is known. Written from a
description of that code.

No gradient is taken. A first pass finds the blocks whose activations are farthest from the source's
mean and variance; in a second one, those are moved back the more, the farther they are. Mean and
covariance of the stream are moving averages, which start anew where a block's mean jumps. Views of
the images (a centre crop, a flip) are passes of their own, and the answer is the mean of their
logits.

    score_l = |mu_l^S - mu_l| + |v_l^S - v_l|,   w_l = (score_l - min) / (max - min)
    m, K <- (1 - r) m + r b, (1 - r) K + r S;   D <- a |b - m| + (1 - a) D;  b, S if |b - m| > g D
    Y = (X - m) K^{-1/2} (Sigma^S)^{1/2} + mu^S,   X <- X + w_l (Y - X)

b and S are mean and covariance of the pass's rows, all tokens or pixels after the block, |b - m| is
a mean over channels, and powers are taken of groups of channels. A block with w below 1e-3, as the
nearest one has, is left alone. Statistics move in every pass, before they are used. Where the mean
entropy of the answers is above its average by ``entropy_limit``, all of them are dropped.

In networks with tokens the score compares the class token, at position 0, with the source's
statistics of all tokens (``class_token_weights``), as the authors' code does. Differences: their
running variance of source tokens is wrong from the second batch on, here it is the variance; and
what they compute of maps of one pixel is changed in place, here the formula above holds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tta.core.backbone import Backbone
from tta.core.batch_split import current_split
from tta.core.checks import LARGE, LARGEST, boolean, fraction, number, shown, whole_number
from tta.core.component import Context, Remembers
from tta.core.config import ComponentConfig
from tta.core.outputs import LogitsReader
from tta.core.prediction import Prediction, Report
from tta.core.registry import register
from tta.core.source import SourceStatistics, missing_artefact
from tta.core.tracing import is_tracing
from tta.core.update import ForwardUpdate
from tta.parts.blocks import Block, block_names, channel_axis, find_blocks
from tta.parts.losses import entropy
from tta.parts.moments import RunningMoments
from tta.parts.teachers import NamedTensors

__all__ = ["Pea", "PeaConfig", "recoloured"]

RIDGE = 1e-5  # on covariances, and the smallest eigenvalue
LEAST_WEIGHT = 1e-3  # below which a block is left alone
LEAST_DRIFT = 1e-6  # of the average, below which no jump is seen in networks with tokens
MOST_IMAGES = 100_000  # of source batches
MOVING = ("mean", "covariance", "drift")
ARTEFACTS = ("block_mean", "block_variance", "block_covariance_root")

Use = Callable[[str, Tensor], Tensor | None]


@dataclass(frozen=True, kw_only=True)
class PeaConfig(ComponentConfig):
    """Fields of ``pea``."""

    views: int = 2  # besides the image itself: centre crop, flip, both, as many of them
    views_per_pass: int = 1  # views in one batch of the second pass, with the image first
    crop: float = 0.9  # side of the centre crop, as a share
    group_size: int | None = None  # channels in a group; None: 768 with tokens, else 32
    rate: float = 0.02  # r, of the statistics of the stream
    drift_rate: float = 0.2  # a, of the averages of drift and entropy
    drift_limit: float | None = None  # g, jumps above the average; None: 4 with tokens, else 2.5
    entropy_limit: float = 1.0  # nats above the average at which all statistics are dropped
    class_token_weights: bool = True  # scores by the class token alone, in networks with tokens
    blocks: tuple[str, ...] | None = None  # names of the blocks; None: found by structure

    def __post_init__(self) -> None:
        super().__post_init__()
        whole_number("views", self.views, 0, 3)
        whole_number("views_per_pass", self.views_per_pass, 1, 4)
        number("crop", self.crop, 0, 1, above=True)
        if self.group_size is not None:
            whole_number("group_size", self.group_size, 1, LARGEST)
        fraction("rate", self.rate)
        fraction("drift_rate", self.drift_rate)
        if self.drift_limit is not None:
            number("drift_limit", self.drift_limit, 0, LARGE)
        number("entropy_limit", self.entropy_limit, 0, LARGE)
        boolean("class_token_weights", self.class_token_weights)
        block_names("blocks", self.blocks)


class _Hooks(Remembers):
    """Shows what blocks give out to the pass that is going on, which may change it."""

    def __init__(self) -> None:
        self.use: Use | None = None

    def __call__(self, name: str, module: nn.Module, args: Any, output: Any) -> Any:
        if self.use is None:
            return None
        alone = isinstance(output, tuple)
        changed = self.use(name, output[0] if alone else output)
        return changed if changed is None or not alone else (changed, *output[1:])


@register("pea")
class Pea(ForwardUpdate):
    """Activations whitened and re-coloured block by block; no gradient."""

    Config = PeaConfig
    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "imagenet": {"entropy_limit": 1.0},
        "cifar100": {"entropy_limit": 0.5},
    }
    default_norm = None
    uses_labels = False
    wants_features = True
    cost = 5.0

    entropy: Tensor  # 0-dimensional, average of answers; NaN before the first

    def __init__(self, config: PeaConfig, network: Backbone, context: Context) -> None:
        super().__init__(config, network, context)
        found = find_blocks(network.model, network.reader, config.blocks)
        if network.feature_hook is not None:
            network.feature_hook.values = []  # a dry run leaves nothing there
        if not found:
            raise ValueError(
                f"`model` must have blocks for {self.name}, modules of one class that are stacked, "
                f"but none are found in this {type(network.model).__name__}: name them by blocks=."
            )
        modules = dict(network.model.named_modules())
        self.axes = {block.name: channel_axis(block, modules[block.name]) for block in found}
        self.hooks = _Hooks()
        for kind in (*MOVING, *ARTEFACTS):
            setattr(self, kind, NamedTensors({}, kind in ARTEFACTS, "its own"))
        for block in found:
            hook = modules[block.name].register_forward_hook(partial(self.hooks, block.name))
            network.handles.append(hook)
            self._remember(block)
        self.register_buffer("entropy", torch.full((), float("nan"), dtype=torch.float32))
        self.tokens = all(block.is_sequence for block in found)
        self.group_size = config.group_size or (768 if self.tokens else 32)
        limit = config.drift_limit
        self.drift_limit = (4.0 if self.tokens else 2.5) if limit is None else limit

    @classmethod
    def suits(cls, model: nn.Module) -> bool:
        """Whether blocks are found in the model."""
        return bool(find_blocks(model, LogitsReader()))

    def adapt(self, x: Tensor) -> Prediction:
        """Weigh the blocks, align them in each pass, and answer with the mean over views."""
        prediction, weights, spikes = self._predict(x, learn=True)
        value = entropy(prediction.logits.float()).mean()
        self.report = Report(selected=len(x), block_weights=weights, spikes=spikes, entropy=value)
        stepped = bool((spikes >= 0).any()) and bool(value.isfinite())
        self.report["stepped"] = stepped
        if bool(value > self.entropy + self.config.entropy_limit):
            self._drop()
            self.resets += 1
        if bool(value.isfinite()):
            old = value if bool(self.entropy.isnan()) else self.entropy
            self.entropy.copy_(old.lerp(value, self.config.drift_rate))
        return prediction

    def predict(self, x: Tensor) -> Prediction:
        """Predict with the statistics of the stream as they are."""
        return self._predict(x, learn=False)[0]

    def undefined_as_nan(self) -> tuple[str, ...]:
        """Statistics before the first pass."""
        kinds = [f"{kind}.{name}" for kind in ("mean", "covariance") for name in self.axes]
        return ("entropy", *kinds)

    def fit(self, source: SourceStatistics) -> None:
        """Take the moments of the source's blocks, or measure them on source batches.

        Raises:
            ValueError: When ``source`` has nothing to take them from, or those of another model.
        """
        if all(getattr(source, kind) is not None for kind in ARTEFACTS):
            self._take({kind: getattr(source, kind) for kind in ARTEFACTS})
            self.source_used = "moments of blocks as given"
        elif source.batches is not None:
            self._measure(source)
        else:
            raise missing_artefact(source, self.name, ", ".join(ARTEFACTS))

    def source_artefacts(self) -> dict[str, Any]:
        """Mean, variance and root of the covariance of each block, by its name."""
        return {kind: {name: self._held(kind, name) for name in self.axes} for kind in ARTEFACTS}

    def _remember(self, block: Block) -> None:
        """Make room for the statistics of a block."""
        size = block.given[self.axes[block.name]]
        shapes = {"mean": (size,), "covariance": (size, size)}
        for kind, shape in shapes.items():
            blank = torch.full(shape, float("nan"), dtype=torch.float32)
            self._named[kind].hold({block.name: blank}, constant=False)
        self._named["drift"].hold({block.name: torch.zeros(())}, constant=False)
        for kind, shape in zip(ARTEFACTS, ((size,), (size,), (size, size)), strict=True):
            zeros = torch.zeros(shape, dtype=torch.float32)
            self._named[kind].hold({block.name: zeros}, constant=True)

    @property
    def _named(self) -> dict[str, Any]:
        """Tensors by the names of blocks, by what they are."""
        return {kind: getattr(self, kind) for kind in (*MOVING, *ARTEFACTS)}

    def _held(self, kind: str, name: str) -> Tensor:
        return getattr(self, kind).named()[name]

    def _rows(self, name: str, output: Tensor) -> Tensor:
        """What a block gives, as rows (n, d) in float32: all tokens, or all pixels."""
        return output.movedim(self.axes[name], -1).flatten(0, -2).float()

    def _whole(self, output: Tensor) -> Tensor:
        """The rows of all processes, where they share a batch."""
        split = current_split()
        return output if split is None else split.collect(output)

    def _run(self, x: Tensor, use: Use) -> Prediction:
        self.hooks.use = use
        try:
            return self.network(x)
        finally:
            self.hooks.use = None

    def _predict(self, x: Tensor, learn: bool) -> tuple[Prediction, Tensor, Tensor]:
        views = self._views(x)
        with torch.no_grad():
            weights = self._weights(views)
        size = self.config.views_per_pass
        passes = [views[i : i + size] for i in range(0, len(views), size)]
        spikes = torch.full((len(weights), len(passes)), -1)
        logits, features = [], []
        result = self.network.result  # of the image itself
        for number_, some in enumerate(passes):
            noted: dict[str, int] = {}
            align = partial(self._aligned, dict(zip(self.axes, weights, strict=True)), noted, learn)
            found = self._run(torch.cat(some), align)
            result = self.network.result if number_ == 0 and len(some) == 1 else result
            for i, name in enumerate(self.axes):
                spikes[i, number_] = noted.get(name, -1)
            logits += found.logits.chunk(len(some))
            features += [] if found.features is None else found.features.chunk(len(some))
        self.network.result = result
        mean = torch.stack(logits).mean(0)
        return (
            Prediction(mean, torch.stack(features).mean(0) if features else None),
            weights,
            spikes,
        )

    def _views(self, x: Tensor) -> list[Tensor]:
        """The images (B, C, H, W) and their views: centre crop, flip, both."""
        found = [x]
        if self.config.views > 0:
            size = [max(1, round(side * self.config.crop)) for side in x.shape[-2:]]
            top, left = (round((n - part) / 2) for n, part in zip(x.shape[-2:], size, strict=True))
            part = x[..., top : top + size[0], left : left + size[1]]
            resized = F.interpolate(part.float(), x.shape[-2:], mode="bilinear").to(x.dtype)
            found += [resized, x.flip(-1), resized.flip(-1)][: self.config.views]
        return found

    def _weights(self, views: list[Tensor]) -> Tensor:
        """The weights w (blocks,), from a pass of each view in the network as it is."""
        moments = {name: RunningMoments() for name in self.axes}

        def note(name: str, output: Tensor) -> None:
            output = self._whole(output.detach())
            alone = self.tokens and self.config.class_token_weights
            moments[name].add(output[:, 0].float() if alone else self._rows(name, output))

        result = None
        for view in views:
            self._run(view, note)
            result = self.network.result if result is None else result
        self.network.result = result
        scores = torch.stack([self._score(name, moments[name]) for name in self.axes])
        spread = scores.max() - scores.min()
        if not is_tracing():
            return ((scores - scores.min()) / spread).float() if spread > 0 else scores.float() * 0
        return torch.where(spread > 0, (scores - scores.min()) / spread, 0.0).float()

    def _score(self, name: str, moments: RunningMoments) -> Tensor:
        """How far a block's mean and variance are from the source's."""
        mean = self._held("block_mean", name) - moments.mean()
        variance = self._held("block_variance", name)
        away = variance - (moments.variance() if moments.count > 1 else variance)
        return (mean.norm() + away.norm()).nan_to_num(0.0)

    def _aligned(
        self, weights: dict[str, Tensor], noted: dict[str, int], learn: bool, name: str, x: Tensor
    ) -> Tensor | None:
        """What a block gives, moved towards the source; None to leave it alone."""
        weight = weights[name]
        if not is_tracing() and bool(weight < LEAST_WEIGHT):
            return None
        if learn:
            noted[name] = int(self._move(name, self._rows(name, self._whole(x.detach()))))
        mean, covariance = self._held("mean", name), self._held("covariance", name)
        known = ~mean.isnan().any()
        if is_tracing():
            weight = torch.where(known & (weight >= LEAST_WEIGHT), weight, 0.0)
            unit = torch.eye(len(mean), dtype=covariance.dtype, device=covariance.device)
            mean, covariance = mean.nan_to_num(0.0), torch.where(known, covariance, unit)
        elif not bool(known):
            return None
        rows = self._rows(name, x)
        with torch.autocast(x.device.type, enabled=False):
            target = recoloured(
                rows,
                mean,
                covariance,
                self._held("block_mean", name),
                self._held("block_covariance_root", name),
                self.group_size,
            )
            moved = rows + weight * (target - rows)
            # Activations of rows that lie so far out that they would overflow stay as they are.
            rows = torch.where(moved.isfinite().all(1, keepdim=True), moved, rows)
        shape = x.movedim(self.axes[name], -1).shape
        return rows.view(shape).movedim(-1, self.axes[name]).to(x.dtype)

    def _move(self, name: str, rows: Tensor) -> bool:
        """Move the statistics of a block towards rows (n, d); returns whether they jumped."""
        if len(rows) < 2:
            return False
        mean, covariance = self._held("mean", name), self._held("covariance", name)
        drift = self._held("drift", name)
        with torch.autocast(rows.device.type, enabled=False):
            new_mean, new_covariance = rows.mean(0), _covariance(rows)
        # Nor is it where a row is not; and squares overflow long before the rows do.
        if not bool(new_covariance.isfinite().all()):
            return False
        jumps = False
        if bool(mean.isnan().any()):
            mean.copy_(new_mean)
            covariance.copy_(new_covariance)
            return jumps
        step = (new_mean - mean).abs().mean()
        drift.lerp_(step, self.config.drift_rate)
        least = LEAST_DRIFT if self.tokens else 0.0
        jumps = bool(step > self.drift_limit * drift) and bool(drift > least)
        rate = 1.0 if jumps else self.config.rate
        mean.lerp_(new_mean, rate)
        covariance.lerp_(new_covariance, rate)
        return jumps

    def _drop(self) -> None:
        for name in self.axes:
            self._held("mean", name).fill_(float("nan"))
            self._held("covariance", name).fill_(float("nan"))
            self._held("drift", name).zero_()
        self.entropy.fill_(float("nan"))

    def _take(self, given: dict[str, dict[str, Tensor]]) -> None:
        for kind, by_name in given.items():
            for name in self.axes:
                held = self._held(kind, name)
                value = by_name.get(name)
                if value is None or value.shape != held.shape:
                    got = "none" if value is None else tuple(value.shape)
                    raise ValueError(
                        f"`source.{kind}` must hold {shown(name)} of shape {tuple(held.shape)}, "
                        f"got {got}: make it with "
                        f"tta.collect_source(model, loader, for_methods=['{self.name}'])."
                    )
                held.copy_(value)

    @torch.no_grad()
    def _measure(self, source: SourceStatistics) -> None:
        """Mean and variance of all rows, and the covariance within batches."""
        moments = {name: RunningMoments() for name in self.axes}
        scatter: dict[str, Any] = dict.fromkeys(self.axes, 0.0)
        batches, images_seen = 0, 0

        def note(name: str, output: Tensor) -> None:
            rows = self._rows(name, self._whole(output))
            moments[name].add(rows)
            centred = (rows - rows.mean(0)).double()
            freedom = 1 if self.tokens else max(len(rows) - 1, 1)
            scatter[name] = scatter[name] + centred.T @ centred / freedom

        for images, _ in source.iter_batches(MOST_IMAGES):
            self._run(images.to(self.entropy.device), note)
            batches, images_seen = batches + 1, images_seen + len(images)
        for name in self.axes:
            self._held("block_mean", name).copy_(moments[name].mean())
            self._held("block_variance", name).copy_(moments[name].variance())
            freedom = moments[name].count - 1 if self.tokens else batches
            covariance = scatter[name] / freedom
            covariance = covariance + RIDGE * torch.eye(len(covariance)).to(covariance)
            self._held("block_covariance_root", name).copy_(_power(covariance, 0.5))
        self.source_used = f"moments of blocks of {images_seen} images in {batches} batches"


def recoloured(
    rows: Tensor,
    mean: Tensor,
    covariance: Tensor,
    target_mean: Tensor,
    target_root: Tensor,
    group_size: int,
) -> Tensor:
    """Rows whitened by one covariance, and given another, in groups of channels.

    Args:
        rows: (n, d).
        mean: (d,) of the rows.
        covariance: (d, d) of the rows.
        target_mean: (d,) that they get.
        target_root: (d, d), root of the covariance that they get.
        group_size: Channels in a group; the last one may have fewer.

    Returns:
        (n, d).
    """
    found = []
    for start in range(0, len(mean), group_size):
        group = slice(start, start + group_size)
        white, root = _power(covariance[group, group], -0.5), target_root
        if group_size < len(mean):
            root = _power(target_root[group] @ target_root[:, group], 0.5)
        found.append((rows[:, group] - mean[group]) @ (white @ root))
    return torch.cat(found, 1) + target_mean


def _covariance(rows: Tensor) -> Tensor:
    """Unbiased covariance (d, d) of rows, with a ridge."""
    centred = rows - rows.mean(0)
    ridge = RIDGE * torch.eye(rows.shape[1], dtype=rows.dtype, device=rows.device)
    return centred.T @ centred / (len(rows) - 1) + ridge


def _power(matrix: Tensor, exponent: float) -> Tensor:
    """A power of a symmetric matrix (d, d), of eigenvalues not below the ridge."""
    values, vectors = torch.linalg.eigh(matrix)
    return vectors * values.clamp_min(RIDGE).pow(exponent) @ vectors.T
