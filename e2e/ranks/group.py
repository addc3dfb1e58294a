"""A replica over hosts: a leader and followers, started again when they end, as a kubelet does."""

import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from e2e.ranks.hosts import Host, Hosts, stop
from shoal.api import names
from shoal.api.v1 import engine_pb2, engine_pb2_grpc

SERVE_SECONDS: Final = 400.0
_PLACED: Final = re.compile(r"rank placed.*")
_FIELD: Final = re.compile(r"(\w+)=(\S+)")


@dataclass(frozen=True, slots=True)
class Told:
    """What a client was told, and when by the monotonic clock."""

    tokens: tuple[int, ...]
    end: str  # "stop", "length", or why it broke off
    at: float


@dataclass
class Group:
    """Its processes, one a host; the first leads."""

    hosts: Hosts
    folder: Path
    tensor: int = 1
    pipeline: int = 3
    flags: tuple[str, ...] = ()
    _processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    _over: threading.Event = field(default_factory=threading.Event)

    @property
    def leader(self) -> Host:
        return next(iter(self.hosts))

    @property
    def address(self) -> str:
        return f"{self.leader.ip}:{names.PORT_ENGINE_GRPC}"

    def __enter__(self) -> "Group":
        (self.folder / "token").write_text("a-token-of-this-group-alone")
        (self.folder / "token").chmod(0o600)
        for member, host in enumerate(self.hosts):
            threading.Thread(target=self._keep, args=(member, host), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for process in list(self._processes.values()):
            stop(process)

    def process(self, host: Host) -> subprocess.Popen[bytes]:
        return self._processes[host.name]

    def log(self, host: Host) -> str:
        path = self.folder / f"{host.name}.log"
        return path.read_text() if path.exists() else ""

    def ranks(self) -> dict[int, dict[str, str]]:
        """host, ip and pid of each rank of the newest group, as its log tells."""
        found: dict[int, dict[str, str]] = {}
        for line in _PLACED.findall(self.log(self.leader)):
            said = dict(_FIELD.findall(line))
            found[int(said["rank"])] = said
        return found

    def wait_serving(self, seconds: float = SERVE_SECONDS) -> None:
        deadline = time.monotonic() + seconds
        with grpc.insecure_channel(self.address, _OPTIONS) as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            while time.monotonic() < deadline:
                try:
                    answer = stub.Check(health_pb2.HealthCheckRequest(), timeout=2)
                    if answer.status == health_pb2.HealthCheckResponse.SERVING:
                        return
                except grpc.RpcError:
                    pass
                time.sleep(0.1)
        raise AssertionError(f"does not serve within {seconds} s:\n{self.log(self.leader)[-3000:]}")

    def complete(self, prompt: list[int], count: int, begun: threading.Event | None = None) -> Told:
        """A greedy answer of `count` tokens, or what became of it. `begun` is set by the first
        token."""
        tokens: list[int] = []
        start = engine_pb2.Start(id="1", token_ids=prompt, n=1, sampling=_greedy(count))
        over = threading.Event()

        def requests() -> Iterator[engine_pb2.GenerateRequest]:
            yield engine_pb2.GenerateRequest(start=[start])
            over.wait()

        with grpc.insecure_channel(self.address, _OPTIONS) as channel:
            stub = engine_pb2_grpc.EngineStub(channel)
            try:
                for batch in stub.Generate(requests()):
                    for delta in batch.deltas:
                        tokens += delta.token_ids
                        if tokens and begun is not None:
                            begun.set()
                        if delta.HasField("error"):
                            code = engine_pb2.Error.Code.Name(delta.error.code)
                            why = f"{code}: {delta.error.message}"
                            return Told(tuple(tokens), why, time.monotonic())
                        if delta.finish_reason:
                            name = engine_pb2.FinishReason.Name(delta.finish_reason)
                            return Told(tuple(tokens), name, time.monotonic())
            except grpc.RpcError as error:
                assert isinstance(error, grpc.Call)
                why = f"{error.code().name}: {error.details()}"
                return Told(tuple(tokens), why, time.monotonic())
            finally:
                over.set()
        return Told(tuple(tokens), "the stream ended", time.monotonic())

    def _keep(self, member: int, host: Host) -> None:
        role = names.ROLE_FOLLOWER if member else names.ROLE_LEADER
        command = [sys.executable, "-m", "shoal.worker.cluster", role]
        environ = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "RAY_AUTH_TOKEN_PATH": str(self.folder / "token"),
            names.ENV_HOST: "0.0.0.0",
            names.ENV_GROUP_SIZE: str(len(list(self.hosts))),
            names.ENV_GROUP_MEMBER: str(member),
            names.ENV_LEADER_ADDRESS: self.leader.ip,
            names.ENV_TENSOR_PARALLEL: str(self.tensor),
            names.ENV_PIPELINE_PARALLEL: str(self.pipeline),
        }
        parallel = ["--tensor", str(self.tensor), "--pipeline", str(self.pipeline)]
        flags = [] if member else [*self.flags, *parallel, "--threads", "1"]
        with (self.folder / f"{host.name}.log").open("ab") as log:
            while not self._over.is_set():
                process = host.popen([*command, *flags], environ, log)
                self._processes[host.name] = process
                process.wait()
                self._over.wait(0.2)


_OPTIONS: Final = (
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.keepalive_time_ms", 1000),
    ("grpc.keepalive_timeout_ms", 2000),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 500),
)


def _greedy(count: int) -> engine_pb2.Sampling:
    return engine_pb2.Sampling(temperature=0.0, max_tokens=count, ignore_eos=True)
