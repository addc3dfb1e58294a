"""What tables and `logs` make of a live pod."""

from typing import Any

import pytest

from shoal.cli.kube.pods import containers_to_log, event_view, pod_view, seconds_of
from tests.cli.kube_server import live_pod


def container(state: dict[str, Any], name: str = "worker", **more: Any) -> dict[str, Any]:
    return {"name": name, "ready": False, "restartCount": 0, "state": state, **more}


RUNNING: dict[str, Any] = {"running": {}}
INITIALIZING = {"waiting": {"reason": "PodInitializing"}}
DONE = {"terminated": {"exitCode": 0, "reason": "Completed"}}
CRASH = {"terminated": {"exitCode": 1, "reason": "Error", "message": "cannot serve: no\n"}}
BACK_OFF = {"waiting": {"reason": "CrashLoopBackOff", "message": "back-off 10s"}}


@pytest.mark.parametrize(
    ("init", "main", "status", "message"),
    [
        ([], [container(RUNNING)], "Starting", ""),
        ([container(RUNNING, "fetch")], [container(INITIALIZING)], "Init:fetch", ""),
        (
            [container(CRASH, "fetch")],
            [container(INITIALIZING)],
            "Init:Error",
            "fetch ended with exit code 1 (Error): cannot serve: no",
        ),
        (
            [container(DONE, "fetch")],
            [container(BACK_OFF, lastState=CRASH)],
            "CrashLoopBackOff",
            "worker ended with exit code 1 (Error): cannot serve: no",
        ),
        (
            [],
            [container({"waiting": {"reason": "ImagePullBackOff", "message": "no image"}})],
            "ImagePullBackOff",
            "worker: no image",
        ),
    ],
)
def test_one_word_and_one_sentence(
    init: list[Any], main: list[Any], status: str, message: str
) -> None:
    """The word is kubectl's; the sentence tells the end of the container, not its back-off."""
    pod = live_pod(
        "p",
        conditions=[{"type": "Ready", "status": "False"}],
        initContainerStatuses=init,
        containerStatuses=main,
    )
    view = pod_view(pod)
    assert (view.status, view.message, view.ready) == (status, message, "0/1")


def test_a_pod_that_no_node_takes() -> None:
    """The scheduler's words; no address and no node yet."""
    reason = {"type": "PodScheduled", "status": "False", "message": "0/3 nodes are available"}
    pod = live_pod("p", phase="Pending", conditions=[reason], containerStatuses=None, podIP=None)
    del pod["spec"]["nodeName"]
    view = pod_view(pod)
    assert (view.status, view.message) == ("Pending", "0/3 nodes are available")
    assert (view.place, view.address, view.ready) == ("", "", "0/1")


def test_a_pod_on_its_way_out_and_one_that_was_evicted() -> None:
    """A deletion shows before all else; an eviction has the kubelet's words."""
    leaving = live_pod("p")
    leaving["metadata"]["deletionTimestamp"] = "2025-01-01T00:00:00Z"
    assert pod_view(leaving).status == "Terminating"
    evicted = live_pod("p", phase="Failed", reason="Evicted", message="low on memory")
    evicted["status"]["containerStatuses"] = []
    assert (pod_view(evicted).status, pod_view(evicted).message) == ("Evicted", "low on memory")


def test_a_pod_that_serves() -> None:
    """Everything a wide table has."""
    view = pod_view(live_pod("p"))
    assert (view.ready, view.status, view.message) == ("1/1", "Running", "")
    assert (view.service, view.role, view.revision) == ("chat", "leader", "abc1234567")
    assert (view.place, view.address) == ("node1", "10.0.0.7:9000")


@pytest.mark.parametrize(
    ("init", "main", "names"),
    [
        ([container(RUNNING, "fetch")], [container(INITIALIZING)], ["fetch"]),
        ([container(DONE, "fetch")], [container(RUNNING)], ["worker"]),
        ([container(DONE, "fetch")], [container(BACK_OFF, lastState=CRASH)], ["worker"]),
        ([container(INITIALIZING, "fetch")], [container(INITIALIZING)], []),
    ],
)
def test_whose_log_is_worth_reading(init: list[Any], main: list[Any], names: list[str]) -> None:
    """The worker's once it began, before that the init container's."""
    pod = live_pod("p", initContainerStatuses=init, containerStatuses=main)
    assert containers_to_log(pod) == names


def test_events_of_both_kinds_of_counting() -> None:
    """A series counts by itself; without one the old fields do."""
    about = {"kind": "Pod", "name": "p"}
    old = event_view({"involvedObject": about, "count": 2, "lastTimestamp": "2025-01-01T00:00:00Z"})
    assert (old.subject, old.count) == ("pod/p", 2)
    series = {"count": 5, "lastObservedTime": "2025-01-02T00:00:00.000000Z"}
    new = event_view({"involvedObject": about, "series": series, "eventTime": None})
    assert (new.count, new.last) == (5, seconds_of("2025-01-02T00:00:00Z"))
    assert seconds_of(None) == 0
