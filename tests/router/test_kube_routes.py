"""Route tables from the ConfigMaps of a cluster."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from shoal.api.routes import RouteTable
from shoal.router.kube_access import NoServiceAccount, ServiceAccount
from shoal.router.kube_routes import KubeRoutes
from shoal.router.kube_tables import KubeTables
from tests.router.kube_server import KubeServer, config_map


class Watched:
    """A watch under way; `tables` are what a router would serve now."""

    def __init__(self, server: KubeServer, *namespaces: str) -> None:
        self.reports: list[Mapping[str, RouteTable]] = []
        self.busy: set[str] = set()
        self.watch = KubeRoutes(
            server.account, self.reports.append, namespaces, busy=self.busy.__contains__
        )

    async def __aenter__(self) -> "Watched":
        self.task = asyncio.create_task(self.watch.run())
        return self

    async def __aexit__(self, *error: object) -> None:
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)

    @property
    def tables(self) -> Mapping[str, RouteTable]:
        return self.reports[-1]

    async def until(self, reached: Callable[["Watched"], bool], seconds: float = 5.0) -> None:
        async with asyncio.timeout(seconds):
            while not (self.reports and reached(self)):
                assert not self.task.done(), self.task
                await asyncio.sleep(0.005)

    async def serves(self, *services: str) -> None:
        await self.until(lambda watched: set(watched.tables) == set(services))


def with_server(folder: Path, play: Callable[[KubeServer], Awaitable[None]]) -> None:
    async def run() -> None:
        async with KubeServer(folder / "account") as server:
            await play(server)

    asyncio.run(run())


def test_tables_come_change_and_go(tmp_path: Path) -> None:
    """What the operator writes, changes and deletes is served, changed and gone."""

    async def play(server: KubeServer) -> None:
        server.put(config_map("one", "chat"))
        async with Watched(server) as watched:
            await watched.serves("one/chat")
            server.put(config_map("two", "chat", models=["other"]))
            await watched.serves("one/chat", "two/chat")
            server.put(config_map("one", "chat", generation=7))
            await watched.until(lambda w: w.tables["one/chat"].generation == 7)
            server.delete("one", "chat")
            await watched.serves("two/chat")

    with_server(tmp_path, play)


def test_an_empty_cluster_is_reported_once(tmp_path: Path) -> None:
    """A router of a cluster without services is ready all the same."""

    async def play(server: KubeServer) -> None:
        async with Watched(server) as watched:
            await watched.serves()
            await asyncio.sleep(0.05)
            assert watched.reports == [{}]

    with_server(tmp_path, play)


def test_only_its_namespaces_are_watched_and_all_are_awaited(tmp_path: Path) -> None:
    """With --namespaces nothing else is asked for, and the first report has all of them."""

    async def play(server: KubeServer) -> None:
        for namespace in ("one", "two", "three"):
            server.put(config_map(namespace, "chat", models=[namespace]))
        async with Watched(server, "one", "two") as watched:
            await watched.serves("one/chat", "two/chat")
            assert len(watched.reports) == 1
            server.put(config_map("three", "chat", models=["three"], generation=2))
            server.put(config_map("two", "chat", models=["two"], generation=2))
            await watched.until(lambda w: w.tables["two/chat"].generation == 2)
            assert set(watched.tables) == {"one/chat", "two/chat"}

    with_server(tmp_path, play)


def test_the_api_server_goes_away_and_comes_back(tmp_path: Path) -> None:
    """Meanwhile the known tables stay; afterwards also what was deleted unseen is gone, within
    about a second."""

    async def play(server: KubeServer) -> None:
        server.put(config_map("one", "chat"))
        server.put(config_map("one", "old"))
        async with Watched(server) as watched:
            await watched.serves("one/chat", "one/old")
            await server.stop()
            server.delete("one", "old")
            server.put(config_map("one", "new"))
            await asyncio.sleep(0.5)
            assert set(watched.tables) == {"one/chat", "one/old"}
            await server.start()
            began = asyncio.get_running_loop().time()
            await watched.serves("one/chat", "one/new")
            assert asyncio.get_running_loop().time() - began < 1.6

    with_server(tmp_path, play)


def test_forgotten_history_is_listed_again(tmp_path: Path) -> None:
    """410 Gone in a watch ends in a list, which prunes."""

    async def play(server: KubeServer) -> None:
        server.put(config_map("one", "chat"))
        async with Watched(server) as watched:
            await watched.serves("one/chat")
            server.delete("one", "chat")
            server.put(config_map("one", "new"))
            server.forget()
            await watched.serves("one/new")
            assert [query for query in server.requests if "watch" not in query][1:]

    with_server(tmp_path, play)


@pytest.mark.parametrize("code", [403, 429, 500, 410])
def test_refusals_are_waited_out(
    tmp_path: Path, code: int, caplog: pytest.LogCaptureFixture
) -> None:
    """No answer ends the router; the log repeats the server's words."""

    async def play(server: KubeServer) -> None:
        server.put(config_map("one", "chat"))
        server.refusals = [(code, "because of me")] * 2
        async with Watched(server) as watched:
            await watched.serves("one/chat")

    with caplog.at_level(logging.INFO):
        with_server(tmp_path, play)
    assert "because of me" in caplog.text
    assert ("needs get, list and watch" in caplog.text) == (code == 403)


def test_a_renewed_token_is_used(tmp_path: Path) -> None:
    """The kubelet renews the token file; the next request carries the new one."""

    async def play(server: KubeServer) -> None:
        server.put(config_map("one", "chat"))
        async with Watched(server) as watched:
            await watched.serves("one/chat")
            server.token = "second"
            (server.folder / "token").write_text("second\n")
            await server.stop()
            await server.start()
            server.put(config_map("one", "new"))
            await watched.serves("one/chat", "one/new")

    with_server(tmp_path, play)


def test_many_changes_are_few_hand_overs(tmp_path: Path) -> None:
    """A hundred services at once do not mean a hundred times a hundred tables."""

    async def play(server: KubeServer) -> None:
        async with Watched(server) as watched:
            await watched.serves()
            for number in range(100):
                server.put(config_map("one", f"chat{number}"))
            await watched.until(lambda w: len(w.tables) == 100)
            assert len(watched.reports) < 60

    with_server(tmp_path, play)


def test_a_deleted_service_finishes_its_requests(tmp_path: Path) -> None:
    """It takes no new ones, its replicas drain, and its table goes with the last request."""

    async def play(server: KubeServer) -> None:
        endpoint = {"name": "a", "address": "h:1", "revision": "r"}
        server.put(config_map("one", "chat", endpoints=[endpoint]))
        async with Watched(server) as watched:
            await watched.serves("one/chat")
            watched.busy.add("one/chat")
            server.delete("one", "chat")
            await watched.until(lambda w: w.tables["one/chat"].models == ())
            assert [e.draining for e in watched.tables["one/chat"].endpoints] == [True]
            await asyncio.sleep(0.7)
            assert set(watched.tables) == {"one/chat"}
            watched.busy.clear()
            await watched.serves()

    with_server(tmp_path, play)


def test_a_service_that_comes_back_is_open() -> None:
    """Deleted and made again under one name, with requests of the first still in flight."""
    tables = KubeTables()
    tables.put(config_map("one", "chat"))
    tables.drop(config_map("one", "chat"))
    assert tables.closing
    assert tables.settled()["one/chat"].models == ()
    assert tables.put(config_map("one", "chat"))
    assert not tables.closing
    assert tables.settled()["one/chat"].models == ("chat",)


def test_only_a_table_of_its_own_namespace_counts(caplog: pytest.LogCaptureFixture) -> None:
    """Who may write ConfigMaps in one namespace cannot take another's traffic."""
    tables = KubeTables()
    assert tables.put(config_map("one", "chat"))
    foreign = config_map("two", "chat", service="one/chat")
    unnamed = config_map("two", "chat")
    unnamed["metadata"]["name"] = "chat"
    with caplog.at_level(logging.WARNING):
        assert not tables.put(foreign)
        assert not tables.put(unnamed)
    assert set(tables.settled()) == {"one/chat"}
    assert "one/chat" in caplog.text


@pytest.mark.parametrize("text", ["", "{", "[]", '{"service": "one/chat"}'])
def test_a_bad_table_leaves_the_last_good(text: str, caplog: pytest.LogCaptureFixture) -> None:
    """What cannot be read is logged once, and the service goes on as it was."""
    tables = KubeTables()
    tables.put(config_map("one", "chat", generation=3))
    bad = config_map("one", "chat")
    bad["data"] = {"routes.json": text}
    with caplog.at_level(logging.ERROR):
        assert not tables.put(bad)
        assert not tables.put(bad)
    assert len(caplog.records) == 1
    assert tables.settled()["one/chat"].generation == 3


def test_a_model_id_stays_with_whom_has_it(caplog: pytest.LogCaptureFixture) -> None:
    """Of two services with one model id the first keeps it, whatever their names, until it
    lets go."""
    tables = KubeTables()
    tables.put(config_map("b", "chat", models=["chat", "b"]))
    assert tables.settled()["b/chat"].models == ("chat", "b")
    tables.put(config_map("a", "chat", models=["chat", "a"]))
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert models(tables) == {"b/chat": ("chat", "b"), "a/chat": ("a",)}
    assert caplog.text.count("model id chat belongs to b/chat") == 1
    tables.drop(config_map("b", "chat"))
    assert models(tables)["a/chat"] == ("chat", "a")


def models(tables: KubeTables) -> dict[str, tuple[str, ...]]:
    return {name: table.models for name, table in tables.settled().items()}


@pytest.mark.parametrize(
    ("environ", "files", "words"),
    [
        ({}, ("token", "ca.crt"), "KUBERNETES_SERVICE_HOST"),
        ({"KUBERNETES_SERVICE_HOST": "h", "KUBERNETES_SERVICE_PORT": "1"}, (), "token"),
    ],
)
def test_outside_a_pod_it_says_what_is_missing(
    tmp_path: Path, environ: dict[str, str], files: tuple[str, ...], words: str
) -> None:
    """A router that cannot reach an API server at all ends with a sentence."""
    for name in files:
        (tmp_path / name).touch()
    with pytest.raises(NoServiceAccount, match=words):
        ServiceAccount.of_pod(environ, tmp_path)


def test_an_ipv6_server_gets_brackets(tmp_path: Path) -> None:
    """KUBERNETES_SERVICE_HOST may be an IPv6 address."""
    for name in ("token", "ca.crt"):
        (tmp_path / name).touch()
    environ: dict[str, Any] = {
        "KUBERNETES_SERVICE_HOST": "fd00::1",
        "KUBERNETES_SERVICE_PORT": "443",
    }
    assert ServiceAccount.of_pod(environ, tmp_path).server == "https://[fd00::1]:443"
