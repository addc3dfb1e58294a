"""`shoal logs`, and reading logs that grow."""

import threading
from pathlib import Path
from typing import Any

import pytest

from shoal.cli.startup import Startup, StartupLogs, parse_line
from shoal.cli.tail import Tailer


def test_logs_of_a_pod_and_its_tail(world: Any) -> None:
    """All lines, or the last few."""
    world.pod()
    world.log("chat-abc12-0", "one\ntwo\nthree\n")
    assert world.shoal("logs", "chat-abc12-0").stdout == "one\ntwo\nthree\n"
    assert world.shoal("logs", "chat-abc12-0", "--tail", "1").stdout == "three\n"
    assert world.shoal("logs", "chat-abc12-0", "--tail", "0").stdout == ""


def test_logs_of_a_service_name_the_pod(world: Any) -> None:
    """With several pods each line says whose it is; with one it does not."""
    world.pod()
    world.log("chat-abc12-0", "a\n")
    assert world.shoal("logs", "chat").stdout == "a\n"
    world.pod(name="chat-abc12-1")
    world.log("chat-abc12-1", "b\n")
    assert world.shoal("logs", "chat").stdout == "[chat-abc12-0] a\n[chat-abc12-1] b\n"


def test_logs_outlive_the_pod(world: Any) -> None:
    """After a stop the last log can still be read; the router's too."""
    world.log("router", "hello\n")
    assert world.shoal("logs", "router").stdout == "hello\n"


def test_logs_of_nothing_name_what_there_is(world: Any) -> None:
    """A typo is answered with pods and services."""
    world.pod()
    world.shoal("apply", "-f", world.write())
    done = world.shoal("logs", "chta")
    assert done.exit_code == 1
    assert "chat-abc12-0, chat" in done.stderr


def test_follow_prints_what_comes_until_the_pod_is_gone(served: Any) -> None:
    """-f goes on with new lines and new pods, and ends with the last pod."""
    served.pod()
    served.log("chat-abc12-0", "one\n")

    def live() -> None:
        served.log("chat-abc12-0", "two\n")
        served.pod(name="chat-abc12-1")
        served.log("chat-abc12-1", "three\n")

    def end() -> None:
        served.store.remove_pod("chat-abc12-0")
        served.store.remove_pod("chat-abc12-1")

    threading.Timer(0.3, live).start()
    threading.Timer(1.2, end).start()
    done = served.shoal("logs", "chat", "-f")
    assert done.exit_code == 0
    assert [line.split()[-1] for line in done.stdout.splitlines()] == ["one", "two", "three"]


def test_tailer_waits_for_whole_lines(tmp_path: Path) -> None:
    """Half a line, or half a character, is kept until the rest is there."""
    path = tmp_path / "log"
    tailer = Tailer(path)
    assert tailer.read() == []
    path.write_bytes(b"a\nb\xc3")
    assert tailer.read() == ["a"]
    with path.open("ab") as file:
        file.write(b"\xa4c\n")
    assert tailer.read() == ["bäc"]
    tailer.close()


@pytest.mark.parametrize("moved", [True, False])
def test_tailer_follows_a_rotated_log(tmp_path: Path, moved: bool) -> None:
    """Whether the file is moved away or cut, no line is lost or read twice."""
    path = tmp_path / "log"
    path.write_text("one, a long line\n")
    tailer = Tailer(path)
    assert tailer.read() == ["one, a long line"]
    if moved:
        with path.open("a") as file:
            file.write("two\n")
        path.rename(tmp_path / "log.1")
        path.write_text("three\n")
        assert tailer.read() == ["two", "three"]
    else:
        path.write_text("three\n")
        assert tailer.read() == ["three"]
    tailer.close()


@pytest.mark.parametrize(
    ("line", "startup", "text"),
    [
        (
            '12:01:02 startup progress phase=resolve what="downloading \\"x\\"" fraction=0.55',
            Startup("resolve", 'downloading "x"', 0.55),
            'resolve: downloading "x" 55%',
        ),
        (
            "12:01:05 startup phase phase=resolve seconds=3.201",
            Startup("resolve", seconds=3.201),
            "resolve 3.2 s",
        ),
        (
            '{"event": "startup progress", "phase": "load", "what": null, "fraction": 0.5}',
            Startup("load", share=0.5),
            "load 50%",
        ),
    ],
)
def test_startup_lines_are_understood(line: str, startup: Startup, text: str) -> None:
    """Text and JSON lines say the same."""
    assert parse_line(line) == startup
    assert str(startup) == text


@pytest.mark.parametrize(
    "line",
    ["", "{", "[]", '{"event": "ready"}', "12:01:02 ready seconds=5.1", "startup phase", "Ünïcode"],
)
def test_other_lines_are_left_alone(line: str) -> None:
    """Whatever else is logged, even broken JSON, is no start-up line."""
    assert parse_line(line) is None


def test_startup_logs_give_each_line_once(world: Any) -> None:
    """A second look has only what is new."""
    logs = StartupLogs()
    path = world.log("a", "12:01:05 startup phase phase=load seconds=1.0\nnoise\n")
    assert [startup.phase for startup in logs.read("a", path)] == ["load"]
    world.log("a", "12:01:06 startup phase phase=kv seconds=1.0\n")
    assert [startup.phase for startup in logs.read("a", path)] == ["kv"]
