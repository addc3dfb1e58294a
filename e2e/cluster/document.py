"""Commands of a page of documentation, as somebody would type them."""

import subprocess
import textwrap
from collections.abc import Iterator
from typing import Final

PROGRAMS: Final = ("make", "helm", "kubectl", "curl")


def commands(page: str) -> list[str]:
    """Every command of the page's indented blocks that begin with one of PROGRAMS, in order. One
    may have many lines: continued, quoted, or a document for its standard input."""
    return [one for block in _blocks(page) if block.startswith(PROGRAMS) for one in _split(block)]


def _blocks(page: str) -> Iterator[str]:
    block: list[str] = []
    for line in [*page.splitlines(), "end"]:
        if line.startswith("    ") or (block and not line.strip()):
            block.append(line)
        elif block:
            yield textwrap.dedent("\n".join(block)).strip()
            block = []


def _split(block: str) -> Iterator[str]:
    command = ""
    for line in block.splitlines():
        command += line + "\n"
        if command.strip() and _complete(command):
            yield command.strip()
            command = ""
    assert not command.strip(), f"not a whole command: {command}"


def _complete(command: str) -> bool:
    """Whether a shell would run it as it stands, and not wait for more."""
    if command.endswith("\\\n"):
        return False
    done = subprocess.run(
        ["bash", "-n"], input=command, capture_output=True, text=True, check=False
    )
    return done.returncode == 0 and not done.stderr
