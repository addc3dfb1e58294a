"""Hosts of one machine: network namespaces on a bridge, each with an address and a name.

    with Hosts("a", "b", "c") as hosts:
        hosts["b"].popen(["python", ...])
        hosts["b"].unplug()

Needs root and `ip`. What runs in a namespace is killed with it.
"""

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final

import psutil

_BRIDGE: Final = "shoal-ranks"
_NETWORK: Final = "10.213.77"
_OUTSIDE: Final = 254


def unsupported() -> str | None:
    """Why this machine cannot have such hosts; None where it can."""
    if os.geteuid() != 0 or shutil.which("ip") is None or shutil.which("unshare") is None:
        return "network namespaces need root, ip and unshare"
    probe = f"{_BRIDGE}-probe"
    try:
        _ip("netns", "add", probe)
        _ip("netns", "del", probe)
    except subprocess.CalledProcessError as error:
        return f"network namespaces cannot be made here: {error.stderr.strip()}"
    return None


@dataclass(frozen=True, slots=True)
class Host:
    """One of them."""

    name: str
    number: int

    @property
    def ip(self) -> str:
        return f"{_NETWORK}.{self.number}"

    @property
    def namespace(self) -> str:
        return f"{_BRIDGE}-{self.name}"

    @property
    def _cable(self) -> str:
        """The bridge's end of its cable."""
        return f"sr-{self.name}"

    def popen(
        self, command: Sequence[str], environ: Mapping[str, str], log: IO[Any]
    ) -> subprocess.Popen[bytes]:
        """A process of this host, under its name. What is returned becomes that process."""
        named = f'hostname {self.name}; exec "$@"'
        return subprocess.Popen(
            [*self._within(), "unshare", "--uts", "sh", "-c", named, "sh", *command],
            env={**environ},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
        )

    def processes(self, words: str = "") -> list[psutil.Process]:
        """Those that run here and have `words` in their name or command line."""
        found = []
        for pid in _ip("netns", "pids", self.namespace).split():
            with suppress(psutil.NoSuchProcess):
                process = psutil.Process(int(pid))
                if words in f"{process.name()} {' '.join(process.cmdline())}":
                    found.append(process)
        return found

    def unplug(self) -> None:
        """Nothing comes in or goes out, and nobody is told."""
        _ip("link", "set", self._cable, "down")

    def plug(self) -> None:
        _ip("link", "set", self._cable, "up")

    def make(self, names: str) -> None:
        """`names` is the hosts file of all."""
        self.remove()
        # What `ip netns exec` shows as /etc: whoever asks for a name has an answer at once.
        self._etc.mkdir(parents=True)
        (self._etc / "hosts").write_text(names)
        (self._etc / "resolv.conf").write_text("")
        _ip("netns", "add", self.namespace)
        _ip("link", "add", self._cable, "type", "veth", "peer", "eth0", "netns", self.namespace)
        _ip("link", "set", self._cable, "master", _BRIDGE)
        self.plug()
        for command in (
            ("addr", "add", f"{self.ip}/24", "dev", "eth0"),
            ("link", "set", "eth0", "up"),
            ("link", "set", "lo", "up"),
            ("route", "add", "default", "via", f"{_NETWORK}.{_OUTSIDE}"),
        ):
            subprocess.run([*self._within(), "ip", *command], check=True)

    @property
    def _etc(self) -> Path:
        return Path("/etc/netns") / self.namespace

    def remove(self) -> None:
        shutil.rmtree(self._etc, ignore_errors=True)
        with suppress(subprocess.CalledProcessError):
            for process in self.processes():
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            _ip("netns", "del", self.namespace)
        with suppress(subprocess.CalledProcessError):
            _ip("link", "del", self._cable)

    def _within(self) -> list[str]:
        return ["ip", "netns", "exec", self.namespace]


class Hosts:
    """All of them, from `with` to its end."""

    def __init__(self, *names: str) -> None:
        self._hosts = {name: Host(name, number) for number, name in enumerate(names, start=1)}

    def __getitem__(self, name: str) -> Host:
        return self._hosts[name]

    def __iter__(self) -> Iterator[Host]:
        return iter(self._hosts.values())

    def __enter__(self) -> "Hosts":
        with suppress(subprocess.CalledProcessError):
            _ip("link", "del", _BRIDGE)
        _ip("link", "add", _BRIDGE, "type", "bridge")
        _ip("addr", "add", f"{_NETWORK}.{_OUTSIDE}/24", "dev", _BRIDGE)
        _ip("link", "set", _BRIDGE, "up")
        lines = ["127.0.0.1 localhost", *(f"{host.ip} {host.name}" for host in self)]
        for host in self:
            host.make("\n".join(lines) + "\n")
        return self

    def __exit__(self, *_: object) -> None:
        for host in self:
            host.remove()
        with suppress(subprocess.CalledProcessError):
            _ip("link", "del", _BRIDGE)


def stop(process: subprocess.Popen[bytes], seconds: float = 15.0) -> None:
    """Ends it, politely first."""
    with suppress(ProcessLookupError):
        process.send_signal(signal.SIGTERM)
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def gone(pids: Sequence[int], seconds: float) -> float | None:
    """How long it took until none of the processes was left; None if one still is."""
    began = time.monotonic()
    while time.monotonic() - began < seconds:
        if not any(_alive(pid) for pid in pids):
            return time.monotonic() - began
        time.sleep(0.05)
    return None


def _alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _ip(*arguments: str) -> str:
    done = subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)
    return done.stdout
