"""What a rank is told when it is started: whom to dial, by which key, and what to compute."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import msgpack

from shoal.worker.config import EngineConfig


@dataclass(frozen=True, slots=True)
class Order:
    """The model, and the engine's settings."""

    path: str  # of the model on the driver's node
    uri: str  # where another node gets it from
    model_revision: str | None
    cache_dir: str | None
    config: EngineConfig


@dataclass(frozen=True, slots=True)
class Invitation:
    """To all ranks of one group. Secret: it holds the group's key."""

    work: tuple[str, int]  # the driver's port for plans
    pulse: tuple[str, int]  # and for heartbeats
    key: bytes
    tensor: int
    pipeline: int
    order: Order

    @property
    def world(self) -> int:
        return self.tensor * self.pipeline

    def pack(self) -> bytes:
        return bytes(msgpack.packb(asdict(self)))

    @staticmethod
    def unpack(data: bytes) -> "Invitation":
        content: dict[str, Any] = msgpack.unpackb(data)
        order = content.pop("order")
        order["config"] = EngineConfig(**order["config"])
        for address in ("work", "pulse"):
            host, port = content[address]
            content[address] = (host, port)
        return Invitation(order=Order(**order), **content)


def model_path(order: Order) -> Path | None:
    """The model where the driver has it, if this node has it there too."""
    path = Path(order.path)
    return path if path.exists() else None
