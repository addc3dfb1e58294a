"""Specs that are taken but cannot be acted on become conditions, and disturb nothing."""

from dataclasses import replace

import pytest

from shoal.api.types import ConditionType, parse_document
from shoal.operator.observe import Observed
from shoal.operator.plan import CreatePod, plan
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
