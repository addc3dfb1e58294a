"""`shoal apply`, `scale`, `delete` and `wait`: what writes the desired state."""

import json
import threading
from collections.abc import Callable
from typing import Any

import pytest

PREFIX = "inferenceservice.serving.shoal.dev"


def _later(act: Callable[[], object], seconds: float = 0.3) -> threading.Timer:
    """Does what a supervisor would, while a command waits."""
    timer = threading.Timer(seconds, act)
    timer.start()
    return timer


def test_apply_says_what_it_did(served: Any) -> None:
    """created, then unchanged, then configured; in kubectl's words."""
    path = served.write()
    assert served.shoal("apply", "-f", path).stdout == f"{PREFIX}/chat created\n"
    assert served.shoal("apply", "-f", path).stdout == f"{PREFIX}/chat unchanged\n"
    served.write(replicas=3)
    done = served.shoal("apply", "-f", path)
    assert (done.stdout, done.stderr) == (f"{PREFIX}/chat configured\n", "")


def test_apply_reads_folders_and_standard_input(served: Any) -> None:
    """-f takes files, folders of YAML, and -, together."""
    served.write("one")
    served.write("two")
    done = served.shoal(
        "apply", "-f", str(served.folder), "-f", "-", stdin=served.manifest("three")
    )
    assert [line.split()[0] for line in done.stdout.splitlines()] == [
        f"{PREFIX}/{name}" for name in ("one", "two", "three")
    ]


def test_apply_prints_what_is_in_force(served: Any) -> None:
    """-o json is the object as stored, with its generation."""
    data = json.loads(served.shoal("apply", "-f", served.write(), "-o", "json").stdout)
    assert (data["metadata"]["name"], data["metadata"]["generation"]) == ("chat", 1)


def test_a_mistake_in_one_file_changes_nothing(served: Any) -> None:
    """All problems of all files, a line each with its file; nothing is applied; exit 2."""
    good = served.write("good")
    bad = served.write("bad", engine={"maxModelLenn": 5}, replicas=-1)
    done = served.shoal("apply", "-f", good, "-f", bad)
    assert done.exit_code == 2
    lines = done.stderr.splitlines()
    assert len(lines) == 2
    assert all("bad.yaml: spec." in line for line in lines)
    assert "did you mean maxModelLen?" in done.stderr
    assert "-1" in done.stderr
    assert served.store.services() == []


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "no document"),
        (b"a: [", "bad.yaml: "),
        (b"\xff\xfe\x00", "not UTF-8"),
        (b"kind: Pod\napiVersion: v1\n", "InferenceService"),
    ],
)
def test_unreadable_files_are_named(served: Any, content: bytes, words: str) -> None:
    """Whatever a file holds, the answer is a sentence with its name and exit code 2."""
    path = served.folder / "bad.yaml"
    path.write_bytes(content)
    done = served.shoal("apply", "-f", str(path))
    assert done.exit_code == 2
    assert "bad.yaml" in done.stderr
    assert words in done.stderr


def test_a_missing_file_and_an_empty_folder_are_named(served: Any) -> None:
    """The path is in the sentence."""
    done = served.shoal("apply", "-f", "nowhere.yaml")
    assert (done.exit_code, "nowhere.yaml" in done.stderr) == (2, True)
    empty = served.folder / "empty"
    empty.mkdir()
    done = served.shoal("apply", "-f", str(empty))
    assert (done.exit_code, str(empty) in done.stderr) == (2, True)


def test_one_name_in_two_files_is_refused(served: Any) -> None:
    """Two documents of one name would overwrite each other."""
    path = served.write()
    other = served.folder / "other.yaml"
    other.write_text(served.manifest())
    done = served.shoal("apply", "-f", path, "-f", str(other))
    assert done.exit_code == 2
    assert "'chat'" in done.stderr
    assert path in done.stderr


def test_apply_warns_of_what_would_have_no_effect(world: Any) -> None:
    """A feature that is not there yet is named; so is that nothing serves."""
    done = world.shoal("apply", "-f", world.write(engine={"quantization": "fp8"}))
    assert done.exit_code == 0
    assert "chat: not supported yet: spec.engine.quantization=fp8" in done.stderr
    assert "shoal up" in done.stderr


def test_scale_writes_replicas(served: Any) -> None:
    """The number is in the store at once; a later apply of the file keeps it."""
    path = served.write()
    served.shoal("apply", "-f", path)
    assert served.shoal("scale", "chat", "3").stdout == f"{PREFIX}/chat scaled\n"
    assert served.store.get("chat").spec.replicas == 3
    served.shoal("apply", "-f", path)
    assert served.store.get("chat").spec.replicas == 3


def test_scale_leaves_the_number_to_the_autoscaler(served: Any) -> None:
    """A number that has no effect is refused; 0 switches the service off, 1 on again."""
    served.shoal("apply", "-f", served.write(autoscaling={"maxReplicas": 4}))
    refused = served.shoal("scale", "chat", "3")
    assert refused.exit_code == 1
    assert "spec.autoscaling decides the number of replicas" in refused.stderr
    assert served.shoal("scale", "chat", "0").exit_code == 0
    assert served.shoal("scale", "chat", "1").exit_code == 0
    assert served.store.get("chat").spec.replicas == 1


def test_scale_waits_for_replicas_that_take_requests(served: Any) -> None:
    """--wait returns when the supervisor reports so many routable replicas of this generation."""
    served.shoal("apply", "-f", served.write())
    served.status(replicas=2, generation=1)  # of the old generation: not yet
    timer = _later(lambda: served.status(replicas=2, generation=2))
    done = served.shoal("scale", "chat", "2", "--wait", "--timeout", "10s")
    assert done.exit_code == 0, done.stderr
    assert not timer.is_alive()


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("nope", "2"), 1, '"nope" not found; there are: chat'),
        (("chat", "-2"), 2, "-2"),
        (("chat", "many"), 2, "many"),
        (("chat", "99999"), 2, "99999"),
        (("chat", "2", "--wait", "--timeout", "0.2s"), 1, "of 2 replicas take requests"),
        (("chat", "2", "--wait", "--timeout", "soon"), 2, "write 90, 90s, 5m or 1h"),
    ],
)
def test_scale_refuses(served: Any, arguments: tuple[str, ...], code: int, words: str) -> None:
    """Unknown names, numbers out of bounds and waits in vain are sentences."""
    served.shoal("apply", "-f", served.write())
    done = served.shoal("scale", *arguments)
    assert done.exit_code == code
    assert words in done.stderr


def test_delete_waits_until_all_is_gone(served: Any) -> None:
    """The command returns when the supervisor has drained the pods."""
    served.shoal("apply", "-f", served.write())
    served.status()
    served.pod()

    def drained() -> None:
        served.store.remove_pod("chat-abc12-0")
        served.store.forget("chat")

    timer = _later(drained)
    done = served.shoal("delete", "chat", "--timeout", "10s")
    assert (done.exit_code, done.stdout) == (0, f'{PREFIX} "chat" deleted\n')
    assert not timer.is_alive()
    assert served.store.get("chat") is None


def test_delete_gives_up_in_time(served: Any) -> None:
    """A drain that takes longer than --timeout is an error that says where to look."""
    served.shoal("apply", "-f", served.write())
    served.pod()
    done = served.shoal("delete", "chat", "--timeout", "0.2s")
    assert done.exit_code == 1
    assert "still drains after 0.2 s" in done.stderr


def test_delete_need_not_wait(served: Any) -> None:
    """--no-wait returns at once."""
    served.shoal("apply", "-f", served.write())
    served.pod()
    assert served.shoal("delete", "chat", "--no-wait").exit_code == 0


def test_delete_by_file_and_all(world: Any) -> None:
    """-f deletes what the files describe, --all the rest."""
    one, _, _ = world.write("one"), world.write("two"), world.write("three")
    world.shoal("apply", "-f", str(world.folder))
    assert world.shoal("delete", "-f", one).exit_code == 0
    assert [service.name for service in world.store.services()] == ["three", "two"]
    assert world.shoal("delete", "--all").exit_code == 0
    assert world.store.services() == []


def test_delete_of_what_is_not_there(world: Any) -> None:
    """An error, the others still deleted; no error with --ignore-not-found; 2 without names."""
    world.shoal("apply", "-f", world.write())
    done = world.shoal("delete", "nope", "chat")
    assert done.exit_code == 1
    assert '"nope" not found' in done.stderr
    assert world.store.services() == []
    assert world.shoal("delete", "nope", "--ignore-not-found").exit_code == 0
    assert world.shoal("delete").exit_code == 2


def test_wait_returns_when_the_condition_holds(served: Any) -> None:
    """The condition must hold for the present generation."""
    served.shoal("apply", "-f", served.write())
    timer = _later(served.status)
    done = served.shoal("wait", "chat", "--for=condition=ready", "--timeout=10s")
    assert (done.exit_code, done.stdout) == (0, f"{PREFIX}/chat condition met\n")
    assert not timer.is_alive()
    assert served.shoal("wait", "chat", "--for=condition=Ready=False", "--timeout=0").exit_code == 1


def test_wait_in_vain_tells_the_last_reason(served: Any) -> None:
    """The timeout's message carries the condition's own."""
    served.shoal("apply", "-f", served.write())
    served.status(ready="False", replicas=0)
    done = served.shoal("wait", "chat", "--timeout", "0.2s")
    assert done.exit_code == 1
    assert "Starting: 0 replicas take requests" in done.stderr


def test_wait_for_the_end(served: Any) -> None:
    """--for=delete returns once nothing is left."""
    assert served.shoal("wait", "chat", "--for=delete", "--timeout=1s").exit_code == 0
    served.pod()
    assert served.shoal("wait", "chat", "--for=delete", "--timeout=0.2s").exit_code == 1


def test_wait_does_not_hang_where_nothing_can_happen(world: Any) -> None:
    """Without a service, or without a supervisor, waiting fails at once and says why."""
    done = world.shoal("wait", "chat")
    assert (done.exit_code, '"chat" not found' in done.stderr) == (1, True)
    world.shoal("apply", "-f", world.write())
    done = world.shoal("wait", "chat")
    assert (done.exit_code, "shoal up" in done.stderr) == (1, True)
    assert world.shoal("wait", "chat", "--for=jsonpath=x").exit_code == 2


def test_promote_writes_one_annotation(served: Any) -> None:
    """The spec, its generation and other annotations stay; the status says which step."""
    served.shoal("apply", "-f", served.write())
    served.store.patch("chat", {"metadata": {"annotations": {"team": "fish"}}})
    served.status()
    done = served.shoal("promote", "chat")
    assert done.exit_code == 1
    assert "no canary is under way" in done.stderr
    status = served.store.status("chat") | {"canary": {"revision": "r2", "weight": 5, "step": 0}}
    served.store.write_status("chat", status)
    assert "may pass step 0" in served.shoal("promote", "chat").stdout
    metadata = served.store.get("chat").metadata
    assert metadata.annotations == {"team": "fish", "serving.shoal.dev/promote": "r2:0"}
    assert metadata.generation == 1


def test_promote_of_nothing_names_what_there_is(served: Any) -> None:
    """An unknown service is an error with the known names."""
    served.shoal("apply", "-f", served.write())
    done = served.shoal("promote", "chta")
    assert done.exit_code == 1
    assert '"chta" not found; there are: chat' in done.stderr


OLD, NEW, OLDER = "aaaaaaaaaa", "bbbbbbbbbb", "cccccccccc"


@pytest.mark.parametrize(
    "active, previous, back",
    [(NEW, OLD, OLD), (OLD, OLDER, OLD)],
    ids=["after a rollout", "in the middle of one"],
)
def test_rollback_names_the_revision_that_served(
    served: Any, active: str, previous: str, back: str
) -> None:
    """The one before; in the middle of a rollout the one that serves. Forward by --undo."""
    served.shoal("apply", "-f", served.write())
    served.status()
    assert "no earlier revision" in served.shoal("rollback", "chat").stderr
    seen = {"activeRevision": active, "previousRevision": previous, "specRevision": NEW}
    served.store.write_status("chat", served.store.status("chat") | seen)
    assert f"back to revision {back}" in served.shoal("rollback", "chat").stdout
    wish = served.store.get("chat").spec.rollout.rollback_to
    assert (wish.revision, wish.instead_of) == (back, NEW)
    assert served.shoal("rollback", "chat", "--undo", "--to", OLDER).exit_code == 1
    assert "follows its spec" in served.shoal("rollback", "chat", "--undo").stdout
    assert served.store.get("chat").spec.rollout.rollback_to is None
    served.shoal("rollback", "chat", "--to", OLDER)
    assert served.store.get("chat").spec.rollout.rollback_to.revision == OLDER
