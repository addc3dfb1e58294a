"""Whether a live object already has everything that a manifest asks for. Pure.

The API server adds defaults, and brings quantities into a canonical form; neither is a reason to
write. Lists of named things are compared by name, as server-side apply merges them.
"""

from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any, Final

from shoal.api.quantity import parse_quantity

# Keys whose values are mappings of quantities.
_QUANTITIES: Final = frozenset({"requests", "limits", "capacity"})
_MERGE_KEYS: Final = ("name", "uid", "containerPort", "port", "mountPath", "type")


def is_subset(desired: Any, live: Any) -> bool:
    """Whether applying `desired` over `live` would change nothing."""
    return _matches(desired, live, quantities=False)


def _matches(desired: Any, live: Any, *, quantities: bool) -> bool:
    match desired:
        case Mapping():
            if not isinstance(live, Mapping):
                return not desired and live is None
            return all(
                _matches(value, live.get(key), quantities=quantities or key in _QUANTITIES)
                for key, value in desired.items()
            )
        case str() if quantities:
            return live == desired or _quantity(desired) == _quantity(live)
        case str():
            return bool(live == desired)
        case Sequence():
            return _lists_match(desired, live, quantities=quantities)
        case bool():
            return live is desired
        case _:
            return bool(live == desired)


def _lists_match(desired: Sequence[Any], live: Any, *, quantities: bool) -> bool:
    if not isinstance(live, Sequence) or isinstance(live, str):
        return not desired and live is None
    key = _merge_key(desired)
    if key is None:
        return len(desired) == len(live) and all(
            _matches(a, b, quantities=quantities) for a, b in zip(desired, live, strict=True)
        )
    there = {item.get(key): item for item in live if isinstance(item, Mapping)}
    return all(_matches(item, there.get(item[key]), quantities=quantities) for item in desired)


def _merge_key(items: Sequence[Any]) -> str | None:
    """What tells the items apart; None for a list that is compared as a whole, in order."""
    if not items or not all(isinstance(item, Mapping) for item in items):
        return None
    for key in _MERGE_KEYS:
        values = [item.get(key) for item in items]
        if None not in values and all(values.count(value) == 1 for value in values):
            return key
    return None


def _quantity(value: Any) -> Decimal | None:
    try:
        return parse_quantity(str(value))
    except ValueError:
        return None
