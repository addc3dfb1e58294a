"""A peer is a process of its own that loads once and then runs one workload a line.

Requests and replies are JSON lines: `{"seed": 1, "workload": "W2"}` in, a `Timing` out. The
first line out says that the peer is ready. Peers run in environments of their own, so this
module needs nothing but the standard library.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import asdict

from bench.workloads import Timing, Workload, workloads


def serve(describe: dict[str, object], run: Callable[[Workload], Timing]) -> None:
    """Answers requests on standard input until it ends."""
    print(json.dumps({"ready": describe}), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        timing = run(workloads(request["seed"])[request["workload"]])
        print(json.dumps(asdict(timing)), flush=True)
