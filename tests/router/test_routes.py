"""The directory of route tables."""

import logging
from pathlib import Path

import pytest

from shoal.api.routes import Endpoint, RouteTable
from shoal.router.routes_watch import RoutesWatch


def write(directory: Path, service: str, **fields: object) -> None:
    table = RouteTable(service=service, models=(service,), **fields)
    fresh = directory / f".{service}.new"
    fresh.write_text(table.model_dump_json())
    fresh.replace(directory / f"{service}.json")


@pytest.fixture
def watched(tmp_path):
    changes = []
    return tmp_path, RoutesWatch(tmp_path, changes.append), changes


def test_tables_come_change_and_go(watched):
    """New, changed and deleted files are reported, each once; nothing new is no report."""
    directory, watch, changes = watched
    watch.scan()
    assert changes == [{}]
    write(directory, "chat")
    watch.scan()
    watch.scan()
    assert [set(tables) for tables in changes] == [set(), {"chat"}]
    endpoint = Endpoint(name="a", address="h:1", revision="r")
    write(directory, "chat", endpoints=(endpoint,), generation=2)
    watch.scan()
    assert changes[-1]["chat"].endpoints == (endpoint,)
    (directory / "chat.json").unlink()
    watch.scan()
    assert changes[-1] == {}
    assert len(changes) == 4


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"service": "chat"}', '{"service": "other", "models": []}', "\x00"]
)
def test_a_bad_file_leaves_the_last_good_table(watched, caplog, content):
    """What cannot be read is logged once, and the service goes on as it was."""
    directory, watch, changes = watched
    write(directory, "chat", generation=7)
    write(directory, "other", generation=8)
    watch.scan()
    (directory / "chat.json").write_text(content)
    with caplog.at_level(logging.ERROR):
        watch.scan()
        watch.scan()
    assert len(changes) == 1
    assert len(caplog.records) == 1
    assert "chat.json" in caplog.text
    write(directory, "chat", generation=9)
    watch.scan()
    assert changes[-1]["chat"].generation == 9


def test_a_directory_that_comes_later(tmp_path):
    """A router may start before its routes: no directory is no services."""
    changes = []
    watch = RoutesWatch(tmp_path / "routes", changes.append)
    watch.scan()
    (tmp_path / "routes").mkdir()
    write(tmp_path / "routes", "chat")
    watch.scan()
    assert [set(tables) for tables in changes] == [set(), {"chat"}]


def test_other_files_are_left_alone(watched):
    """Half-written files and other names are no tables."""
    directory, watch, changes = watched
    (directory / ".chat.json").write_text("{")
    (directory / "notes.txt").write_text("x")
    watch.scan()
    assert changes == [{}]
