"""What routers are told of the prefix cache: a snapshot, then net changes.

A watcher that reads slowly costs bounded memory: changes that cancel out vanish, and beyond a
limit they are dropped in favour of a new snapshot.
"""

import asyncio
from collections.abc import Callable
from itertools import count

from shoal.api.blocks import BlockHash, wire_id
from shoal.api.v1 import engine_pb2
from shoal.worker.loop import Command, Report, Snapshot

# Between two messages to a router: each costs it some 50 microseconds, and it may watch hundreds
# of engines, while a prefix is rarely asked for again within a few steps. Many changes do not
# wait: long messages would hold up the answers that share their connection.
_PAUSE_SECONDS = 0.02
_MANY_CHANGES = 256
_MAX_HASHES = 100_000  # of one message, 0.8 MB


class Watcher:
    """One `WatchCache` call. All methods run on the event loop."""

    def __init__(self, number: int, resync: Callable[[], None], max_pending: int) -> None:
        self.number = number
        self._resync = resync
        self._max_pending = max_pending
        self._snapshot: list[int] | None = None  # not sent yet
        self._changes: dict[int, bool] = {}  # wire id -> stored (True) or removed
        self._synced = False  # a snapshot came, changes apply to it
        self._wake: asyncio.Future[None] | None = None
        self._next_at = 0.0  # by the loop's clock: when few changes may go out
        resync()

    async def next_events(self) -> list[engine_pb2.CacheEvents]:
        """Waits for news and returns it, in messages of bounded size."""
        loop = asyncio.get_running_loop()
        while self._snapshot is None and len(self._changes) < _MANY_CHANGES:
            rest = self._next_at - loop.time()
            if self._changes and rest <= 0:
                break
            self._wake = loop.create_future()
            timer = loop.call_later(rest, self._notify) if self._changes else None
            try:
                await self._wake
            finally:
                self._wake = None
                if timer is not None:
                    timer.cancel()
        self._next_at = loop.time() + _PAUSE_SECONDS
        messages = []
        if self._snapshot is not None:
            ids, self._snapshot = self._snapshot, None
            messages.append(engine_pb2.CacheEvents(reset=True, stored=ids[:_MAX_HASHES]))
            for start in range(_MAX_HASHES, len(ids), _MAX_HASHES):
                messages.append(engine_pb2.CacheEvents(stored=ids[start : start + _MAX_HASHES]))
        if self._changes:
            changes, self._changes = self._changes, {}
            messages.append(
                engine_pb2.CacheEvents(
                    stored=[block for block, stored in changes.items() if stored],
                    removed=[block for block, stored in changes.items() if not stored],
                )
            )
        return messages

    def reset(self, blocks: list[int]) -> None:
        self._snapshot, self._changes, self._synced = blocks, {}, True
        self._notify()

    def apply(self, stored: list[int], removed: list[int]) -> None:
        if not self._synced:
            return  # the snapshot on its way holds these changes
        had = len(self._changes)
        self._changes |= dict.fromkeys(removed, False)
        self._changes |= dict.fromkeys(stored, True)
        if len(self._changes) > self._max_pending:
            self._changes, self._snapshot, self._synced = {}, None, False
            self._resync()
        elif not had or len(self._changes) >= _MANY_CHANGES:
            self._notify()

    def _notify(self) -> None:
        if self._wake is not None and not self._wake.done():
            self._wake.set_result(None)


class CacheWatch:
    """All watchers of a server."""

    def __init__(self, submit: Callable[[Command], None], max_pending: int) -> None:
        """A watcher with more than `max_pending` changes unread starts over from a snapshot."""
        self._submit = submit
        self._max_pending = max_pending
        self._numbers = count(1)
        self._watchers: dict[int, Watcher] = {}

    def open(self) -> Watcher:
        number = next(self._numbers)
        watcher = Watcher(number, lambda: self._submit(Snapshot(number)), self._max_pending)
        self._watchers[number] = watcher
        return watcher

    def close(self, watcher: Watcher) -> None:
        self._watchers.pop(watcher.number, None)

    def take(self, report: Report) -> None:
        if not self._watchers:
            return
        for number, blocks in report.snapshots:
            watcher = self._watchers.get(number)
            if watcher is not None:
                watcher.reset(_wire_ids(blocks))
        if report.output is not None and (report.output.stored or report.output.removed):
            stored, removed = _wire_ids(report.output.stored), _wire_ids(report.output.removed)
            for watcher in self._watchers.values():
                watcher.apply(stored, removed)


def _wire_ids(blocks: tuple[BlockHash, ...]) -> list[int]:
    return [wire_id(block) for block in blocks]
