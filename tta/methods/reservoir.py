"""ReservoirTTA: one set of weights for each kind of domain that a stream shows.

Vray et al.: ReservoirTTA: Prolonged Test-time Adaptation for Evolving and Recurring Domains,
arXiv 2505.14511.

Batches are clustered by their style while they come. Each cluster has its own set of trained
weights and optimiser state, which another update moves (``inner``: TENT, EATA or ETA, SAR, ROID).
What is returned is the prediction of the average of all sets, weighted by how near the batch's
style is to the clusters; then the set of the nearest cluster takes the inner update's step.

    s = log var of each channel of early maps over the batch,   w_k = softmax_k(-|s - c_k|)
    returned: f(x; sum_k w_k theta_k);   then theta_k* takes a step on x,   k* = argmax_k w_k

The first centroid is the source's mean style. A batch whose style is farther from all centroids
than the threshold, a quantile of distances between source batches, makes a new cluster at its
place, whose set is a copy of the one with the best prediction for the batch: the lowest mean
entropy less the entropy of the mean (``start="source"``: the source's weights). Only batches of
``wrap(batch_size=)`` images do so; without that argument, all. In every batch the centroids take
one step of AdamW (rate 1e-4, decay 0.01 of the way from the source's style), made anew with each
cluster, on the mean entropy of the assignments of the batch and of a buffer of earlier styles, less
the entropy of their mean. The weights and k* are those before that step. Then the style goes to the
buffer, which keeps ``buffer // clusters`` styles for each cluster there is: a reservoir over the
stream, or with ``sampling="fifo"`` the last ones.

The style network is ``SourceStatistics.style_net``, a module from pixels in [0, 1] to a list of
maps (the authors': three convolutions of VGG-19, which normalise inside). It needs ``mean=`` and
``std=`` as methods that augment do, is not saved, and is asked for again by ``tta.load(...,
source=)``. Without it (ours), the maps are those of the model's own first three convolutions or
linear layers, in a pass with the source's weights and statistics. ``style_mean`` and
``style_threshold`` may be given; else they are measured on source batches, which are repeated to
1,000 styles, as the authors do.

``draws=`` is asked for ``replace_index``, without axes, whenever the buffer is full: the place in
it, or any number above it for none.

A set holds the trained parameters, the optimiser's state and the inner update's averages, each
``update/set<k>.<name>``; rows and sets of clusters that there are not yet are NaN. Of the inner
updates, the authors' traces cover TENT; that EATA's average is kept for each cluster is in their
code, that SAR's and ROID's are is ours. Statistics of a norm rule are shared by all sets. The field
``inner`` has the optimiser, the learning rate and all else that the update takes; fields of the
same name here are those of ``inner``, and setting one sets it there. Equation numbers are not
given: this follows the authors' code.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tta.core.backbone import Backbone
from tta.core.checks import LARGEST, fraction, one_of, shown, whole_number
from tta.core.classifier import evaluating
from tta.core.component import Context
from tta.core.config import UpdateConfig
from tta.core.norm_layers import frozen_statistics, normalize_by_source, with_statistics
from tta.core.prediction import Prediction, Report
from tta.core.registry import component, config_from_dict, get_config, register
from tta.core.source import SourceStatistics, missing_artefact
from tta.core.state_dict import copy_tensors
from tta.core.tracing import is_tracing
from tta.core.update import Update
from tta.parts.augment import Augmenter
from tta.parts.chance import Chance
from tta.parts.style import (
    assignments,
    cluster_loss,
    early_layers,
    early_maps,
    style_of,
    style_threshold,
)
from tta.parts.teachers import NamedTensors, OtherWeights

__all__ = ["Reservoir", "ReservoirConfig"]

STYLES = 1000  # of the source
FORGET = 10  # times the buffer's length in styles, after which one more counts as many as it holds
INNER = "inner."
CENTROID_LR, CENTROID_DECAY, BETAS, ADAM_EPS = 1e-4, 0.01, (0.9, 0.999), 1e-8


@dataclass(frozen=True, kw_only=True)
class ReservoirConfig(UpdateConfig):
    """Fields of ``reservoir``; those of every update are the inner one's."""

    inner: Any = "tent"  # what moves a set of weights: a name or a config
    clusters: int = 16  # sets of weights at most
    buffer: int = 64  # styles kept at most, for all clusters together
    quantile: float = 0.999  # of distances between source styles, above which a cluster is new
    sampling: str = "reservoir"  # of the buffer: "reservoir" or "fifo"
    start: str = "best"  # of a new set: "best" of the others, or "source"

    def __post_init__(self) -> None:
        if self.name:  # before this one is registered, the inner update may not be either
            host = self.host
            for name in _shared():
                object.__setattr__(self, name, getattr(host, name))
        super().__post_init__()
        whole_number("clusters", self.clusters, 1, 10_000)
        whole_number("buffer", self.buffer, self.clusters, LARGEST)
        fraction("quantile", self.quantile)
        one_of("sampling", self.sampling, ("reservoir", "fifo"))
        one_of("start", self.start, ("best", "source"))

    @property
    def host(self) -> UpdateConfig:
        """The config of the inner update.

        Raises:
            TypeError: When ``inner`` is neither a name nor a config.
            ValueError: When it is of a component whose weights cannot be one of several sets.
        """
        given: Any = self.inner
        if isinstance(given, Mapping):  # from a file
            given = config_from_dict(given)
        elif isinstance(given, str):
            given = get_config(given)
        cls = component(given.name) if isinstance(given, UpdateConfig) else None
        if cls is None or not issubclass(cls, Update) or not cls.in_sets:
            error = ValueError if isinstance(self.inner, (str, UpdateConfig)) else TypeError
            raise error(
                "`inner` must be a name or config of tent, eata, eta, sar or roid, got "
                f"{shown(self.inner)}: use one of these."
            )
        return given

    def replace(self, **changes: Any) -> ReservoirConfig:
        """Return a copy with some fields changed, of the inner update's too."""
        shared = {k: changes.pop(k) for k in list(changes) if k in _shared()}
        found = super().replace(**changes)
        if not shared:
            return found
        return super(ReservoirConfig, found).replace(inner=found.host.replace(**shared))

    def for_batch_size(self, batch_size: int | None) -> ReservoirConfig:
        """Scale the inner update's learning rate as it does."""
        return self.replace(inner=self.host.for_batch_size(batch_size))

    def to_dict(self) -> dict[str, Any]:
        """The component's name and every field, as JSON types."""
        inner = self.inner if isinstance(self.inner, (str, Mapping)) else self.inner.to_dict()
        return super().to_dict() | {"inner": inner}


def _shared() -> list[str]:
    return [field.name for field in dataclasses.fields(UpdateConfig)]


@register("reservoir")
class Reservoir(Update):
    """Sets of weights for clusters of batches, moved by another update."""

    Config = ReservoirConfig
    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "imagenet": {"inner": "tent.imagenet"},
        "imagenet_vit": {"inner": "tent.imagenet_vit", "buffer": 1024},
        "cifar10": {"inner": "tent.cifar10"},
        "cifar100": {"inner": "tent.cifar100"},
    }
    injects: ClassVar[tuple[str, ...]] = ("augment",)
    learns_from_whole_batch: ClassVar[bool] = False
    splits: ClassVar[bool] = False  # ranks would wait for each other where clusters differ
    takes_draws: ClassVar[bool] = True
    uses_labels: ClassVar[bool] = False
    cost: ClassVar[float] = 5.0

    style_mean: Tensor  # (S,)
    style_threshold: Tensor  # 0-dimensional
    given_net: Tensor  # 0-dimensional bool: whether the caller gave the style network
    styles: Tensor  # (buffer, S)
    seen: Tensor  # 0-dimensional: styles offered to the buffer
    centroids: Tensor  # (clusters, S)
    centroid_average: Tensor  # (clusters, S), of AdamW
    centroid_square: Tensor  # (clusters, S), of AdamW
    centroid_steps: Tensor  # 0-dimensional, since the last new cluster

    def __init__(self, config: ReservoirConfig, network: Backbone, context: Context) -> None:
        super().__init__(config, network, context)
        make: Any = component(config.host.name)
        self.inner: Any = make(config.host, network, context)
        self.optimizer = self.inner.optimizer
        for k in range(config.clusters):
            held = NamedTensors({}, constant=False)
            for name, value in self._live().items():
                first = torch.full_like(value, float("nan")) if k else value
                own = name.startswith(INNER)
                held.hold({name: first}, False, "its own" if own else "as parameters")
            setattr(self, f"set{k}", held)
        self.anchor = OtherWeights(network, context.parameters, constant=True)
        self.layers = early_layers(network.model)
        self.style_net: tuple[nn.Module, ...] = ()  # in a tuple, since it is no part of this one
        self.augmenter: Augmenter | None = None
        for name, value in (("style_threshold", 0.0), ("given_net", False)):
            self.register_buffer(name, torch.tensor(value), persistent=False)
        self.register_buffer("style_mean", torch.zeros(0), persistent=False)
        for name in ("centroids", "centroid_average", "centroid_square"):
            self.register_buffer(name, torch.zeros(config.clusters, 0))
        self.register_buffer("centroid_steps", torch.zeros((), dtype=torch.int64))
        self.register_buffer("styles", torch.zeros(config.buffer, 0))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    @classmethod
    def brings(cls, config: Any) -> dict[str, str]:
        """What the inner update brings."""
        return component(config.host.name).brings(config.host)

    @classmethod
    def leaves_out(cls, config: Any, names: Iterable[str]) -> set[str]:
        """What the inner update leaves out."""
        inner: Any = component(config.host.name)
        return inner.leaves_out(config.host, names)

    def fit(self, source: SourceStatistics) -> None:
        """Take or measure the source's mean style and the threshold, and what is inside needs.

        Raises:
            ValueError: When ``source`` has nothing to take them from.
        """
        self.inner.fit(source)
        self._take_net(source)
        mean, threshold, used = source.style_mean, source.style_threshold, "style as given"
        if mean is None or threshold is None:
            if source.batches is None:
                raise missing_artefact(source, self.name, "the styles of source batches")
            styles = self._source_styles(source)
            used = f"style of {len(styles)} batches"
            styles = styles[torch.arange(max(STYLES, len(styles))) % len(styles)]
            mean = styles.mean(0) if mean is None else mean
            if threshold is None:
                threshold = style_threshold(styles, self.config.quantile)
        if bool(threshold.isnan()):
            raise ValueError(
                "`source` must hold at least two batches that differ, for distances between their "
                "styles, got one: pass more."
            )
        self._open(mean)
        self.style_threshold.copy_(threshold)
        self.source_used = "; ".join(text for text in (self.inner.source_used, used) if text)

    def attach(self, source: SourceStatistics) -> None:
        """Take the style network again, which no file holds.

        Raises:
            ValueError: When there was one and ``source`` has none.
        """
        self.inner.attach(source)
        if bool(self.given_net) and source.style_net is None:
            raise ValueError(
                "`source.style_net` must be given again, since no file holds it, got none: pass "
                "source=tta.SourceStatistics(style_net=...)."
            )
        self._take_net(source)

    def source_artefacts(self) -> dict[str, Any]:
        """Mean style and threshold, and what the inner update took."""
        mine = {"style_mean": self.style_mean, "style_threshold": self.style_threshold}
        return self.inner.source_artefacts() | mine

    def constants(self) -> dict[str, Tensor]:
        """Mean style, threshold and source weights, and the constants of the inner update."""
        mine = {k: v for k, v in super().constants().items() if not k.startswith(INNER)}
        return mine | {f"{INNER}{k}": v for k, v in self.inner.constants().items()}

    def load_constants(self, values: dict[str, Tensor]) -> None:
        """Set what :meth:`constants` returned."""
        self._open(values["style_mean"])
        of_inner = {k.removeprefix(INNER): v for k, v in values.items() if k.startswith(INNER)}
        self.inner.load_constants(of_inner)
        super().load_constants({k: v for k, v in values.items() if not k.startswith(INNER)})

    def survives_reset(self) -> tuple[str, ...]:
        """As the inner update says."""
        return tuple(f"{INNER}{name}" for name in self.inner.survives_reset())

    def undefined_as_nan(self) -> tuple[str, ...]:
        """What belongs to clusters and styles that there are not yet."""
        # The first cluster is there from the start.
        sets = [f"set{k}.{name}" for k in range(1, self.config.clusters) for name in self._live()]
        inner = [f"{INNER}{name}" for name in self.inner.undefined_as_nan()]
        inner += [f"set0.{name}" for name in inner]
        return ("centroids", "styles", *sets, *inner)

    def integer_ranges(self) -> dict[str, tuple[int, int]]:
        """As the inner update says."""
        return {f"{INNER}{name}": r for name, r in self.inner.integer_ranges().items()}

    def learn(self, x: Tensor) -> Prediction:
        """One cycle; ``steps`` are the inner update's."""
        return self.adapt(x)

    def adapt(self, x: Tensor) -> Prediction:
        """Find the clusters of the batch, predict with their average, step with the nearest."""
        style = self._style(x)
        count = self._count()
        distance = torch.linalg.vector_norm(style - self.centroids[:count], dim=1).min()
        if self._is_new(distance, count, len(x)):
            self._set(count).copy(self._start(x, count))
            self.centroids[count] = style
            self.centroid_average.zero_()
            self.centroid_square.zero_()
            self.centroid_steps.zero_()
            count += 1
        weights = self._move_centroids(style, count)
        prediction = self._predict(x, self._average(weights))
        nearest = int(weights.argmax())
        copy_tensors(self._live(), self._set(nearest).named())
        self.inner.learn(x)
        self._set(nearest).copy(self._live())
        self._remember(style, count)
        self.parameters_adapted = self.inner.parameters_adapted
        self.resets.copy_(self.inner.resets)
        self.report = Report(self.inner.report.raw())
        self.report |= {"cluster": nearest, "clusters": count, "weights": weights}
        self.report["style_distance"] = distance
        return prediction

    def predict(self, x: Tensor) -> Prediction:
        """Predict with the average for the batch's style, without learning."""
        count = len(self.centroids) if is_tracing() else self._count()
        weights = assignments(self._style(x)[None], self.centroids[:count])[0]
        return self._predict(x, self._average(weights))

    def _set(self, k: int) -> NamedTensors:
        return getattr(self, f"set{k}")

    def _live(self) -> dict[str, Tensor]:
        """What a set holds, where it is in use: weights, optimiser state, averages of the inner."""
        found = {name: p.detach() for name, p in self.context.parameters.items()}
        found |= {k.replace("/", ".", 1): v for k, v in self.inner.optimizer_slots().items()}
        own = self.inner.state_dict()
        found |= {f"{INNER}{n}": v for n, v in own.items() if v.is_floating_point()}
        return found

    def _count(self) -> int:
        """How many clusters there are."""
        return int((~self.centroids[:, 0].isnan()).sum())

    def _is_new(self, distance: Tensor, count: int, images: int) -> bool:
        whole = images >= (self.context.batch_size or 1)
        return whole and count < self.config.clusters and bool(distance > self.style_threshold)

    @torch.no_grad()
    def _start(self, x: Tensor, count: int) -> dict[str, Tensor]:
        """What the set of a new cluster starts with."""
        if self.config.start == "source":
            point = self.network.session.reset_point
            return {name: point[_key(name)] for name in self._live()}
        scores = []
        for k in range(count):
            weights = self._weights(k)
            shares = self._predict(x, weights).logits.detach().float().softmax(1)
            scores.append(cluster_loss(shares))
        return self._set(int(torch.stack(scores).argmin())).named()

    def _weights(self, k: int) -> list[Tensor]:
        """The trained parameters of a set."""
        return self._set(k).tensors()[: len(self.context.parameters)]

    @torch.no_grad()
    def _average(self, weights: Tensor) -> list[Tensor]:
        """The trained parameters, averaged over the clusters with weights (K,)."""
        sets = [self._weights(k) for k in range(len(weights))]
        joined = [torch.stack(p) for p in zip(*sets, strict=True)]
        if is_tracing():  # those of clusters that there are not yet have no weight
            joined = [p.nan_to_num(0.0) for p in joined]
        return [p.mul_(_column(weights, p[0])).sum(0) for p in joined]

    def _predict(self, x: Tensor, weights: list[Tensor]) -> Prediction:
        following = torch.set_grad_enabled(self.network.session.following)
        with frozen_statistics(self.network.wrappers), following:
            return self.network(x, (self.anchor.places, weights))

    def _move_centroids(self, style: Tensor, count: int) -> Tensor:
        """Assign the batch to the clusters, (K,), and then move the centroids by one step."""
        vectors = torch.cat([self.styles[: self._held()], style[None]])
        offsets = (self.centroids[:count] - self.style_mean).requires_grad_()
        with torch.enable_grad():
            shares = assignments(vectors, self.style_mean + offsets)
            (gradient,) = torch.autograd.grad(cluster_loss(shares), offsets)
        with torch.no_grad():
            self.centroid_steps += 1
            step = int(self.centroid_steps)
            average, square = self.centroid_average[:count], self.centroid_square[:count]
            average.lerp_(gradient, 1 - BETAS[0])
            square.lerp_(gradient.square(), 1 - BETAS[1])
            mean, spread = average / (1 - BETAS[0] ** step), square / (1 - BETAS[1] ** step)
            offsets = offsets.detach() * (1 - CENTROID_LR * CENTROID_DECAY)
            offsets -= CENTROID_LR * mean / (spread.sqrt() + ADAM_EPS)
            self.centroids[:count] = self.style_mean + offsets
        return shares[-1].detach()

    def _held(self) -> int:
        """How many styles the buffer holds."""
        return int((~self.styles[:, 0].isnan()).sum())

    @torch.no_grad()
    def _remember(self, style: Tensor, count: int) -> None:
        config, held = self.config, self._held()
        capacity = count * (config.buffer // config.clusters)
        self.seen += 1
        if held < capacity:
            self.styles[held] = style
        elif config.sampling == "fifo":
            self.styles[: held - 1] = self.styles[1:held].clone()
            self.styles[held - 1] = style
        else:
            options = range(int(self.seen))
            place = Chance(self.context).pick("replace_index", options, open_end=True)
            if place < capacity:
                self.styles[place] = style
        if int(self.seen) > FORGET * capacity:
            self.seen.fill_(capacity)

    @torch.no_grad()
    def _style(self, x: Tensor) -> Tensor:
        """Style (S,) of a batch."""
        if self.augmenter is not None:
            self.augmenter.check(x)
            with evaluating(self.style_net[0]):
                maps = _checked(self.style_net[0](self.augmenter.pixels(x)), len(x))
        else:
            wrappers = self.network.wrappers
            collecting = early_maps(self.network.model, self.layers)
            with collecting as maps, with_statistics(wrappers, normalize_by_source):
                self.anchor.predict(x)
        style = style_of(maps)
        if len(self.style_mean) not in (0, len(style)):
            raise ValueError(
                "`source.style_mean` must have a value for each channel of the style maps, "
                f"{len(style)}, got {len(self.style_mean)}: make it with this model and style_net."
            )
        return style if len(self.style_mean) == 0 else style.where(~style.isnan(), self.style_mean)

    def _source_styles(self, source: SourceStatistics) -> Tensor:
        """Styles (N, S) of source batches, at most 1,000; a channel without one has the mean."""
        styles = []
        for images, _ in source.iter_batches():
            styles.append(self._style(images.to(self.centroids.device)))
            if len(styles) == STYLES:
                break
        if not styles:
            raise ValueError(
                "`source` must hold at least one batch, got none: pass an iterable of "
                "(images, labels) that was not read to its end."
            )
        found = torch.stack(styles)
        return found.where(~found.isnan(), found.nanmean(0).nan_to_num(0.0))

    def _take_net(self, source: SourceStatistics) -> None:
        if source.style_net is not None:
            self.augmenter = Augmenter(self.network.model, self.context)
            self.style_net = (source.style_net,)
            self.given_net.fill_(True)

    def _open(self, mean: Tensor) -> None:
        """Make room for styles as long as the source's mean (S,), which is the first centroid."""
        mean = mean.to(self.styles).clone()
        for name in ("centroid_average", "centroid_square"):
            setattr(self, name, mean.new_zeros(self.config.clusters, len(mean)))
        for name, rows in (("centroids", self.config.clusters), ("styles", self.config.buffer)):
            setattr(self, name, mean.new_full((rows, len(mean)), float("nan")))
        self.style_mean = mean
        self.centroids[0] = mean


def _key(name: str) -> str:
    """The key that a tensor of a set has in a state where it is in use."""
    if name.startswith("optim."):
        return name.replace(".", "/", 1)
    return f"update/{name}" if name.startswith(INNER) else f"param/{name}"


def _column(weights: Tensor, like: Tensor) -> Tensor:
    """Weights (K,) that multiply K tensors in a stack."""
    return weights.to(like).view(-1, *(1 for _ in like.shape))


def _checked(maps: Any, rows: int) -> list[Tensor]:
    fine = isinstance(maps, (list, tuple)) and all(
        isinstance(m, Tensor) and m.ndim > 1 and len(m) == rows for m in maps
    )
    if not fine or not maps:
        raise TypeError(
            f"`source.style_net` must return a list of maps (B, C, ...), got {shown(type(maps))}: "
            "correct it."
        )
    return list(maps)
