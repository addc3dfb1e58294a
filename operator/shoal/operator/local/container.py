"""A pod manifest as a process: what of it counts on one machine.

Command, arguments and SHOAL_ environment of the container are run as they stand. Where pods in a
cluster have an address each, processes share one: host and ports come from the environment
instead. A cache on the host is the folder itself; without one the machine's own stands, and a
worker downloads what it lacks. The image is ignored, `python` is the interpreter that runs the
supervisor.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shoal.api.names import (
    ENV_GRPC_PORT,
    ENV_HOST,
    ENV_METRICS_PORT,
    ENV_PORT,
    ROLE_LEADER,
    ROLE_ROUTER,
)
from shoal.operator.build import Pod
from shoal.operator.local.settings import SupervisorSettings
from shoal.operator.local.store import ROUTER_POD

LOCALHOST = "127.0.0.1"


@dataclass(frozen=True, slots=True)
class Probe:
    """A gRPC health probe. Seconds."""

    service: str
    period: float
    timeout: float
    failures: int  # in a row, until it counts


@dataclass(frozen=True, slots=True)
class Container:
    """What to run for a pod, and how to know that it works."""

    name: str  # of the pod
    role: str
    argv: tuple[str, ...]
    environ: Mapping[str, str]
    host: str  # that it listens on
    ports: Mapping[str, str]  # name -> environment variable that says it; "grpc" is among them
    readiness: Probe
    fixed_ports: Mapping[str, int]  # name -> port; the others are any free ones
    liveness: Probe | None = None  # asked once the pod has been ready
    service: str = ""
    revision: str = ""
    replica: int = 0


def worker_container(pod: Pod, service: str, settings: SupervisorSettings) -> Container:
    """The worker that the planner made a manifest for."""
    spec = pod.manifest["spec"]
    container = spec["containers"][0]
    said = _environment(spec["volumes"], container)
    return Container(
        name=pod.name,
        role=ROLE_LEADER,
        argv=_argv([*container["command"], *container["args"]], settings.python),
        environ={**settings.environ, **said, ENV_HOST: LOCALHOST, "PYTHONUNBUFFERED": "1"},
        host=LOCALHOST,
        ports={"grpc": ENV_PORT, "metrics": ENV_METRICS_PORT},
        readiness=_probe(container["readinessProbe"]),
        fixed_ports={},
        liveness=_probe(container["livenessProbe"]),
        service=service,
        revision=pod.revision,
        replica=pod.replica,
    )


def router_container(
    settings: SupervisorSettings, http_port: int, grpc_port: int, routes: Path
) -> Container:
    """The one router of all services."""
    arguments = [
        "--routes",
        str(routes),
        "--drain-seconds",
        f"{settings.stop_seconds:g}",
        "--log-level",
        settings.log_level,
    ]
    environ = {
        **settings.environ,
        ENV_HOST: settings.host,
        "PYTHONUNBUFFERED": "1",
    }
    return Container(
        name=ROUTER_POD,
        role=ROLE_ROUTER,
        argv=_argv([*settings.router_command, *arguments], settings.python),
        environ=environ,
        host=settings.host,
        ports={"http": ENV_PORT, "grpc": ENV_GRPC_PORT},
        readiness=Probe("", period=1.0, timeout=2.0, failures=3),
        fixed_ports={"http": http_port, "grpc": grpc_port},
    )


def _environment(
    volumes: Sequence[Mapping[str, Any]], container: Mapping[str, Any]
) -> dict[str, str]:
    """What the container says to Shoal, with the folders of mounts as they are on this machine."""
    folders = {volume["name"]: volume.get("hostPath", {}).get("path") for volume in volumes}
    places = {mount["mountPath"]: folders[mount["name"]] for mount in container["volumeMounts"]}
    found = {}
    for entry in container["env"]:
        name, value = entry["name"], entry["value"]
        mount = next((m for m in places if value == m or value.startswith(f"{m}/")), None)
        if mount is not None:
            if (folder := places[mount]) is not None:
                found[name] = folder + value.removeprefix(mount)
        elif name.startswith("SHOAL_"):
            found[name] = value
    return found


def _argv(command: Sequence[str], python: str) -> tuple[str, ...]:
    program, *arguments = command
    return (python if program == "python" else program, *arguments)


def _probe(manifest: Mapping[str, Any]) -> Probe:
    return Probe(
        manifest["grpc"]["service"],
        manifest["periodSeconds"],
        manifest["timeoutSeconds"],
        manifest["failureThreshold"],
    )
