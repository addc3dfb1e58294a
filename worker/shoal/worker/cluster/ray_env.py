"""The environment of Ray's processes: who may join, and how soon a dead node is noticed; pure.

Ray's own defaults see a broken link after a minute, and leave a partitioned node's processes
alive for longer. These must be set before `ray start`, on every node of a cluster alike. They need
not be tight, and must not be on a busy machine, which Ray would take for a dead one: that a rank is
gone is heard from the ranks themselves (`shoal.worker.parallel.pulse`).
"""

from collections.abc import Mapping
from typing import Final

ENV_AUTH_MODE: Final = "RAY_AUTH_MODE"
ENV_TOKEN_PATH: Final = "RAY_AUTH_TOKEN_PATH"
_ALWAYS: Final = {
    ENV_AUTH_MODE: "token",
    "USER": "shoal",  # a container's user has no name of its own
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_IGNORE_UNHANDLED_ERRORS": "1",  # they are told, and logged by who is told
    "RAY_memory_monitor_refresh_ms": "0",  # the container's limit decides, not Ray
    "RAY_health_check_initial_delay_ms": "2000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "3000",
    "RAY_health_check_failure_threshold": "3",
    # What a partitioned node goes by to end itself.
    "RAY_gcs_rpc_server_reconnect_timeout_s": "10",
    "RAY_raylet_liveness_self_check_interval_ms": "5000",
    "RAY_grpc_client_keepalive_time_ms": "5000",
    "RAY_grpc_client_keepalive_timeout_ms": "5000",
}


def ray_environment(environ: Mapping[str, str], token_path: str | None = None) -> dict[str, str]:
    """`environ` for a process of Ray's. What it says of Ray itself stands; `token_path` is where
    the token is if it does not."""
    token = {} if token_path is None else {ENV_TOKEN_PATH: token_path}
    return {**_ALWAYS, **token, **environ}
