"""Grafana's dashboard: what users of a service feel, then its replicas, then the operator."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final

Json = dict[str, Any]

_SOURCE: Final = {"type": "prometheus", "uid": "${datasource}"}
_SERVICE: Final = 'service=~"$service"'
_WIDTH, _HEIGHT, _COLUMNS = 8, 8, 24
_RATE: Final = "[$__rate_interval]"


@dataclass(frozen=True, slots=True)
class Panel:
    """One time series panel: queries with the legend of their lines; `unit` is Grafana's name."""

    title: str
    queries: tuple[tuple[str, str], ...]
    unit: str = "short"
    description: str = ""


def _quantiles(metric: str, by: str = "service") -> tuple[tuple[str, str], ...]:
    legend = " ".join(f"{{{{{label}}}}}" for label in by.split(", "))
    return tuple(
        (
            f"histogram_quantile({quantile}, sum by ({by}, le) "
            f"(rate({metric}_bucket{{{_SERVICE}}}{_RATE})))",
            f"{legend} p{round(quantile * 100)}",
        )
        for quantile in (0.5, 0.95)
    )


def _rate(metric: str, by: str, matchers: str = _SERVICE) -> tuple[tuple[str, str], ...]:
    legend = " ".join(f"{{{{{label}}}}}" for label in by.split(", "))
    return ((f"sum by ({by}) (rate({metric}{{{matchers}}}{_RATE}))", legend),)


SERVING: Final = (
    Panel("Requests", _rate("shoal_requests_total", "service, code"), "reqps"),
    Panel("Time to first token", _quantiles("shoal_time_to_first_token_seconds"), "s"),
    Panel("Time between tokens", _quantiles("shoal_inter_token_seconds"), "s"),
    Panel("Time of whole requests", _quantiles("shoal_request_seconds"), "s"),
    Panel(
        "Queue",
        ((f"sum by (service) (shoal_queue_depth{{{_SERVICE}}})", "{{service}}"),),
        description="Requests that wait in the routers for a replica.",
    ),
    Panel("Time in the queue", _quantiles("shoal_queue_seconds"), "s"),
    Panel("Requests turned away", _rate("shoal_rejected_total", "service, reason"), "reqps"),
    Panel(
        "Retries and migrations",
        (
            *_rate("shoal_retries_total", "service"),
            *_rate("shoal_migrations_total", "service"),
        ),
        "reqps",
        "Requests sent again before their first token, and streams continued elsewhere after it.",
    ),
    Panel(
        "First token by revision",
        _quantiles("shoal_time_to_first_token_seconds", "service, revision"),
        "s",
        "Two revisions side by side during a rollout.",
    ),
)
_POD: Final = 'namespace=~"$namespace"'
REPLICAS: Final = (
    Panel(
        "Replicas wanted, and taking requests",
        (
            (f"max by (service) (shoal_desired_replicas{{{_SERVICE}}})", "{{service}} wanted"),
            (
                f"max by (service) (sum by (service, pod) (shoal_endpoint_admitted{{{_SERVICE}}}))",
                "{{service}}",
            ),
        ),
        description="Taking requests: as the router that sees most of them has it.",
    ),
    Panel(
        "Sequences on each replica",
        ((f"sum by (endpoint) (shoal_endpoint_in_flight{{{_SERVICE}}})", "{{endpoint}}"),),
    ),
    Panel(
        "KV cache in use",
        ((f"shoal_kv_blocks_used{{{_POD}}} / shoal_kv_blocks_total{{{_POD}}}", "{{pod}}"),),
        "percentunit",
    ),
    Panel(
        "Prefix cache hits",
        (
            (
                f"sum by (pod) (rate(shoal_prefix_cache_hit_tokens_total{{{_POD}}}{_RATE}))"
                f" / sum by (pod) (rate(shoal_prefix_cache_queries_tokens_total{{{_POD}}}{_RATE}))",
                "{{pod}}",
            ),
        ),
        "percentunit",
        "Share of prompt tokens that were not computed again.",
    ),
    Panel(
        "Tokens generated",
        _rate("shoal_generation_tokens_total", "pod", _POD),
        "short",
        "A second.",
    ),
    Panel("Prompt tokens", _rate("shoal_prompt_tokens_total", "pod", _POD), "short", "A second."),
    Panel(
        "Sequences in engines",
        (
            (f"shoal_requests_running{{{_POD}}}", "{{pod}} running"),
            (f"shoal_requests_waiting{{{_POD}}}", "{{pod}} waiting"),
        ),
    ),
    Panel(
        "Time of an engine's step",
        (
            (
                "histogram_quantile(0.95, sum by (pod, le) "
                f"(rate(shoal_step_seconds_bucket{{{_POD}}}{_RATE})))",
                "{{pod}} p95",
            ),
        ),
        "s",
    ),
    Panel("Preemptions", _rate("shoal_preemptions_total", "pod", _POD), "ops"),
    Panel(
        "Time of the start-up",
        ((f"shoal_startup_phase_seconds{{{_POD}}}", "{{pod}} {{phase}}"),),
        "s",
    ),
)
CONTROL: Final = (
    Panel("Leader", (("max by (pod) (shoal_leader)", "{{pod}}"),)),
    Panel(
        "Looks at services",
        (
            (f"sum(rate(shoal_reconcile_seconds_count{_RATE}))", "all"),
            (f"sum(rate(shoal_reconcile_errors_total{_RATE}))", "failed"),
        ),
        "ops",
    ),
    Panel(
        "Time of a look",
        (
            (
                "histogram_quantile(0.95, sum by (le) "
                f"(rate(shoal_reconcile_seconds_bucket{_RATE})))",
                "p95",
            ),
        ),
        "s",
    ),
    Panel("Services that wait for a look", (("max(shoal_work_queue_depth)", "waiting"),)),
    Panel("Calls to the API server", _rate("shoal_api_requests_total", "verb, code", ""), "ops"),
)


def dashboard() -> Json:
    """The dashboard as Grafana imports it."""
    return {
        "uid": "shoal-serving",
        "title": "Shoal",
        "tags": ["shoal", "llm"],
        "schemaVersion": 39,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "30s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {
            "list": [
                {
                    "name": "datasource",
                    "label": "Data source",
                    "type": "datasource",
                    "query": "prometheus",
                },
                _variable("service", "shoal_queue_depth", "Service"),
                _variable("namespace", "shoal_kv_blocks_total", "Namespace of the workers"),
            ]
        },
        "panels": list(
            _placed((("Serving", SERVING), ("Replicas", REPLICAS), ("Operator", CONTROL)))
        ),
    }


def _variable(label: str, metric: str, title: str) -> Json:
    return {
        "name": label,
        "label": title,
        "type": "query",
        "datasource": _SOURCE,
        "query": {"query": f"label_values({metric}, {label})", "refId": label},
        "refresh": 2,
        "multi": True,
        "includeAll": True,
        "allValue": ".*",
    }


def _placed(rows: Iterable[tuple[str, tuple[Panel, ...]]]) -> Iterable[Json]:
    """Rows of panels, three beside each other."""
    number, y = 0, 0
    for title, panels in rows:
        number += 1
        yield {
            "id": number,
            "type": "row",
            "title": title,
            "collapsed": False,
            "gridPos": {"h": 1, "w": _COLUMNS, "x": 0, "y": y},
            "panels": [],
        }
        y += 1
        for place, panel in enumerate(panels):
            number += 1
            line, column = divmod(place, _COLUMNS // _WIDTH)
            yield _drawn(panel, number, x=column * _WIDTH, y=y + line * _HEIGHT)
        y += -(-len(panels) * _WIDTH // _COLUMNS) * _HEIGHT


def _drawn(panel: Panel, number: int, *, x: int, y: int) -> Json:
    return {
        "id": number,
        "type": "timeseries",
        "title": panel.title,
        "description": panel.description,
        "datasource": _SOURCE,
        "gridPos": {"h": _HEIGHT, "w": _WIDTH, "x": x, "y": y},
        "fieldConfig": {"defaults": {"unit": panel.unit, "min": 0}, "overrides": []},
        "options": {
            "legend": {"displayMode": "list", "placement": "bottom"},
            "tooltip": {"mode": "multi", "sort": "desc"},
        },
        "targets": [
            {
                "refId": chr(ord("A") + index),
                "datasource": _SOURCE,
                "expr": expression,
                "legendFormat": legend,
            }
            for index, (expression, legend) in enumerate(panel.queries)
        ],
    }
