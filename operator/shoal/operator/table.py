"""The route table of a service: which pods routers may use, and how."""

from collections import Counter
from collections.abc import Mapping

from shoal.api.routes import Endpoint, Pin, RouteTable
from shoal.api.scaling import ScaleToZeroSpec
from shoal.api.types import InferenceService
from shoal.operator.observe import Observed

WHOLE = 100


def route_table(
    service: InferenceService,
    key: str,
    observed: Observed,
    leaving: frozenset[str],
    weights: Mapping[str, int] | None = None,
    pins: tuple[Pin, ...] = (),
) -> RouteTable:
    """The table that should be in force under the service's `key`; pods that are `leaving` are
    marked as draining. Replicas of several pods are known by their leader.

    A pod enters when it is ready for the first time and stays until it is gone, so that a
    router can tell when its last request has ended. Revisions share new requests by `weights`;
    where those are None, by the number of their replicas. The generation is the present one if
    nothing changes, else the next: also after that on which routers act, where the table that
    they read was lost.
    """
    routing = service.spec.routing
    autoscaling = service.spec.autoscaling
    queue = (autoscaling and autoscaling.scale_to_zero) or ScaleToZeroSpec()
    table = RouteTable(
        service=key,
        models=service.model_ids,
        policy=routing.policy,
        session_header=routing.session_header,
        max_retries=routing.max_retries,
        migration_limit=routing.migration_limit,
        max_queued=queue.max_queued,
        queue_timeout_seconds=queue.queue_timeout_seconds,
        pins=pins,
    )
    return _numbered(_over_pods(table, observed, leaving, weights), observed)


def frozen_table(observed: Observed, leaving: frozenset[str]) -> RouteTable | None:
    """The table in force with its names, policy and weights, over the pods that are there; None
    if there is none. Names that an older service claims are given up: no name leads to two
    services."""
    if observed.table is None:
        return None
    claimed = {claim.model_id for claim in observed.claims}
    models = tuple(model for model in observed.table.models if model not in claimed)
    table = observed.table.model_copy(update={"models": models})
    there = {pod.revision for pod in observed.pods if pod.name not in leaving}
    weights = percents({name: w for name, w in table.weights.items() if name in there})
    return _numbered(_over_pods(table, observed, leaving, weights or None), observed)


def closed_table(observed: Observed) -> RouteTable | None:
    """The table of a service that is being removed: no names, every endpoint draining."""
    if observed.table is None:
        return None
    leaving = frozenset(pod.name for pod in observed.pods)
    table = observed.table.model_copy(update={"models": ()})
    return _numbered(_over_pods(table, observed, leaving, None), observed)


def percents(shares: Mapping[str, int]) -> dict[str, int]:
    """The shares as whole percents that add up to 100, by the largest remainders; {} of nothing."""
    total = sum(shares.values())
    if not total:
        return {}
    exact = {name: divmod(share * WHOLE, total) for name, share in sorted(shares.items())}
    spare = WHOLE - sum(whole for whole, _ in exact.values())
    gifts = sorted(exact, key=lambda name: -exact[name][1])[:spare]
    return {name: whole + (name in gifts) for name, (whole, _) in exact.items()}


def _over_pods(
    table: RouteTable,
    observed: Observed,
    leaving: frozenset[str],
    weights: Mapping[str, int] | None,
) -> RouteTable:
    known = {e.name: e.address for e in observed.table.endpoints} if observed.table else {}
    endpoints = []
    for pod in sorted(observed.pods, key=lambda pod: pod.name):
        # Between two of its processes a pod has no address: the last one stands.
        address = pod.address or known.get(pod.name)
        enters = (pod.ready or observed.reached(pod)) and pod.name not in leaving
        if address is not None and (pod.name in known or enters):
            endpoints.append(
                Endpoint(
                    name=pod.name,
                    address=address,
                    revision=pod.revision,
                    draining=pod.name in leaving,
                )
            )
    if weights is None:
        weights = percents(Counter(e.revision for e in endpoints if not e.draining))
    update = {"endpoints": tuple(endpoints), "weights": dict(sorted(weights.items()))}
    return table.model_copy(update=update)


def _numbered(table: RouteTable, observed: Observed) -> RouteTable:
    current = observed.table
    number = current.generation if current is not None else 0
    heard = max((router.generation for router in observed.routers), default=0)
    if table.model_copy(update={"generation": number}) == current and heard <= number:
        return current
    return table.model_copy(update={"generation": max(number, heard) + 1})
