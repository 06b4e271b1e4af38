"""Norm surgery: a wrapper around each BatchNorm layer that asks a rule for its statistics.

The original layer stays inside as ``.base`` and is never changed, so taking the wrapper away gives
the caller's model back. Replacing layers by plain ones, as many repositories do, loses what
subclasses add (timm's ``BatchNormAct2d`` carries its activation): here the rule does the
normalisation and the base's own ``drop`` and ``act`` follow.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from tta.core.batch_split import current_split
from tta.core.checkpointing import is_recomputation, may_be_recomputed
from tta.core.classifier import evaluating
from tta.core.functional import HOOKS, bare_copy, call_with_hooks, has_hooks
from tta.core.norm_kernels import LARGE_MEAN, few_passes_back, normalize_by
from tta.core.norm_rule import NormRule
from tta.core.session import Session
from tta.core.tracing import is_recorded, is_tracing, rule_refused, source_if_refused

__all__ = [
    "FAR_OUTSIDE",
    "AdaptiveNorm",
    "batch_norm_layers",
    "batch_stats",
    "begin_graph",
    "check_values",
    "evaluate",
    "far_outside",
    "few_images_advice",
    "frozen_statistics",
    "insert",
    "instance_stats",
    "learning_pass",
    "normalize",
    "normalize_by_batch",
    "normalize_by_source",
    "one_value",
    "ordinary_images",
    "part_of_batch",
    "pooled_stats",
    "remove",
    "rows_independent",
    "run_kernel",
    "too_few_values",
    "with_statistics",
]


FAR_OUTSIDE = 30.0  # energies above this many reference variances are those of bad images


@dataclass
class _Pass:
    """State of a layer before a pass, on which the output of the pass depends."""

    sign: float  # of the input of the pass, see `_sign`
    mode: tuple[bool, Any, float]  # the rule's ``learning``, ``override`` and ``part_size``
    remembered: list[Tensor]  # copies of the rule's buffers


class AdaptiveNorm(nn.Module):
    """A BatchNorm layer whose statistics come from a rule.

    Args:
        base: The layer that it replaces, kept as it is.
        rule: Decides mean and variance.
        session: The adapter's session.
    """

    def __init__(self, base: nn.Module, rule: NormRule, session: Session) -> None:
        super().__init__()
        self.base = base
        self.rule = rule
        self.session = rule.session = session
        self.passes: list[_Pass] = []  # of this call, which a backward pass may repeat
        self._finisher: tuple[nn.Module, ...] = ()  # a copy of the base; not among the modules
        # A forward of its own does something after normalising, unless the class says that all of
        # it is another way to normalise.
        only = isinstance(base, nn.SyncBatchNorm) or getattr(base, "only_normalises", False)
        own = "forward" in base.__dict__ or type(base).forward is not _BatchNorm.forward
        self.finish = own and not only
        for hooks in HOOKS:  # the caller's hooks on the layer, and those that are put on this one
            self.__dict__[hooks] = base.__dict__[hooks]

    def shared_by_copies(self) -> tuple[Any, ...]:
        """See :func:`tta.core.functional.copy_structure`."""
        return self.rule, self.session, self.passes

    def _call_impl(self, *args: Any, **kwargs: Any) -> Any:
        if has_hooks(self):
            return call_with_hooks(self.base, self.forward, *args, **kwargs)
        return super()._call_impl(*args, **kwargs)

    def forward(self, x: Tensor) -> Tensor:
        if self.passes and is_recomputation():
            y = self._again(x)
        else:
            if self.session.recording and may_be_recomputed():
                self.passes.append(self._now(_sign(x)))
            y = self._normalised(x)
        return self._finished(y) if self.finish else y

    def _again(self, x: Tensor) -> Tensor:
        """Normalise ``x`` as in the forward pass, with the state that the rule had then.

        A checkpointed part of a model runs again within the backward pass, when the moving
        statistics have already moved for it.
        """
        sign = _sign(x)
        now = self._now(sign)
        # Of passes of the same images the last one, as a loss is of the last pass before it.
        self._go_to(min(reversed(self.passes), key=lambda noted: abs(noted.sign - sign)))
        try:
            return self._normalised(x)
        finally:
            self._go_to(now)

    def _normalised(self, x: Tensor) -> Tensor:
        normalise = self.rule if self.rule.override is None else self.rule.override
        if not is_tracing():
            return normalise(x, self.base)
        with rule_refused() as refusal:
            y = normalise(x, self.base)
        if refusal.used or refusal.condition is None or self.base.running_mean is None:
            return y
        return torch.where(refusal.condition, normalize_by_source(x, self.base), y)

    def _now(self, sign: float) -> _Pass:
        remembered = [b.clone() for b in self.rule.buffers()]
        rule = self.rule
        return _Pass(sign, (rule.learning, rule.override, rule.part_size), remembered)

    @torch.no_grad()
    def _go_to(self, noted: _Pass) -> None:
        self.rule.learning, self.rule.override, self.rule.part_size = noted.mode
        for buffer, value in zip(self.rule.buffers(), noted.remembered, strict=True):
            buffer.copy_(value)

    def _finished(self, y: Tensor) -> Tensor:
        """What a BatchNorm subclass does after normalising.

        timm's protocol is a ``drop`` and an ``act`` module. Anything else is run through the
        layer's own forward with statistics and affine parameters that make the normalisation the
        identity; in a copy of the layer, since its own parameters stay in it.
        """
        base: Any = self.base
        if _has_activation(base):
            drop = getattr(base, "drop", None)
            return base.act(drop(y) if isinstance(drop, nn.Module) else y)
        channels, like = y.shape[1], {"device": y.device, "dtype": torch.float32}
        var = torch.full((channels,), 1.0 - base.eps, **like)
        neutral = {"running_mean": torch.zeros(channels, **like), "running_var": var}
        if base.affine:
            neutral |= {
                "weight": torch.ones(channels, **like),
                "bias": torch.zeros(channels, **like),
            }
        if not self._finisher:
            self._finisher = (bare_copy(base),)
        return torch.func.functional_call(self._finisher[0], neutral, (y,))

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_finisher": ()}

    def __getattr__(self, name: str) -> Any:
        # Models that read `self.bn1.weight` or `self.bn1.eps` in their forward keep working.
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("__"):
                raise  # how to copy a layer, say, does not hold for its wrapper
            return getattr(super().__getattr__("base"), name)


def _sign(x: Tensor) -> float:
    """A number that distinguishes the inputs of one layer: the sum of their values."""
    return float(x.detach().double().sum())


def _has_activation(base: Any) -> bool:
    return isinstance(getattr(base, "act", None), nn.Module)


def batch_norm_layers(model: nn.Module) -> dict[str, nn.Module]:
    """BatchNorm1d, 2d, 3d and subclasses inside ``model``, by name, in definition order."""
    return {name: m for name, m in model.named_modules() if isinstance(m, _BatchNorm)}


def insert(
    model: nn.Module, make: Callable[[nn.Module], NormRule], session: Session
) -> dict[str, AdaptiveNorm]:
    """Put an :class:`AdaptiveNorm` around every BatchNorm layer, in place.

    A layer that is used in several places gets one wrapper, in all of them. All rules are made
    before the first layer is touched, so a rule that raises leaves the model as it was.
    """
    wrappers = {n: AdaptiveNorm(b, make(b), session) for n, b in batch_norm_layers(model).items()}
    _swap(model, {w.base: w for w in wrappers.values()})
    for wrapper in wrappers.values():
        wrapper.training = wrapper.rule.training = wrapper.base.training
    return wrappers


def remove(model: nn.Module, wrappers: dict[str, AdaptiveNorm]) -> None:
    """Undo :func:`insert`."""
    _swap(model, {w: w.base for w in wrappers.values()})


@contextmanager
def frozen_statistics(wrappers: Iterable[AdaptiveNorm]) -> Iterator[None]:
    """Within the block, forward passes use the rules' statistics without moving them."""
    before = [(w.rule, w.rule.learning) for w in wrappers]
    for rule, _ in before:
        rule.learning = False
    try:
        yield
    finally:
        for rule, learning in before:
            rule.learning = learning


@contextmanager
def part_of_batch(wrappers: Iterable[AdaptiveNorm], share: float) -> Iterator[None]:
    """Within the block, passes hold this share, in (0, 1], of images that are learned from at once.

    Rules that average over batches move by so much less that all parts together move them as far.
    Rules of batch statistics take those of a single image too, since its batch has more of them.
    """
    rules = [wrapper.rule for wrapper in wrappers]
    for rule in rules:
        rule.part_size = share
    try:
        yield
    finally:
        for rule in rules:
            rule.part_size = 1.0


@contextmanager
def with_statistics(
    wrappers: Iterable[AdaptiveNorm], normalise: Callable[[Tensor, Any], Tensor]
) -> Iterator[None]:
    """Within the block, normalise with other statistics, as :func:`normalize_by_batch` does."""
    before = [(wrapper.rule, wrapper.rule.override) for wrapper in wrappers]
    for rule, _ in before:
        rule.override = normalise
    try:
        yield
    finally:
        for rule, override in before:  # as a learning pass may be around it
            rule.override = override


@contextmanager
def learning_pass(wrappers: Iterable[AdaptiveNorm]) -> Iterator[None]:
    """Within the block, rules that move apart from predictions do so, by ``NormRule.learn``.

    So do rules that move in a pass of their own before each prediction, in the passes made here
    themselves. Other rules do as in every pass.
    """
    rules = [w.rule for w in wrappers]
    first = [rule for rule in rules if rule.learns_first and rule.learning]
    apart = [rule for rule in rules if rule.learns_apart]
    for rule in (*apart, *first):
        rule.override = rule.learn
    for rule in first:  # or each pass would be led by another one
        rule.learning = False
    try:
        yield
    finally:
        for rule in (*apart, *first):
            rule.override = None
        for rule in first:
            rule.learning = True


def normalize_by_batch(x: Tensor, base: Any) -> Tensor:
    """Normalise ``x`` (B, C, ...) with its own statistics, or the source's for a single image."""
    if too_few_values(x) and base.running_mean is not None:
        return normalize_by_source(x, base)
    check_values(x)
    if current_split() is not None:
        return normalize(x, *batch_stats(x), base)
    return F.batch_norm(x, None, None, base.weight, base.bias, True, 0.0, base.eps)


def normalize_by_source(x: Tensor, base: Any) -> Tensor:
    """Normalise ``x`` (B, C, ...) as the source model does in eval mode."""
    if base.running_mean is None:
        return normalize_by_batch(x, base)
    if getattr(base, "only_normalises", False) and not base.training:
        return base.forward(x)  # in its own way
    return normalize(x, base.running_mean, base.running_var, base)


def rows_independent(model: nn.Module) -> bool:
    """Whether no BatchNorm layer of an unwrapped model in eval mode mixes the rows of a batch."""
    layers: Any = batch_norm_layers(model).values()
    with evaluating(model):  # a model may keep layers in training mode even then
        return all(m.running_mean is not None and not m.training for m in layers)


def _swap(model: nn.Module, replacement: dict[Any, Any]) -> None:
    for parent in list(model.modules()):
        if isinstance(parent, AdaptiveNorm) and parent in replacement:
            continue  # its own `base` must stay
        for key, child in parent._modules.items():
            if child in replacement:
                parent._modules[key] = replacement[child]


def too_few_values(x: Tensor) -> bool:
    """Whether the batch holds a single image, which makes batch statistics meaningless."""
    return x.shape[0] < 2 and current_split() is None


def one_value(x: Tensor) -> bool:
    """Whether there is only one value per channel, which has no variance."""
    return x.numel() == x.shape[1] and current_split() is None


def few_images_advice(rule: str) -> str:
    """The warning for a rule that had too few values; it does not recommend that rule."""
    others = [f"norm={name!r}" for name in ("robust_bn", "unmix_tns") if name != rule]
    return (
        "`images` must hold at least 2 images for batch statistics, got 1: the source statistics "
        f"are used for such a batch; use larger batches or {' or '.join(others)}."
    )


def check_values(x: Tensor) -> None:
    """Refuse one value per channel, which a layer without running statistics cannot normalise."""
    if one_value(x):
        raise ValueError(
            "`images` must hold at least 2 images for a BatchNorm layer without running "
            "statistics, got 1: use larger batches."
        )


def batch_stats(x: Tensor, unbiased: bool = False) -> tuple[Tensor, Tensor]:
    """Mean and variance per channel over the batch: (B, C, ...) to two (C,), in float32.

    Where the batch is split over ranks, they are taken over all of it, with gradients to all ranks.
    """
    split = current_split()
    if split is None and (x.ndim == 2 or x.device.type != "cpu"):
        axes = [0, *range(2, x.ndim)]
        var, mean = torch.var_mean(x.float(), dim=axes, correction=int(unbiased))
        return mean, var
    means, variances = instance_stats(x)
    count = x.numel() // x.shape[1]
    if split is not None:
        count = count // len(x) * split.rows
        means, variances = split.gather(means), split.gather(variances)
    mean, var = pooled_stats(means, variances)
    return mean, var * (count / (count - 1)) if unbiased else var


@few_passes_back
def instance_stats(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance per image and channel: (B, C, ...) to two (B, C), in float32.

    On a CPU ``torch.var_mean`` takes many times its share next to a convolution, while a mean and a
    vector norm are vectorised. The mean square less the squared mean loses digits where the mean is
    large; there the deviations from the mean are squared instead.
    """
    axes = list(range(2, x.ndim))
    if not axes:
        return x.float(), torch.zeros_like(x, dtype=torch.float32)
    if x.device.type != "cpu":
        var, mean = torch.var_mean(x.float(), dim=axes, correction=0)
        return mean, var
    count = math.prod(x.shape[2:])
    wide = x.dtype if x.dtype == torch.float64 else torch.float32
    mean = x.mean(axes, dtype=wide)
    if is_recorded():
        deviation = x.to(wide) - mean.view(*mean.shape, *(1 for _ in axes))
        return mean, deviation.square().mean(axes)
    square = torch.linalg.vector_norm(x, dim=axes, dtype=wide).square() / count
    var = square - mean.square()
    lost = torch.sub(var, square, alpha=LARGE_MEAN)  # below 0: too few digits
    if not float(lost.detach().min()) >= 0:
        deviation = x - mean.view(*mean.shape, *(1 for _ in axes)).to(x.dtype)
        norm = torch.linalg.vector_norm(deviation, dim=axes, dtype=wide)
        var = norm.square() / count
    return mean, var


def far_outside(means: Tensor, variances: Tensor, centre: Tensor, reference: Tensor) -> Tensor:
    """Find images far outside the network's domain, such as ones with pixels times 255.

    An image is far outside when, in more than half of the channels,
    ``(mean - centre)^2 + variance`` is above ``FAR_OUTSIDE`` times the reference, or is NaN.

    Args:
        means: Mean of each image and channel, (B, C).
        variances: Variance of each image and channel, (B, C).
        centre: What the means are compared with, (C,).
        reference: The ordinary variance around the centre, (C,), above 0.

    Returns:
        (B,) bool.
    """
    offsets = means - centre
    energies = torch.addcmul(variances, offsets, offsets)
    ordinary = torch.sub(energies, reference, alpha=FAR_OUTSIDE) <= 0
    return ordinary.sum(1) < 0.5 * means.shape[1]


@torch.no_grad()
def ordinary_images(
    means: Tensor, variances: Tensor, mean: Tensor, var: Tensor, base: Any
) -> Tensor:
    """Which images (B,) are not :func:`far_outside` statistics (C,) that have moved.

    Variances are those of the average or of the source, whichever are larger.
    """
    return ~far_outside(means, variances, mean, torch.maximum(var, base.running_var) + base.eps)


def pooled_stats(
    means: Tensor, variances: Tensor, kept: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Mean and variance of the batch from those of its images, or of some of them.

    Args:
        means: Mean of each image and channel, (B, C).
        variances: Biased variance of each image and channel, (B, C).
        kept: (B,) bool, the images to use, all if None; without any the statistics are 0.

    Returns:
        Two (C,), the variance biased, as :func:`batch_stats`.
    """
    # Variance within images plus that between them; both are positive, so nothing cancels.
    if kept is None:
        if not is_tracing() and len(means) == 1:
            return means[0], variances[0]
        mean = means.mean(0)
        return mean, variances.mean(0) + (means - mean).square().mean(0)
    count, rows = kept.sum().clamp_min(1), kept[:, None]
    mean = torch.where(rows, means, 0.0).sum(0) / count
    spread = torch.where(rows, means - mean, 0.0).square()
    return mean, torch.where(rows, variances, 0.0).sum(0) / count + spread.sum(0) / count


def evaluate(x: Tensor, mean: Tensor, var: Tensor, base: Any, eps: float) -> Tensor:
    """Run the evaluation kernel, with the affine part in the precision of the statistics (C,)."""
    return run_kernel(x, *source_if_refused(mean, var, base, eps), base, eps)


def run_kernel(x: Tensor, mean: Tensor, var: Tensor, base: Any, eps: float) -> Tensor:
    """As :func:`evaluate`, of statistics in which a graph's refusal is taken into account."""
    weight, bias = base.weight, base.bias
    if weight is not None and weight.dtype != mean.dtype:
        weight, bias = weight.to(mean.dtype), bias.to(mean.dtype)
    return F.batch_norm(x, mean, var, weight, bias, False, 0.0, eps)


def begin_graph(wrappers: Iterable[AdaptiveNorm]) -> None:
    """Call ``NormRule.begin_graph`` for the rules of all layers, kind by kind."""
    kinds: dict[type[NormRule], list[tuple[NormRule, nn.Module]]] = {}
    for wrapper in wrappers:
        kinds.setdefault(type(wrapper.rule), []).append((wrapper.rule, wrapper.base))
    for kind, layers in kinds.items():
        kind.begin_graph(layers)


def normalize(x: Tensor, mean: Tensor, var: Tensor, base: Any, eps: float | None = None) -> Tensor:
    """``(x - mean) / sqrt(var + eps) * weight + bias`` with the affine part of ``base``.

    Args:
        x: (B, C, ...).
        mean: (C,) or, one set for each image, (B, C).
        var: Like ``mean``.
        base: The BatchNorm layer.
        eps: Replaces the layer's own, unless None.

    Returns:
        (B, C, ...) of x's dtype. Gradients flow into mean and var where these carry any.
    """
    eps = float(base.eps if eps is None else eps)
    if mean.ndim == 1 and not (torch.is_grad_enabled() and mean.requires_grad):
        return evaluate(x, mean, var, base, eps)
    mean, var = source_if_refused(mean, var, base, eps)
    return normalize_by(x, mean, var, base.weight, base.bias, eps)
