"""Ranks on the nodes of a Ray cluster: the engine's side, without Ray.

Ray's driver is a process of its own (`ray_ranks`), and so is this machine's part of the cluster
where none is given (`node`). Both hold this process's lifeline: they end when it does.
"""

import json
import logging
import os
import subprocess
import sys
import threading
from base64 import b64encode
from collections.abc import Mapping
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Any, Final

from shoal.api.names import ENV_LIFELINE
from shoal.worker.cluster.node import START_SECONDS, own_address
from shoal.worker.cluster.ray_env import ENV_TOKEN_PATH, ray_environment
from shoal.worker.cluster.ray_order import SEAT_SECONDS, WAIT_SECONDS, RayOrder
from shoal.worker.logs import event

log = logging.getLogger(__name__)

_MARGIN_SECONDS: Final = 60.0  # beyond what the other process bounds itself
_STOP_SECONDS: Final = 2.0


class LaunchError(RuntimeError):
    """The ranks cannot be started; says what to do about it."""


class RayLauncher:
    """Starts and ends the ranks of one group. Not for use by several threads."""

    def __init__(
        self,
        tensor: int,
        pipeline: int,
        address: str | None,
        *,
        environ: Mapping[str, str] = os.environ,
        wait_seconds: float = WAIT_SECONDS,
    ) -> None:
        """`address` of a Ray cluster's head, or None: a cluster of this machine alone, with room
        for all ranks, on its GPUs where it has some."""
        self._tensor = tensor
        self._pipeline = pipeline
        self._address = address
        self._environ = dict(environ)
        self._wait_seconds = wait_seconds
        self._node: _Child | None = None
        self._ranks: _Child | None = None
        self._failure: str | None = None
        # Where the other nodes of the cluster find this one.
        self.host = own_address(address.rpartition(":")[0]) if address else own_address()

    def start(self, invitation: bytes) -> None:
        """Returns when every rank's program runs. Raises LaunchError."""
        address = self._address or self._own_node()
        order = RayOrder(
            address=address,
            ip=self.host,
            tensor=self._tensor,
            pipeline=self._pipeline,
            invitation=b64encode(invitation).decode(),
            wait_seconds=self._wait_seconds,
        )
        self._ranks = _Child("ranks", [], ray_environment(self._environ), order.line())
        allowed = self._wait_seconds + 2 * SEAT_SECONDS + _MARGIN_SECONDS
        while True:
            said = self._ranks.next_event(allowed)
            if "waiting" in said:
                event(log, "waiting for nodes", why=said["waiting"])
            elif "rank" in said:
                event(log, "rank placed", **said)
            elif "started" in said:
                break
            else:
                self.stop()
                raise LaunchError(said.get("error", f"the ranks do not start: {said}"))
        threading.Thread(target=self._listen, name="ray-ranks", daemon=True).start()

    def failure(self) -> str | None:
        """Why the ranks run no more, or None while they do."""
        return self._failure

    def stop(self) -> None:
        """Ends all ranks, and this machine's node if it is ours. Idempotent."""
        for child in (self._ranks, self._node):
            if child is not None:
                child.close()
        self._ranks = self._node = None

    def _own_node(self) -> str:
        ranks = self._tensor * self._pipeline
        flags = ["--ip", self.host, "--ranks", str(ranks)]
        self._node = _Child("node", flags, self._environ)
        said = self._node.next_line(START_SECONDS + _MARGIN_SECONDS)
        word, _, rest = said.partition(" ")
        if word != "ready":
            self.stop()
            raise LaunchError("Ray does not start on this machine; its words are above")
        address, _, token = rest.partition(" ")
        self._environ[ENV_TOKEN_PATH] = token
        return address

    def _listen(self) -> None:
        ranks = self._ranks
        while ranks is not None and self._failure is None:
            said = ranks.next_event(None)
            if "lost" in said:
                self._failure = f"rank {said['lost']}: {said['why']}"
            elif "error" in said:
                self._failure = str(said["error"])


class _Child:
    """A program of this package that ends with this process, and talks in lines."""

    def __init__(
        self, program: str, flags: list[str], environ: Mapping[str, str], first: str = ""
    ) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "shoal.worker.cluster", program, *flags],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**environ, ENV_LIFELINE: "stdin"},
            text=True,
            bufsize=1,
            start_new_session=True,  # a terminal's Ctrl-C is the engine's to answer
        )
        self._lines: SimpleQueue[str] = SimpleQueue()
        threading.Thread(target=self._read, name=f"{program}-words", daemon=True).start()
        if first:
            self._write(first + "\n")

    def next_line(self, seconds: float | None) -> str:
        """The next line, or "" when there will be none in time."""
        try:
            return self._lines.get(timeout=seconds)
        except Empty:
            return ""

    def next_event(self, seconds: float | None) -> dict[str, Any]:
        """The next line that is an event; one with `error` where there will be none."""
        while line := self.next_line(seconds):
            if line.startswith("{"):
                with suppress(ValueError):
                    said: dict[str, Any] = json.loads(line)
                    return said
        return {"error": "the process that runs Ray's driver ended: its node or head is gone"}

    def close(self) -> None:
        """Lets go of the lifeline; kills what does not end with it."""
        with suppress(OSError):
            assert self._process.stdin is not None
            self._process.stdin.close()
        try:
            self._process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.terminate()
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(3 * _STOP_SECONDS)
            self._process.kill()
            self._process.wait()

    def _write(self, text: str) -> None:
        assert self._process.stdin is not None
        with suppress(OSError):  # it ended already: its next event says so
            self._process.stdin.write(text)
            self._process.stdin.flush()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line.rstrip("\n"))
        self._lines.put("")
