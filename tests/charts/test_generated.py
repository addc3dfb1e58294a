"""What follows from the charts is committed as generated, and speaks of metrics that exist."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from prometheus_client.metrics_core import Metric

from charts import generate
from shoal.operator.kube.metrics import OperatorMetrics, ServiceFigures
from shoal.router.metrics import RouterCollector
from shoal.worker.engine import EngineLoad, EngineStats
from shoal.worker.loop import Report
from shoal.worker.metrics import WorkerMetrics

if TYPE_CHECKING:
    from tests.charts.conftest import Render

ROOT = Path(__file__).parents[2]
_SUFFIXES = {"counter": ("_total",), "gauge": ("",), "histogram": ("_bucket", "_sum", "_count")}


def series(families: Iterable[Metric]) -> set[str]:
    """Names of the series of some metric families."""
    return {family.name + suffix for family in families for suffix in _SUFFIXES[family.type]}


def known_series() -> set[str]:
    """Every series that a component of Shoal exports."""
    worker = WorkerMetrics()
    worker.observe(
        Report((), (), None, EngineLoad(0, 0, 0, 1, 0, 0, 0), EngineStats(0, 0, 0, 0, 0), 0)
    )
    operator = OperatorMetrics()
    operator.show(
        leads=lambda: True, queued=lambda: 0, services=lambda: {"a": ServiceFigures(1, 5)}
    )
    exported = (RouterCollector({}), worker.registry, operator.registry)
    return set().union(*(series(one.collect()) for one in exported))


def used_series(expressions: Iterable[str]) -> set[str]:
    return {name for text in expressions for name in re.findall(r"\bshoal_[a-z_]+", text)}


@pytest.mark.usefixtures("helm_binary")
def test_the_tree_is_up_to_date(capsys: pytest.CaptureFixture[str]) -> None:
    """Schemas, tables, dashboard and manifests are what charts and types say."""
    assert generate.main(["--check"]) == 0, capsys.readouterr().out


def test_the_dashboard_shows_metrics_that_exist() -> None:
    """Every series of every panel and variable is exported by a component."""
    board = generate.dashboard()
    expressions = [target["expr"] for p in board["panels"] for target in p.get("targets", ())]
    variables = [v["query"]["query"] for v in board["templating"]["list"] if v["type"] == "query"]
    used = used_series([*expressions, *variables])
    assert used
    assert used <= known_series()


def test_alerts_speak_of_metrics_that_exist(render: "Render") -> None:
    """An alert on a series that nobody exports could never fire."""
    groups = render("monitoring.enabled=true", "monitoring.alerts.enabled=true").one(
        "PrometheusRule", "shoal"
    )["spec"]
    used = used_series(rule["expr"] for group in groups["groups"] for rule in group["rules"])
    assert used
    assert used <= known_series()
