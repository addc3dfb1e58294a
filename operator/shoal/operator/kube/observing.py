"""What the planner is told of one service, out of the live objects. Pure but for the world."""

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from shoal.api.routes import RouteTable
from shoal.api.types import InferenceServiceStatus
from shoal.operator.children import read_revision, read_routes
from shoal.operator.kube.kinds import CONFIG_MAPS, CONTROLLER_REVISIONS, PODS
from shoal.operator.kube.world import World, controller_uid, uid_of
from shoal.operator.metadata import routes_name
from shoal.operator.observe import Claim, Observed, ObservedPod, RouterView
from shoal.operator.podstate import observed_pod

Json = Mapping[str, Any]


def observe(
    world: World,
    key: str,
    live: Json,
    *,
    routers: tuple[RouterView, ...],
    silent_routers: int,
    claims: tuple[Claim, ...],
    url: str | None,
    progress: Mapping[str, str],
) -> Observed:
    """Everything about the service `live` that is not in its spec.

    `progress`: by pod uid, what its download said last. Objects of an earlier service of the
    same name are not this one's.
    """
    uid = uid_of(live)
    pods = _pods(world, key, uid, progress)
    records = (o for o in world[CONTROLLER_REVISIONS].of(key) if controller_uid(o) == uid)
    revisions = (read_revision(record) for record in records)
    return Observed(
        pods=pods,
        routers=routers,
        silent_routers=silent_routers,
        table=_table(world, live),
        revisions=tuple(r for r in revisions if r is not None),
        status=read_status(live),
        claims=claims,
        url=url,
    )


def read_status(live: Json) -> InferenceServiceStatus:
    """The status as the document has it; an empty one where another release wrote it."""
    try:
        return InferenceServiceStatus.model_validate(live.get("status") or {})
    except ValidationError:
        return InferenceServiceStatus()


def _pods(world: World, key: str, uid: str, progress: Mapping[str, str]) -> tuple[ObservedPod, ...]:
    return tuple(
        observed_pod(pod, world.nodes, progress.get(uid_of(pod), ""))
        for pod in world[PODS].of(key)
        if controller_uid(pod) == uid
    )


def _table(world: World, live: Json) -> RouteTable | None:
    meta = live["metadata"]
    config_map = world[CONFIG_MAPS].get(meta["namespace"], routes_name(meta["name"]))
    if config_map is None or controller_uid(config_map) != uid_of(live):
        return None
    return read_routes(config_map)
