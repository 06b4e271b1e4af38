"""FOA: prompts that a search without gradients finds, and features that move back to the source.

Niu, Miao, Chen, Wu, Zhao: Test-Time Model Adaptation with Only Forward Passes, ICML 2024,
arXiv 2404.01650.

Prompt tokens are put behind the class token of a vision transformer. For each batch, CMA-ES
proposes K of them, and keeps those under which predictions are certain and class tokens have the
mean and deviation of the source in every block. On top, the last class token is shifted towards
the source's mean.

    F(p) = lambda (B / 64) sum_l (|sigma_l - sigma_l^S|^2 + |mu_l - mu_l^S|^2) + sum_b H(z_b)
    z_b = W (h_b(p*) + s) + bias,   then   s <- (1 - a) s + a (mu_S - mean_{b, p} h_b(p))

mu_l and sigma_l are those of the class token after block l through the norm that follows, over the
batch at hand; the former best prompt p* is a candidate too. a is 0.1. The first batch is not
shifted. ``foa_shift`` is the shift alone, on features of any model before a linear layer, for no
more than a forward pass: s starts as its own value after the first batch, and moves after the
answer ever after, unlike NEO's. Its ``balanced=True`` (ours) replaces the mean over the images of a
batch by one over the C classes; with r = mu_S it is that of ``neo``.

Differences: the deviation of a single image is left out of F, where it would be no number.
``reset`` goes back to the prompts of wrap; ``official=True`` draws new ones, as the official code
does. Before its first batch a frozen adapter predicts as the source.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tta.core.backbone import Backbone
from tta.core.checks import LARGE, boolean, fraction, number, seed, whole_number
from tta.core.component import Context
from tta.core.config import ComponentConfig
from tta.core.prediction import Prediction, Report
from tta.core.random import CountedDraws
from tta.core.registry import register
from tta.core.source import SourceStatistics
from tta.core.traced_pass import either, is_tracing
from tta.core.update import ForwardUpdate
from tta.methods._shift import MOST_IMAGES, ShiftRule, in_logits
from tta.parts import cma
from tta.parts.blocks import block_names
from tta.parts.losses import entropy
from tta.parts.moments import RunningMoments, fill_moments
from tta.parts.tokens import MOST_PROMPTS, TokenPrompts, takes_prompts, uniform_start

__all__ = ["Foa", "FoaConfig", "FoaShift", "FoaShiftConfig"]

BATCH = 64  # size for which the fitness is balanced
SHIFT_MOMENTUM = 0.1  # a
MOST_CANDIDATES = 10_000


@dataclass(frozen=True, kw_only=True)
class FoaConfig(ComponentConfig):
    """Fields of ``foa``."""

    prompts: int = 3  # P, tokens that are searched
    population: int = 27  # K, candidates in a batch besides the former best
    fitness_weight: float = 0.4  # lambda, of the distance from the source's statistics
    sigma: float = 1.0  # first step size of the search
    search_seed: int = 2020  # of the search, which draws the same for every stream
    blocks: tuple[str, ...] | None = None  # names of the blocks; None: found by structure
    official: bool = False  # draw new prompts at every reset, as the official code does

    def __post_init__(self) -> None:
        super().__post_init__()
        whole_number("prompts", self.prompts, 1, MOST_PROMPTS)
        whole_number("population", self.population, 2, MOST_CANDIDATES)
        number("fitness_weight", self.fitness_weight, 0, LARGE)
        number("sigma", self.sigma, 0, LARGE, above=True)
        seed("search_seed", self.search_seed)
        block_names("blocks", self.blocks)


@dataclass(frozen=True, kw_only=True)
class FoaShiftConfig(ComponentConfig):
    """Fields of ``foa_shift``."""

    momentum: float = 0.1  # a, weight of the new batch
    balanced: bool = False  # every predicted class counts once (ours)
    official: bool = False  # without the rule for bad images

    def __post_init__(self) -> None:
        super().__post_init__()
        fraction("momentum", self.momentum)
        boolean("balanced", self.balanced)
        boolean("official", self.official)


@register("foa_shift")
class FoaShift(ShiftRule):
    """Features moved back to the source's mean by an average of earlier batches."""

    Config = FoaShiftConfig

    shift: Tensor  # (D,), s; NaN before the first batch

    def __init__(self, config: FoaShiftConfig, context: Context) -> None:
        super().__init__(config, context)
        self.register_buffer("shift", torch.full_like(self.feature_mean, float("nan")))

    def correct(self, prediction: Prediction) -> Tensor:
        """Logits (B, C) of the shifted features; the shift moves afterwards."""
        logits = self.shifted(prediction)
        if self.learning:
            self._move(prediction)
        return logits

    def offset(self) -> Tensor:
        """The shift, which is 0 before the first batch."""
        return self.shift.nan_to_num(0.0)

    def undefined_as_nan(self) -> tuple[str, ...]:
        """There is no shift before the first batch."""
        return ("shift",)

    def fit(self, source: SourceStatistics, network: Backbone) -> None:
        """Take or measure the source's mean.

        Raises:
            ValueError: When ``source`` has nothing to take it from, or that of another model.
        """
        self.fit_mean(source, network)

    def source_artefacts(self) -> dict[str, Any]:
        """The mean of the features."""
        return {"feature_mean": self.feature_mean}

    @torch.no_grad()
    def _move(self, prediction: Prediction) -> None:
        features = self.features_of(prediction, self.feature_mean - self.offset())
        offsets, rate = features - self.feature_mean, self.config.momentum
        if self.classes is not None:
            self.classes.move(offsets, prediction.logits.argmax(1), rate)
            self.shift.copy_(-self.classes.mean())
            return
        new = -offsets.mean(0)
        self.shift.copy_(torch.where(self.shift.isnan(), new, self.shift.lerp(new, rate)))


@register("foa")
class Foa(ForwardUpdate):
    """Prompts by CMA-ES, and the shift; no gradient."""

    Config = FoaConfig
    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "imagenet": {"fitness_weight": 0.4},
        "imagenet_r": {"fitness_weight": 0.2},
    }
    default_norm = None
    needs_features = True
    needs_linear_head = True
    uses_labels = False
    takes_draws = True
    cost = 27.0

    layer_mean: Tensor  # (L, D) of class tokens of the source
    layer_std: Tensor  # (L, D)
    shift: Tensor  # (D,), s; NaN before the first batch
    best: Tensor  # (P * D,), the former best prompts, at first random ones
    starts: Tensor  # 0-dimensional, how often prompts were drawn
    search_steps: Tensor  # 0-dimensional; the rest of the search is in ``search_...`` too

    def __init__(self, config: FoaConfig, network: Backbone, context: Context) -> None:
        super().__init__(config, network, context)
        self.tokens = TokenPrompts(network, self.name, config.blocks)
        width, size = context.feature_size, config.prompts * self.tokens.width
        if width != self.tokens.width:
            raise ValueError(
                f"`model` must give its class token of {self.tokens.width} numbers to its "
                f"classifier for {self.name}, got features of {width}: use another method."
            )
        self.constants_of_search = cma.Constants(size, config.population)
        for name in ("layer_mean", "layer_std"):
            zeros = torch.zeros(self.tokens.depth, width, dtype=torch.float32)
            self.register_buffer(name, zeros, persistent=False)
        self.register_buffer("shift", torch.full((width,), float("nan"), dtype=torch.float32))
        self.register_buffer("best", torch.zeros(size, dtype=torch.float32))
        self.register_buffer("starts", torch.zeros((), dtype=torch.int64))
        for name, value in cma.start(size, config.sigma).items():
            self.register_buffer(f"search_{name}", value)
        self._draw_start()

    @classmethod
    def suits(cls, model: nn.Module) -> bool:
        """Whether the model has one stack of blocks that pass on a sequence."""
        return takes_prompts(model)

    def adapt(self, x: Tensor) -> Prediction:
        """Run all candidates, answer with the best one, and move search and shift."""
        candidates = self._candidates()
        fitness, means, best, chosen, result = [], [], 0, None, None
        for i, prompts in enumerate(candidates):
            prediction, tokens = self.tokens.run_reading(
                self.network, x, prompts.view(-1, self.tokens.width)
            )
            fitness.append(self._fitness(prediction.logits, tokens))
            means.append(tokens[-1].mean(0))
            if chosen is None or bool(fitness[i] < fitness[best]):
                best, chosen, result = i, prediction, self.network.result
        assert chosen is not None
        self.network.result = result
        values = torch.stack(fitness)
        prediction = self._shifted(chosen)
        self.report = Report(selected=len(x), loss=values[best], fitness=values, best=best)
        found = self.layer_mean[-1] - torch.stack(means).mean(0)
        learned = bool(values[best].isfinite()) and bool(found.isfinite().all())
        self.report["stepped"] = learned
        if learned:
            cma.tell(self._search(), self.constants_of_search, candidates, values, foreign=1)
            self.best.copy_(candidates[best])
            old = torch.where(self.shift.isnan(), found, self.shift)
            self.shift.copy_(old.lerp(found, SHIFT_MOMENTUM))
        return prediction

    def predict(self, x: Tensor) -> Prediction:
        """Predict with the best prompts of the last batch, and the shift; at first without both."""
        fresh = self.shift.isnan().any()
        if not is_tracing() and bool(fresh):
            return self.network(x)
        plain = self.network(x) if is_tracing() else None
        prompts = self.best.view(-1, self.tokens.width)
        found = self._shifted(self.tokens.run(self.network, x, prompts))
        return found if plain is None else either(fresh, plain, found)

    def after_reset(self) -> None:
        """Draw new prompts under ``official=True``."""
        if self.config.official:
            self._draw_start()

    def survives_reset(self) -> tuple[str, ...]:
        """Under ``official=True`` the prompts, which are new ones then, and the count of these."""
        return ("best", "starts") if self.config.official else ()

    def undefined_as_nan(self) -> tuple[str, ...]:
        """There is no shift before the first batch."""
        return ("shift",)

    def fit(self, source: SourceStatistics) -> None:
        """Take mean and deviation of the source's class tokens, or measure them.

        Raises:
            ValueError: When ``source`` has nothing to take them from, or those of another model, or
                when prompts have no meaning in this model.
        """
        self.tokens.check(self.network)
        held = self.source_artefacts()
        self.source_used = fill_moments(
            held, source, self.name, "blocks and width of this model", self._measure
        )

    def source_artefacts(self) -> dict[str, Any]:
        """Mean and deviation of the class tokens."""
        return {"layer_mean": self.layer_mean, "layer_std": self.layer_std}

    @torch.no_grad()
    def _measure(self, source: SourceStatistics) -> str:
        moments = RunningMoments()
        for images, _ in source.iter_batches(MOST_IMAGES):
            _, tokens = self.tokens.run_reading(self.network, images.to(self.layer_mean.device))
            moments.add(tokens.transpose(0, 1))
        self.layer_mean.copy_(moments.mean())
        self.layer_std.copy_(moments.variance().sqrt())
        return f"class tokens of {moments.count} images"

    def _candidates(self) -> Tensor:
        """All that is run in this batch (K + 1, P * D), the former best last."""
        count, size = self.config.population, len(self.best)
        shape, device = torch.Size((count, size)), self.best.device
        asked = self.context.draws.ask("candidates", shape, torch.float32, device)
        if asked is None:
            begin = self.config.search_seed + (int(self.search_steps) << 40)
            normals = CountedDraws(begin, device).normals(count, size)
            asked = cma.ask(self._search(), normals).float()
        return torch.cat([asked, self.best[None]])

    def _fitness(self, logits: Tensor, tokens: Tensor) -> Tensor:
        """F of logits (B, C) and class tokens (L, B, D); infinite where it is no number."""
        away = (tokens.mean(1) - self.layer_mean).square().sum()
        if tokens.shape[1] > 1:
            away = away + (tokens.std(1) - self.layer_std).square().sum()
        weight = self.config.fitness_weight * len(logits) / BATCH
        fitness = weight * away + entropy(logits.float()).sum()
        return fitness.nan_to_num(float("inf"))

    def _shifted(self, prediction: Prediction) -> Prediction:
        shift = self.shift.nan_to_num(0.0)
        assert prediction.features is not None
        logits = prediction.logits.float() + in_logits(shift, self.context.classifier)
        features = prediction.features + shift.to(prediction.features.dtype)
        return Prediction(logits.to(prediction.logits.dtype), features)

    def _draw_start(self) -> None:
        """Draw the prompts that the search starts from."""
        count, width = self.config.prompts, self.tokens.width
        shape = torch.Size((count, width))
        found = self.context.draws.ask("prompts_init", shape, torch.float32, self.best.device)
        if found is None:
            begin = self.context.generator.initial_seed() + (int(self.starts) << 40)
            numbers = CountedDraws(begin, self.best.device).uniforms(count, width)
            found = uniform_start(self.network, numbers)
        self.best.copy_(found.flatten())
        self.starts += 1

    def _search(self) -> cma.State:
        start = "search_"
        held = {name: buffer for name, buffer in self.named_buffers() if name.startswith(start)}
        return {name.removeprefix(start): buffer for name, buffer in held.items()}
