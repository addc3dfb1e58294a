"""Services of a cluster, through its API server."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from shoal.api.names import (
    APP,
    GROUP,
    LABEL_COMPONENT,
    LABEL_NAME,
    LABEL_SERVICE,
    PORT_ROUTER_GRPC,
    VERSION,
)
from shoal.cli.backend import ApplyResult, EventView, LogLine, PodView, not_found
from shoal.cli.errors import CliError, UsageError
from shoal.cli.kube import logs
from shoal.cli.kube.client import KubeClient, Refused
from shoal.cli.kube.forward import forwarded
from shoal.cli.kube.pods import event_view, pod_view

if TYPE_CHECKING:
    from shoal.api.types import InferenceService, InferenceServiceSpec
    from shoal.api.v1.router_pb2 import RouterLoad

PLURAL: Final = "inferenceservices"
MANAGER: Final = "shoal"  # field manager of what people apply
_APPLY: Final = "application/apply-patch+yaml"
_MERGE: Final = "application/merge-patch+json"
_PODS: Final = f"{LABEL_NAME}={APP},{LABEL_COMPONENT} in (worker,router)"
_ROUTERS: Final = f"{LABEL_NAME}={APP},{LABEL_COMPONENT}=router"
_LOAD_SECONDS: Final = 5.0
_ROUTER_NAMESPACE: Final = "shoal-system"  # where the chart's notes put routers


class KubeBackend:
    """See shoal.cli.backend.Backend."""

    place = "node"
    poll_seconds = 1.0

    def __init__(
        self,
        client: KubeClient,
        namespace: str,
        *,
        everywhere: bool = False,
        explicit: bool = False,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """`everywhere`: all namespaces, for reading alone. `explicit`: the namespace was asked
        for, so a file of another one is refused."""
        self._client = client
        self._namespace = namespace
        self._explicit = explicit
        self._clock = clock
        self._sleep = sleep
        self.namespaced = everywhere
        scope = "all namespaces" if everywhere else f"namespace {namespace}"
        self.where = f"{scope} of context {client.context}"
        self.hint = f"create a service with: shoal apply --namespace {namespace} -f service.yaml"

    def services(self, name: str | None = None) -> list[dict[str, Any]]:
        self._check_definition()
        if name is not None and not self.namespaced:
            found = self._client.find(self._service(name))
            return [] if found is None else [_plain(found)]
        listed = self._client.get(self._scoped(f"/apis/{GROUP}/{VERSION}", PLURAL)).get("items", [])
        documents = [_plain(item) for item in listed]
        return [each for each in documents if name in (None, each["metadata"]["name"])]

    def pods(self, service: str | None = None) -> list[PodView]:
        return [pod_view(pod) for pod in self._live_pods(service)]

    def events(self, service: str) -> list[EventView]:
        pods = {pod["metadata"]["name"] for pod in self._live_pods(service)}
        listed = self._client.get(f"/api/v1/namespaces/{self._namespace}/events").get("items", [])
        own = [event_view(event) for event in listed if _concerns(event, service, pods)]
        return sorted(own, key=lambda event: event.last)

    def load(self, filenames: Sequence[str]) -> list["InferenceService"]:
        from shoal.cli.manifests import load

        return load(filenames, one_namespace=False)

    def key(self, service: "InferenceService") -> str:
        namespace = self._namespace_of(service)
        return service.name if namespace == self._namespace else f"{namespace}/{service.name}"

    def apply(self, service: "InferenceService") -> ApplyResult:
        self._check_definition()
        namespace = self._namespace_of(service)
        path = self._service(self.key(service))
        current = self._client.find(path)
        document = _written(service, namespace)
        if (
            current is not None
            and "replicas" not in document["spec"]
            and _applied_replicas(current)
        ):
            # Left out of an apply, a field that we set before would fall back to its default.
            document["spec"]["replicas"] = current["spec"]["replicas"]
        query = [("fieldManager", MANAGER), ("force", "true"), ("fieldValidation", "Strict")]
        made = self._client.call("PATCH", path, query, document, _APPLY)
        if current is None:
            return "created"
        same = made["metadata"]["resourceVersion"] == current["metadata"]["resourceVersion"]
        return "unchanged" if same else "configured"

    def scale(self, name: str, replicas: int) -> ApplyResult:
        self._check_definition()
        path = f"{self._service(name)}/scale"
        current = self._client.find(path)
        if current is None:
            raise CliError(not_found(self, name))
        if (current.get("spec") or {}).get("replicas", 0) == replicas:
            return "unchanged"
        query = [("fieldManager", MANAGER)]
        self._client.call("PATCH", path, query, {"spec": {"replicas": replicas}}, _MERGE)
        return "configured"

    def patch(self, name: str, change: Mapping[str, object]) -> None:
        query = [("fieldManager", MANAGER), ("fieldValidation", "Strict")]
        self._client.call("PATCH", self._service(name), query, dict(change), _MERGE)

    def delete(self, name: str) -> bool:
        self._check_definition()
        options = {"propagationPolicy": "Background"}
        try:
            self._client.call("DELETE", self._service(name), (), options)
        except Refused as refused:
            if refused.status == 404:
                return False
            raise
        return True

    def gone(self, name: str) -> bool:
        return self._client.find(self._service(name)) is None and not self._live_pods(name)

    def asleep(self) -> str | None:
        """An operator that does not run shows in the conditions, which then stay as they are."""
        return None

    def warnings(self, spec: "InferenceServiceSpec") -> list[str]:
        """What has no effect in a cluster depends on its operator, which says so in conditions."""
        return []

    def logs(self, name: str, tail: int | None, *, follow: bool) -> Iterator[LogLine]:
        def look() -> list[dict[str, Any]]:
            if name == "router":
                return self._routers()
            return [pod for pod in self._live_pods(None) if name in _names(pod)]

        pods = look()
        if not pods:
            names = ", ".join(pod["metadata"]["name"] for pod in self._live_pods(None)) or "none"
            raise CliError(f'no pod and no service "{name}" in {self.where}; pods: {names}')
        if follow:
            return logs.follow(self._client, look, tail)
        return logs.read(self._client, pods, tail)

    def loads(self) -> tuple[list["RouterLoad"], list[str]]:
        from shoal.cli.load import ask_router

        loads, silent = [], []
        for pod in self._routers():
            metadata = pod["metadata"]
            if pod_view(pod).status != "Running":
                continue  # not ready: it serves nobody
            try:
                with forwarded(
                    self._client, metadata["namespace"], metadata["name"], PORT_ROUTER_GRPC
                ) as address:
                    loads.append(ask_router(address, _LOAD_SECONDS))
            except CliError as error:
                silent.append(f"{metadata['name']} is left out: {error.message}")
        if not loads:
            nobody = f"no router is ready in context {self._client.context}"
            raise CliError("\n".join(silent) or nobody)
        return loads, silent

    def service_name(self, key: str) -> str | None:
        namespace, _, name = key.partition("/")
        if self.namespaced:
            return key
        return name if namespace == self._namespace else None

    def wait(self, ready: Callable[[], bool], timeout: float) -> bool:
        deadline = self._clock() + timeout
        while not ready():
            left = deadline - self._clock()
            if left <= 0:
                return False
            self._sleep(min(self.poll_seconds, left))
        return True

    def _check_definition(self) -> None:
        """Raises CliError where the cluster does not know InferenceServices."""
        try:
            self._client.get(f"/apis/{GROUP}/{VERSION}")
        except Refused as refused:
            if refused.status != 404:
                raise
            raise CliError(
                f"the cluster of context {self._client.context} does not know InferenceServices; "
                "install Shoal there: helm install shoal-crds charts/shoal-crds, then "
                "helm install shoal charts/shoal -n shoal-system --create-namespace"
            ) from refused

    def _live_pods(self, service: str | None) -> list[dict[str, Any]]:
        if service is None:
            return self._listed_pods(self._scoped("/api/v1", "pods"), _PODS)
        namespace, name = self._split(service)
        selector = f"{_PODS},{LABEL_SERVICE}={name}"
        if self.namespaced:
            return self._listed_pods("/api/v1/pods", selector)
        return self._listed_pods(f"/api/v1/namespaces/{namespace}/pods", selector)

    def _routers(self) -> list[dict[str, Any]]:
        """Router pods, wherever they are; where that may not be asked, in their usual place."""
        try:
            found = self._listed_pods("/api/v1/pods", _ROUTERS)
        except Refused as refused:
            if refused.status != 403:
                raise
            path = f"/api/v1/namespaces/{_ROUTER_NAMESPACE}/pods"
            found = self._listed_pods(path, _ROUTERS)
        if not found:
            raise CliError(f"no router pod ({_ROUTERS}) in the cluster of {self._client.context}")
        return found

    def _listed_pods(self, path: str, selector: str) -> list[dict[str, Any]]:
        listed = self._client.get(path, [("labelSelector", selector)]).get("items", [])
        pods = [{"apiVersion": "v1", "kind": "Pod", **pod} for pod in listed]
        return sorted(pods, key=lambda pod: (pod["metadata"]["namespace"], pod["metadata"]["name"]))

    def _scoped(self, group: str, plural: str) -> str:
        if self.namespaced:
            return f"{group}/{plural}"
        return f"{group}/namespaces/{self._namespace}/{plural}"

    def _service(self, key: str) -> str:
        namespace, name = self._split(key)
        return f"/apis/{GROUP}/{VERSION}/namespaces/{namespace}/{PLURAL}/{name}"

    def _split(self, key: str) -> tuple[str, str]:
        """Namespace and name of `name` or `namespace/name`."""
        namespace, _, name = key.rpartition("/")
        return namespace or self._namespace, name

    def _namespace_of(self, service: "InferenceService") -> str:
        if "namespace" not in service.metadata.model_fields_set:
            return self._namespace
        if self._explicit and service.metadata.namespace != self._namespace:
            raise UsageError(
                f"{service.name}: metadata.namespace is {service.metadata.namespace}, but "
                f"--namespace is {self._namespace}; leave one of them out"
            )
        return service.metadata.namespace


def _written(service: "InferenceService", namespace: str) -> dict[str, Any]:
    """The service as its YAML has it: without defaults, status and what the server adds."""
    said = service.model_dump(by_alias=True, exclude_unset=True, mode="json")
    metadata = {
        key: value
        for key, value in said["metadata"].items()
        if key in ("name", "labels", "annotations")
    }
    return {
        "apiVersion": service.api_version,
        "kind": service.kind,
        "metadata": {**metadata, "namespace": namespace},
        "spec": dict(said["spec"]),
    }


def _applied_replicas(current: Mapping[str, Any]) -> bool:
    """Whether our last apply set spec.replicas, or this program's scale did."""
    for entry in current["metadata"].get("managedFields") or []:
        if entry.get("manager") == MANAGER and "f:replicas" in (
            (entry.get("fieldsV1") or {}).get("f:spec") or {}
        ):
            return True
    return False


def _plain(document: dict[str, Any]) -> dict[str, Any]:
    """Without the bookkeeping that kubectl does not show either; ready to be applied again."""
    metadata = {k: v for k, v in document["metadata"].items() if k != "managedFields"}
    return {**document, "metadata": metadata}


def _concerns(event: Mapping[str, Any], service: str, pods: set[str]) -> bool:
    about = event.get("involvedObject") or {}
    if about.get("kind") == "Pod":
        return about.get("name") in pods
    return about.get("kind") == "InferenceService" and about.get("name") == service


def _names(pod: Mapping[str, Any]) -> tuple[str, str]:
    labels = pod["metadata"].get("labels") or {}
    return pod["metadata"]["name"], labels.get(LABEL_SERVICE, "")
