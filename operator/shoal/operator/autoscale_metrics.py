"""How many replicas one metric asks for. Pure.

The three rules are those of Kubernetes' pkg/controller/podautoscaler/replica_calculator.go (1.35):

    per_replica   Pods metrics (KvUtilization, Running): an average over replicas
    shared        External metrics with averageValue (QueueDepth): a total that replicas share
    overall       Object metrics with value (TtftP95): one number that more replicas bring down

Differences from Kubernetes, all intended:

| Kubernetes | here | why |
|---|---|---|
| values are whole thousandths | floats | a share of KV blocks moves by less than that |
| `shared` divides by status.replicas, and keeps that count within tolerance | by the wanted count | a rollout's extra replicas are no reason to scale |
| a replica that is ready but reports nothing counts as missing | the same | - |
"""  # noqa: E501

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from math import ceil

# Ratios come from divisions: 0.6 / 0.2 must ask for 3 replicas, not for 4.
_ROUNDING = 1e-9


@dataclass(frozen=True, slots=True)
class Tolerance:
    """Relative distances from the target that change nothing."""

    up: float = 0.1
    down: float = 0.1

    def covers(self, ratio: float) -> bool:
        return 1.0 - self.down - _ROUNDING <= ratio <= 1.0 + self.up + _ROUNDING


@dataclass(frozen=True, slots=True)
class Replicas:
    """The service's replicas as the calculation sees them; those on their way out are in none.

    `wanted` is the number decided last, whatever exists.
    """

    wanted: int
    ready: Collection[str] = ()
    starting: Collection[str] = ()  # exist, but have not taken requests yet


def per_replica(
    values: Mapping[str, float], replicas: Replicas, target: float, tolerance: Tolerance
) -> int | None:
    """Replicas that bring the average value to `target`; None if no ready replica has a value.

    Replicas that start count as 0 when scaling up. Ready ones without a value count as 0 when
    scaling up, as exactly on target when scaling down. None of this may turn the direction.
    """
    known = [values[name] for name in replicas.ready if name in values]
    if not known:
        return None
    ratio = _average(known) / target
    missing = len(replicas.ready) - len(known)
    starting = len(replicas.starting) if ratio > 1.0 else 0
    if not starting and not missing:
        return replicas.wanted if tolerance.covers(ratio) else _ceil(ratio * len(known))
    if missing and ratio != 1.0:
        known += [target if ratio < 1.0 else 0.0] * missing
    known += [0.0] * starting
    again = _average(known) / target
    if tolerance.covers(again) or (ratio < 1.0 < again) or (again < 1.0 < ratio):
        return replicas.wanted
    count = _ceil(again * len(known))
    if (again < 1.0 and count > replicas.wanted) or (again > 1.0 and count < replicas.wanted):
        return replicas.wanted
    return count


def shared(total: float, replicas: Replicas, target: float, tolerance: Tolerance) -> int:
    """Replicas whose shares of `total` are `target` each. From zero, whatever the total needs."""
    if replicas.wanted and tolerance.covers(total / (target * replicas.wanted)):
        return replicas.wanted
    return _ceil(total / target)


def overall(value: float, replicas: Replicas, target: float, tolerance: Tolerance) -> int:
    """Replicas that bring `value` down to `target` if it falls in proportion to them.

    Counts from the ready ones, so that replicas under way are waited for."""
    ratio = value / target
    if not replicas.wanted:
        return _ceil(ratio)
    if tolerance.covers(ratio):
        return replicas.wanted
    return _ceil(ratio * len(replicas.ready))


def _average(values: list[float]) -> float:
    return sum(values) / len(values)


def _ceil(count: float) -> int:
    return ceil(count - _ROUNDING)
