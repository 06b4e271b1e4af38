"""NOTE: instance-aware BatchNorm, and learning from a reservoir balanced over predictions.

Gong, Jeong, Kim, Kim, Shin, Lee: NOTE: Robust Continual Test-time Adaptation Against Temporal
Correlation, NeurIPS 2022, arXiv 2208.05117.

On streams whose neighbouring images share a class, a batch does not represent the stream. Therefore
every image is normalised by running statistics, corrected by its own where these differ by more
than chance (``iabn``), and updates are made on a memory, a reservoir that is balanced over
predicted labels. Statistics and norm parameters move at the updates alone.

    L = -1/(B C) sum_b sum_k p_bk log(p_bk + 1e-6),   p_b = softmax(z_b / T)

B are the images of a mini-batch of the memory. There is an update after every ``update_every``
images, counted across batches: ``epochs`` passes over the memory in random order, in which
statistics are the mini-batch's and the running ones move towards these. An update falling inside of
a batch happens there, and the rows after it see it: each image is predicted by what was learned
from those before. The rows between two updates go through the model together. The class
:class:`tta.parts.memory.Pbrs` decides which image goes to which slot.

NOTE* is the authors' variant for streams without order: ``memory="fifo"``, the learning rate of the
presets ``..._iid``, and batch statistics everywhere, which are the norm rule's::

    norm = tta.get_config("iabn", learned_statistics=False)
    adapter = tta.wrap(model, norm=norm, update="note.cifar10_iid")

Then a batch of one has the source's statistics. With another norm rule, predictions use its state
at rest, and it moves in the learning passes.

The published figures are of networks trained with instance-aware layers, as the bundled
``cifar10_resnet20_iabn`` is; the authors' code loses accuracy when it puts the layers into a
network with plain BatchNorm.

``draws=`` is asked for ``draw_value``, a number for each decision of the memory (see
:class:`tta.parts.memory.Pbrs`), and, once an epoch, for ``batch_order``: (images held,), over the
memory class by class, or by arrival with ``memory="fifo"``.

Differences: images are kept as they came, those of 8 bits in 8 bits, and images of another size are
refused until ``reset``. All norm layers are trained, not BatchNorm alone. The authors make an
update of what is left where the whole stream is shorter than ``update_every``; here no stream has
an end. Where an update falls inside of a batch, the batch goes through the model once more, before
all else, so that images that overflow are found. Equation numbers are not given: this follows the
authors' code.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from tta.core.backbone import Backbone
from tta.core.checks import LARGE, LARGEST, boolean, fraction, number, one_of, whole_number
from tta.core.component import Context
from tta.core.config import ComponentConfig, UpdateConfig
from tta.core.norm_layers import (
    batch_stats,
    frozen_statistics,
    instance_stats,
    learning_pass,
    one_value,
    ordinary_images,
    pooled_stats,
    too_few_values,
)
from tta.core.norm_rule import NormRule
from tta.core.prediction import Prediction, Report
from tta.core.registry import register
from tta.core.tracing import is_tracing, rows_of
from tta.methods._image_memory import ImageMemoryUpdate
from tta.parts.chance import Chance
from tta.parts.memory import Fifo, Pbrs
from tta.parts.statistics import instance_aware

__all__ = ["Iabn", "IabnConfig", "Note", "NoteConfig"]


@dataclass(frozen=True, kw_only=True)
class IabnConfig(ComponentConfig):
    """Fields of ``iabn``."""

    alpha: float = 4.0  # k, standard errors by which an image may be off by chance
    learned_statistics: bool = True  # of the source and what was learned; False = of the batch
    momentum: float = 0.01  # share of a learning pass in the statistics
    official: bool = False  # without the rule for bad images

    def __post_init__(self) -> None:
        super().__post_init__()
        number("alpha", self.alpha, 0, LARGE)
        fraction("momentum", self.momentum)
        boolean("official", self.official)


@register("iabn")
class Iabn(NormRule):
    """Statistics of each image, as far as they differ from the source's by more than chance."""

    Config = IabnConfig
    needs_source_stats = True
    learns_apart = True

    mean: Tensor  # (C,)
    var: Tensor  # (C,), unbiased

    def __init__(self, config: IabnConfig, base: Any, context: Context) -> None:
        super().__init__(config, base, context)
        # At least float32, since half precision would round small moves of an average away.
        wide = torch.promote_types(base.running_mean.dtype, torch.float32)
        self.register_buffer("mean", base.running_mean.detach().to(wide, copy=True))
        self.register_buffer("var", base.running_var.detach().to(wide, copy=True))

    def mixed_images(self, count: int) -> float:
        """None of the stream, unless statistics are the batch's."""
        return math.inf if self.config.learned_statistics else count

    def forward(self, x: Tensor, base: Any) -> Tensor:
        """Normalise (B, C, ...) by statistics that are at rest, or by the batch's."""
        if self.config.learned_statistics:
            return self._normalised(x, self.mean, self.var, base)
        few = one_value if self.part_size < 1 else too_few_values
        if few(x):
            self.fell_back = True
            return self._normalised(x, self.mean, self.var, base)
        mean, var = batch_stats(x, unbiased=True)
        if is_tracing():
            few = rows_of(x) < 2
            mean, var = torch.where(few, self.mean, mean), torch.where(few, self.var, var)
        return self._normalised(x, mean, var, base)

    def learn(self, x: Tensor, base: Any) -> Tensor:
        """Normalise (B, C, ...) by the batch's statistics, towards which those at rest move."""
        if one_value(x):
            self.fell_back = True
            return self._normalised(x, self.mean, self.var, base)
        mean, var = self._ordinary_stats(x, base)
        if self.config.learned_statistics:
            with torch.no_grad():
                # Finite pixels may overflow; such a batch would spoil the averages for good.
                fine = mean.isfinite() & var.isfinite()
                for average, value in ((self.mean, mean), (self.var, var)):
                    moved = average.lerp(value.to(average), self.config.momentum)
                    average.copy_(torch.where(fine, moved, average))
        return self._normalised(x, mean, var, base)

    def _ordinary_stats(self, x: Tensor, base: Any) -> tuple[Tensor, Tensor]:
        """Batch statistics (C,), the variance unbiased, without images that lie far outside."""
        if self.config.official:
            return batch_stats(x, unbiased=True)
        means, variances = instance_stats(x)
        kept = ordinary_images(means, variances, self.mean, self.var, base)
        values = kept.sum() * math.prod(x.shape[2:])
        if bool(kept.all()) or int(values) < 2:
            return batch_stats(x, unbiased=True)
        mean, var = pooled_stats(means, variances, kept)
        return mean, var * (values / (values - 1))

    def _normalised(self, x: Tensor, mean: Tensor, var: Tensor, base: Any) -> Tensor:
        alpha, eps = self.config.alpha, float(base.eps)
        return instance_aware(x, mean, var, base.weight, base.bias, alpha=alpha, eps=eps)


@dataclass(frozen=True, kw_only=True)
class NoteConfig(UpdateConfig):
    """Fields of ``note``."""

    lr: float = 1e-4  # learning rate
    optimizer: str = "adam"  # "sgd", "adam" or "adamw"
    memory: str = "pbrs"  # a reservoir balanced over predictions, or "fifo", the last images
    memory_size: int = 64  # images in the memory
    update_every: int = 64  # images between updates, counted across batches
    epochs: int = 1  # passes over the memory in an update
    mini_batch: int = 64  # images of a step
    temperature: float = 1.0  # T, divides logits

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("memory", self.memory, ("pbrs", "fifo"))
        for name in ("memory_size", "update_every", "mini_batch"):
            whole_number(name, getattr(self, name), 1, LARGEST)
        whole_number("epochs", self.epochs, 1, 10**6)
        number("temperature", self.temperature, 0, LARGE, above=True)


@register("note")
class Note(ImageMemoryUpdate):
    """Entropy minimisation on a reservoir of images, balanced over predicted labels."""

    Config = NoteConfig
    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "imagenet": {},
        "cifar10": {},
        "cifar100": {},
        "imagenet_iid": {"memory": "fifo", "lr": 1e-3},
        "cifar10_iid": {"memory": "fifo", "lr": 1e-3},
        "cifar100_iid": {"memory": "fifo", "lr": 1e-3},
    }
    default_norm: ClassVar[str | None] = "iabn"
    learns_from_whole_batch: ClassVar[bool] = False
    takes_draws: ClassVar[bool] = True
    splits: ClassVar[bool] = False  # its results with two processes are not those of one

    offered: Tensor  # 0-dimensional: images offered to the memory so far

    def __init__(self, config: NoteConfig, network: Backbone, context: Context) -> None:
        super().__init__(config, network, context)
        kind = Pbrs if config.memory == "pbrs" else Fifo
        self.bank = kind(config.memory_size, context.num_classes)
        self.register_buffer("offered", torch.zeros((), dtype=torch.int64))

    def adapt(self, x: Tensor) -> Prediction:
        """Predict and remember the images, and learn from the memory whenever it is due."""
        self.report = Report(selected=0, loss=float("nan"), stepped=False, updates=0)
        chance, every = Chance(self.context), self.config.update_every
        found: list[Prediction] = []
        start, wait = 0, every - int(self.offered) % every
        if wait < len(x):
            self._predict(x)
        while start < len(x):
            rows = x[start : start + wait]
            found.append(self._predict(rows))
            labels = found[-1].logits.argmax(1).tolist()
            self.keep(self.bank.offer(labels, chance), rows)
            self.offered += len(rows)
            if len(rows) == wait:
                self._update(x.dtype, chance)
            start, wait = start + wait, every
        self.report["remembered"] = (self.bank.labels >= 0).sum()
        features = [p.features for p in found if p.features is not None]
        logits = torch.cat([p.logits for p in found])
        return Prediction(logits, torch.cat(features) if features else None)

    def integer_ranges(self) -> dict[str, tuple[int, int]]:
        """Range of the bank's labels, which are -1 in empty slots."""
        return {"bank.labels": (-1, self.context.num_classes - 1)}

    @torch.no_grad()
    def _predict(self, x: Tensor) -> Prediction:
        with frozen_statistics(self.network.wrappers):
            return self.network(x)

    def _update(self, dtype: torch.dtype, chance: Chance) -> None:
        """Learn from the memory, for some epochs."""
        slots = torch.tensor(self.bank.order(), device=self.memory.device)
        for _ in range(self.config.epochs):
            order = chance.order("batch_order", len(slots), slots.device)
            for rows in slots[order].split(self.config.mini_batch):
                with learning_pass(self.network.wrappers):
                    logits = self.network(self.images(rows, dtype)).logits
                probs = (logits.float() / self.config.temperature).softmax(1)
                loss = -(probs * torch.log(probs + 1e-6)).mean()
                stepped = self.step(loss) or self.report["stepped"]
                self.report |= {"loss": loss.detach(), "stepped": stepped}
        self.report |= {"selected": len(slots), "updates": self.report["updates"] + 1}
