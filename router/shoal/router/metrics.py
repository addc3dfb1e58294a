"""Prometheus metrics of the router, read from the services' figures when somebody scrapes."""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from shoal.router.histogram import Histogram
from shoal.router.load import ServiceStats

if TYPE_CHECKING:
    from shoal.router.core import Service


class RouterCollector(Collector):
    """`services` is the core's own mapping, which changes as services come and go."""

    def __init__(self, services: "Mapping[str, Service]") -> None:
        self._services = services

    def describe(self) -> list[Metric]:
        return list(self.collect())

    def collect(self) -> Iterator[Metric]:
        services = dict(self._services)
        stats = {name: service.dispatcher.stats for name, service in services.items()}
        yield from _counters(stats)
        yield from _gauges(services)
        yield _by_service(
            "queue_seconds", "Time in the queue", {n: s.queue for n, s in stats.items()}
        )
        yield _by_service(
            "route_seconds", "Time to choose a replica", {n: s.route for n, s in stats.items()}
        )
        revisions = [
            ((service, name), revision)
            for service, figures in stats.items()
            for name, revision in figures.revisions.items()
        ]
        yield _by_revision(
            "time_to_first_token_seconds",
            "From arrival to the first token",
            [(labels, revision.ttft) for labels, revision in revisions],
        )
        yield _by_revision(
            "inter_token_seconds",
            "Between tokens of one sample",
            [(labels, revision.itl) for labels, revision in revisions],
        )
        yield _by_revision(
            "request_seconds",
            "From arrival to the end",
            [(labels, revision.duration) for labels, revision in revisions],
        )


def _counters(stats: Mapping[str, ServiceStats]) -> Iterator[Metric]:
    requests = CounterMetricFamily(
        "shoal_requests", "Requests that ended", labels=["service", "revision", "code"]
    )
    retries = CounterMetricFamily(
        "shoal_retries", "Requests sent again before their first token", labels=["service"]
    )
    migrations = CounterMetricFamily(
        "shoal_migrations", "Samples continued on another replica", labels=["service"]
    )
    rejected = CounterMetricFamily(
        "shoal_rejected", "Requests turned away", labels=["service", "reason"]
    )
    for service, figures in stats.items():
        for name, revision in figures.revisions.items():
            for code, number in revision.codes.items():
                requests.add_metric([service, name, str(code)], number)
        retries.add_metric([service], figures.retries)
        migrations.add_metric([service], figures.migrations)
        for reason, number in figures.rejected.items():
            rejected.add_metric([service, reason], number)
    yield from (requests, retries, migrations, rejected)


def _gauges(services: "Mapping[str, Service]") -> Iterator[Metric]:
    depth = GaugeMetricFamily(
        "shoal_queue_depth", "Requests waiting for a replica", labels=["service"]
    )
    labels = ["service", "endpoint", "revision"]
    flying = GaugeMetricFamily(
        "shoal_endpoint_in_flight", "Sequences of this router on a replica", labels=labels
    )
    admitted = GaugeMetricFamily(
        "shoal_endpoint_admitted", "1 where new requests may go", labels=labels
    )
    for name, service in services.items():
        depth.add_metric([name], service.queued)
        for replica in service.dispatcher.replicas.values():
            values = [name, replica.name, replica.revision]
            flying.add_metric(values, replica.in_flight)
            admitted.add_metric(values, float(replica.available))
    yield from (depth, flying, admitted)


def _by_service(name: str, text: str, histograms: Mapping[str, Histogram]) -> Metric:
    family = HistogramMetricFamily(f"shoal_{name}", text, labels=["service"])
    for service, histogram in histograms.items():
        family.add_metric([service], histogram.cumulative(), histogram.sum)
    return family


def _by_revision(
    name: str, text: str, histograms: list[tuple[tuple[str, str], Histogram]]
) -> Metric:
    family = HistogramMetricFamily(f"shoal_{name}", text, labels=["service", "revision"])
    for labels, histogram in histograms:
        family.add_metric(list(labels), histogram.cumulative(), histogram.sum)
    return family
