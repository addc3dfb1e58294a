"""The worker's Prometheus metrics, in a registry of their own.

Totals and gauges are read from the last report when somebody scrapes; only the step histogram
costs anything in a step.
"""

from collections.abc import Callable, Iterable
from wsgiref.simple_server import WSGIServer

from prometheus_client import CollectorRegistry, Gauge, Histogram, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from shoal.worker.engine import EngineLoad, EngineStats
from shoal.worker.loop import Report

_STEP_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_SWAP_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0)

_GAUGES: tuple[tuple[str, str, Callable[[EngineLoad], float]], ...] = (
    ("shoal_requests_running", "Sequences that hold KV blocks.", lambda load: load.running),
    ("shoal_requests_waiting", "Sequences admitted but not running.", lambda load: load.waiting),
    ("shoal_kv_blocks_used", "KV blocks held by running sequences.", lambda load: load.blocks_used),
    ("shoal_kv_blocks_total", "KV blocks of the pool.", lambda load: load.blocks_total),
)
_TOTALS: tuple[tuple[str, str, Callable[[EngineStats], float]], ...] = (
    (
        "shoal_prefix_cache_queries_tokens",
        "Prompt tokens looked up in the prefix cache.",
        lambda stats: stats.prefix_queried_tokens,
    ),
    (
        "shoal_prefix_cache_hit_tokens",
        "Prompt tokens found in the prefix cache.",
        lambda stats: stats.prefix_hit_tokens,
    ),
    (
        "shoal_prompt_tokens",
        "Prompt tokens of admitted requests.",
        lambda stats: stats.prompt_tokens,
    ),
    ("shoal_generation_tokens", "Tokens generated.", lambda stats: stats.generated_tokens),
    (
        "shoal_preemptions",
        "Times a running sequence gave its blocks up.",
        lambda stats: stats.preemptions,
    ),
)


class WorkerMetrics(Collector):
    """Everything the worker tells Prometheus."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._last: Report | None = None
        self._steps = Histogram(
            "shoal_step_seconds",
            "Time of an engine step.",
            buckets=_STEP_BUCKETS,
            registry=self.registry,
        )
        self._phases = Gauge(
            "shoal_startup_phase_seconds",
            "Time a phase of the start-up took.",
            ["phase"],
            registry=self.registry,
        )
        self._swaps = Histogram(
            "shoal_swap_pause_seconds",
            "Time for which a swap of weights kept the engine from stepping.",
            buckets=_SWAP_BUCKETS,
            registry=self.registry,
        )
        self.registry.register(self)

    def phase(self, name: str, seconds: float) -> None:
        self._phases.labels(name).set(seconds)

    def swapped(self, pause_seconds: float) -> None:
        """Takes note of a swap of weights."""
        self._swaps.observe(pause_seconds)

    def observe(self, report: Report) -> None:
        """Takes note of a turn of the engine's loop."""
        self._last = report
        if report.output is not None:
            self._steps.observe(report.step_seconds)

    def collect(self) -> Iterable[Metric]:
        last = self._last
        if last is None:
            return
        for name, text, load_value in _GAUGES:
            yield GaugeMetricFamily(name, text, value=load_value(last.load))
        for name, text, total in _TOTALS:
            yield CounterMetricFamily(name, text, value=total(last.stats))

    def listen(self, host: str, port: int) -> tuple[WSGIServer, int]:
        """Serves /metrics from a thread; returns the server and its port (of 0: a free one).
        Raises OSError where the port cannot be had."""
        server, _ = start_http_server(port, host, self.registry)
        return server, server.server_port
