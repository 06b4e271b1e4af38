"""LSA: a network that was fitted on the source adapts the linear layer to the stream's classes.

Park, Yang, Choo, Yun: Label Shift Adapter for Test-Time Adaptation under Covariate and Label
Shifts, ICCV 2023, arXiv 2308.08810.

A model that learned from imbalanced classes leans to the frequent ones, and a stream may have other
shares. A small network G, fitted once on labelled source images while the model stays as it is,
turns an estimate of the stream's class shares into changes of the features and of the linear layer.
Any update can run on top, and learns from the adapted logits.

    z = (W + dW)(gamma * h + beta) + b + db,   (gamma - 1, beta, dW, db) = G(code(pi)),
    pi <- a pi + (1 - a) mean_b softmax(z_b)

There is no official code, and its paper's formulas were out of reach. Known are the parts of G's
output, that the shares are mapped to a scalar "degree of imbalance", a generalised logit-adjusted
loss for three sets of shares, and a moving average of the predicted shares. The form of the scalar,
the size of G, the optimiser, the average's rate and its start are our definition; the traces
``lsa_*`` pin that definition, not the authors' code.

The code of a batch is made from the shares before it, which start equal; pi moves after the answer.
Whatever calls the linear layer gets the adapted logits: every pass of an update, and teachers,
whose own weights are then W and b. The source that a guard asks does not.

The scalar does not exist for a source whose classes are equally frequent. Without ``code=`` the
vector code is taken there (ours), which also describes shares that are no power of the source's.
``delta="bias"`` leaves the weight alone and ``"low_rank"`` changes it by a product of two thin
matrices (both ours), as G has 65 numbers for each number that it gives: 133 million for 1,000
classes and 2,048 features.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from tta.core.backbone import Backbone
from tta.core.checks import fraction, number, one_of, shown, told, whole_number
from tta.core.classifier import CONVOLUTIONS
from tta.core.component import Context
from tta.core.config import ComponentConfig
from tta.core.output_rule import Output
from tta.core.prediction import Prediction, Report
from tta.core.registry import register
from tta.core.source import SourceStatistics, missing_artefact
from tta.parts import label_shift

__all__ = ["Lsa", "LsaConfig"]

HIDDEN, LR, BATCH, EPOCHS = 64, 1e-3, 128, 10  # of fitting G
BALANCED = 1.5  # largest share to smallest, up to which a source has no imbalance to speak of
MOST_IMAGES = 100_000  # of source batches


@dataclass(frozen=True, kw_only=True)
class LsaConfig(ComponentConfig):
    """Fields of ``lsa``."""

    code: str | None = None  # of class shares: "scalar", "vector"; None = as the source allows
    delta: str = "full"  # change of the weight: "full", "bias" (none), "low_rank" (ours)
    prior_momentum: float = 0.9  # a, share of the old estimate of the class shares
    floor: float = 1e-6  # class shares below it count as this much
    rank: int = 4  # of the change of the weight, with "low_rank"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.code is not None:
            one_of("code", self.code, label_shift.CODES)
        one_of("delta", self.delta, label_shift.DELTAS)
        fraction("prior_momentum", self.prior_momentum)
        number("floor", self.floor, 0, 1, above=True)
        whole_number("rank", self.rank, 1, 10**4)


@register("lsa")
class Lsa(Output):
    """The linear layer as a fitted network changes it for the class shares of the stream."""

    Config = LsaConfig
    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {}
    needs_features: ClassVar[bool] = True
    needs_linear_head: ClassVar[bool] = True
    makes_logits: ClassVar[bool] = True

    estimate: Tensor  # pi (C,)

    def __init__(self, config: LsaConfig, context: Context) -> None:
        super().__init__(config, context)
        classes = context.num_classes
        self.register_buffer("estimate", torch.full((classes,), 1 / classes, dtype=torch.float32))
        self.fitted = False

    def correct(self, prediction: Prediction) -> Tensor:
        """Logits (B, C) as they are, since the layer made them; the estimate moves."""
        self.report = Report(code=self._code())
        if self.learning:
            shares = prediction.logits.float().softmax(1).mean(0)
            self.estimate.lerp_(shares, 1 - self.config.prior_momentum)
        return prediction.logits

    def make_logits(self, layer: Any, features: Tensor) -> Tensor | None:
        """Logits of the changed layer, from what the layer is given."""
        if not self.fitted:
            return None
        # A convolution as the last layer has its channels before space.
        moved = isinstance(layer, CONVOLUTIONS) and features.ndim == layer.weight.ndim
        features = features.movedim(1, -1) if moved else features
        with torch.autocast(features.device.type, enabled=False):
            wide = torch.promote_types(features.dtype, torch.float32)
            bias = None if layer.bias is None else layer.bias.to(wide)
            found = self._change().logits(features.to(wide), layer.weight.flatten(1).to(wide), bias)
        return found.movedim(-1, 1) if moved else found

    def fit(self, source: SourceStatistics, network: Backbone) -> None:
        """Take G and the class shares of the source, or fit them on source batches.

        Raises:
            ValueError: When ``source`` has neither, or has them for another model.
        """
        given, prior = source.label_shift, source.source_prior
        if given is not None:
            if prior is None:
                raise ValueError(
                    "`source.source_prior` must come with `source.label_shift`, got none: pass "
                    "both, as tta.collect_source(model, loader, for_methods=['lsa']) gives them."
                )
            self.source_used = "label_shift as given"
        elif source.batches is not None:
            given, prior = self._fit(source, network)
        else:
            raise missing_artefact(
                source, self.name, "its fitted network", "source batches with labels"
            )
        self._hold({**given, "source_prior": prior})

    def source_artefacts(self) -> dict[str, Any]:
        """G and the class shares of the source."""
        held = self.constants()
        prior = held.pop("source_prior")
        return {"label_shift": held, "source_prior": prior}

    def load_constants(self, values: dict[str, Tensor]) -> None:
        """Set what ``constants`` returned."""
        self._hold(values)

    def _hold(self, values: Mapping[str, Tensor]) -> None:
        self._check(values)
        for name in (*label_shift.NAMES, "source_prior"):
            value = values[name].detach().to(self.estimate).clone()
            self.register_buffer(name, value, persistent=False)
        self.fitted = True

    def _check(self, values: Mapping[str, Tensor]) -> None:
        """Refuse a network, or class shares, of another model or of another kind."""
        classes, width = self.context.num_classes, self.context.feature_size
        prior = values.get("source_prior")
        if prior is None or prior.shape != (classes,) or bool((prior < 0).any()):
            got = "none" if prior is None else f"shape {tuple(prior.shape)} or values below 0"
            raise ValueError(
                f"`source.source_prior` must be the shares of {classes} classes, ({classes},), got "
                f"{got}: make it for this model with tta.collect_source."
            )
        shapes: dict[str, tuple[int, ...]] = {
            n: tuple(values[n].shape) if n in values else () for n in label_shift.NAMES
        }
        inputs = shapes["A1"][1:]
        expected = {"scalar": [(1,)], "vector": [(classes,)]}.get(
            self.config.code, [(1,), (classes,)]
        )
        hidden, count = shapes["c1"], shapes["c2"]
        fits = len(hidden) == len(count) == 1 and inputs in expected
        fits = fits and shapes["A1"][:1] == hidden and shapes["A2"] == (*count, *hidden)
        delta = self.config.delta
        if not fits or label_shift.rank_of(count[0], classes, width, delta) is None:
            wanted = label_shift.outputs(classes, width, delta, self.config.rank)
            got = ", ".join(f"{n} {s}" for n, s in shapes.items())
            raise ValueError(
                "`source.label_shift` must hold A1, c1, A2 and c2 with "
                f"{' or '.join(str(count) for (count,) in expected)} inputs and {wanted} outputs "
                f"for this model with delta={shown(delta, 20)}, got {told(got)}: make it with "
                "tta.collect_source."
            )
        kind = "scalar" if inputs == (1,) else "vector"
        label_shift.encode(prior, prior, kind, self.config.floor)  # where it is not defined

    def _fit(self, source: SourceStatistics, network: Backbone) -> tuple[dict[str, Tensor], Tensor]:
        """Fit G on features under running statistics; also the source's class shares (C,)."""
        features, labels = [], []
        with torch.no_grad():
            for images, found in source.iter_batches(MOST_IMAGES):
                prediction = network(images.to(self.estimate.device))
                assert prediction.features is not None
                features.append(prediction.features.float())
                labels.append(found.to(self.estimate.device))
        if not features:
            raise ValueError(
                "`source` must hold at least one batch, got none: pass an iterable of "
                "(images, labels) that was not read to its end."
            )
        h, y = torch.cat(features), torch.cat(labels)
        prior = source.source_prior
        if prior is None:
            prior = torch.bincount(y, minlength=self.context.num_classes) / len(y)
        prior = prior.to(h)
        code = self.config.code
        if code is None:
            balanced = float(prior.max()) <= BALANCED * float(prior.min())
            code = "vector" if balanced else "scalar"
        layer: Any = self.context.classifier
        net, _ = label_shift.fit(
            h,
            y,
            layer.weight.flatten(1),
            layer.bias,
            prior,
            code=code,
            lr=LR,
            floor=self.config.floor,
            steps=EPOCHS * -(-len(h) // BATCH),
            batch_size=min(BATCH, len(h)),
            delta=self.config.delta,
            hidden=HIDDEN,
            rank=self.config.rank,
            generator=self.context.generator,
        )
        self.source_used = f"label_shift from {len(h)} images ({code} code)"
        return net, prior

    def _code(self) -> Tensor:
        """The code of the estimate, (1,) or (C,)."""
        held = self.constants()
        kind = "scalar" if held["A1"].shape[1] == 1 else "vector"
        return label_shift.encode(
            self.estimate, held["source_prior"], kind, self.config.floor
        ).detach()

    def _change(self) -> label_shift.HeadChange:
        held, context = self.constants(), self.context
        return label_shift.change(
            held, self._code(), context.num_classes, context.feature_size, self.config.delta
        )
