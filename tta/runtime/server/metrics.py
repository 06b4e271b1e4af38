"""Figures for Prometheus, in a registry of their own, so that one process may have several."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from tta.runtime.extras import needed
from tta.runtime.server.watch import FIGURES, StreamWatch

__all__ = ["Metrics"]

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128)


class Metrics:
    """The figures of one server.

    Args:
        watches: What is remembered of streams.
        pool_counts: ``StreamPool.counts``.
        gauges: What is asked for when Prometheus asks, by name and meaning.
    """

    def __init__(
        self,
        watches: Callable[[], Iterable[StreamWatch]],
        pool_counts: Callable[[], Mapping[str, int]],
        gauges: Mapping[tuple[str, str], Callable[[], float]],
    ) -> None:
        client = needed("prometheus_client", "serve")
        self._client = client
        self.registry = client.CollectorRegistry()
        client.ProcessCollector(registry=self.registry)

        def histogram(name: str, about: str, buckets: tuple[float, ...]) -> Any:
            return client.Histogram(name, about, buckets=buckets, registry=self.registry)

        self.requests = client.Counter(
            "tta_requests", "Requests by answer.", ["route", "status"], registry=self.registry
        )
        self.latency = histogram(
            "tta_latency_seconds", "From the arrival of an image to its prediction.", SECONDS
        )
        self.batch_seconds = histogram(
            "tta_batch_seconds",
            "The model's time for a batch: images of one stream in a round, or of several streams.",
            SECONDS,
        )
        self.batch_rows = histogram("tta_batch_rows", "Images in such a batch.", ROWS)
        self.registry.register(
            _Collector(needed("prometheus_client.core", "serve"), watches, pool_counts, gauges)
        )

    def text(self) -> tuple[bytes, str]:
        """All figures in the text format of Prometheus, and its media type."""
        return self._client.generate_latest(self.registry), self._client.CONTENT_TYPE_LATEST


class _Collector:
    """What is counted elsewhere; a stream that was dropped is told no more."""

    def __init__(self, core: Any, watches: Any, pool_counts: Any, gauges: Any) -> None:
        self._core = core
        self._watches, self._pool_counts, self._gauges = watches, pool_counts, gauges

    def collect(self) -> Iterator[Any]:
        gauge, counter = self._core.GaugeMetricFamily, self._core.CounterMetricFamily
        for (name, about), value in self._gauges.items():
            yield gauge(name, about, value=value())
        pool = counter("tta_pool", "What happened to streams and their files.", labels=["what"])
        for what, count in self._pool_counts().items():
            pool.add_metric([what], count)
        yield pool
        watches = list(self._watches())
        counts = {"images": "Predicted images.", "learned": "Images that were learned from.",
                  "failed": "Images without a prediction."}  # fmt: skip
        for key, about in counts.items():
            family = counter(f"tta_{key}", about, labels=["stream"])
            for watch in watches:
                family.add_metric([watch.name], getattr(watch, key))
            yield family
        actions = counter(
            "tta_guard_actions", "Batches that the guard acted on.", labels=["stream", "action"]
        )
        for watch in watches:
            for action, count in list(watch.actions.items()):
                actions.add_metric([watch.name, action], count)
        yield actions
        for key in FIGURES:
            family = gauge(f"tta_{key}", f"Moving average of {key} in health.", labels=["stream"])
            for watch in watches:
                value = watch.health.get(f"{key}_average", math.nan)
                if not math.isnan(value):
                    family.add_metric([watch.name], value)
            yield family
