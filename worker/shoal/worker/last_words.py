"""The termination message of a container: what `kubectl describe pod` shows of its end.

The kubelet makes the file before the container starts; where there is none (any other machine)
nothing is written.
"""

import os
from contextlib import suppress
from pathlib import Path
from typing import Final

TERMINATION_LOG: Final = Path("/dev/termination-log")
MAX_BYTES: Final = 4096  # the kubelet reads no more


def say(text: str, path: Path = TERMINATION_LOG) -> None:
    """Makes `text` the container's termination message, in place of what was there."""
    content = text.encode()
    if len(content) > MAX_BYTES:
        content = content[: MAX_BYTES - 3].decode(errors="ignore").encode() + b"..."
    with suppress(OSError):
        handle = os.open(path, os.O_WRONLY | os.O_TRUNC)  # never made here
        try:
            os.write(handle, content)
        finally:
            os.close(handle)
