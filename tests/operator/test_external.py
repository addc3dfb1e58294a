"""What other autoscalers are given: metrics, targets and the objects that name them."""

import pytest

from shoal.api.types import ScalingDriver
from shoal.operator.autoscale_load import Load
from shoal.operator.children import desired_children
from shoal.operator.external import (
    FILLED,
    autoscaler,
    external_metrics,
    has_work,
    quantity,
    values,
)
from shoal.operator.observe import Observed
from shoal.operator.platform import LOCAL, Platform
from shoal.operator.scaler import Scalers, planned_replicas
from shoal.operator.unsupported import unsupported
from tests.operator.conftest import make_service


def driven(driver="hpa", replicas=2, **autoscaling):
    scaling = {"driver": driver, "maxReplicas": 8, **autoscaling}
    return make_service(replicas=replicas, engine={"maxNumSeqs": 4}, autoscaling=scaling)


def load(queued=0, running=(), kv=(), ttft=None, complete=True, idle=0.0):
    names = [f"p{n}" for n in range(max(len(running), len(kv)))]
    return Load(
        queued=queued,
        in_flight=dict(zip(names, running, strict=False)),
        kv=dict(zip(names, kv, strict=False)),
        ttft_p95=ttft,
        idle_seconds=idle,
        complete=complete,
    )


ALL = [
    {"type": "QueueDepth", "target": 4},
    {"type": "Running", "target": 12},
    {"type": "KvUtilization", "target": 0.8},
    {"type": "TtftP95", "target": 1.5},
]


def test_metrics_are_totals_and_one_value():
    """Queues, sequences and shares add up; a time does not."""
    found = values(driven(), load(queued=3, running=(2.0, 4.0), kv=(0.25, 0.5), ttft=0.9))
    assert found["shoal_queue_depth"] == 3
    assert found["shoal_running"] == 6
    assert found["shoal_kv_utilization"] == 0.75
    assert found["shoal_ttft_p95_seconds"] == 0.9
    assert "shoal_ttft_p95_seconds" not in values(driven(), load())


@pytest.mark.parametrize(
    ("now", "filled"),
    [
        (load(running=(4.0, 4.0)), 2),
        (load(running=(2.0, 1.0)), 1),
        (load(), 0),
        (load(queued=1), 2),
        (load(complete=False), 2),
        (load(running=(4.0, 4.0, 4.0, 4.0)), 2),
    ],
)
def test_what_is_filled_stays(now, filled):
    """Work in full replicas; all of them while anything waits or a router is silent, and never
    more than there are: it is no reason to grow."""
    assert values(driven(replicas=2), now)[FILLED] == filled


def test_an_autoscaler_gets_every_metric_and_the_users_rules():
    """Targets, bounds and behavior as in the spec, aimed at the service itself."""
    chat = driven(
        minReplicas=1,
        metrics=ALL,
        behavior={"scaleDown": {"stabilizationWindowSeconds": 60, "tolerance": 0.25}},
    )
    spec = autoscaler(chat)["spec"]
    assert spec["scaleTargetRef"]["kind"] == "InferenceService"
    assert (spec["minReplicas"], spec["maxReplicas"]) == (1, 8)
    targets = {m["external"]["metric"]["name"]: m["external"]["target"] for m in spec["metrics"]}
    assert targets == {
        "shoal_queue_depth": {"type": "AverageValue", "averageValue": "4"},
        "shoal_running": {"type": "AverageValue", "averageValue": "12"},
        "shoal_kv_utilization": {"type": "AverageValue", "averageValue": "800m"},
        "shoal_ttft_p95_seconds": {"type": "Value", "value": "1500m"},
        FILLED: {"type": "AverageValue", "averageValue": "1"},
    }
    down = spec["behavior"]["scaleDown"]
    assert (down["stabilizationWindowSeconds"], down["tolerance"]) == (60, "250m")
    assert "tolerance" not in spec["behavior"]["scaleUp"]


def test_keda_gets_a_trigger_a_metric_and_the_way_to_zero():
    """One of them pushes; idleSeconds is the cooldown."""
    chat = driven("keda", minReplicas=0, scaleToZero={"idleSeconds": 45})
    spec = autoscaler(chat, "op.shoal.svc:9092")["spec"]
    assert (spec["minReplicaCount"], spec["cooldownPeriod"]) == (0, 45)
    kinds = {t["metadata"]["metric"]: t["type"] for t in spec["triggers"]}
    assert kinds == {"shoal_queue_depth": "external", FILLED: "external-push"}
    assert {t["metadata"]["scalerAddress"] for t in spec["triggers"]} == {"op.shoal.svc:9092"}


def test_the_object_is_made_where_its_driver_is_switched_on():
    """None for our own autoscaler, and none that nobody could feed."""
    chat = driven()

    def kinds(service, *drivers):
        found = desired_children(service, Observed(), monitors=False, drivers=drivers)
        return {child["kind"] for child in found}

    assert "HorizontalPodAutoscaler" in kinds(chat, ScalingDriver.HPA)
    assert "HorizontalPodAutoscaler" not in kinds(chat, ScalingDriver.KEDA)
    internal = driven("internal")
    assert "HorizontalPodAutoscaler" not in kinds(internal, *ScalingDriver)
    assert autoscaler(internal) is None


@pytest.mark.parametrize("driver", ["hpa", "keda"])
def test_a_driver_that_is_not_there_is_named(driver):
    """On one machine, and on a cluster whose chart leaves it out; not where it is on."""
    spec = driven(driver).spec
    assert unsupported(spec, LOCAL) == [
        f"only on Kubernetes: spec.autoscaling.driver={driver} (here: internal)"
    ]
    (sentence,) = unsupported(spec, Platform())
    assert sentence.startswith(f"switched off: spec.autoscaling.driver={driver} (")
    assert unsupported(spec, Platform(drivers=frozenset(ScalingDriver))) == []


def test_whoever_drives_writes_the_number():
    """The operator brings about spec.replicas, and its status says who decides."""
    observed = Observed()
    view = Scalers().look("k", driven(replicas=5), observed, 0.0)
    assert (view.wanted, view.reason, view.active) == (5, "DrivenByHpa", True)
    assert planned_replicas(driven(replicas=5), observed) == 5


def test_work_is_what_waits_runs_or_has_just_ended():
    """A service sleeps only once nothing of that is there and every router says so."""
    assert has_work(load(queued=1, idle=0.0))
    assert has_work(load(running=(1.0,), idle=0.0))
    assert has_work(load(idle=1.0))
    assert has_work(load(idle=900.0, complete=False))
    assert not has_work(load(idle=900.0))


@pytest.mark.parametrize(
    ("value", "text"), [(4.0, "4"), (0.8, "800m"), (1.5, "1500m"), (0.0004, "0"), (0.0, "0")]
)
def test_numbers_are_written_in_thousandths(value, text):
    """As the autoscaler counts."""
    assert quantity(value) == text


def test_every_metric_that_is_asked_for_has_a_value():
    """No target names a figure that is never served."""
    chat = driven(metrics=ALL)
    served = values(chat, load(ttft=0.1))
    assert {metric.name for metric in external_metrics(chat.spec.autoscaling)} == set(served)
