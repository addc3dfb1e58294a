"""The picture of the cluster: late news lose, the dead stay dead, lists find what was missed."""

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from shoal.operator.kube.book import ServiceBook
from shoal.operator.kube.feed import Feed
from shoal.operator.kube.kinds import DISRUPTION_BUDGETS, INFERENCE_SERVICES, PODS
from shoal.operator.kube.world import Key, Objects, World
from tests.operator.kube.fake_api import inference_service

Json = dict[str, Any]


def pod(name: str = "p", version: int = 1, service: str = "chat", **meta: Any) -> Json:
    labels = {"serving.shoal.dev/service": service}
    found = {
        "name": name,
        "namespace": "default",
        "uid": f"uid-{name}",
        "resourceVersion": str(version),
        "labels": labels,
    }
    return {"metadata": {**found, **meta}, "spec": {"nodeName": "n1"}}


def service(version: int, generation: int = 1, **spec: Any) -> Json:
    document = inference_service(**spec)
    document["metadata"] |= {
        "uid": "u",
        "resourceVersion": str(version),
        "generation": generation,
        "creationTimestamp": "2026-01-01T00:00:00Z",
    }
    return document


class Told(list[str]):
    """Services that were woken."""

    def since(self) -> list[str]:
        found = sorted(set(self))
        self.clear()
        return found


def feed() -> tuple[Feed, World, ServiceBook, Told]:
    world, book, told = World(), ServiceBook(), Told()
    return Feed(world, book, lambda key, delay: told.append(key)), world, book, told


def test_an_older_state_does_not_replace_a_newer() -> None:
    """The answer to a write may come before or after the watch tells of it."""
    pods = Objects(PODS)
    assert pods.put(pod(version=5)) == "default/chat"
    assert pods.put(pod(version=4)) is None
    assert pods.put(pod(version=5)) is None
    assert pods.put(pod(version=6)) == "default/chat"


def test_a_late_answer_does_not_raise_the_dead() -> None:
    """What was deleted stays so until something newer has its name."""
    pods = Objects(PODS)
    pods.put(pod(version=5))
    assert pods.drop(pod(version=7)) == "default/chat"
    assert pods.put(pod(version=6)) is None
    assert pods.put(pod(version=8)) == "default/chat"


def test_a_late_deletion_does_not_end_the_successor() -> None:
    """A pod of the same name that was made after the deletion stays."""
    pods = Objects(PODS)
    pods.put(pod(version=9))
    assert pods.drop(pod(version=7)) is None
    assert len(pods) == 1


def test_objects_are_found_by_service_and_change_it() -> None:
    """The index follows the label."""
    pods = Objects(PODS)
    pods.put(pod("a", 1))
    pods.put(pod("b", 2, "other"))
    pods.put(pod("a", 3, "other"))
    assert [p["metadata"]["name"] for p in pods.of("default/chat")] == []
    assert {p["metadata"]["name"] for p in pods.of("default/other")} == {"a", "b"}


def test_a_list_shows_what_was_missed() -> None:
    """Older than the list and not in it: gone. In it with a newer version: outdated."""
    pods = Objects(PODS)
    for name, version in (("gone", 3), ("made-after", 20), ("old", 4)):
        pods.put(pod(name, version))
    listed = {Key("default", "old"): 9, Key("default", "new"): 8}
    assert [key.name for key in pods.missing_from(listed, 10, None)] == ["gone"]
    assert pods.missing_from(listed, 10, "elsewhere") == []
    assert sorted(key.name for key in pods.outdated_by(listed)) == ["new", "old"]


def test_what_nobody_reads_is_not_kept() -> None:
    """Managed fields are half of a small object."""
    pods = Objects(PODS)
    last = {"kubectl.kubernetes.io/last-applied-configuration": "...", "mine": "1"}
    pods.put(pod(managedFields=[{"manager": "x"}], annotations=last))
    kept = pods.get("default", "p")
    assert kept is not None
    assert "managedFields" not in kept["metadata"]
    assert kept["metadata"]["annotations"] == {"mine": "1"}


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 8)), max_size=20), st.randoms())
def test_the_order_of_news_does_not_matter(events: list[tuple[bool, int]], random: Any) -> None:
    """Any order of the same puts and drops of one object ends in the state of the newest."""
    events = list({version: (alive, version) for alive, version in events}.values())
    shuffled = list(events)
    random.shuffle(shuffled)
    pods = Objects(PODS)
    for alive, version in shuffled:
        (pods.put if alive else pods.drop)(pod(version=version))
    newest = max(events, key=lambda event: event[1], default=(False, 0))
    assert (pods.get("default", "p") is not None) is newest[0]


def test_watched_news_wake_and_own_writes_do_not() -> None:
    """Who wrote goes on from there by itself."""
    f, world, _, told = feed()
    f.wrote(PODS, pod(version=2))
    assert told.since() == []
    f.saw(PODS, pod(version=2))
    assert told.since() == []
    f.saw(PODS, pod(version=3))
    assert told.since() == ["default/chat"]
    assert world[PODS].get("default", "p") is not None


def test_a_spec_that_changed_under_a_status_write_wakes() -> None:
    """The answer to a status write may be the first to show a new generation."""
    f, _, book, told = feed()
    f.saw(INFERENCE_SERVICES, service(2))
    told.clear()
    f.wrote(INFERENCE_SERVICES, service(3))
    assert told.since() == []
    f.wrote(INFERENCE_SERVICES, service(4, generation=2, replicas=3))
    assert told.since() == ["default/chat"]
    entry = book.get("default/chat")
    assert entry is not None and entry.service is not None
    assert entry.service.spec.replicas == 3


def test_counting_of_a_budget_wakes_nobody() -> None:
    """The disruption controller writes a budget's status with every pod; its spec is ours."""
    f, _, _, told = feed()
    f.saw(DISRUPTION_BUDGETS, pod("chat", 1, generation=1))
    told.clear()
    f.saw(DISRUPTION_BUDGETS, pod("chat", 2, generation=1))
    assert told.since() == []
    f.saw(DISRUPTION_BUDGETS, pod("chat", 3, generation=2))
    assert told.since() == ["default/chat"]


def test_a_node_that_falls_silent_wakes_the_services_on_it() -> None:
    """Only a change of its readiness is news, and a node that is gone does not answer."""
    f, world, _, told = feed()
    f.saw(PODS, pod())
    told.clear()

    def node(ready: str) -> Json:
        return {
            "metadata": {"name": "n1", "resourceVersion": "1"},
            "status": {"conditions": [{"type": "Ready", "status": ready}]},
        }

    f.saw_node(node("True"))
    told.clear()
    f.saw_node(node("True"))
    assert told.since() == []
    f.saw_node(node("Unknown"))
    assert told.since() == ["default/chat"]
    f.saw_node(node("True"))
    told.clear()
    f.lost_node("n1")
    assert told.since() == ["default/chat"]
    assert world.nodes["n1"] is False


def test_what_goes_on_may_wait_and_what_ends_may_not() -> None:
    """A pod that starts changes often within a moment; a spec and a deletion are looked at."""
    told: dict[str, float] = {}
    f = Feed(World(), ServiceBook(), told.__setitem__)
    f.saw(INFERENCE_SERVICES, service(2))
    assert told.pop("default/chat") == 0.0
    f.saw(PODS, pod(version=3))
    assert 0.0 < told.pop("default/chat") < 0.5
    placed = pod(version=4)
    placed["spec"] = {"nodeName": "n1"}
    placed["status"] = {"phase": "Pending"}
    f.saw(PODS, placed)
    assert told.pop("default/chat") == 1.0, "its node will say more in a moment"
    ending = pod(version=5)
    ending["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"
    f.saw(PODS, ending)
    assert told.pop("default/chat") == 0.0
    f.lost(PODS, pod(version=6))
    assert told.pop("default/chat") == 0.0
