"""What a service has beside its pods, as manifests for server-side apply. Pure.

A headless Service gives the pods of a group their names; a PodDisruptionBudget lets one replica
go at a time when nodes are emptied; a PodMonitor tells Prometheus where the engines' metrics
are. The route table is a ConfigMap, a revision's spec a ControllerRevision, and groups of more
than one pod share a token in a Secret. All are owned by the service and go with it.
"""

import base64
from collections.abc import Collection, Mapping
from typing import Any, Final

from pydantic import ValidationError

from shoal.api.names import (
    LABEL_REVISION,
    LABEL_ROUTES,
    LABEL_SERVICE,
    PORT_ENGINE_GRPC,
    PORT_ENGINE_METRICS,
    ROUTES_KEY,
)
from shoal.api.routes import RouteTable
from shoal.api.types import InferenceService, ScalingDriver
from shoal.operator.external import autoscaler
from shoal.operator.metadata import (
    controller_revision_name,
    group_size,
    group_token_name,
    metadata,
    routes_name,
    worker_labels,
    workers_name,
)
from shoal.operator.observe import Observed
from shoal.operator.platform import NO_DEFAULTS, PodDefaults
from shoal.operator.revision import Revision
from shoal.operator.scaler import planned_replicas

TOKEN_KEY: Final = "token"  # of the group token's data


def desired_children(
    service: InferenceService,
    observed: Observed,
    *,
    monitors: bool,
    pods: PodDefaults = NO_DEFAULTS,
    drivers: Collection[ScalingDriver] = (),
    scaler_address: str = "",
) -> tuple[dict[str, Any], ...]:
    """Objects that should be there beside the pods, once a plan is carried out.

    `monitors`: whether the cluster knows PodMonitors (monitoring.coreos.com). `pods`: what every
    worker pod has. `drivers`: who may scale, beside the operator. `scaler_address`: where KEDA
    finds the operator.
    """
    children = [_workers_service(service)] if _need_names(service, observed, pods) else []
    planned = _planned_pods(service, observed, pods)
    if planned > 1:
        children.append(_disruption_budget(service, planned))
    if monitors:
        children.append(_pod_monitor(service))
    scaling = service.spec.autoscaling
    driver = autoscaler(service, scaler_address)
    if driver is not None and scaling is not None and scaling.driver in drivers:
        children.append(driver)
    return tuple(children)


def routes_config_map(service: InferenceService, table: RouteTable) -> dict[str, Any]:
    """The route table as routers watch it."""
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": metadata(service, routes_name(service.name), {LABEL_ROUTES: "true"}),
        "data": {ROUTES_KEY: table.model_dump_json()},
    }


def read_routes(config_map: Mapping[str, Any]) -> RouteTable | None:
    """The table that a ConfigMap holds; None where somebody spoiled it: it is written anew."""
    try:
        return RouteTable.model_validate_json(config_map["data"][ROUTES_KEY])
    except (KeyError, TypeError, ValidationError):
        return None


def controller_revision(service: InferenceService, revision: Revision) -> dict[str, Any]:
    """A revision's spec, so that its pods can be made again after the service's has changed."""
    name = controller_revision_name(service.name, revision.name)
    return {
        "apiVersion": "apps/v1",
        "kind": "ControllerRevision",
        "metadata": metadata(service, name, {LABEL_REVISION: revision.name}),
        "revision": int(revision.created.timestamp()),
        "data": revision.to_document(),
    }


def read_revision(controller_revision: Mapping[str, Any]) -> Revision | None:
    """The revision that an object keeps; None where this release cannot read it."""
    try:
        return Revision.from_document(controller_revision["data"])
    except (KeyError, TypeError, ValueError):
        return None


def needs_group_token(
    service: InferenceService, observed: Observed, pods: PodDefaults = NO_DEFAULTS
) -> bool:
    """Whether a replica of any revision has more than one pod."""
    made = [(service.spec, pods), *((one.spec, one.pods) for one in observed.revisions)]
    return any(group_size(spec, defaults) > 1 for spec, defaults in made)


def group_token_secret(service: InferenceService, token: str) -> dict[str, Any]:
    """The secret of a service's groups. It is made once: pods that run know only that one."""
    return {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": metadata(service, group_token_name(service.name), {}),
        "type": "Opaque",
        "immutable": True,
        "data": {TOKEN_KEY: base64.b64encode(token.encode()).decode()},
    }


def _workers_service(service: InferenceService) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": metadata(service, workers_name(service.name), {}),
        "spec": {
            "clusterIP": "None",
            # Members of a group look for each other before any of them is ready.
            "publishNotReadyAddresses": True,
            "selector": worker_labels(service.name),
            "ports": [
                {"name": name, "port": port, "protocol": "TCP", "targetPort": port}
                for name, port in (("grpc", PORT_ENGINE_GRPC), ("metrics", PORT_ENGINE_METRICS))
            ],
        },
    }


def _need_names(service: InferenceService, observed: Observed, pods: PodDefaults) -> bool:
    """Whether the Service is due. Members of a group look for each other when they start. A
    replica of one pod is looked up by others, once it has an address; made before, the cluster
    would write every Service's endpoints twice."""
    return group_size(service.spec, pods) > 1 or any(
        pod.address is not None or pod.group_size > 1 for pod in observed.pods
    )


def _planned_pods(service: InferenceService, observed: Observed, pods: PodDefaults) -> int:
    """How many pods there should be, or a little less while groups of two sizes are there."""
    sizes = [group_size(service.spec, pods), *(pod.group_size for pod in observed.pods)]
    return planned_replicas(service, observed) * min(sizes)


def _disruption_budget(service: InferenceService, planned: int) -> dict[str, Any]:
    """One pod may go at a time, and with it its replica. A sole pod has no budget: one that never
    allows an eviction would keep its node from ever being emptied, and one that always does
    would be work for the cluster and protect nothing."""
    return {
        "apiVersion": "policy/v1",
        "kind": "PodDisruptionBudget",
        "metadata": metadata(service, service.name, {}),
        "spec": {
            "minAvailable": planned - 1,
            "selector": {"matchLabels": worker_labels(service.name)},
            # Who serves nobody may always be evicted.
            "unhealthyPodEvictionPolicy": "AlwaysAllow",
        },
    }


def _pod_monitor(service: InferenceService) -> dict[str, Any]:
    return {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PodMonitor",
        "metadata": metadata(service, service.name, {}),
        "spec": {
            "selector": {"matchLabels": worker_labels(service.name)},
            "podMetricsEndpoints": [{"port": "metrics", "path": "/metrics"}],
            "podTargetLabels": [LABEL_SERVICE, LABEL_REVISION],
        },
    }
