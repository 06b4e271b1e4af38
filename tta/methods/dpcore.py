"""DPCore: a set of prompts for the domains met so far, each with the statistics of its domain.

Zhang, Mehra, Niu, Hamm: Dynamic Prompt Coreset for Continual Test-Time Adaptation, ICML 2025,
arXiv 2406.10737.

Prompts behind the class token of a vision transformer are trained so that the batch's features have
the mean and deviation of the source. A batch that fits a mixture of known prompts trains that one
for a step and moves all of them a little; one that does not trains a new prompt, which is kept with
the statistics that the batch has without it.

    d(m, s) = |m - mu_S| + |s - sigma_S|,   m, s: mean and deviation of the batch's class token
    a_j = softmax_j( -(|m - m_j| + |s - s_j|) / tau ),   p = sum_j a_j p_j
    known if d with p < rho d without:   p by E = 1 step, then
        m_j += alpha a_j (m' - m_j),  s_j += alpha a_j max(s' - s_j, 0),  p_j += alpha a_j (p - p_j)
    new otherwise: p by E = 50 steps from the one start; (m, s, p) joins the set

m' and s' are those under the mixed prompt, before its step. Each batch has an optimiser of its own.
The returned logits are those of the last pass, before its step.

Differences: the set is bounded (``core_size``); when it is full, of the two most similar members
the older one leaves. ``official=True`` has no bound. The learning rate is 0.1, as the authors' code
sets it, whatever its settings file says. The deviation of a single image is left out of d. The
source's statistics are those of up to 300 images whose entropy is below ln(C)/2 - 1, or of all
where fewer than two are. A frozen adapter predicts with the mixed prompt where the batch is known,
and else as the source.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tta.core.backbone import Backbone
from tta.core.checks import LARGE, LARGEST, fraction, number, whole_number
from tta.core.component import Context
from tta.core.config import UpdateConfig
from tta.core.optimizer import make_optimizer
from tta.core.prediction import Prediction, Report
from tta.core.random import CountedDraws
from tta.core.registry import register
from tta.core.source import SourceStatistics
from tta.core.traced_pass import either, is_tracing
from tta.core.update import Update
from tta.parts.blocks import block_names
from tta.parts.losses import entropy
from tta.parts.moments import RunningMoments, fill_moments
from tta.parts.tokens import MOST_PROMPTS, TokenPrompts, takes_prompts, uniform_start

__all__ = ["Dpcore", "DpcoreConfig"]

SOURCE_IMAGES = 300  # whose features the source's statistics are taken from
MOST_READ = 100_000  # source images among which these are looked for


@dataclass(frozen=True, kw_only=True)
class DpcoreConfig(UpdateConfig):
    """Fields of ``dpcore``; ``params`` plays no part, as no parameter of the model is trained."""

    lr: float = 0.1  # learning rate of a batch's optimiser
    optimizer: str = "adamw"  # "sgd", "adam" or "adamw", made anew for each batch
    weight_decay: float = 0.01  # of the prompt that is trained
    prompts: int = 8  # P, tokens in a prompt
    temperature: float = 3.0  # tau, of the weights of known prompts
    core_momentum: float = 0.999  # alpha, share of the way to a known batch
    known_ratio: float = 0.8  # rho, of the distances below which a batch is known
    steps_new: int = 50  # E for a new prompt
    steps_known: int = 1  # E for a known one
    core_size: int = 64  # most prompts that are kept; official=True has no bound
    blocks: tuple[str, ...] | None = None  # names of the blocks; None: found by structure

    def __post_init__(self) -> None:
        super().__post_init__()
        whole_number("prompts", self.prompts, 1, MOST_PROMPTS)
        number("temperature", self.temperature, 0, LARGE, above=True)
        fraction("core_momentum", self.core_momentum)
        number("known_ratio", self.known_ratio, 0, LARGE)
        whole_number("steps_new", self.steps_new, 1, 10**6)
        whole_number("steps_known", self.steps_known, 1, 10**6)
        whole_number("core_size", self.core_size, 2, LARGEST)
        block_names("blocks", self.blocks)


@register("dpcore")
class Dpcore(Update):
    """Prompts for known and new domains, trained to the statistics of the source."""

    Config = DpcoreConfig
    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {"imagenet": {"lr": 0.1}}
    default_norm = None
    trains_model = False
    needs_features = True
    uses_labels = False
    takes_draws = True
    cost = 30.0

    feature_mean: Tensor  # (D,) of the source
    feature_std: Tensor  # (D,)
    start: Tensor  # (P, D), from which every new prompt is trained
    core_mean: Tensor  # (K, D), m_j; NaN where there is no member
    core_std: Tensor  # (K, D), s_j
    core_prompts: Tensor  # (K, P, D), p_j

    def __init__(self, config: DpcoreConfig, network: Backbone, context: Context) -> None:
        super().__init__(config, network, context)
        self.tokens = TokenPrompts(network, self.name, config.blocks)
        width, row = context.feature_size, (config.prompts, self.tokens.width)
        for name in ("feature_mean", "feature_std"):
            zeros = torch.zeros(width, dtype=torch.float32)
            self.register_buffer(name, zeros, persistent=False)
        self.register_buffer("start", self._draw_start(torch.Size(row)), persistent=False)
        size = 0 if config.official else config.core_size
        for name, shape in (("mean", (width,)), ("std", (width,)), ("prompts", row)):
            rows = torch.full((size, *shape), float("nan"), dtype=torch.float32)
            self.register_buffer(f"core_{name}", rows)

    @classmethod
    def suits(cls, model: nn.Module) -> bool:
        """Whether the model has one stack of blocks that pass on a sequence."""
        return takes_prompts(model)

    def adapt(self, x: Tensor) -> Prediction:
        """Train the prompt that the batch asks for, and answer with it."""
        with torch.no_grad():
            mean, std = self._moments(self.network(x))
            plain = self._distance(mean, std)
            weights, mixed = self._mixture(mean, std)
            weighted = torch.full_like(plain, float("nan"))
            if mixed is not None:
                inside = self._moments(self.tokens.run(self.network, x, mixed))
                weighted = self._distance(*inside)
            else:
                inside = mean, std
        known = bool(weighted < self.config.known_ratio * plain)
        steps = self.config.steps_known if known else self.config.steps_new
        start = mixed if known and mixed is not None else self.start
        prompts, prediction, loss = self._train(x, start, steps)
        self.report = Report(selected=len(x), loss=loss, loss_plain=plain, loss_weighted=weighted)
        self.report |= {"known": known, "stepped": bool(prompts.isfinite().all())}
        with torch.no_grad():
            if self.report.stepped and known:
                self._move(weights, inside, prompts)
            elif self.report.stepped:
                self._append(mean, std, prompts)
        self.report["core_size"] = self._filled()
        return prediction

    def predict(self, x: Tensor) -> Prediction:
        """Predict with the mixed prompt where the batch is known, and else as the source."""
        plain = self.network(x)
        mean, std = (value.detach() for value in self._moments(plain))
        _, mixed = self._mixture(mean, std)
        if mixed is None:
            return plain
        prediction = self.tokens.run(self.network, x, mixed)
        found = self._distance(*self._moments(prediction))
        known = found < self.config.known_ratio * self._distance(mean, std)
        if is_tracing():
            return either(known & ~self.core_mean[:, 0].isnan().all(), prediction, plain)
        return prediction if bool(known) else plain

    def undefined_as_nan(self) -> tuple[str, ...]:
        """Rows without a member."""
        return ("core_mean", "core_std", "core_prompts")

    def resizable_buffers(self) -> tuple[str, ...]:
        """The whole set under ``official=True``, which has no bound."""
        return self.undefined_as_nan() if self.config.official else ()

    def fit(self, source: SourceStatistics) -> None:
        """Take mean and deviation of the source's features, or measure them.

        Raises:
            ValueError: When ``source`` has nothing to take them from, or those of another model, or
                when prompts have no meaning in this model.
        """
        self.tokens.check(self.network)
        held = self.source_artefacts()
        self.source_used = fill_moments(
            held, source, self.name, "as this model's features", self._measure
        )

    def source_artefacts(self) -> dict[str, Any]:
        """Mean and deviation of the features."""
        return {"feature_mean": self.feature_mean, "feature_std": self.feature_std}

    @torch.no_grad()
    def _measure(self, source: SourceStatistics) -> str:
        sure, whole = RunningMoments(), RunningMoments()
        limit = self.context.log_classes / 2 - 1
        for images, _ in source.iter_batches(MOST_READ):
            prediction = self.network(images.to(self.feature_mean.device))
            assert prediction.features is not None
            features, rows = prediction.features.float(), entropy(prediction.logits.float()) < limit
            whole.add(features)
            sure.add(features[rows][: SOURCE_IMAGES - sure.count])
            if sure.count == SOURCE_IMAGES:
                break
        used = sure if sure.count > 1 else whole
        self.feature_mean.copy_(used.mean())
        self.feature_std.copy_(used.variance().sqrt())
        words = " of low entropy" if used is sure else ""
        return f"features of {used.count} images{words}"

    def _moments(self, prediction: Prediction) -> tuple[Tensor, Tensor]:
        """Mean and unbiased deviation (D,) of the features; of one image NaN for the latter."""
        assert prediction.features is not None
        features = prediction.features.float()
        if not is_tracing() and len(features) == 1:
            return features[0], torch.full_like(features[0], float("nan"))
        return features.mean(0), features.std(0)

    def _distance(self, mean: Tensor, std: Tensor) -> Tensor:
        """The distance d from the source."""
        return _length(mean - self.feature_mean) + _length(std - self.feature_std)

    def _filled(self) -> int:
        return int((~self.core_mean[:, 0].isnan()).sum())

    def _mixture(self, mean: Tensor, std: Tensor) -> tuple[Tensor, Tensor | None]:
        """Weights a (K,) of the members, and their prompt (P, D); None where there are none."""
        held = (self.core_mean, self.core_std, self.core_prompts)
        count = len(self.core_mean) if is_tracing() else self._filled()
        means, stds, prompts = (rows[:count] for rows in held)
        away = _length(mean - means) + _length(std - stds)
        if is_tracing():  # all rows are there, and those without a member have no weight
            away = torch.where(means[:, 0].isnan(), torch.inf, away)
            prompts = prompts.nan_to_num(0.0)
        weights = (-away / self.config.temperature).softmax(0)
        return weights, torch.einsum("k,kpd->pd", weights, prompts) if count else None

    def _train(self, x: Tensor, start: Tensor, steps: int) -> tuple[Tensor, Prediction, Tensor]:
        """A prompt after some steps, and prediction and loss of the pass before the last one."""
        prompts = nn.Parameter(start.detach().clone())
        optimizer = make_optimizer(self.config, [prompts])
        prediction, loss = Prediction(x), start
        for _ in range(steps):
            prediction = self.tokens.run(self.network, x, prompts)
            loss = self._distance(*self._moments(prediction))
            if not loss.requires_grad:
                raise ValueError(
                    "`model` must let gradients flow from its features to prompts, got features "
                    "without a graph: take no_grad, detach or requires_grad_(False) out of it."
                )
            (prompts.grad,) = self.network.session.gradients(loss, [prompts])
            optimizer.step()
        assert prediction.features is not None
        prediction = Prediction(prediction.logits.detach(), prediction.features.detach())
        return prompts.detach(), prediction, loss.detach()

    def _move(self, weights: Tensor, found: tuple[Tensor, Tensor], prompts: Tensor) -> None:
        """Move the members towards a known batch, as far as they have a share in it."""
        mean, std = found
        count, share = len(weights), self.config.core_momentum * weights
        self.core_mean[:count] += share[:, None] * (mean - self.core_mean[:count])
        growth = (std - self.core_std[:count]).clamp_min(0).nan_to_num(0.0)
        self.core_std[:count] += share[:, None] * growth
        away = prompts - self.core_prompts[:count]
        self.core_prompts[:count] += share[:, None, None] * away

    def _append(self, mean: Tensor, std: Tensor, prompts: Tensor) -> None:
        """Add a member; where there is no room, a member leaves first."""
        count, rows = self._filled(), (mean, std, prompts)
        if self.config.official:
            for name, row in zip(self.undefined_as_nan(), rows, strict=True):
                setattr(self, name, torch.cat([getattr(self, name), row[None]]))
            return
        if count == len(self.core_mean):
            leaving = self._most_similar()
            for name in self.undefined_as_nan():
                held = getattr(self, name)
                held[leaving:-1] = held[leaving + 1 :].clone()
            count -= 1
        for name, row in zip(self.undefined_as_nan(), rows, strict=True):
            getattr(self, name)[count] = row

    def _most_similar(self) -> int:
        """The older one of the two members whose statistics are the nearest."""
        away = torch.cdist(self.core_mean, self.core_mean)
        away += torch.cdist(self.core_std.nan_to_num(0.0), self.core_std.nan_to_num(0.0))
        away.fill_diagonal_(float("inf"))
        return int(away.min(1).values.argmin())

    def _draw_start(self, shape: torch.Size) -> Tensor:
        found = self.context.draws.ask("prompts_init", shape, torch.float32, torch.device("cpu"))
        if found is None:
            numbers = CountedDraws(self.context.generator.initial_seed()).uniforms(*shape)
            found = uniform_start(self.network, numbers)
        return found.clone()


def _length(offset: Tensor) -> Tensor:
    """Length over the last axis; 0 where it is no number, as the deviation of one image."""
    known = torch.where(offset.isnan(), 0.0, offset)
    return torch.linalg.vector_norm(known, dim=-1)
