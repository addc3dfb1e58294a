"""The operator's Prometheus metrics, in a registry of their own."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from shoal.api.status import ColdStartStatus

_BUCKETS: Final = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
_START_BUCKETS: Final = (0.1, 0.3, 1.0, 2.0, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 300.0, 600.0)


@dataclass(frozen=True, slots=True)
class ServiceFigures:
    """What is told of one service."""

    desired_replicas: int
    canary_weight: int | None = None


class OperatorMetrics:
    """Counters that the parts of the operator write, and gauges read when somebody scrapes."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._reconciles = Histogram(
            "shoal_reconcile_seconds",
            "Time to look at one service and act.",
            buckets=_BUCKETS,
            registry=self.registry,
        )
        self._errors = Counter(
            "shoal_reconcile_errors", "Looks at a service that failed.", registry=self.registry
        )
        self._starts = Histogram(
            "shoal_cold_start_seconds",
            "Parts of the time between a replica's creation and its first request.",
            ["phase"],
            buckets=_START_BUCKETS,
            registry=self.registry,
        )
        self._calls = Counter(
            "shoal_api_requests",
            "Calls to the API server; code 0 where no answer came in time.",
            ["verb", "code"],
            registry=self.registry,
        )

    def started(self, start: ColdStartStatus) -> None:
        for part in start.phases:
            self._starts.labels(part.phase).observe(part.seconds)

    def reconciled(self, seconds: float) -> None:
        self._reconciles.observe(seconds)

    def failed(self) -> None:
        self._errors.inc()

    def called(self, verb: str, code: int) -> None:
        self._calls.labels(verb, str(code)).inc()

    def show(
        self,
        *,
        leads: Callable[[], bool],
        queued: Callable[[], int],
        services: Callable[[], Mapping[str, ServiceFigures]],
    ) -> None:
        """Adds the gauges; to be called once."""
        self.registry.register(_Gauges(leads, queued, services))


class _Gauges(Collector):
    def __init__(
        self,
        leads: Callable[[], bool],
        queued: Callable[[], int],
        services: Callable[[], Mapping[str, ServiceFigures]],
    ) -> None:
        self._leads = leads
        self._queued = queued
        self._services = services

    def collect(self) -> Iterable[Metric]:
        yield GaugeMetricFamily(
            "shoal_leader", "1 where this operator leads.", value=float(self._leads())
        )
        yield GaugeMetricFamily(
            "shoal_work_queue_depth", "Services that wait to be looked at.", value=self._queued()
        )
        desired = GaugeMetricFamily(
            "shoal_desired_replicas", "Replicas that are wanted.", labels=["service"]
        )
        canary = GaugeMetricFamily(
            "shoal_canary_weight", "Percent of requests at the canary.", labels=["service"]
        )
        for name, figures in self._services().items():
            desired.add_metric([name], figures.desired_replicas)
            if figures.canary_weight is not None:
                canary.add_metric([name], figures.canary_weight)
        yield desired
        yield canary
