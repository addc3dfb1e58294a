"""What the engine asks of the process that runs its ranks; pure."""

import json
from dataclasses import asdict, dataclass
from typing import Final

WAIT_SECONDS: Final = 600.0  # for nodes that are still to join
RESERVE_SECONDS: Final = 30.0  # for places that are there
SEAT_SECONDS: Final = 120.0  # for an actor's process to start


@dataclass(frozen=True, slots=True)
class RayOrder:
    """A group of ranks on a Ray cluster."""

    address: str  # of the cluster's head
    ip: str  # of this node
    tensor: int
    pipeline: int
    invitation: str  # base64 of what the ranks are told
    wait_seconds: float = WAIT_SECONDS

    def line(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def of(line: str) -> "RayOrder":
        return RayOrder(**json.loads(line))
