"""What a service has beside its pods, and the way back from live objects."""

from dataclasses import replace
from datetime import UTC, datetime

import pytest

from shoal.api.routes import RouteTable
from shoal.operator.build import build_group
from shoal.operator.children import (
    controller_revision,
    desired_children,
    group_token_secret,
    needs_group_token,
    read_revision,
    read_routes,
    routes_config_map,
)
from shoal.operator.metadata import pod_name, workers_name
from shoal.operator.observe import Observed, ObservedPod
from shoal.operator.platform import PodDefaults
from shoal.operator.revision import Revision, revision_of
from tests.operator.conftest import CREATED, make_service

SERVING = ObservedPod("p", "r", 0, 0.0, address="10.0.0.1:8000")


def owned(service, uid="u-1"):
    metadata = service.metadata.model_copy(update={"uid": uid})
    return service.model_copy(update={"metadata": metadata})


def children(service, observed=None, *, monitors=False):
    found = desired_children(owned(service), observed or Observed(), monitors=monitors)
    return {child["kind"]: child for child in found}


def test_everything_goes_with_its_service():
    """An owner that controls and does not block, in the service's namespace, and its label."""
    chat = owned(make_service())
    revision = Revision(revision_of(chat.spec), CREATED, chat.spec)
    manifests = [
        *desired_children(chat, Observed(pods=(SERVING,)), monitors=True),
        routes_config_map(chat, RouteTable(service="default/chat", models=())),
        controller_revision(chat, revision),
        group_token_secret(chat, "s3cret"),
        *(pod.manifest for pod in build_group(chat, revision, 0)),
    ]
    names = set()
    for manifest in manifests:
        meta = manifest["metadata"]
        (owner,) = meta["ownerReferences"]
        assert (owner["uid"], owner["controller"], owner["blockOwnerDeletion"]) == (
            "u-1",
            True,
            False,
        )
        assert meta["namespace"] == "default"
        assert meta["labels"]["serving.shoal.dev/service"] == "chat"
        names.add((manifest["kind"], meta["name"]))
    assert len(names) == len(manifests)


def test_group_members_find_each_other_before_they_are_ready():
    """The headless service's selector matches every pod, and publishes those not ready."""
    chat = make_service(parallelism={"tensor": 2})
    service = children(chat)["Service"]
    assert service["metadata"]["name"] == workers_name("chat")
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["publishNotReadyAddresses"] is True
    for pod in build_group(chat, Revision("a" * 10, CREATED, chat.spec), 0):
        labels = pod.manifest["metadata"]["labels"]
        assert service["spec"]["selector"].items() <= labels.items()
        assert pod.manifest["spec"]["subdomain"] == workers_name("chat")
        assert pod.manifest["spec"]["hostname"] == pod.name


def test_the_name_of_a_sole_pod_comes_with_its_address():
    """Nobody can find it before, and endpoints that are written once are cheaper than twice."""
    starting = replace(SERVING, address=None)
    assert "Service" not in children(make_service())
    assert "Service" not in children(make_service(), Observed(pods=(starting,)))
    assert "Service" in children(make_service(), Observed(pods=(SERVING,)))


@pytest.mark.parametrize("replicas, tensor, least", [(3, 1, 2), (2, 1, 1), (2, 2, 3), (1, 4, 3)])
def test_the_budget_lets_one_pod_go_at_a_time(replicas, tensor, least):
    """A group is lost with one pod."""
    chat = make_service(replicas=replicas, parallelism={"tensor": tensor})
    budget = children(chat)["PodDisruptionBudget"]["spec"]
    assert budget["minAvailable"] == least
    assert budget["unhealthyPodEvictionPolicy"] == "AlwaysAllow"


@pytest.mark.parametrize("replicas", [0, 1])
def test_a_sole_pod_has_no_budget(replicas):
    """A node must be able to be emptied, and a budget that forbids nothing is of no use."""
    assert "PodDisruptionBudget" not in children(make_service(replicas=replicas))


def test_the_budget_does_not_lock_a_change_of_group_size():
    """While small groups of the old revision serve, more pods than there are is no budget."""
    chat = make_service(replicas=2, parallelism={"tensor": 4})
    old = tuple(ObservedPod(f"p{n}", "old", n, 0.0) for n in range(2))
    assert children(chat, Observed(pods=old))["PodDisruptionBudget"]["spec"]["minAvailable"] == 1


def test_monitors_only_where_the_cluster_knows_them():
    """Applying an unknown kind would fail the whole look."""
    assert "PodMonitor" not in children(make_service())
    monitor = children(make_service(), monitors=True)["PodMonitor"]
    assert monitor["spec"]["podMetricsEndpoints"] == [{"port": "metrics", "path": "/metrics"}]


def test_routes_come_back_from_their_config_map():
    """And what somebody spoiled is no table."""
    table = RouteTable(service="default/chat", models=("chat",), generation=7)
    manifest = routes_config_map(make_service(), table)
    assert manifest["metadata"]["labels"]["serving.shoal.dev/routes"] == "true"
    assert read_routes(manifest) == table
    assert read_routes({"data": {"routes.json": "{"}}) is None
    assert read_routes({"data": None}) is None
    assert read_routes({}) is None


def test_revisions_come_back_from_controller_revisions():
    """With the pod defaults they were made under; what is not ours is none."""
    pods = PodDefaults(image="reg/worker:2", pod_overlay={"spec": {"priorityClassName": "high"}})
    spec = make_service(engine={"maxNumSeqs": 8}).spec
    revision = Revision(revision_of(spec, pods), datetime(2026, 1, 2, tzinfo=UTC), spec, pods)
    manifest = controller_revision(make_service(), revision)
    assert isinstance(manifest["revision"], int)
    assert read_revision(manifest) == revision
    assert read_revision({"data": {"name": "x"}}) is None
    assert read_revision({"data": {**manifest["data"], "spec": {"colour": 1}}}) is None
    assert read_revision({}) is None


def test_pod_defaults_are_part_of_the_revision():
    """Another worker image is rolled out like any other change; none at all changes nothing."""
    spec = make_service().spec
    assert revision_of(spec, PodDefaults()) == revision_of(spec)
    assert revision_of(spec, PodDefaults(image="reg/worker:2")) != revision_of(spec)


def test_a_token_where_any_revision_has_groups():
    """Also while only the revision on its way out has one."""
    alone, group = make_service(), make_service(parallelism={"tensor": 2})
    revision = Revision("a" * 10, CREATED, group.spec)
    assert not needs_group_token(alone, Observed())
    assert needs_group_token(group, Observed())
    assert needs_group_token(alone, Observed(revisions=(revision,)))
    assert group_token_secret(alone, "abc")["data"] == {"token": "YWJj"}


def test_names_fit_a_dns_label():
    """The longest name, the largest numbers."""
    assert len(pod_name("a" * 40, "f" * 10, 10_000, 1_048_575)) <= 63
