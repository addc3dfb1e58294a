"""An executor whose model is computed by a group of ranks, each a process of its own.

    start ranks -> all join -> all have opened the model -> KV blocks of the smallest -> all have
    opened what they share -> all have loaded -> warm up -> serve

Every wait ends when the group does: at the first rank that leaves, fails or falls silent (see
`pulse`), or that whoever runs the ranks saw end. Nothing of a group is used again after that.
"""

import logging
import secrets
import socket
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Final, Protocol

import msgpack

from shoal.worker.executor import DeviceLost, ModelInfo
from shoal.worker.logs import event
from shoal.worker.parallel.auth import admit, new_key
from shoal.worker.parallel.channel import Channel
from shoal.worker.parallel.invitation import Invitation, Order
from shoal.worker.parallel.messages import (
    Relay,
    StepFailed,
    pack_plan,
    unpack_result,
)
from shoal.worker.parallel.protocol import Verb
from shoal.worker.parallel.pulse import Progress, Watch, mismatch
from shoal.worker.parallel.vitals import Loss
from shoal.worker.step import StepPlan, StepResult

log = logging.getLogger(__name__)

_POLL_SECONDS: Final = 0.25
_ACCEPT_SECONDS: Final = 0.02  # between two looks at the ranks that were greeted
_FIRST_FRAME_SECONDS: Final = 10.0  # of a rank that has shown the key: it is sent at once
_BRING_UP_SECONDS: Final = 3600.0  # of one phase; a rank that is silent ends it much sooner
_STEP_SECONDS: Final = 600.0  # until a step is answered, by ranks that are not silent
_BLAME_SECONDS: Final = 3.0  # until the pulse says who is gone, once a connection has ended
_PROGRESS_SECONDS: Final = 1.0  # between two lines about one rank's phase
_SHARED_MEMORY: Final = Path("/dev/shm")


class Launcher(Protocol):
    """Starts and ends the processes of one group's ranks."""

    host: str  # this machine's address, as the ranks reach it

    def start(self, invitation: bytes) -> None:
        """Every rank runs `rank.run_rank` with the invitation (see `Invitation.unpack`). Returns
        when they have begun. Raises RuntimeError with a sentence."""
        ...

    def failure(self) -> str | None:
        """Which rank ended, and how; None while all run. Any thread may ask."""
        ...

    def stop(self) -> None:
        """Ends all ranks within seconds. Idempotent."""
        ...


class GroupExecutor:
    """Implements `shoal.worker.executor.Executor`."""

    standby = None  # the ranks' weights stay
    relays = False  # a stage has the rows of several plans, and learns of tokens from the last one

    def __init__(
        self,
        order: Order,
        tensor: int,
        pipeline: int,
        launcher: Launcher,
        progress: Callable[[str, float], None],
        *,
        depth: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Starts the ranks and returns once they serve. `progress` gets the name and seconds of
        each phase. `depth`: plans under way at a time; by default one more than there are stages,
        so that the first stage has its next one when it ends one. Raises ValueError for what the
        ranks cannot serve, DeviceLost where they cannot be started or one is lost."""
        self.block_size = order.config.block_size
        self._depth = depth or (1 if pipeline == 1 else pipeline + 1)
        self._launcher = launcher
        self._clock = clock
        self._relay = Relay()
        self._lost: str | None = None
        self._over = threading.Event()
        self._channels: dict[int, Channel] = {}
        self._segments = f"shoal-{secrets.token_hex(8)}"
        self._answers = (pipeline - 1) * tensor
        self._shown: dict[int, tuple[str, float]] = {}
        key = new_key()
        world = tensor * pipeline
        self._watch = Watch(
            world, key, self._on_loss, host=launcher.host, on_progress=self._on_progress
        )
        self._listener = socket.create_server((launcher.host, 0), backlog=world)
        try:
            self._bring_up(order, tensor, pipeline, key, progress)
        except BaseException:
            self.close()
            raise

    @property
    def depth(self) -> int:
        return self._depth

    @property
    def lost(self) -> str | None:
        return self._lost

    def submit(self, plan: StepPlan) -> None:
        body = Verb.PLAN + pack_plan(plan, self._relay.submitted(plan))
        try:
            for channel in self._channels.values():
                channel.send(body)
        except OSError as error:
            raise DeviceLost(self._blame(error)) from error

    def collect(self) -> StepResult:
        try:
            answer = self._channels[self._answers].receive(_STEP_SECONDS)
        except OSError as error:
            raise DeviceLost(self._blame(error)) from error
        try:
            result = unpack_result(answer)
            if isinstance(result, StepFailed):
                # It may be what a rank says of a peer that is gone.
                raise DeviceLost(self._blame(f"rank {self._answers} says {result.error}"))
            self._relay.collected(result)
        except (ValueError, TypeError) as error:
            # Answers of the plans that are still under way would be taken for those of later ones.
            why = f"the answer of rank {self._answers} does not fit its plan: {error}"
            self._lose(why)
            raise DeviceLost(self._lost or why) from error
        return result

    def timings(self) -> dict[int, dict[str, float]]:
        """Of each rank since it was last asked: see `stage.Timings`; and `tables`, the checksum of
        its block tables. With no plan under way only."""
        for channel in self._channels.values():
            channel.send(Verb.TIMINGS)
        return {rank: self._ask(rank) for rank in self._channels}

    def close(self) -> None:
        self._over.set()
        for channel in self._channels.values():
            with suppress(OSError):
                channel.send(Verb.END)
        self._watch.close()
        for channel in self._channels.values():
            channel.close()
        self._listener.close()
        self._launcher.stop()
        sweep(self._segments)

    def _bring_up(
        self,
        order: Order,
        tensor: int,
        pipeline: int,
        key: bytes,
        progress: Callable[[str, float], None],
    ) -> None:
        world = tensor * pipeline
        host, port = self._listener.getsockname()[:2]
        started = self._clock()
        invitation = Invitation((host, port), self._watch.address, key, tensor, pipeline, order)
        try:
            self._launcher.start(invitation.pack())
        except RuntimeError as error:
            raise DeviceLost(str(error)) from error
        self._watch.launched()
        threading.Thread(target=self._monitor, name="launcher", daemon=True).start()
        nodes = self._welcome(world, key)
        if (why := mismatch(self._watch.wait_joined())) is not None:
            raise ValueError(why)
        started = self._over_with("join", started, progress)
        self._tell({"nodes": nodes, "segments": self._segments})
        opened = {rank: self._ask(rank) for rank in range(world)}
        self._compare(opened)
        info = opened[0]["info"]
        self.info = ModelInfo(**{**info, "eos_token_ids": tuple(info["eos_token_ids"])})
        self.num_blocks = min(said["blocks"] for said in opened.values())
        native = all(said["native"] for said in opened.values())
        self._tell({"blocks": self.num_blocks, "native": native, "port": opened[0]["port"]})
        for rank in range(world):
            self._ask(rank)
        self._tell({"open": True})
        loaded = {rank: self._ask(rank) for rank in range(world)}
        for rank, said in loaded.items():
            event(log, "rank loaded", rank=rank, node=nodes[rank], **said)
        started = self._over_with("load", started, progress)
        self._tell({"go": True})
        rates = [self._ask(rank)["rate"] for rank in range(world)]
        self.warm_up_rate = rates[self._answers]
        self._over_with("warm-up", started, progress)

    def _welcome(self, world: int, key: bytes) -> list[str]:
        """Takes the ranks' connections for plans; returns their nodes."""
        nodes: dict[int, str] = {}
        greeted: SimpleQueue[tuple[int, str, Channel]] = SimpleQueue()
        self._listener.settimeout(_ACCEPT_SECONDS)
        while len(nodes) < world:
            with suppress(TimeoutError):
                connection, _ = self._listener.accept()
                # In a thread of its own: a stranger that stays silent holds up nobody.
                threading.Thread(
                    target=_greet, args=(connection, key, greeted), name="greeting", daemon=True
                ).start()
            while not greeted.empty():
                rank, node, channel = greeted.get()
                if rank in nodes or rank not in range(world):
                    channel.close()
                    continue
                nodes[rank] = node
                self._channels[rank] = channel
            # Looked at after: `_lose` closes the channels that were there when it set it.
            if (loss := self._lost) is not None:
                raise DeviceLost(loss)
        self._channels = dict(sorted(self._channels.items()))
        return [nodes[rank] for rank in range(world)]

    def _compare(self, opened: Mapping[int, Mapping[str, Any]]) -> None:
        digests = {rank: said["digest"] for rank, said in opened.items()}
        for rank, digest in digests.items():
            if digest != digests[0]:
                hellos = self._watch.hellos
                raise ValueError(
                    f"rank {rank} on {hellos[rank].host} has another model ({digest}) than rank 0 "
                    f"on {hellos[0].host} ({digests[0]}): all nodes need the same files"
                )

    def _tell(self, message: Mapping[str, Any]) -> None:
        try:
            for channel in self._channels.values():
                channel.send(msgpack.packb(message))
        except OSError as error:
            raise DeviceLost(self._blame(error)) from error

    def _ask(self, rank: int) -> dict[str, Any]:
        """A rank's answer. Raises ValueError where the rank says why it cannot serve."""
        try:
            said: dict[str, Any] = msgpack.unpackb(self._channels[rank].receive(_BRING_UP_SECONDS))
        except OSError as error:
            raise DeviceLost(self._blame(error)) from error
        if "refused" in said:
            raise ValueError(said["refused"])
        return said

    def _over_with(
        self, phase: str, started: float, progress: Callable[[str, float], None]
    ) -> float:
        now = self._clock()
        progress(phase, now - started)
        return now

    def _blame(self, error: OSError | str) -> str:
        """Who is gone, as the pulse tells it; else what the connection said."""
        deadline = time.monotonic() + _BLAME_SECONDS
        while self._lost is None and time.monotonic() < deadline:
            time.sleep(0.01)
        return self._lost or f"the ranks do not answer: {error}"

    def _monitor(self) -> None:
        while not self._over.wait(_POLL_SECONDS):
            if (why := self._launcher.failure()) is not None:
                # The rank's own last word says more than how its process ended.
                if not self._over.wait(_POLL_SECONDS):
                    self._lose(why)
                return

    def _on_loss(self, loss: Loss) -> None:
        self._lose(str(loss))

    def _lose(self, why: str) -> None:
        """The end of the group: whoever waits for a rank wakes up."""
        if self._lost is not None or self._over.is_set():
            return
        self._lost = why
        log.error("the group of ranks ends: %s", why)
        for channel in list(self._channels.values()):
            channel.close()

    def _on_progress(self, progress: Progress) -> None:
        share = progress.share
        phase, shown = self._shown.get(progress.rank, ("", 0.0))
        now = self._clock()
        if phase == progress.phase and now - shown < _PROGRESS_SECONDS and share != 1.0:
            return
        self._shown[progress.rank] = (progress.phase, now)
        fields: dict[str, str | int | float] = {"rank": progress.rank, "host": progress.host}
        fields["phase"] = progress.phase
        if progress.what:
            fields["what"] = progress.what
        if share is not None:
            fields["fraction"] = round(share, 2)
        event(log, "rank progress", **fields)


def sweep(segments: str, folder: Path = _SHARED_MEMORY) -> None:
    """Takes away the names of shared memory that begin so: those that ranks of this host left
    who were killed before they had all opened them."""
    for path in folder.glob(f"{segments}-*"):
        path.unlink(missing_ok=True)


def _greet(
    connection: socket.socket, key: bytes, greeted: SimpleQueue[tuple[int, str, Channel]]
) -> None:
    """Takes a rank's first frame, or hangs up on whoever does not speak as one."""
    try:
        connection.settimeout(None)
        admit(connection, key)
        channel = Channel(connection)
        said = msgpack.unpackb(channel.receive(_FIRST_FRAME_SECONDS))
        greeted.put((said["rank"], said["node"], channel))
    except (OSError, ValueError, KeyError, TypeError):
        connection.close()
