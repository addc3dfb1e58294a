"""What a look carries out: the plan first, and what belongs beside it once the plan is done."""

import asyncio
from collections.abc import Collection, Mapping
from typing import Any

from shoal.api.types import InferenceService
from shoal.operator.actions import Action, CreatePod, DrainPod, ForgetRevision
from shoal.operator.build import build_group
from shoal.operator.kube.applier import NotYet, Refused
from shoal.operator.kube.carry import carry_out
from shoal.operator.kube.errors import ApiError
from shoal.operator.kube.outcome import Outcome
from shoal.operator.revision import Revision
from tests.operator.conftest import CREATED, make_service

AWAY = ApiError(0, "Unreachable", "away")
CHILDREN = ({"kind": "Service"}, {"kind": "PodMonitor"})


class Recorder:
    """An applier that does nothing but what it is told to fail at."""

    def __init__(self, **fails: Exception) -> None:
        self.fails = fails  # by name of an action's class or of a child's kind
        self.did: list[str] = []

    async def adopt(self, service: InferenceService) -> bool:
        return False

    async def ensure_group_token(self, service: InferenceService) -> None:
        self._do("token")

    async def perform(self, service: InferenceService, action: Action) -> None:
        self._do(type(action).__name__)

    async def ensure(self, document: Mapping[str, Any]) -> bool:
        self._do(document["kind"])
        return True

    async def prune(self, service: InferenceService, children: Collection[Any]) -> None:
        self.did.append("prune")

    def _do(self, name: str) -> None:
        if name in self.fails:
            raise self.fails[name]
        self.did.append(name)


def carry(applier: Recorder, *actions: Action, groups: bool = False) -> Outcome:
    return asyncio.run(
        carry_out(
            applier,  # type: ignore[arg-type]  # a fake
            make_service(),
            actions,
            CHILDREN,
            group_token=groups,
        )
    )


def test_children_come_once_the_plan_is_done() -> None:
    """A look that acted is followed by another; the one with nothing left brings them about."""
    applier = Recorder()
    assert carry(applier, DrainPod("p"), ForgetRevision("r")) == Outcome(acted=True)
    assert applier.did == ["DrainPod", "ForgetRevision"]
    assert carry(applier) == Outcome()
    assert applier.did[2:] == ["Service", "PodMonitor", "prune"]


def test_children_come_along_with_records() -> None:
    """What is only written down changes nothing that they are made for."""
    applier = Recorder()
    assert carry(applier, ForgetRevision("r")) == Outcome(acted=True, recorded=True)
    assert applier.did == ["ForgetRevision", "Service", "PodMonitor", "prune"]
    refusing = Recorder(Service=Refused("no"))
    outcome = carry(refusing, ForgetRevision("r"))
    assert outcome == Outcome(acted=True, missing="no", recorded=True)


def test_a_plan_stops_at_what_fails() -> None:
    """Any prefix of it is safe; what was refused is told, and what was done is followed up."""
    applier = Recorder(ForgetRevision=Refused("no"))
    outcome = carry(applier, DrainPod("p"), ForgetRevision("r"), DrainPod("q"))
    assert outcome == Outcome(acted=True, rejected="no")
    assert applier.did == ["DrainPod"]


def test_what_is_refused_does_not_hold_up_the_children() -> None:
    """Nor does one child hold up the others."""
    applier = Recorder(DrainPod=Refused("no"), Service=Refused("taken"))
    assert carry(applier, DrainPod("p")) == Outcome(rejected="no", missing="taken")
    assert applier.did == ["PodMonitor", "prune"]


def test_who_cannot_be_reached_is_not_asked_on() -> None:
    """One call that nobody answers is enough."""
    applier = Recorder(Service=AWAY)
    assert carry(applier) == Outcome(error=AWAY)
    assert applier.did == []


def test_what_has_to_end_first_says_when_to_look_again() -> None:
    """It is no failure, and no refusal."""
    applier = Recorder(DrainPod=NotYet("it ends", 0.5))
    assert carry(applier, DrainPod("p")) == Outcome(again=0.5)


def test_the_token_of_a_group_is_there_before_its_pods() -> None:
    """It is looked for each time, as somebody may have deleted it; without it no pod is made."""
    service = make_service(parallelism={"tensor": 2})
    pods = build_group(service, Revision("a" * 10, CREATED, service.spec), 0)
    made = [CreatePod(pod) for pod in pods]
    applier = Recorder()
    carry(applier, DrainPod("p"), groups=True)
    carry(applier, *made, groups=True)
    carry(applier, *made, groups=True)
    assert applier.did == ["DrainPod", *(["token", "CreatePod", "CreatePod"] * 2)]
    refused = Recorder(token=Refused("taken"))
    assert carry(refused, *made, groups=True).rejected == "taken"
    assert "CreatePod" not in refused.did
