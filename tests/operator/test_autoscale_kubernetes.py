"""The autoscaler against decisions recorded from Kubernetes' own HorizontalPodAutoscaler code."""

import json
from pathlib import Path

import pytest

from shoal.api.scaling import ScalingBehavior
from shoal.operator.autoscale_behavior import Memory, Wish, changed, limit, remember, stabilize
from shoal.operator.autoscale_metrics import Replicas, Tolerance, overall, per_replica, shared

RECORDED = json.loads((Path(__file__).parent / "data" / "hpa.json").read_text())


def replay(series):
    """Our wanted numbers for a recorded series of wishes."""
    behavior = ScalingBehavior.model_validate(series["behavior"])
    now, wanted, memory = 1_000_000.0, series["start"], Memory()
    numbers = []
    for wish in series["wishes"]:
        if not memory.wishes:
            memory = Memory((Wish(now, wanted),))
        goal = stabilize(wish, wanted, memory.wishes, behavior, now).count
        count = limit(
            goal, wanted, series["min"], series["max"], memory.changes, behavior, now
        ).count
        memory = Memory(remember(memory.wishes, Wish(now, wish), behavior), memory.changes)
        if count != wanted:
            memory = changed(memory, count - wanted, behavior, now)
        wanted = count
        numbers.append(wanted)
        now += series["step"]
    return numbers


@pytest.mark.parametrize("number", range(len(RECORDED["series"])))
def test_windows_and_policies_decide_as_kubernetes(number):
    """Stabilisation, policies and bounds give the recorded count at every look."""
    series = RECORDED["series"][number]
    assert replay(series) == series["wanted"]


def test_recorded_series_exercise_every_rule():
    """The recordings move up and down, and hold still, often enough to prove something."""
    steps = [
        after - before
        for series in RECORDED["series"]
        for before, after in zip(series["wanted"], series["wanted"][1:], strict=False)
    ]
    assert sum(step > 0 for step in steps) > 100
    assert sum(step < 0 for step in steps) > 100
    assert sum(step == 0 for step in steps) > 1000


def calculated(case):
    replicas = Replicas(case["current"], case["ready"], case["pending"])
    tolerance = Tolerance(case["up"], case["down"])
    target = case["target"] / 1000
    values = {name: value / 1000 for name, value in case["values"].items()}
    asked = per_replica(values, replicas, target, tolerance)
    return {
        "per_replica": -1 if asked is None else asked,
        "overall": overall(case["total"] / 1000, replicas, target, tolerance),
        "shared": shared(case["total"] / 1000, replicas, target, tolerance),
    }


def test_metrics_ask_for_as_many_replicas_as_kubernetes():
    """Missing, starting and tolerated values give the recorded count in every case."""
    cases = RECORDED["metrics"]
    different = [
        (case, calculated(case))
        for case in cases
        if calculated(case) != {name: case[name] for name in ("per_replica", "overall", "shared")}
    ]
    assert different == []
    assert sum(case["per_replica"] not in (-1, case["current"]) for case in cases) > 100
