"""How fast a wish for replicas may come true: stabilisation windows and rate policies. Pure.

Kubernetes' pkg/controller/podautoscaler/horizontal.go (1.35): `stabilize` is
stabilizeRecommendationWithBehaviors, `limit` is convertDesiredReplicasWithBehaviorRate. What it
decides for the same wishes is the same (tests replay its decisions); the memory differs:

| Kubernetes | here | why |
|---|---|---|
| keeps every recommendation | only what can still be the largest or smallest of a window | the same decisions from a handful of numbers |
| may forget a change once the longest period of its own direction is over | keeps it for the longest period of both | a policy for scaling up looks back at what was taken away, too |
| all is lost at a restart | changes can be written down | limits hold over restarts |
"""  # noqa: E501

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from math import ceil

from shoal.api.scaling import (
    PolicyType,
    ScalingBehavior,
    ScalingPolicy,
    ScalingRules,
    SelectPolicy,
)


@dataclass(frozen=True, slots=True)
class Wish:
    """A number of replicas that the metrics asked for, before any limit."""

    at: float
    count: int


@dataclass(frozen=True, slots=True)
class Change:
    """The wanted number of replicas went from one to another. Positive `by`: up."""

    at: float
    by: int


@dataclass(frozen=True, slots=True)
class Memory:
    """What one decision leaves to the next. Times are Unix seconds.

    Only `changes` are worth writing down: after a restart `began` puts the present number in the
    place of the wishes, so nothing shrinks before a full window has been seen, as Kubernetes does
    with its initial recommendation.
    """

    wishes: tuple[Wish, ...] = ()  # oldest first; see `remember`
    changes: tuple[Change, ...] = ()  # oldest first, of the longest policy period
    recent: tuple[Wish, ...] = ()  # of the panic window
    alarmed: float | None = None  # when the panic threshold was last crossed, while panic lasts
    served: float | None = None  # since when any replica has been ready; None: none is

    @classmethod
    def began(cls, wanted: int, changes: tuple[Change, ...], now: float) -> "Memory":
        """Of an autoscaler that begins while `wanted` replicas are wanted."""
        return cls((Wish(now, wanted),), changes)


@dataclass(frozen=True, slots=True)
class Limited:
    """A number of replicas, and which rule kept it from being another ("": none)."""

    count: int
    rule: str = ""


def stabilize(
    wish: int, wanted: int, wishes: Iterable[Wish], behavior: ScalingBehavior, now: float
) -> Limited:
    """The most cautious wish of each direction's window: never above the least of the one for
    scaling up, nor below the greatest of the one for scaling down."""
    up = down = wish
    up_since = now - behavior.scale_up.stabilization_window_seconds
    down_since = now - behavior.scale_down.stabilization_window_seconds
    for past in wishes:
        if past.at > up_since:
            up = min(up, past.count)
        if past.at > down_since:
            down = max(down, past.count)
    count = min(max(wanted, up), down)
    if count == wish:
        return Limited(count)
    return Limited(count, "ScaleUpStabilized" if wish >= wanted else "ScaleDownStabilized")


def limit(
    count: int,
    wanted: int,
    least: int,
    most: int,
    changes: Sequence[Change],
    behavior: ScalingBehavior,
    now: float,
) -> Limited:
    """`count` within the bounds and the policies' speed; `least` and `most` inclusive."""
    if count > wanted:
        ceiling = max(wanted, _ceiling(wanted, changes, behavior.scale_up, now))
        if count > min(most, ceiling):
            return Limited(min(most, ceiling), "ScaleUpLimit" if most > ceiling else "MaxReplicas")
    elif count < wanted:
        floor = min(wanted, _floor(wanted, changes, behavior.scale_down, now))
        if count < max(least, floor):
            rule = "ScaleDownLimit" if least < floor else "MinReplicas"
            return Limited(max(least, floor), rule)
    return Limited(count)


def remember(wishes: Sequence[Wish], wish: Wish, behavior: ScalingBehavior) -> tuple[Wish, ...]:
    """`wishes` with one more, without those that no window can need any more.

    An older wish counts as long as it is in the window for scaling down and greater than all
    that came after it, or in the one for scaling up and less than all that came after.
    """
    up_since = wish.at - behavior.scale_up.stabilization_window_seconds
    down_since = wish.at - behavior.scale_down.stabilization_window_seconds
    least = greatest = wish.count
    kept = [wish]
    for past in reversed(wishes):
        needed = (past.at > down_since and past.count > greatest) or (
            past.at > up_since and past.count < least
        )
        if needed:
            kept.append(past)
            least, greatest = min(least, past.count), max(greatest, past.count)
    return tuple(reversed(kept))


def changed(memory: Memory, by: int, behavior: ScalingBehavior, now: float) -> Memory:
    """`memory` after the wanted number changed, without changes that no policy can need."""
    policies = (*behavior.scale_up.policies, *behavior.scale_down.policies)
    since = now - max(policy.period_seconds for policy in policies)
    kept = tuple(change for change in memory.changes if change.at > since)
    return replace(memory, changes=(*kept, Change(now, by)))


def _ceiling(wanted: int, changes: Sequence[Change], rules: ScalingRules, now: float) -> int:
    if rules.select_policy is SelectPolicy.DISABLED:
        return wanted
    choose = min if rules.select_policy is SelectPolicy.MIN else max
    return choose(_most(_before(wanted, changes, p, now), p) for p in rules.policies)


def _floor(wanted: int, changes: Sequence[Change], rules: ScalingRules, now: float) -> int:
    if rules.select_policy is SelectPolicy.DISABLED:
        return wanted
    choose = max if rules.select_policy is SelectPolicy.MIN else min
    return choose(_fewest(_before(wanted, changes, p, now), p) for p in rules.policies)


def _before(wanted: int, changes: Sequence[Change], policy: ScalingPolicy, now: float) -> int:
    """The number at the beginning of the policy's period."""
    since = now - policy.period_seconds
    return wanted - sum(change.by for change in changes if change.at > since)


def _most(before: int, policy: ScalingPolicy) -> int:
    if policy.type is PolicyType.PODS:
        return before + policy.value
    return ceil(before * (1 + policy.value / 100))


def _fewest(before: int, policy: ScalingPolicy) -> int:
    if policy.type is PolicyType.PODS:
        return before - policy.value
    return int(before * (1 - policy.value / 100))
