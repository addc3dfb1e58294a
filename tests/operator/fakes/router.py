"""A router without requests: admits what its route tables list, and says so by GetLoad.

A file <pod>.busy beside the tables makes a pod look as if it had requests in flight;
<service>.counts holds requests and failures by revision as JSON, <service>.queued the number of
requests that wait, <service>.idle the seconds since the last.
"""

import argparse
import json
import os
import signal
import socket
import threading
from concurrent import futures
from pathlib import Path

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from shoal.api.lifeline import watch_lifeline
from shoal.api.routes import RouteTable
from shoal.api.v1 import router_pb2, router_pb2_grpc


class Router(router_pb2_grpc.RouterServicer):
    def __init__(self, routes: Path) -> None:
        self.routes = routes

    def GetLoad(self, request, context):
        tables = [RouteTable.model_validate_json(p.read_text()) for p in self.routes.glob("*.json")]
        return router_pb2.RouterLoad(services=[self.load(table) for table in tables])

    def load(self, table):
        return router_pb2.ServiceLoad(
            service=table.service,
            generation=table.generation,
            queued=int(self.figure(table.service, "queued")),
            idle_seconds=self.figure(table.service, "idle"),
            revisions=self.revisions(table.service),
            endpoints=[
                router_pb2.EndpointLoad(
                    name=e.name,
                    address=e.address,
                    revision=e.revision,
                    admitted=not e.draining and connects(e.address),
                    in_flight=int((self.routes / f"{e.name}.busy").exists()),
                )
                for e in table.endpoints
            ],
        )

    def revisions(self, service: str) -> list[router_pb2.RevisionLoad]:
        path = self.routes / f"{service}.counts"
        counts = json.loads(path.read_text()) if path.exists() else {}
        return [
            router_pb2.RevisionLoad(
                revision=name,
                requests=requests,
                errors=failed,
                ttft=router_pb2.Durations(first=50, counts=[requests - failed]),
            )
            for name, (requests, failed) in counts.items()
        ]

    def figure(self, service: str, name: str) -> float:
        path = self.routes / f"{service}.{name}"
        return float(path.read_text()) if path.exists() else 0.0


def connects(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=1).close()
    except OSError:
        return False
    return True


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--routes", type=Path, required=True)
    options = parser.parse_known_args()[0]
    watch_lifeline()
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    http = socket.create_server((os.environ["SHOAL_HOST"], int(os.environ["SHOAL_PORT"])))
    server = grpc.server(futures.ThreadPoolExecutor(4))
    state = health.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(state, server)
    router_pb2_grpc.add_RouterServicer_to_server(Router(options.routes), server)
    server.add_insecure_port(f"{os.environ['SHOAL_HOST']}:{os.environ['SHOAL_GRPC_PORT']}")
    server.start()
    state.set("", health_pb2.HealthCheckResponse.SERVING)
    stop.wait()
    http.close()
    os._exit(0)


if __name__ == "__main__":
    main()
