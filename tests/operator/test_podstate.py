"""Live pods in words: each trouble names container and cause, and the field that helps."""

from copy import deepcopy

import pytest

from shoal.operator.containers import CREATING, WAITING
from shoal.operator.observe import FAILING
from shoal.operator.podstate import fetching, observed_pod

RUNNING = {"name": "worker", "state": {"running": {}}, "started": True, "ready": True}
UP = {"node-a": True}


def pod(*, containers=(), init=(), conditions=(), **status):
    """A worker pod on node-a."""
    worker = {"name": "worker", "image": "reg/worker:1"}
    worker["resources"] = {"limits": {"memory": "2Gi"}}
    inits = [{"name": "own-cache"}, {"name": "fetch"}]
    return {
        "metadata": {
            "name": "chat-abcde-1-2",
            "labels": {
                "serving.shoal.dev/revision": "abcde12345",
                "serving.shoal.dev/replica": "1",
                "serving.shoal.dev/member": "2",
                "serving.shoal.dev/group-size": "4",
            },
            "creationTimestamp": "2026-01-02T03:04:05Z",
        },
        "spec": {"nodeName": "node-a", "containers": [worker], "initContainers": inits},
        "status": {
            "phase": "Pending",
            "containerStatuses": list(containers),
            "initContainerStatuses": list(init),
            "conditions": [{"type": "PodScheduled", "status": "True"}, *conditions],
            **status,
        },
    }


def ready_pod():
    ready = {"type": "Ready", "status": "True"}
    return pod(containers=[RUNNING], conditions=[ready], phase="Running", podIP="10.0.0.7")


def waiting(reason, message="", last=None, name="worker"):
    last_state = {"terminated": last} if last else {}
    return {
        "name": name,
        "state": {"waiting": {"reason": reason, "message": message}},
        "lastState": last_state,
        "restartCount": 3,
    }


def test_a_ready_pod():
    """Place, address and time come from labels and status; there is nothing to say."""
    seen = observed_pod(ready_pod(), UP)
    assert (seen.revision, seen.replica, seen.member, seen.group_size) == ("abcde12345", 1, 2, 4)
    assert (seen.address, seen.created) == ("10.0.0.7:9000", 1767323045.0)
    assert seen.ready and seen.started and not seen.lost
    assert (seen.reason, seen.message) == ("", "")


def test_an_ipv6_address_is_bracketed():
    """A bare one would swallow the port."""
    assert observed_pod({**ready_pod(), "status": {"podIP": "fd00::7"}}, UP).address == (
        "[fd00::7]:9000"
    )


OOM = {"exitCode": 137, "reason": "OOMKilled"}
DIED = {"exitCode": 1, "reason": "Error", "message": "cannot serve: no such file\n"}


@pytest.mark.parametrize(
    "live, reason, words",
    [
        (
            pod(containers=[waiting("ImagePullBackOff", 'Back-off pulling image "reg/worker:1"')]),
            "ImagePullBackOff",
            ["container worker", "reg/worker:1", "imagePullSecrets"],
        ),
        (
            pod(containers=[waiting("InvalidImageName", "couldn't parse")]),
            "InvalidImageName",
            ["container worker", "couldn't parse"],
        ),
        (
            pod(containers=[waiting("CrashLoopBackOff", last=DIED)]),
            "CrashLoopBackOff",
            ["container worker", "exit code 1: cannot serve: no such file; it is started again"],
        ),
        (
            pod(containers=[waiting("CrashLoopBackOff", last=OOM)]),
            "OOMKilled",
            ["memory limit of 2Gi", "raise spec.resources.memory"],
        ),
        (
            pod(containers=[{**RUNNING, "started": False, "ready": False,
                             "lastState": {"terminated": OOM}}]),
            "OOMKilled",
            ["it is started again"],
        ),
        (
            pod(containers=[{**RUNNING, "started": False, "ready": False,
                             "lastState": {"terminated": DIED}}]),
            "Restarted",
            ["exit code 1", "it is started again"],
        ),
        (
            pod(containers=[{**RUNNING, "ready": False}]),
            "Unhealthy",
            ["container worker runs but its readiness probe fails"],
        ),
        (
            pod(containers=[{**RUNNING, "started": False, "ready": False}]),
            "Starting",
            ["container worker loads the model"],
        ),
        (
            pod(containers=[waiting("CreateContainerConfigError", 'secret "x" not found')]),
            "CreateContainerConfigError",
            ['secret "x" not found'],
        ),
        (
            pod(
                init=[{"name": "fetch", "state": {"running": {}}}],
                containers=[waiting("PodInitializing")],
            ),
            "FetchingModel",
            ["container fetch downloads the model"],
        ),
        (
            pod(
                init=[waiting("CrashLoopBackOff", last={"exitCode": 4, "message": "disk is full"},
                              name="fetch")],
                containers=[waiting("PodInitializing")],
            ),
            "FetchFailed",
            ["container fetch", "disk is full"],
        ),
        (
            pod(
                init=[{"name": "own-cache", "state": {"terminated": {"exitCode": 0}}},
                      {"name": "fetch", "state": {"terminated": {"exitCode": 0}}}],
                containers=[waiting("PodInitializing")],
            ),
            "PodInitializing",
            ["container worker is being created"],
        ),
        (
            pod(phase="Failed", reason="Evicted", message="The node was low on resource: memory."),
            "Evicted",
            ["node-a", "low on resource: memory", "spec.resources.memory", "it is replaced"],
        ),
        (
            pod(phase="Failed", reason="UnexpectedAdmissionError", message="no GPU"),
            "UnexpectedAdmissionError",
            ["no GPU"],
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)  # fmt: skip
def test_trouble_is_told(live, reason, words):
    """Kubernetes' reason, and a message with what to look at."""
    seen = observed_pod(live, UP)
    assert not seen.ready
    assert seen.reason == reason
    assert all(word in seen.message for word in words), seen.message


@pytest.mark.parametrize(
    "said, field",
    [
        ("0/3 nodes are available: 3 Insufficient cpu.", "spec.resources.cpu"),
        ("0/3 nodes are available: 3 Insufficient memory.", "spec.resources.memory"),
        ("0/3 nodes are available: 3 Insufficient nvidia.com/gpu.", "spec.resources.gpusPerNode"),
        ("0/3 nodes: 3 node(s) had untolerated taint {a: b}.", "spec.podOverlay.spec.tolerations"),
        ("0/1: 1 node(s) didn't match Pod's node affinity/selector.", "nodeSelector"),
        ('persistentvolumeclaim "models" not found', "spec.cache.claimName"),
    ],
)
def test_the_scheduler_is_quoted_with_the_field_that_decides(said, field):
    """Unschedulable is no state to wait for in silence."""
    live = pod()
    live["spec"].pop("nodeName")
    live["status"]["conditions"] = [
        {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": said}
    ]
    seen = observed_pod(live, UP)
    assert seen.reason == "Unschedulable" and seen.reason in FAILING
    assert said.rstrip(".") in seen.message and field in seen.message


def test_a_pod_that_is_deleted_has_not_failed():
    """Its containers end because somebody wants it: no trouble, whatever phase that leaves."""
    for phase in ("Succeeded", "Failed", "Running"):
        live = pod(phase=phase)
        live["metadata"]["deletionTimestamp"] = "2026-01-02T03:05:05Z"
        seen = observed_pod(live, UP)
        assert (seen.reason, seen.deleting) == ("Terminating", True)
        assert seen.lost is (phase != "Running"), "one that has ended takes up no room"
        assert observed_pod(live, {"node-a": False}).lost, "nothing ends it on a dead node"


def test_a_crash_loop_is_one_also_between_its_crashes():
    """The reason does not come and go with every restart."""
    restarted = {**RUNNING, "started": False, "ready": False, "lastState": {"terminated": DIED}}
    once = observed_pod(pod(containers=[{**restarted, "restartCount": 1}]), UP)
    often = observed_pod(pod(containers=[{**restarted, "restartCount": 2}]), UP)
    assert (once.reason, often.reason) == ("Restarted", "CrashLoopBackOff")
    fetch = {
        "name": "fetch",
        "state": {"running": {}},
        "lastState": {"terminated": {"exitCode": 1, "message": "no such host"}},
        "restartCount": 5,
    }
    assert observed_pod(pod(init=[fetch]), UP).reason == "FetchFailed"
    assert observed_pod(pod(init=[fetch]), UP, "12%").reason == "FetchingModel"


def test_a_pod_on_a_dead_node_is_lost_however_ready_it_says_it_is():
    """Its last report was made before the node went silent."""
    seen = observed_pod(ready_pod(), {"node-a": False})
    assert seen.lost and seen.gone_node and not seen.ready
    assert seen.reason == "NodeLost" and "node-a" in seen.message


def test_a_node_that_nobody_told_of_counts_as_answering():
    """The list of nodes may come later than the pods, or not at all."""
    assert observed_pod(ready_pod(), {}).ready


def test_a_failed_pod_is_lost_for_good():
    """Unlike one whose node may come back."""
    seen = observed_pod(pod(phase="Failed", reason="Evicted"), {"node-a": False})
    assert seen.lost and not seen.gone_node


@pytest.mark.parametrize(
    "line, percent",
    [("fetch 42% of 1.2 GB", 40), ("99.9% done", 95), ("100%", 100), ("resolving", None)],
)
def test_progress_goes_in_steps(line, percent):
    """The status is not written for every percent."""
    live = pod(init=[{"name": "fetch", "state": {"running": {}}}])
    assert fetching(live) == "fetch"
    assert observed_pod(live, UP, line).fetched == percent


def test_nobody_fetches_once_it_has_ended():
    """An old line of its log is no progress."""
    live = pod(init=[{"name": "fetch", "state": {"terminated": {"exitCode": 0}}}])
    assert fetching(live) is None
    assert observed_pod(live, UP, "50%").fetched is None


def test_a_drain_mark_is_a_time_or_nothing():
    """What somebody else wrote there is no mark."""
    live = ready_pod()
    for text, mark in (("1700000000.5", 1700000000.5), ("soon", None), ("", None)):
        marked = deepcopy(live)
        marked["metadata"]["annotations"] = {"serving.shoal.dev/drain-started": text}
        assert observed_pod(marked, UP).drain_started == mark


def test_long_words_are_cut_at_the_front():
    """The end of a log says more than its beginning."""
    last = {"exitCode": 1, "message": "x" * 5000 + " out of luck"}
    seen = observed_pod(pod(containers=[waiting("CrashLoopBackOff", last=last)]), UP)
    assert len(seen.message) < 700 and "out of luck" in seen.message


def test_a_bare_pod_is_read_too():
    """Right after it was made it has no status at all."""
    seen = observed_pod({"metadata": {"name": "x"}, "spec": {}}, {})
    assert (seen.reason, seen.ready, seen.group_size) == ("Starting", False, 1)


@pytest.mark.parametrize("reason", [it for it in WAITING if it not in CREATING])
def test_what_no_container_comes_out_of_by_itself_is_a_failure(reason):
    """Every reason that the table explains needs somebody, and says what to look at."""
    seen = observed_pod(pod(containers=[waiting(reason, "it says so")]), UP)
    assert seen.failing
    assert "it says so" in seen.message
    assert "imagePullSecrets" in seen.message or "spec.podOverlay" in seen.message
