"""New weights in replicas that run: which of them, and when that is not to be. Pure.

Only the model's files may differ between the two revisions; what else a worker is made of needs a
new process. An engine that holds other shapes refuses, in a sentence that the status keeps, and the
rollout goes on replica by replica. As many replicas swap at once as a rolling update would replace.

A replica that was swapped is marked with the revision that it serves and with the restarts of its
container, as a process that starts anew serves what it was made of. A call that was made before the
mark was written is made again: an engine that serves the revision already says so at once.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from shoal.api.types import InPlaceStatus
from shoal.operator.observe import Observed, ObservedPod, SwapState, SwapView
from shoal.operator.revision import Revision, differing_fields
from shoal.operator.rollout import Bounds


@dataclass(frozen=True, slots=True)
class NextSwaps:
    """What is to be swapped."""

    pods: frozenset[str] = frozenset()  # replicas that stay, to serve the new revision
    now: tuple[str, ...] = ()  # of these, whose engines are to be called
    refusal: InPlaceStatus | None = None  # why none is


def next_swaps(
    observed: Observed,
    bounds: Bounds,
    target: str,
    active: str,
    saved: Mapping[str, Revision],
) -> NextSwaps:
    """The replicas to swap to revision `target`; `saved` are the revisions that are known."""
    refusal = _refusal(observed, target, active, saved)
    if refusal is not None:
        return NextSwaps(refusal=refusal)
    pods = [
        pod
        for pod in observed.pods
        if pod.revision != target
        and pod.ready
        and observed.stays(pod)
        and _fits(pod, target, saved)
    ]
    calls = {pod.name: _call(pod, observed) for pod in pods}
    busy = sum(
        call is not None and call.state in (SwapState.RUNNING, SwapState.DONE)
        for call in calls.values()
    )
    free = [
        pod.name
        for pod in sorted(pods, key=lambda pod: (observed.in_flight(pod), pod.name))
        if (call := calls[pod.name]) is None or call.state in (SwapState.REFUSED, SwapState.AGAIN)
    ]
    width = max(1, bounds.surge + bounds.unavailable) - busy
    return NextSwaps(frozenset(calls), tuple(free[: max(0, width)]))


def failure(observed: Observed, target: str | None) -> str | None:
    """Why weights are not swapped yet, where calls for the revision have failed."""
    for pod in observed.pods:
        call = _call(pod, observed)
        if call is not None and call.revision == target and call.message:
            return f"{pod.name}: {call.message}; it is tried again"
    return None


def served(observed: Observed) -> dict[str, str]:
    """Replicas whose engines say that they serve another revision than is written, with it."""
    return {
        pod.name: call.revision
        for pod in observed.pods
        if (call := _call(pod, observed)) is not None
        and call.state is SwapState.DONE
        and call.revision != pod.revision
    }


def mark_of(revision: str, restarts: int) -> str:
    """What is written on a pod whose weights were swapped."""
    return f"{revision}:{restarts}"


def revisions_of(born: str, mark: str | None, restarts: int) -> tuple[str, str | None]:
    """The revision that a pod serves, and the one it was made of where that is another."""
    revision, _, counted = (mark or "").partition(":")
    if not revision or counted != str(restarts) or revision == born:
        return born, None
    return revision, born


def _call(pod: ObservedPod, observed: Observed) -> SwapView | None:
    """The last call to the replica's present process, if that still matters."""
    call = observed.swaps.get(pod.name)
    if call is None or call.restarts != pod.restarts:
        return None
    old_news = call.state is SwapState.DONE and call.revision == pod.revision
    return None if old_news else call


def _refusal(
    observed: Observed, target: str, active: str, saved: Mapping[str, Revision]
) -> InPlaceStatus | None:
    known = observed.status.in_place
    if known is not None and known.revision == target:
        return known
    if target == active:
        return None
    if any(pod.group_size > 1 for pod in observed.pods):
        message = "a replica of several pods is replaced as a whole"
        return InPlaceStatus(revision=target, message=message)
    for call in observed.swaps.values():
        if call.state is SwapState.REFUSED and call.revision == target:
            return InPlaceStatus(revision=target, message=call.message)
    before, after = saved.get(active), saved.get(target)
    if before is None or after is None:
        return None
    if fields := differing_fields(before, after):
        message = f"only the model's files may differ, and {', '.join(fields)} does too"
        return InPlaceStatus(revision=target, message=message)
    return None


def _fits(pod: ObservedPod, target: str, saved: Mapping[str, Revision]) -> bool:
    before, after = saved.get(pod.revision), saved.get(target)
    return before is not None and after is not None and not differing_fields(before, after)
