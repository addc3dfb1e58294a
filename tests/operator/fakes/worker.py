"""A worker without a model: speaks gRPC health, and misbehaves as its model URI asks.

py://good and py://better serve, and swap to each other's weights but not to py://wide's, which
serves, too; py://broken ends at once; py://stubborn ignores SIGTERM; py://parent starts a
process of its own; py://dead is alive until a file of that name beside its log says otherwise.
"""

import argparse
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent import futures
from pathlib import Path

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from shoal.api.lifeline import watch_lifeline
from shoal.api.v1 import engine_pb2, engine_pb2_grpc

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


class Engine(engine_pb2_grpc.EngineServicer):
    def SwapWeights(self, request, context):
        if request.uri == "py://wide":
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, "wide has other shapes")
        print(f"swapped to {request.uri} as {request.revision}", flush=True)
        yield engine_pb2.SwapProgress(phase=engine_pb2.SwapProgress.LOADING, fraction=0.5)
        yield engine_pb2.SwapProgress(phase=engine_pb2.SwapProgress.DONE)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    model = parser.parse_known_args()[0].model.removeprefix("py://")
    watch_lifeline()
    print(f"{os.environ['SHOAL_POD_NAME']} runs {model}", flush=True)
    if model == "broken":
        print("cannot serve: there is no such model", flush=True)
        return 1
    if model == "parent":
        child = subprocess.Popen(["sleep", "600"])
        print(f"child={child.pid}", flush=True)
    stop = threading.Event()
    ignored = model == "stubborn"
    signal.signal(signal.SIGTERM, signal.SIG_IGN if ignored else lambda *_: stop.set())
    server = grpc.server(futures.ThreadPoolExecutor(4))
    state = health.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(state, server)
    engine_pb2_grpc.add_EngineServicer_to_server(Engine(), server)
    server.add_insecure_port(f"{os.environ['SHOAL_HOST']}:{os.environ['SHOAL_PORT']}")
    server.start()
    for service in ("", "live"):
        state.set(service, SERVING)
    sickness = Path(os.environ.get("FAKE_SICKNESS", "/nonexistent"))
    while not stop.wait(0.02):
        sick = sickness.exists()
        for service in ("", "live"):
            state.set(service, NOT_SERVING if sick else SERVING)
    server.stop(0)
    return 0


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    time.sleep(0)
    os._exit(code)
