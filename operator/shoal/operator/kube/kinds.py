"""The kinds of objects that the operator reads and writes, and where the API server has them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from shoal.api import names
from shoal.api.crd import PLURAL

_OURS: Final = f"{names.LABEL_MANAGED_BY}={names.MANAGER}"


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of object. `selector` bounds what the operator lists and watches of it."""

    api_version: str
    kind: str
    plural: str
    selector: str | None = _OURS
    namespaced: bool = True

    @property
    def group(self) -> str:
        """The API group, empty for the core group."""
        return self.api_version.rpartition("/")[0]

    @property
    def version(self) -> str:
        return self.api_version.rpartition("/")[2]

    def path(
        self, namespace: str | None = None, name: str | None = None, subresource: str | None = None
    ) -> str:
        """Path of a collection, an object or its subresource; without namespace: of all."""
        parts = ["apis" if self.group else "api", self.api_version]
        if self.namespaced and namespace is not None:
            parts += ["namespaces", namespace]
        parts.append(self.plural)
        parts += [part for part in (name, subresource) if part is not None]
        return "/" + "/".join(parts)


INFERENCE_SERVICES: Final = Kind(names.API_VERSION, names.KIND, PLURAL, selector=None)
PODS: Final = Kind("v1", "Pod", "pods")
SERVICES: Final = Kind("v1", "Service", "services")
CONFIG_MAPS: Final = Kind("v1", "ConfigMap", "configmaps")
SECRETS: Final = Kind("v1", "Secret", "secrets")
CONTROLLER_REVISIONS: Final = Kind("apps/v1", "ControllerRevision", "controllerrevisions")
DISRUPTION_BUDGETS: Final = Kind("policy/v1", "PodDisruptionBudget", "poddisruptionbudgets")
POD_MONITORS: Final = Kind("monitoring.coreos.com/v1", "PodMonitor", "podmonitors")
AUTOSCALERS: Final = Kind("autoscaling/v2", "HorizontalPodAutoscaler", "horizontalpodautoscalers")
SCALED_OBJECTS: Final = Kind("keda.sh/v1alpha1", "ScaledObject", "scaledobjects")
NODES: Final = Kind("v1", "Node", "nodes", selector=None, namespaced=False)
EVENTS: Final = Kind("v1", "Event", "events", selector=None)
LEASES: Final = Kind("coordination.k8s.io/v1", "Lease", "leases", selector=None)

# What has to be noticed at once when somebody touches it, by watches of the operator's own.
STREAMED: Final = (PODS, SERVICES, CONFIG_MAPS)
# Kept in memory by watches: services by kopf's.
WATCHED: Final = (INFERENCE_SERVICES, *STREAMED)
# Kept in memory by the list of every minute: the cluster counts on budgets all the time, and
# nobody but the operator reads records. Secrets are not kept: only their pods read a token.
LISTED: Final = (*WATCHED, CONTROLLER_REVISIONS, DISRUPTION_BUDGETS)
# Kept likewise where the cluster knows them and the operator makes them.
OPTIONAL: Final = (POD_MONITORS, AUTOSCALERS, SCALED_OBJECTS)
_KNOWN: Final = {
    (kind.api_version, kind.kind): kind for kind in (*LISTED, *OPTIONAL, SECRETS, NODES, EVENTS)
}


def kind_of(document: Mapping[str, Any]) -> Kind:
    """The kind of a manifest; KeyError for one that the operator never makes."""
    return _KNOWN[document["apiVersion"], document["kind"]]
