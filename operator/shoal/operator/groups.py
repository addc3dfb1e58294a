"""Groups: the pods that form one replica, seen and treated as one.

A group is made, drained and deleted as a whole. Once one of its pods has run, a pod that is
missing or lost cannot be put back: the engine's ranks know each other, so the whole group is
replaced. Before that, pods that are missing were never made (the operator was killed between
two of them) and are added. For everything else the planner sees a group as one `ObservedPod`.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from shoal.operator.observe import ObservedPod


@dataclass(frozen=True, slots=True)
class Group:
    """The pods of one replica that are there."""

    revision: str  # that it was made of
    replica: int
    pods: tuple[ObservedPod, ...]  # by place; at least one

    @property
    def name(self) -> str:
        """The leader's name, also where the leader is missing."""
        first = self.pods[0]
        return first.name if first.member == 0 else first.name.rpartition("-")[0]

    @property
    def size(self) -> int:
        return max(pod.group_size for pod in self.pods)

    @property
    def missing(self) -> tuple[int, ...]:
        """Places without a pod."""
        there = {pod.member for pod in self.pods}
        return tuple(member for member in range(self.size) if member not in there)

    @property
    def unfinished(self) -> bool:
        """Whether pods were never made and can still be added."""
        return bool(self.missing) and not any(
            pod.started or pod.lost or pod.retiring for pod in self.pods
        )

    @property
    def broken(self) -> bool:
        """Whether it lacks a pod that nothing brings back: what is left of it must go."""
        if self.missing and not self.unfinished:
            return True
        return any(pod.lost and not pod.gone_node for pod in self.pods)

    @property
    def leaving(self) -> bool:
        """Whether somebody deletes one of its pods: the others follow."""
        return any(pod.deleting for pod in self.pods)

    def as_replica(self) -> ObservedPod:
        """The group as one pod: the leader's place and address, the state of all."""
        first = self.pods[0]
        worst = min(self.pods, key=_severity)
        lost = self.broken or any(pod.lost for pod in self.pods)
        reason, message = worst.reason, worst.message
        if self.missing and not self.unfinished and not worst.failing:
            names = ", ".join(f"{self.name}-{m}" if m else self.name for m in self.missing)
            reason, message = "MemberLost", f"{names} is gone; the whole group is made anew"
        elif worst is not first:
            message = f"{worst.name}: {message}"
        return replace(
            first,
            name=self.name,
            created=min(pod.created for pod in self.pods),
            address=first.address if first.member == 0 else None,
            ready=all(pod.ready for pod in self.pods) and not self.missing and not lost,
            drain_started=first.drain_started if first.member == 0 else None,
            deleting=self.leaving,
            restarts=max(pod.restarts for pod in self.pods),
            reason=reason,
            message=message,
            member=0,
            group_size=self.size,
            started=any(pod.started for pod in self.pods),
            lost=lost,
            gone_node=lost and not self.broken,
            fetched=min((p.fetched for p in self.pods if p.fetched is not None), default=None),
        )


def groups_of(pods: Iterable[ObservedPod]) -> tuple[Group, ...]:
    """The pods by group, in the order in which the groups' first pods were seen."""
    found: dict[tuple[str, int], list[ObservedPod]] = {}
    for pod in pods:
        found.setdefault((pod.born or pod.revision, pod.replica), []).append(pod)
    return tuple(
        Group(revision, replica, tuple(sorted(members, key=lambda pod: pod.member)))
        for (revision, replica), members in found.items()
    )


def _severity(pod: ObservedPod) -> tuple[bool, bool, bool, int]:
    """Which pod's words count: of those lost, then failing, then not ready, the first."""
    return not pod.lost, not pod.failing, not pod.reason, pod.member
