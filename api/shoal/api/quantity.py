"""Kubernetes quantities: `500m`, `8`, `1.5`, `64Gi`."""

import math
import re
from decimal import Decimal
from types import MappingProxyType

from shoal.api.base import QUANTITY_PATTERN

_FACTORS = MappingProxyType(
    {
        None: Decimal(1),
        "m": Decimal("0.001"),
        "k": Decimal(10**3),
        "M": Decimal(10**6),
        "G": Decimal(10**9),
        "T": Decimal(10**12),
        "P": Decimal(10**15),
        "Ki": Decimal(2**10),
        "Mi": Decimal(2**20),
        "Gi": Decimal(2**30),
        "Ti": Decimal(2**40),
        "Pi": Decimal(2**50),
    }
)
_QUANTITY = re.compile(QUANTITY_PATTERN)
_NUMBER = re.compile(r"[0-9.]+")


def parse_quantity(text: str) -> Decimal:
    """The quantity's exact value in its base unit (cores, bytes).

    ValueError where `text` is no quantity that Shoal accepts; a validated field always is one.
    """
    match = _NUMBER.match(text)
    if match is None or not _QUANTITY.fullmatch(text):
        raise ValueError(f"{text!r} is no quantity; write a number and a unit, as in 500m or 64Gi")
    return Decimal(match[0]) * _FACTORS[text[match.end() :] or None]


def to_bytes(text: str) -> int:
    """A memory quantity in whole bytes, rounded up."""
    return math.ceil(parse_quantity(text))


def to_cores(text: str) -> float:
    """A CPU quantity in cores."""
    return float(parse_quantity(text))
