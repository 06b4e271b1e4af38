"""Parts of ITTA: mixed styles, the learned consistency loss, and how it is learned on the source.

The loss is mean w(z' - z)^2 of the features z of images and z' of the same with mixed styles. w is
a few element-wise maps u <- a u + c with ReLU between them. It is learned so that the gradient of
that loss, over the whole network, points where the gradient of the classification points.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from scipy.special import betaincinv
from torch import Tensor, nn

from tta.core.batch_split import current_split
from tta.core.checks import told
from tta.core.classifier import evaluating, find_classifier
from tta.core.draws import Draws
from tta.core.hooks import InputHook, pooled
from tta.core.outputs import LogitsReader
from tta.core.random import CountedDraws

__all__ = [
    "Mixing",
    "check_maps",
    "consistency_loss",
    "draw_mixing",
    "identity",
    "learn",
    "maps",
    "mix_style",
    "stages",
]

EPS = 1e-6  # of the variance of a style


@dataclass(frozen=True)
class Mixing:
    """Which styles are mixed, and where.

    Args:
        place: Position in the list of blocks, 0 or 1.
        lam: Share of an image's own style (B,).
        perm: The image whose style is mixed in (B,), int64.
    """

    place: int
    lam: Tensor
    perm: Tensor


def stages(model: nn.Module) -> list[str]:
    """Names of the stages of a convolutional network, in order; empty where none are found.

    Stages are modules side by side, numbered alike (``layer1``, ``layer2``) or in a list, each with
    convolutions in it and more than one layer, and no linear one at its end.
    """
    for prefix, module in model.named_modules():
        groups: dict[str, list[str]] = {}
        for name, child in module.named_children():
            found = re.fullmatch(r"(\D*)\d+", name)
            if found and _is_stage(child):
                path = f"{prefix}.{name}" if prefix else name
                groups.setdefault(found[1], []).append(path)
        best = max(groups.values(), key=len, default=[])
        if len(best) > 1:
            return best
    return []


def _is_stage(module: nn.Module) -> bool:
    inside = list(module.modules())
    called = type(module).forward is not nn.Module.forward
    convolutions = any(isinstance(m, nn.Conv2d) for m in inside)
    return called and len(inside) > 2 and convolutions and not isinstance(inside[-1], nn.Linear)


def mix_style(u: Tensor, mixing: Mixing) -> Tensor:
    """Give images mean and deviation of maps that lie between theirs and another image's.

    Args:
        u: Maps (B, c, H, W), of a rank's share where the batch is split over ranks.
        mixing: Shares and partners of the whole batch. No gradient flows through means and
            deviations.
    """
    if current_split() is None and len(u) != len(mixing.perm):
        raise ValueError(
            f"`blocks` must name modules that get all images of a batch at once, got one that gets "
            f"{len(u)} of {len(mixing.perm)}: name others, or use another method."
        )
    var, mean = torch.var_mean(u.detach().float(), dim=(2, 3), keepdim=True)
    deviation = (var + EPS).sqrt()
    lam, perm, split = mixing.lam.view(-1, 1, 1, 1), mixing.perm, current_split()
    means, deviations = mean, deviation  # of all images
    if split is not None:
        means, deviations = split.gather(mean), split.gather(deviation)
        lam, perm = lam[split.own], perm[split.own]
    mixed_mean = lam * mean + (1 - lam) * means[perm]
    mixed_deviation = lam * deviation + (1 - lam) * deviations[perm]
    return ((u - mean) / deviation * mixed_deviation + mixed_mean).to(u.dtype)


def check_maps(name: str, output: Any) -> Tensor:
    """Return what a module gives, or refuse what is no maps (B, c, H, W).

    Raises:
        ValueError: When it is something else.
    """
    if not isinstance(output, Tensor) or output.ndim != 4:
        got = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise ValueError(
            f"`blocks` must name modules that give maps (B, c, H, W), but {told(name, 40)} gives "
            f"{got}: name others, or use another method."
        )
    return output


def maps(u: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Element-wise maps a u + c one after the other, with ReLU between them.

    Args:
        u: (B, ...).
        weight: a, one for each map (L, ...).
        bias: c, likewise.
    """
    last = len(weight) - 1
    for i in range(last + 1):
        u = u * weight[i] + bias[i]
        u = u.relu() if i < last else u
    return u


def identity(depth: int, width: int) -> Tensor:
    """Maps at their start, a = 1 and c = 0: (2, L, D)."""
    ones = torch.ones(depth, width, dtype=torch.float32)
    return torch.stack([ones, torch.zeros_like(ones)])


def consistency_loss(z: Tensor, other: Tensor, consistency: Tensor) -> Tensor:
    """Mean of w(z' - z)^2 over images and features.

    Args:
        z: Features (B, D).
        other: Of the images with mixed styles (B, D).
        consistency: Weights and biases of w (2, L, D).
    """
    return maps(other - z, *consistency).square().mean()


def draw_mixing(
    asked: Draws,
    count: int,
    device: torch.device,
    make: Callable[[], CountedDraws],
    coin: float = 0.5,
    beta: float = 0.1,
) -> Mixing:
    """Draw which styles are mixed.

    Args:
        asked: Answers ``coin`` (), ``lam`` (count,) and ``perm`` (count,), or draws as usual.
        count: Number of images.
        device: Of the images.
        make: Starts a sequence of random numbers; called if one is needed.
        coin: Above it the first block's output is mixed, else the second's.
        beta: Both parameters of the Beta distribution of ``lam``.
    """
    kept: list[CountedDraws] = []

    def uniforms(size: int) -> Tensor:
        if not kept:
            kept.append(make())
        return kept[0].uniforms(size)

    size = torch.Size([count])
    found = asked.ask("coin", torch.Size([]), torch.float32, torch.device("cpu"))
    place = 0 if float(uniforms(1)[0] if found is None else found) > coin else 1
    lam = asked.ask("lam", size, torch.float32, device)
    if lam is None:
        values = betaincinv(beta, beta, uniforms(count).cpu().numpy())
        lam = torch.from_numpy(values).to(device, torch.float32)
    perm = asked.ask("perm", size, torch.int64, device)
    if perm is None:
        perm = uniforms(count).argsort().to(device)
    return Mixing(place, lam, perm)


def learn(
    model: nn.Module,
    consistency: Tensor,
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    lr: float = 5e-5,
    weight_decay: float = 0.0,
    consistency_lr: float = 5e-6,
    penalty_factor: float = 0.1,
    draws: Callable[[str, torch.Size, int], Any] | None = None,
    blocks: Sequence[str] | None = None,
    train_model: bool = True,
    seed: int = 0,
    reader: LogitsReader | None = None,
    optimizers: dict[str, Any] | None = None,
) -> Iterator[dict[str, Any]]:
    """Train a network and its consistency loss in turn; one update for each batch.

    First one step of Adam on the network, of both cross-entropies and the consistency loss. Then,
    with new draws, one on w, so that the gradients of the loss and of the cross-entropies, each
    standardised as one long vector without the head, come nearer to each other.

    Args:
        model: A classifier, trained in place; norm layers use their running statistics.
        consistency: Where w starts (2, L, D); not changed.
        batches: Labelled source images.
        lr: Of the network.
        weight_decay: Of the network.
        consistency_lr: Of w.
        penalty_factor: Of the distance between the gradients.
        draws: Name, shape and update -> tensor, or None to draw as usual: ``coin``, ``lam`` and
            ``perm``, each twice an update.
        blocks: Modules of which the first or the second gets mixed styles; None = the stages.
        train_model: Whether the network is trained; False learns w alone.
        seed: Of the draws.
        reader: Takes logits out of what the model returns.
        optimizers: States of both optimisers: taken up where it is not empty, and filled when the
            batches end, so that the next call goes on where this one stopped.

    Yields:
        ``loss_cla`` and ``loss_reg`` of the second pass, ``loss_reg_step`` of the first (NaN
        without it), ``penalty`` and ``consistency`` (2, L, D) after the update.

    Raises:
        ValueError: When the network has fewer than two stages and ``blocks`` names none.
    """
    names = list(blocks or stages(model))[:2]
    if len(names) < 2:
        raise ValueError(
            f"`model` must have two stages with convolutions for ITTA, got a "
            f"{type(model).__name__} in which none are found: name them by blocks=."
        )
    asked, numbers = Draws(draws), CountedDraws(seed)
    head = find_classifier(model)
    passes = _Passes(model, head, names, LogitsReader() if reader is None else reader)
    everything = [p for p in model.parameters() if p.is_floating_point()]
    flags = [p.requires_grad for p in everything]
    of_head = {id(p) for p in head.parameters()}
    extractor = [p for p in everything if id(p) not in of_head]
    w = consistency.detach().clone().requires_grad_()
    of_model = torch.optim.Adam(everything, lr=lr, weight_decay=weight_decay)
    of_w = torch.optim.Adam([w], lr=consistency_lr)
    both = {"model": of_model, "consistency": of_w}
    for name, state in (optimizers or {}).items():
        both[name].load_state_dict(state)
    try:
        for p in everything:
            p.requires_grad_(True)
        for step, (x, y) in enumerate(batches):
            asked.call = step

            def double(x: Tensor = x, y: Tensor = y) -> tuple[Tensor, Tensor]:
                mixing = draw_mixing(asked, len(x), x.device, lambda: numbers)
                (z, logits), (other, mixed) = passes(x, None), passes(x, mixing)
                classified = F.cross_entropy(logits, y) + F.cross_entropy(mixed, y)
                return consistency_loss(z, other, w), classified

            found: dict[str, Any] = {"loss_reg_step": float("nan")}
            with torch.enable_grad(), evaluating(model):
                if train_model:
                    regular, classified = double()
                    gradients = torch.autograd.grad(
                        regular + classified, everything, allow_unused=True
                    )
                    for p, g in zip(everything, gradients, strict=True):
                        p.grad = g
                    of_model.step()
                    of_model.zero_grad()
                    found["loss_reg_step"] = regular.detach()
                regular, classified = double()
                penalty = (
                    (
                        _standardised(regular, extractor, graph=True)
                        - _standardised(classified, extractor, graph=False)
                    )
                    .square()
                    .mean()
                )
                (w.grad,) = torch.autograd.grad(penalty_factor * penalty, w)
            of_w.step()
            found |= {"loss_cla": classified.detach(), "loss_reg": regular.detach()}
            found |= {"penalty": penalty.detach(), "consistency": w.detach().clone()}
            yield found
    finally:
        if optimizers is not None:
            optimizers |= {name: optimizer.state_dict() for name, optimizer in both.items()}
        for p, flag in zip(everything, flags, strict=True):
            p.requires_grad_(flag)


def _standardised(loss: Tensor, parameters: Sequence[Tensor], graph: bool) -> Tensor:
    """The gradient as one vector, less its mean and by its deviation, which are plain numbers."""
    gradients = torch.autograd.grad(
        loss, parameters, create_graph=graph, retain_graph=True, materialize_grads=True,
        allow_unused=True,
    )  # fmt: skip
    flat = torch.cat([g.flatten() for g in gradients])
    deviation, mean = torch.std_mean(flat.detach())
    return (flat - mean) / deviation.clamp_min(torch.finfo(flat.dtype).tiny)


class _Passes:
    """Passes of a plain model that give features and logits, perhaps with mixed styles."""

    def __init__(
        self, model: nn.Module, head: nn.Module, blocks: Sequence[str], reader: LogitsReader
    ) -> None:
        self.model, self.head, self.reader = model, head, reader
        self.blocks = [model.get_submodule(name) for name in blocks]

    def __call__(self, x: Tensor, mixing: Mixing | None) -> tuple[Tensor, Tensor]:
        hook = InputHook()
        handle = self.head.register_forward_pre_hook(hook)
        try:
            with _mixed(self.blocks, mixing):
                logits = self.reader.read(self.model(x.clone()))  # it may write to them
        finally:
            handle.remove()
        return pooled(hook.values[-1], self.head), logits


@contextmanager
def _mixed(blocks: Sequence[nn.Module], mixing: Mixing | None) -> Iterator[None]:
    if mixing is None:
        yield
        return

    def hook(module: nn.Module, args: Any, output: Any) -> Tensor:
        return mix_style(check_maps("a block", output), mixing)

    handle = blocks[mixing.place].register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()
