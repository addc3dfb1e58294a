"""Quantities are read as Kubernetes reads them."""

import pytest

from shoal.api.quantity import parse_quantity, to_bytes, to_cores


@pytest.mark.parametrize(
    ("text", "size"),
    [("0", 0), ("512", 512), ("2Gi", 2 << 30), ("1.5Ki", 1536), ("2G", 2 * 10**9), ("1.5", 2)],
)
def test_memory_is_whole_bytes_rounded_up(text: str, size: int) -> None:
    """Binary and decimal suffixes give exact byte counts."""
    assert to_bytes(text) == size


@pytest.mark.parametrize(("text", "cores"), [("8", 8.0), ("500m", 0.5), ("1.25", 1.25)])
def test_cpu_is_cores(text: str, cores: float) -> None:
    """Millicores and plain numbers give cores."""
    assert to_cores(text) == cores


@pytest.mark.parametrize("text", ["", "Gi", "2GB", "-1", "1e3", "2 Gi", "1.2.3", "2Gi\n"])
def test_junk_is_refused(text: str) -> None:
    """What is no quantity raises with the text in the message."""
    with pytest.raises(ValueError, match="is no quantity"):
        parse_quantity(text)
