"""The program of one rank: joins its group, loads its part of the model, and computes plans.

All ranks of a group get every plan, and keep the same slots and block tables; each computes its
layers' or heads' part of the rows. Only the first rank of the last stage draws tokens and answers.
"""

import logging
import os
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from importlib.metadata import version
from typing import Any, Final

import msgpack
import torch
from torch._C._distributed_c10d import TCPStore

from shoal.worker.parallel.auth import introduce
from shoal.worker.parallel.channel import Channel, ChannelClosed
from shoal.worker.parallel.comm import Peers, connect, disconnect
from shoal.worker.parallel.invitation import Invitation
from shoal.worker.parallel.messages import StepFailed, pack_result, unpack_plan
from shoal.worker.parallel.native_stage import NativeStage
from shoal.worker.parallel.part import open_part
from shoal.worker.parallel.protocol import Verb
from shoal.worker.parallel.pulse import Hello, Pulse
from shoal.worker.parallel.stage import Exchange, StageExecutor, TorchStage
from shoal.worker.parallel.vitals import SERVING
from shoal.worker.sources import SourceError

log = logging.getLogger(__name__)

_CONNECT_SECONDS: Final = 10.0
_LOADING: Final = "loading"


def run_rank(
    invitation: Invitation,
    rank: int,
    node: str,
    *,
    end: Callable[[int], Any] = os._exit,
    clock: Callable[[], float] = time.perf_counter,
) -> None:
    """Returns when the driver says so or is gone. `node` names this machine, by an address that
    the others reach. `end` ends the process when the driver falls silent. Raises what made it
    impossible to go on, after the driver was told."""
    same = {"shoal": version("shoal"), "torch": torch.__version__}
    hello = Hello(rank, socket.gethostname(), os.getpid(), same)
    pulse = Pulse(invitation.pulse, invitation.key, hello, end=end)
    pulse.start()
    try:
        connection = socket.create_connection(invitation.work, _CONNECT_SECONDS)
        introduce(connection, invitation.key)
        _Rank(invitation, rank, node, Channel(connection), pulse, clock).run()
    except ChannelClosed:
        log.info("rank %d ends with its driver", rank)
    except Exception as error:
        pulse.fail(f"{type(error).__name__}: {error}")
        raise
    finally:
        pulse.close()
        disconnect()


class _Rank:
    def __init__(
        self,
        invitation: Invitation,
        rank: int,
        node: str,
        channel: Channel,
        pulse: Pulse,
        clock: Callable[[], float],
    ) -> None:
        self._invitation, self._rank, self._node = invitation, rank, node
        self._channel, self._pulse, self._clock = channel, pulse, clock

    def run(self) -> None:
        try:
            self._say({"rank": self._rank, "node": self._node})
            joined = self._hear()
            peers = Peers(
                tuple(joined["nodes"]),
                self._invitation.tensor,
                self._invitation.pipeline,
                joined["segments"],
            )
            executor = self._prepare(peers)
        except ChannelClosed:
            raise
        except (ValueError, OSError, MemoryError, SourceError) as error:
            log.debug("refused", exc_info=error)
            self._say({"refused": f"rank {self._rank}: {str(error) or type(error).__name__}"})
            self._hear()  # until the driver, who tells the user, hangs up
            return
        try:
            self._hear()
            executor.warm_up(executor.warm_up_tokens, self._clock)
            self._say({"rate": executor.warm_up_rate})
            self._pulse.say(SERVING)
            self._serve(executor)
        finally:
            executor.close()

    def _prepare(self, peers: Peers) -> StageExecutor:
        """Opens the model, agrees on the number of KV blocks, meets the others, and loads."""
        invitation, rank = self._invitation, self._rank
        neighbours = peers.nodes.count(peers.nodes[rank])
        part = open_part(invitation, rank, neighbours, self._progress)
        store = None
        if peers.apart and rank == 0:
            store = TCPStore(peers.nodes[0], 0, len(peers.nodes), True, wait_for_workers=False)
        self._say(
            {
                "digest": part.digest,
                "blocks": part.memory.num_blocks,
                "native": part.native,
                "info": asdict(part.info),
                "port": 0 if store is None else store.port,
            }
        )
        agreed = self._hear()
        if peers.apart and store is None:
            store = TCPStore(
                peers.nodes[0], agreed["port"], len(peers.nodes), False, wait_for_workers=False
            )
        comm = connect(peers, rank, store, 4 * part.share.vocab.size)
        try:
            self._say({"open": True})
            self._hear()
        finally:
            # All have opened theirs, or nobody computes: nothing is left if a rank is killed now.
            comm.unlink()
        started = self._clock()
        whole = part.whole
        exchange = Exchange(part.share, comm, whole.hidden_size, whole.vocab_size, self._clock)
        stage = NativeStage if agreed["native"] else TorchStage
        backend = stage(part, exchange, agreed["blocks"])
        seconds = round(self._clock() - started, 3)
        self._say({"backend": backend.name, "bytes": part.source.bytes_read, "seconds": seconds})
        return StageExecutor(backend, part, agreed["blocks"])

    def _serve(self, executor: StageExecutor) -> None:
        answers = executor.place.answers
        while True:
            body = self._channel.receive()
            executor.timings.heard()
            verb = body[:1]
            if verb == Verb.END:
                return
            if verb == Verb.TIMINGS:
                self._say({**executor.timings.taken(), "tables": executor.digest()})
                continue
            wire = unpack_plan(body[1:])
            try:
                result = executor.compute(wire)
            except Exception as error:
                if answers:
                    failed = StepFailed(f"{type(error).__name__}: {error}")
                    self._channel.send(pack_result(failed))
                raise
            if answers:
                self._channel.send(pack_result(result))
            executor.timings.done()

    def _progress(self, what: str, share: float | None) -> None:
        self._pulse.say(_LOADING, what, share)

    def _say(self, message: Mapping[str, Any]) -> None:
        self._channel.send(msgpack.packb(message))

    def _hear(self) -> dict[str, Any]:
        message: dict[str, Any] = msgpack.unpackb(self._channel.receive())
        return message
