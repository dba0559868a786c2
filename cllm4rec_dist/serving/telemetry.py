"""Prometheus metrics of the service."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Metric, ProcessCollector, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.registry import Collector

__all__ = ["CONTENT_TYPE_LATEST", "Telemetry"]

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class _Labelled(Collector):
    """Collector that adds labels to all metrics of a registry."""

    def __init__(self, registry: CollectorRegistry, **labels: str) -> None:
        self._registry, self._labels = registry, labels

    def collect(self) -> Iterator[Metric]:
        for metric in self._registry.collect():
            metric.samples = [sample._replace(labels={**sample.labels, **self._labels}) for sample in metric.samples]
            yield metric


class Telemetry:
    """Metrics of one replica, in a separate registry.

    Args:
        replica: name of the replica, a label of every metric, because a scrape through a proxy reaches any replica.
    """

    def __init__(self, replica: str) -> None:
        registry = CollectorRegistry()
        self._all = CollectorRegistry()
        self._all.register(_Labelled(registry, replica=replica))
        ProcessCollector(registry=registry)
        self.requests = Counter(
            "cllm4rec_requests", "Requests answered.", ["method", "path", "status"], registry=registry
        )
        self.latency = Histogram(
            "cllm4rec_request_seconds", "Time to answer a request.", ["path"], buckets=_SECONDS, registry=registry
        )
        self.batch_size = Histogram(
            "cllm4rec_batch_size", "Requests answered by one forward.", buckets=_SIZES, registry=registry
        )
        self.fallbacks = Counter(
            "cllm4rec_fallbacks", "Lists of popular items, because no item of the history is known.", registry=registry
        )
        self.unknown_items = Counter(
            "cllm4rec_unknown_history_items", "History items unknown to the run.", registry=registry
        )
        self.waiting = Gauge(
            "cllm4rec_waiting_requests", "Requests running or waiting for the model.", registry=registry
        )
        self.step = Gauge("cllm4rec_checkpoint_step", "Training step of the checkpoint in use.", registry=registry)
        self.reloads = Counter(
            "cllm4rec_checkpoint_reloads", "New checkpoints of the run, by outcome.", ["outcome"], registry=registry
        )

    def text(self) -> bytes:
        """Return all metrics in Prometheus' text format."""
        return generate_latest(self._all)
