"""Specs that are taken but cannot be acted on become conditions, and disturb nothing."""

from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shoal.api.types import ConditionType, InvalidManifest, parse_document
from shoal.operator.actions import CreatePod
from shoal.operator.observe import Observed
from shoal.operator.plan import plan
from shoal.operator.platform import Platform, PodDefaults
from tests.api.bad_manifests import UNMET
from tests.operator.conftest import make_service

BEFORE_ANY_POD = [bad for bad in UNMET if bad.reason != "PodRejected"]


def condition(decided, kind):
    return decided.status.condition(ConditionType(kind))


@pytest.mark.parametrize("bad", BEFORE_ANY_POD, ids=lambda bad: bad.why)
def test_what_cannot_be_acted_on_is_said(bad):
    """Ready, Progressing and Degraded name field, value and way out; no pod is made."""
    decided = plan(parse_document(bad.document), Observed(), 0.0)
    assert not any(isinstance(action, CreatePod) for action in decided.actions)
    for kind, status in (("Ready", "False"), ("Progressing", "False"), ("Degraded", "True")):
        said = condition(decided, kind)
        assert (said.status, said.reason) == (status, bad.reason)
        assert bad.says in said.message


def test_a_pod_that_the_cluster_refuses_is_a_condition(world, service):
    """The API server's words stand in the conditions while the rest of the plan goes on."""
    world.settle(service())
    world.observed = replace(world.observed, rejected="pods is forbidden: exceeded quota: team")
    decided = world.plan(service(replicas=2, routing={"policy": "RoundRobin"}, generation=2))
    order = [type(action).__name__ for action in decided.actions]
    assert order == ["WriteRoutes", "CreatePod"], "the refusal of a pod holds up nothing else"
    assert condition(decided, "Degraded").reason == "PodRejected"
    assert "exceeded quota" in condition(decided, "Progressing").message
    assert "exceeded quota" in condition(decided, "Ready").message
    assert decided.status.routable_replicas == 1


def test_bad_pod_defaults_are_named_as_the_operators(service):
    """A user is not blamed for what the operator's configuration says."""
    overlay = {"spec": {"containers": [{"image": "x"}]}}
    decided = plan(make_service(), Observed(), 0.0, Platform(pods=PodDefaults(pod_overlay=overlay)))
    said = condition(decided, "Degraded")
    assert said.message.startswith("the operator's pod defaults: podOverlay: spec.containers[0]")


_keys = st.sampled_from(
    (
        *("metadata", "spec", "labels", "containers", "initContainers", "env", "name", "volumes"),
        *("volumeMounts", "mountPath", "$patch", "value", "serving.shoal.dev/x", "tolerations"),
    )
)
_leaves = st.none() | st.integers() | st.sampled_from(["worker", "fetch", "delete", "replace", ""])
_values = st.recursive(
    _leaves, lambda below: st.lists(below, max_size=2) | st.dictionaries(_keys, below, max_size=3)
)


@settings(suppress_health_check=list(HealthCheck), deadline=None, max_examples=300)
@given(overlay=st.dictionaries(_keys, _values, max_size=2), spec=_values)
def test_no_overlay_breaks_the_planner(overlay, spec):
    """Whatever is written there: pods are made, or a condition says why not."""
    for written in (overlay, {"spec": spec}, {"spec": {"containers": spec}}):
        document = {**BEFORE_ANY_POD[0].document, "spec": {"model": {"uri": "py://a"}}}
        document["spec"]["podOverlay"] = written
        try:
            service = parse_document(document)
        except InvalidManifest:
            continue
        decided = plan(service, Observed(), 0.0)
        refused = condition(decided, "Degraded").reason == "InvalidOverlay"
        assert refused != any(isinstance(action, CreatePod) for action in decided.actions)
