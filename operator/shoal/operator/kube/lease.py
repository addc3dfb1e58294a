"""Leadership by a Lease object: at most one operator acts at a time.

As in client-go's leaderelection, with three times: a lease holds for `lease_seconds` after the
holder last renewed it, a holder stops by itself after `renew_seconds` without a renewal that
went well, and everybody tries every `retry_seconds`. Nobody compares wall clocks: who waits
counts from the moment it saw the lease change, on its own monotonic clock. Writes carry the
resource version, so of two that reach for a lease one gets a conflict.

A holder that is stopped and continued notices at its next step that its time is over
(`holds`), before it writes anything. A container that is started anew in its pod takes its
predecessor's lease at once: the kubelet starts it when that one is gone.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final, Protocol

from shoal.operator.kube.errors import ApiError
from shoal.operator.kube.kinds import LEASES

log: Final = logging.getLogger(__name__)

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class LeaseTimes:
    """Seconds. renew + one call must stay below lease."""

    lease: float = 6.0
    renew: float = 4.0
    retry: float = 1.0
    call: float = 1.5  # longest that one call may take


class LeaseApi(Protocol):
    """The two calls that leadership needs."""

    async def read(self, path: str, within: float) -> Json: ...

    async def replace_lease(
        self, path: str, document: Mapping[str, Any], *, new: bool, within: float
    ) -> Json: ...


class Leadership:
    """This operator's standing. All methods belong to one event loop."""

    def __init__(
        self,
        api: LeaseApi,
        *,
        namespace: str,
        name: str,
        identity: str,
        predecessors: str | None = None,
        monotonic: Callable[[], float],
        wall: Callable[[], float],
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        times: LeaseTimes = LeaseTimes(),  # frozen
    ) -> None:
        """`predecessors`: how identities begin whose processes have ended, if any surely have."""
        self._api = api
        self._collection = LEASES.path(namespace)
        self._path = LEASES.path(namespace, name)
        self._meta = {"name": name, "namespace": namespace}
        self._identity = identity
        self._predecessors = predecessors
        self._monotonic = monotonic
        self._wall = wall
        self._sleep = sleep
        self._times = times
        self._lease: Json | None = None  # as last read or written
        self._changed_at = float("-inf")  # when it was first seen so
        self._holds_until = float("-inf")

    def holds(self) -> bool:
        """Whether this operator leads at this very moment."""
        return self._monotonic() < self._holds_until

    async def acquire(self) -> None:
        """Waits until this operator leads."""
        while True:
            try:
                if await self._try():
                    log.info("leading as %s", self._identity)
                    return
            except ApiError as error:
                log.debug("the lease cannot be had: %s", error)
            # To the moment at which the present holder's time is over, if that comes first.
            left = self._changed_at + self._times.lease - self._monotonic()
            await self._sleep(min(self._times.retry, left) if left > 0 else self._times.retry)

    async def keep(self) -> None:
        """Renews until that fails for too long or somebody else holds the lease; then returns."""
        while self.holds():
            left = self._holds_until - self._monotonic()
            await self._sleep(min(self._times.retry, max(0.0, left)))
            if not self.holds():
                break
            try:
                if not await self._try():
                    break
            except ApiError as error:
                log.warning("the lease could not be renewed: %s", error)
        self._holds_until = float("-inf")
        log.warning("not leading any more")

    async def release(self) -> None:
        """Lets the next operator lead at once; to be called when nothing is written any more."""
        if not self.holds():
            return
        self._holds_until = float("-inf")
        try:
            # Read anew: a renewal may have been under way when this operator was told to end.
            lease = await self._look()
            if lease is not None and _holder(lease) == self._identity:
                await self._write(lease, holder="", duration=1)
        except ApiError as error:
            log.warning("the lease could not be released: %s", error)

    async def _try(self) -> bool:
        """One attempt to get or renew the lease; whether this operator holds it after it."""
        began = self._monotonic()
        # A holder writes over what it wrote itself: one call, and a conflict if it was not alone.
        known = self._lease if self.holds() else await self._look()
        if known is not None and not self._may_take(known):
            return False
        try:
            await self._write(known, holder=self._identity, duration=round(self._times.lease))
        except ApiError as error:
            if not (error.conflict or error.exists or error.not_found):
                raise
            log.info("somebody else wrote the lease")
            await self._look()
            if self._lease is None or _holder(self._lease) != self._identity:
                self._holds_until = float("-inf")
            return self.holds()
        self._holds_until = began + self._times.renew
        return True

    def _may_take(self, lease: Json) -> bool:
        holder = _holder(lease)
        if not holder or holder == self._identity:
            return True
        if self._predecessors is not None and holder.startswith(self._predecessors):
            return True
        return self._monotonic() >= self._changed_at + self._times.lease

    async def _look(self) -> Json | None:
        try:
            self._note(await self._api.read(self._path, self._times.call))
        except ApiError as error:
            if not error.not_found:
                raise
            self._lease = None
        return self._lease

    async def _write(self, known: Json | None, *, holder: str, duration: int) -> None:
        now = datetime.fromtimestamp(self._wall(), UTC).isoformat(timespec="microseconds")
        stamp = now.replace("+00:00", "Z")
        spec = dict(known.get("spec") or {}) if known is not None else {}
        if spec.get("holderIdentity") != holder and holder:
            spec["acquireTime"] = stamp
            spec["leaseTransitions"] = int(spec.get("leaseTransitions") or 0) + 1
        spec |= {"holderIdentity": holder, "leaseDurationSeconds": duration, "renewTime": stamp}
        meta = {**self._meta}
        if known is not None:
            meta["resourceVersion"] = known["metadata"]["resourceVersion"]
        document = {
            "apiVersion": LEASES.api_version,
            "kind": LEASES.kind,
            "metadata": meta,
            "spec": spec,
        }
        path = self._collection if known is None else self._path
        self._note(
            await self._api.replace_lease(
                path, document, new=known is None, within=self._times.call
            )
        )

    def _note(self, lease: Json) -> None:
        if self._lease is None or _version(lease) != _version(self._lease):
            self._changed_at = self._monotonic()
        self._lease = lease


def _holder(lease: Json) -> str:
    return (lease.get("spec") or {}).get("holderIdentity") or ""


def _version(lease: Json) -> str:
    version: str = lease["metadata"]["resourceVersion"]
    return version
