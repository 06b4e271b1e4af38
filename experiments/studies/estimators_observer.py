"""All estimators of accuracy on the same predictions, with what each of them costs."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

import tta
from experiments.run.method_strings import Method, parse_method
from experiments.run.subject import Subject
from tta.core.guard import LEARN, Batch, Estimator, Verdict
from tta.core.prediction import Prediction
from tta.methods.aetta import Aetta, AettaConfig
from tta.parts.estimates import AgreementEstimate, ConfidenceEstimate, FeatureDropoutEstimate
from tta.runtime.method_strings import SOURCE

__all__ = ["ESTIMATORS", "Observer", "observed", "stages"]

ESTIMATORS = {
    "aetta_stages": "AETTA, dropout after each stage of the network",
    "aetta": "AETTA, dropout on the features alone",
    "feature_dropout": "dropout on the features of the prediction",
    "confidence": "confidence, compared with that on source images",
    "agreement": "the source's estimate times the agreement with it, one batch in twenty",
    "agreement_always": "the same on every batch",
}


@dataclass
class Observer:
    """Asks all estimators about every batch, and never acts.

    Args:
        adapter: Wrapped with a guard that reads features. What it decides and estimates is
            replaced.
        artefacts: Of the source, for estimators that compare with it; None for none.
        estimates: For each batch, the estimates by name; NaN where there is none.
        source: For each batch, (B,) the source's predicted classes.
        seconds: Processor time of each estimator, and of a plain forward pass as "forward".
        passes: Forward passes of each estimator, in batches.
    """

    adapter: tta.Adapter
    artefacts: tta.SourceStatistics | None = None
    estimates: list[dict[str, float]] = field(default_factory=list)
    source: list[Tensor] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    passes: dict[str, int] = field(default_factory=lambda: defaultdict(int))

    def __post_init__(self) -> None:
        guard = self.adapter.guard
        assert guard is not None
        network, context = self.adapter.network, guard.context
        device = next(network.model.parameters()).device
        self._confidence = ConfidenceEstimate().to(device)
        self._agreement = AgreementEstimate().to(device)
        if self.artefacts is not None:
            for estimator in (self._confidence, self._agreement):
                estimator.fit(self.artefacts, network)
        linear = isinstance(network.head.module, nn.Linear)
        self._dropout = FeatureDropoutEstimate(network, context) if linear else None
        self._aetta = {
            name: Aetta(AettaConfig(places=places), network, context).to(device)
            for name, places in (("aetta_stages", stages(network.model)), ("aetta", None))
            if places is not None or linear
        }
        guard.admit = self._admit
        guard.judge = lambda batch: LEARN
        guard.estimator = _Asked(self._estimate)
        self._before: dict[str, float] = {}

    def costs(self) -> dict[str, dict[str, float]]:
        """Of each estimator, ``forwards`` and ``time``, both in plain forward passes."""
        batches = len(self.estimates)
        return {
            name: {
                "forwards": self.passes[name] / batches,
                "time": self.seconds[name] / self.seconds["forward"],
            }
            for name in ESTIMATORS
            if name in self.seconds
        }

    def _admit(self, batch: Batch) -> Verdict:
        """AETTA's estimates, of the model before it learns from the batch."""
        self._before = {}
        for name, aetta in self._aetta.items():
            own = replace(batch, figures={}, passes=0)  # the watched batch knows nothing of it
            with self._timed(name):
                aetta.admit(own)
                self._before[name] = float(own.figures["estimated_accuracy"])
            self.passes[name] += own.passes
        return LEARN

    def _estimate(self, batch: Batch, prediction: Prediction) -> Tensor:
        """The other estimates, of what the adapter has predicted."""
        found = dict(self._before)
        with self._timed("forward"):
            source: Prediction = batch.predictor.source(batch.images)
        self.source.append(source.logits.argmax(1).cpu())
        asked: list[tuple[str, Estimator, Batch]] = [
            ("confidence", self._confidence, batch),
            ("agreement", self._agreement, batch),
            ("agreement_always", self._agreement, replace(batch, _source=source)),
        ]
        if self._dropout is not None:
            asked.append(("feature_dropout", self._dropout, batch))
        for name, estimator, shown in asked:
            with self._timed(name):
                found[name] = float(estimator.estimate(shown, prediction))
        for name in ("confidence", "agreement"):  # both need the source's passes now and then
            self.passes[name] += batch.has_source
        self.passes["agreement_always"] += 1
        if math.isnan(found["agreement"]):  # the last one stands, and first the source's accuracy
            before = self.estimates[-1]["agreement"] if self.estimates else None
            found["agreement"] = float(self._agreement.accuracy) if before is None else before
        self.estimates.append(found)
        return torch.tensor(found["confidence"])

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        start = time.process_time()
        yield
        self.seconds[name] += time.process_time() - start


class _Asked(Estimator):
    """Stands in a guard for what an observer asks."""

    name = "observer"

    def __init__(self, ask: Callable[[Batch, Prediction], Tensor]) -> None:
        super().__init__()
        self.ask = ask

    def estimate(self, batch: Batch, prediction: Prediction) -> Tensor:
        return self.ask(batch, prediction)


def stages(model: nn.Module) -> tuple[str, ...]:
    """Names of the stages of a network: its chains of layers, or the parts of its only one.

    Raises:
        ValueError: When no child of the model is a chain.
    """
    chains = {n: m for n, m in model.named_children() if isinstance(m, nn.Sequential)}
    if not chains:
        raise ValueError(
            f"`model` must have children that are a nn.Sequential, got {type(model).__name__}: "
            "choose another model"
        )
    if len(chains) > 1:
        return tuple(chains)
    ((only, chain),) = chains.items()
    return tuple(f"{only}.{name}" for name, _ in chain.named_children())


@contextmanager
def observed(subject: Subject, method: str, batch_size: int, seed: int) -> Iterator[Observer]:
    """A subject's model wrapped with a method, and watched by all estimators.

    Args:
        subject: The model.
        method: A method string without a guard.
        batch_size: Learning rates are scaled for it.
        seed: Of the adapter.
    """
    parsed = parse_method(method, subject.info.num_classes)
    guard = AettaConfig(places=stages(subject.model))
    slots = parsed.slots or {"update": SOURCE}  # so that the guard brings no update of its own
    watched = Method(method, {**slots, "guard": guard}, parsed.overrides)
    artefacts = subject.source if isinstance(subject.source, tta.SourceStatistics) else None
    with watched.applied(subject, batch_size, seed) as adapter:
        yield Observer(adapter, artefacts)
