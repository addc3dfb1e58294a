"""What `shoal top` shows: pure, from what each router says of its load.

Routers share the replicas. Requests, queues and arrivals are each router's own and add up; a
replica's figures are the engine's, the same for all routers, and the fullest report counts; of
latencies the slowest router's counts.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from shoal.api.v1 import router_pb2

SERVICE_COLUMNS = (
    "name",
    "replicas",
    "running",
    "queued",
    "kv",
    "ttft p95",
    "itl p95",
    "req/s",
    "requests",
    "errors",
)
REPLICA_COLUMNS = ("replica", "service", "revision", "admitted", "running", "waiting", "kv", "step")


@dataclass(frozen=True, slots=True)
class ReplicaTop:
    """One engine."""

    name: str
    service: str
    revision: str
    admitted: int  # routers that send new requests there
    routers: int
    running: int  # sequences
    waiting: int
    kv_used: float  # share of the KV cache, 0 to 1
    step_seconds: float


@dataclass(frozen=True, slots=True)
class ServiceTop:
    """One service, over all routers."""

    name: str
    replicas: int
    admitted: int  # replicas to which every router sends new requests
    running: int  # sequences with the engines, as the routers count them
    queued: int
    kv_used: float  # mean of the replicas
    ttft_p95_seconds: float  # over the last minute; 0: no request
    itl_p95_seconds: float
    arrivals: int  # since the routers started
    requests: int  # ended
    errors: int  # of these, by a server's fault


def tops(
    loads: Sequence[router_pb2.RouterLoad], name_of: Callable[[str], str | None]
) -> tuple[list[ServiceTop], list[ReplicaTop]]:
    """Services and replicas by name. `name_of` gives the name to show for a router's key of a
    service, None for one that is not to be shown."""
    by_service: dict[str, list[router_pb2.ServiceLoad]] = {}
    for load in loads:
        for service in load.services:
            name = name_of(service.service)
            if name is not None:
                by_service.setdefault(name, []).append(service)
    services, replicas = [], []
    for name, reports in sorted(by_service.items()):
        own = _replicas(name, reports, len(loads))
        services.append(_service(name, reports, own))
        replicas += own
    return services, replicas


def service_cells(top: ServiceTop, rate: float | None) -> list[str]:
    """One row under SERVICE_COLUMNS. `rate`: arrivals a second, once two looks can tell it."""
    return [
        top.name,
        f"{top.admitted}/{top.replicas}",
        str(top.running),
        str(top.queued),
        f"{top.kv_used:.0%}",
        _milliseconds(top.ttft_p95_seconds),
        _milliseconds(top.itl_p95_seconds),
        "-" if rate is None else f"{rate:.1f}",
        str(top.requests),
        str(top.errors),
    ]


def replica_cells(top: ReplicaTop) -> list[str]:
    """One row under REPLICA_COLUMNS."""
    if top.routers == 1:
        admitted = "yes" if top.admitted else "no"
    else:
        admitted = f"{top.admitted}/{top.routers}"
    return [
        top.name,
        top.service,
        top.revision,
        admitted,
        str(top.running),
        str(top.waiting),
        f"{top.kv_used:.0%}",
        _milliseconds(top.step_seconds),
    ]


def document(
    services: Iterable[ServiceTop], replicas: Iterable[ReplicaTop], routers: int
) -> Mapping[str, Any]:
    """For programs: numbers as they are, seconds and shares."""
    return {
        "routers": routers,
        "services": [asdict(top) for top in services],
        "replicas": [asdict(top) for top in replicas],
    }


def _replicas(
    service: str, reports: Sequence[router_pb2.ServiceLoad], routers: int
) -> list[ReplicaTop]:
    by_name: dict[str, list[router_pb2.EndpointLoad]] = {}
    for report in reports:
        for endpoint in report.endpoints:
            by_name.setdefault(endpoint.name, []).append(endpoint)
    return [
        ReplicaTop(
            name=name,
            service=service,
            revision=seen[0].revision,
            admitted=sum(endpoint.admitted for endpoint in seen),
            routers=routers,
            running=max(endpoint.load.running for endpoint in seen),
            waiting=max(endpoint.load.waiting for endpoint in seen),
            kv_used=max(
                endpoint.load.blocks_used / (endpoint.load.blocks_total or 1) for endpoint in seen
            ),
            step_seconds=max(endpoint.load.step_seconds for endpoint in seen),
        )
        for name, seen in sorted(by_name.items())
    ]


def _service(
    name: str, reports: Sequence[router_pb2.ServiceLoad], replicas: Sequence[ReplicaTop]
) -> ServiceTop:
    revisions = [revision for report in reports for revision in report.revisions]
    return ServiceTop(
        name=name,
        replicas=len(replicas),
        admitted=sum(replica.admitted == replica.routers for replica in replicas),
        running=sum(e.in_flight for report in reports for e in report.endpoints),
        queued=sum(report.queued for report in reports),
        kv_used=sum(replica.kv_used for replica in replicas) / (len(replicas) or 1),
        ttft_p95_seconds=max((each.ttft_p95_seconds for each in revisions), default=0.0),
        itl_p95_seconds=max((each.itl_p95_seconds for each in revisions), default=0.0),
        arrivals=sum(report.arrivals for report in reports),
        requests=sum(revision.requests for revision in revisions),
        errors=sum(revision.errors for revision in revisions),
    )


def _milliseconds(seconds: float) -> str:
    """`-` where nothing was measured."""
    if seconds <= 0:
        return "-"
    return f"{seconds * 1e3:.1f}ms" if seconds < 0.1 else f"{seconds * 1e3:.0f}ms"
