"""The worker's metrics and log lines, as their readers see them."""

import io
import json
import logging
import urllib.request
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from shoal.worker.engine import EngineLoad, EngineStats, StepOutput
from shoal.worker.logs import JsonFormatter, TextFormatter, event
from shoal.worker.loop import Report
from shoal.worker.metrics import WorkerMetrics
from shoal.worker.startup import Phases

LOAD = EngineLoad(3, 2, 40, 64, 100, 0.01, 1000.0)
STATS = EngineStats(
    prompt_tokens=500,
    generated_tokens=70,
    prefix_queried_tokens=450,
    prefix_hit_tokens=320,
    preemptions=1,
)


def report(seconds: float) -> Report:
    return Report((), (), StepOutput((), (), ()), LOAD, STATS, seconds)


def scrape(metrics: WorkerMetrics) -> dict[tuple[str, tuple[str, ...]], float]:
    """Samples by name and label values, through HTTP and Prometheus' own parser."""
    server, port = metrics.listen("127.0.0.1", 0)
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
            text = answer.read().decode()
    finally:
        server.shutdown()
        server.server_close()
    return {
        (sample.name, tuple(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_every_documented_metric_is_there() -> None:
    """Names are those of the documentation, values those of the engine's last report."""
    metrics = WorkerMetrics()
    metrics.phase("load", 1.5)
    metrics.observe(report(0.004))
    metrics.observe(report(0.2))
    values = scrape(metrics)
    assert values["shoal_requests_running", ()] == 3
    assert values["shoal_requests_waiting", ()] == 2
    assert values["shoal_kv_blocks_used", ()] == 40
    assert values["shoal_kv_blocks_total", ()] == 64
    assert values["shoal_prefix_cache_queries_tokens_total", ()] == 450
    assert values["shoal_prefix_cache_hit_tokens_total", ()] == 320
    assert values["shoal_prompt_tokens_total", ()] == 500
    assert values["shoal_generation_tokens_total", ()] == 70
    assert values["shoal_preemptions_total", ()] == 1
    assert values["shoal_step_seconds_count", ()] == 2
    assert values["shoal_step_seconds_bucket", ("0.005",)] == 1
    assert values["shoal_startup_phase_seconds", ("load",)] == 1.5


def test_before_the_first_step_there_are_phases_only() -> None:
    """A scrape during the start-up works."""
    metrics = WorkerMetrics()
    metrics.phase("import", 2.0)
    values = scrape(metrics)
    assert values["shoal_startup_phase_seconds", ("import",)] == 2.0
    assert ("shoal_requests_running", ()) not in values


def logged(formatter: logging.Formatter, **fields: Any) -> str:
    stream = io.StringIO()
    log = logging.Logger("shoal.test")
    handler = logging.StreamHandler(stream)
    handler.setFormatter(formatter)
    log.addHandler(handler)
    event(log, "startup phase", **fields)
    return stream.getvalue()


def test_a_text_line_is_words_then_fields() -> None:
    """Values that hold spaces or quotes are quoted, so that a line can be cut at its spaces."""
    line = logged(TextFormatter(), phase="load", seconds=1.25, what='two "words"', empty="")
    assert line[9:] == ('startup phase phase=load seconds=1.25 what="two \\"words\\"" empty=""\n')


def test_a_json_line_is_one_object() -> None:
    """The same fields, beside time, level and event."""
    content = json.loads(logged(JsonFormatter(), phase="load", seconds=1.25))
    assert content["event"] == "startup phase"
    assert (content["phase"], content["seconds"], content["level"]) == ("load", 1.25, "info")


def test_a_phase_is_logged_and_recorded(caplog: pytest.LogCaptureFixture) -> None:
    """Name and seconds go to the log and to the callback."""
    caplog.set_level(logging.INFO)
    recorded: list[tuple[str, float]] = []
    now = iter((10.0, 12.5))
    phases = Phases(lambda name, seconds: recorded.append((name, seconds)), lambda: next(now))
    with phases.phase("load"):
        pass
    assert recorded == [("load", 2.5)]
    assert caplog.messages == ["startup phase"]


def test_progress_is_told_a_few_times_a_second(caplog: pytest.LogCaptureFixture) -> None:
    """Repetitions within half a second are dropped, a new step and the end never are."""
    caplog.set_level(logging.INFO)
    now = [0.0]
    progress = Phases(clock=lambda: now[0]).progress("resolve")
    for step in range(101):
        now[0] = step * 0.01
        progress("downloading", step / 100)
    progress("installed", None)
    shares = [getattr(record, "shoal_fields", {}).get("fraction") for record in caplog.records]
    assert shares == [0.0, 0.5, 1.0, None]
