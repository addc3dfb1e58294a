"""A cluster in memory for planner tests: live pods as the API server shows them, nodes, a router.

Whatever the planner sees passes through `observed_pod`, from the JSON of pods that were made from
its own manifests. Actions are performed as the applier does: a name that is taken is a conflict,
and a deletion counts only for the very pod that was seen.
"""

from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

from shoal.api.names import ANNOTATION_DRAIN_STARTED
from shoal.api.routes import RouteTable
from shoal.api.types import InferenceService, InferenceServiceStatus
from shoal.operator.actions import (
    Action,
    CreatePod,
    DeletePod,
    DrainPod,
    ForgetRevision,
    ResumePod,
    SaveRevision,
    WriteRoutes,
)
from shoal.operator.groups import Group, groups_of
from shoal.operator.observe import EndpointView, Observed, RouterView
from shoal.operator.plan import Plan, plan
from shoal.operator.platform import Platform
from shoal.operator.podstate import observed_pod
from shoal.operator.revision import Revision

NODES = ("node-a", "node-b", "node-c")
PLATFORM = Platform(multi_node=True)


@dataclass(frozen=True)
class Snapshot:
    """What the operator knows at one moment, and which pods those names were."""

    observed: Observed
    uids: dict[str, int]


class Cluster:
    """Pods by name as JSON; everything that can happen to them is a method."""

    def __init__(self) -> None:
        self.now = 1_700_000_000.0
        self.nodes = dict.fromkeys(NODES, True)  # whether the API server hears of it
        self.cut: set[str] = set()  # nodes that routers do not reach
        self.pods: dict[str, dict[str, Any]] = {}
        self.table: RouteTable | None = None
        self.revisions: dict[str, Revision] = {}
        self.status = InferenceServiceStatus()
        self.routers_up = True
        self.router_lags = False
        self.heard: RouteTable | None = None  # the table that the router acts on
        self.busy: dict[str, int] = {}
        self._uid = 0

    # What the operator sees and does.

    def snapshot(self) -> Snapshot:
        pods = tuple(observed_pod(pod, self.nodes) for pod in self.pods.values())
        observed = Observed(
            pods=pods,
            routers=self._routers(),
            table=self.table,
            revisions=tuple(self.revisions.values()),
            status=self.status,
        )
        return Snapshot(observed, {name: pod["metadata"]["uid"] for name, pod in self.pods.items()})

    def step(
        self, service: InferenceService, actions: int | None = None, seen: Snapshot | None = None
    ) -> Plan:
        """Plans from `seen` (now), performs the first `actions` of it (all)."""
        seen = seen or self.snapshot()
        decided = plan(service, seen.observed, self.now, PLATFORM)
        for action in decided.actions[:actions]:
            self.perform(action, seen)
        if actions is None or actions >= len(decided.actions):
            self.status = decided.status
        return decided

    def perform(self, action: Action, seen: Snapshot) -> None:
        match action:
            case SaveRevision(revision):
                self.revisions.setdefault(revision.name, revision)
            case CreatePod(pod):
                if pod.name not in self.pods:
                    self._create(pod.manifest)
            case DrainPod(name) if self._same(name, seen):
                marks = self.pods[name]["metadata"].setdefault("annotations", {})
                marks.setdefault(ANNOTATION_DRAIN_STARTED, str(self.now))
            case ResumePod(name) if self._same(name, seen):
                self.pods[name]["metadata"]["annotations"].pop(ANNOTATION_DRAIN_STARTED, None)
            case WriteRoutes(table):
                # Written with the resourceVersion that was read: an old view cannot undo.
                if seen.observed.table == self.table:
                    self.table = table
            case DeletePod(name, _) if self._same(name, seen):
                self.delete(name)
            case ForgetRevision(name):
                self.revisions.pop(name, None)

    # What happens by itself, or by somebody else.

    def schedule(self, name: str, node: str) -> None:
        pod = self.pods[name]
        if "nodeName" not in pod["spec"] and self.nodes[node] and not self._leaves(name):
            pod["spec"]["nodeName"] = node

    def run(self, name: str) -> None:
        """The kubelet starts the pod's container."""
        pod = self.pods[name]
        if self._alive(name) and not self._leaves(name):
            pod["status"] |= {"phase": "Running", "podIP": f"10.0.0.{pod['metadata']['uid'] % 250}"}
            self._container(name, {"running": {}}, started=False)

    def serve(self, name: str) -> None:
        """The leader's engine comes up, if all pods of its group run."""
        members = self.group(name).pods
        whole = len(members) == members[0].group_size
        if whole and all(self._runs(pod.name) for pod in members):
            for pod in members:
                self._container(pod.name, {"running": {}}, started=True)
                self._ready(pod.name, True)

    def crash(self, name: str) -> None:
        if self._runs(name):
            ended = {"terminated": {"exitCode": 1, "reason": "Error", "message": "no memory left"}}
            waiting = {"waiting": {"reason": "CrashLoopBackOff"}}
            self._container(name, waiting, started=False, last=ended)
            self._break_engine(name)

    def evict(self, name: str) -> None:
        if self._alive(name):
            self.pods[name]["status"] |= {"phase": "Failed", "reason": "Evicted"}
            self._break_engine(name)

    def delete(self, name: str) -> None:
        self.pods[name]["metadata"].setdefault("deletionTimestamp", _stamp(self.now))

    def finish(self, name: str) -> None:
        """The kubelet has ended a pod that is being deleted; a dead node ends nothing."""
        if self._leaves(name) and (self._alive(name) or self._over(name)):
            self.vanish(name)

    def vanish(self, name: str) -> None:
        self._break_engine(name)
        del self.pods[name]
        self.busy.pop(name, None)

    def node_silent(self, node: str) -> None:
        """Its kubelet does not reach the API server; engines and routers know nothing of it."""
        self.nodes[node] = False

    def node_down(self, node: str) -> None:
        """Nobody reaches it."""
        self.nodes[node] = False
        self.cut.add(node)
        for name, pod in self.pods.items():
            if pod["spec"].get("nodeName") == node:
                self._break_engine(name, but=name)  # alone the engine goes on unseen

    def node_up(self, node: str) -> None:
        self.nodes[node] = True
        self.cut.discard(node)

    def settle(self, service: InferenceService, rounds: int = 80) -> Plan:
        """Everything goes well, until there is nothing to do."""
        for node in self.nodes:
            self.node_up(node)
        self.routers_up, self.router_lags = True, False
        for _ in range(rounds):
            self.busy.clear()
            for name in list(self.pods):
                self.schedule(name, NODES[0])
                self.finish(name)
            for name in list(self.pods):
                if not self._runs(name):
                    self.run(name)
            for name in list(self.pods):
                self.serve(name)
            decided = self.step(service)
            self.now += 1
            if not decided.actions and all(p.ready for p in self.snapshot().observed.pods):
                return decided
        raise AssertionError("the plan does not come to rest")

    # Questions.

    def groups(self) -> tuple[Group, ...]:
        return groups_of(self.snapshot().observed.pods)

    def group(self, name: str) -> Group:
        return next(g for g in self.groups() if any(pod.name == name for pod in g.pods))

    def replicas(self) -> Observed:
        """The present, with one pod a group."""
        observed = self.snapshot().observed
        whole = tuple(group.as_replica() for group in groups_of(observed.pods))
        return replace(observed, pods=whole)

    def routable(self) -> int:
        seen = self.replicas()
        return sum(map(seen.routable, seen.pods))

    def serving(self) -> frozenset[str]:
        """Replicas that routers send requests to and that nobody has begun to end: whatever the
        planner thinks of them."""
        views = [router.endpoints for router in self._routers()]
        return frozenset(
            group.name
            for group in self.groups()
            if any(group.name in view and view[group.name].admitted for view in views)
            and not group.leaving
            and group.as_replica().drain_started is None
        )

    def _routers(self) -> tuple[RouterView, ...]:
        if not self.routers_up:
            return ()
        if not self.router_lags:
            self.heard = self.table
        if self.heard is None:
            return (RouterView(0),)
        up = {name for name in self.pods if self._answers(name)}
        views = {
            e.name: EndpointView(
                e.address,
                admitted=e.name in up and not e.draining,
                in_flight=self.busy.get(e.name, 0),
            )
            for e in self.heard.endpoints
        }
        return (RouterView(self.heard.generation, views),)

    def _create(self, manifest: dict[str, Any]) -> None:
        self._uid += 1
        meta = {
            **manifest["metadata"],
            "uid": self._uid,
            "creationTimestamp": _stamp(self.now),
        }
        spec = {**manifest["spec"]}
        self.pods[meta["name"]] = {"metadata": meta, "spec": spec, "status": {"phase": "Pending"}}

    def _container(
        self, name: str, state: dict[str, Any], *, started: bool, last: dict[str, Any] | None = None
    ) -> None:
        status = {"name": "worker", "state": state, "started": started, "ready": started}
        self.pods[name]["status"]["containerStatuses"] = [
            {**status, "lastState": last or {}, "restartCount": int(last is not None)}
        ]
        if not started:
            self._ready(name, False)

    def _ready(self, name: str, ready: bool) -> None:
        condition = {"type": "Ready", "status": str(ready)}
        self.pods[name]["status"]["conditions"] = [condition]

    def _break_engine(self, name: str, but: str = "") -> None:
        """A group whose member is gone no longer answers."""
        for pod in self.group(name).pods:
            if pod.name != but and self.pods[pod.name]["status"].get("conditions"):
                self._ready(pod.name, False)
        self.busy.pop(self.group(name).name, None)

    def _same(self, name: str, seen: Snapshot) -> bool:
        pod = self.pods.get(name)
        return pod is not None and pod["metadata"]["uid"] == seen.uids.get(name)

    def _alive(self, name: str) -> bool:
        node = self.pods[name]["spec"].get("nodeName")
        return node is not None and self.nodes[node] and not self._over(name)

    def _over(self, name: str) -> bool:
        pod = self.pods[name]
        return pod["status"]["phase"] == "Failed" or "nodeName" not in pod["spec"]

    def _answers(self, name: str) -> bool:
        """Whether routers are connected to its engine."""
        pod = self.pods[name]
        (ready,) = pod["status"].get("conditions") or [{"status": "False"}]
        return ready["status"] == "True" and pod["spec"]["nodeName"] not in self.cut

    def _leaves(self, name: str) -> bool:
        return "deletionTimestamp" in self.pods[name]["metadata"]

    def _runs(self, name: str) -> bool:
        statuses = self.pods[name]["status"].get("containerStatuses", [])
        return self._alive(name) and any("running" in s["state"] for s in statuses)


def _stamp(now: float) -> str:
    return datetime.fromtimestamp(now, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
