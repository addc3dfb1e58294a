"""What requests of two revisions met between two looks, at all routers together. Pure.

Routers count since they started, so a look is a difference. A router that is silent at a look is
left out of it, and what it counted meanwhile belongs to the look at which it answers again.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from shoal.api.v1 import router_pb2
from shoal.operator.durations import Durations


@dataclass(frozen=True, slots=True)
class Counts:
    """Of one revision. Failures are requests that ended by a server's fault, and attempts that a
    replica left unfinished: that another made them good is no merit of the revision."""

    requests: int = 0
    failures: int = 0
    ttft: Durations = field(default_factory=Durations)
    itl: Durations = field(default_factory=Durations)

    @property
    def idle(self) -> bool:
        """No request ended, and none went on."""
        return not (self.requests or self.ttft.total or self.itl.total)

    def plus(self, other: "Counts") -> "Counts":
        return Counts(
            self.requests + other.requests,
            self.failures + other.failures,
            Durations.merged((self.ttft, other.ttft)),
            Durations.merged((self.itl, other.itl)),
        )

    def since(self, before: "Counts") -> "Counts":
        """What was added after `before`; all of it where the router has started anew."""
        if self.requests < before.requests or self.failures < before.failures:
            return self
        return Counts(
            self.requests - before.requests,
            self.failures - before.failures,
            self.ttft.since(before.ttft),
            self.itl.since(before.itl),
        )


def counts_of(load: router_pb2.ServiceLoad, revision: str) -> Counts:
    """One revision's counts in a router's answer to GetLoad."""
    for found in load.revisions:
        if found.revision == revision:
            return Counts(
                found.requests + found.broken,
                found.errors + found.broken,
                Durations.of(found.ttft),
                Durations.of(found.itl),
            )
    return Counts()


@dataclass(frozen=True, slots=True)
class Tally:
    """The counts at the last look, by router and revision. Kept by the process that looks: after
    a restart the first look begins anew, and what happened in between is not judged."""

    last: Mapping[tuple[str, str], Counts] = field(default_factory=lambda: MappingProxyType({}))

    def next(
        self, answers: Mapping[str, router_pb2.ServiceLoad], stable: str, canary: str
    ) -> "tuple[Tally, Counts, Counts]":
        """The tally after this look, and what the stable and the new revision met since the last
        one. A router that is seen for the first time only gives its beginning."""
        last = dict(self.last)
        found = {stable: Counts(), canary: Counts()}
        for router, load in answers.items():
            for revision in (stable, canary):
                now = counts_of(load, revision)
                before = self.last.get((router, revision))
                if before is not None:
                    found[revision] = found[revision].plus(now.since(before))
                last[router, revision] = now
        return Tally(last), found[stable], found[canary]
