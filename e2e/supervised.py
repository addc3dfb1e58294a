"""A supervisor in a process of its own, with fakes in the place of engines and router: for tests
that kill it. `python -m e2e.supervised FOLDER`."""

import asyncio
import sys
from pathlib import Path

from shoal.operator.local.supervisor import supervise
from tests.operator.local_machine import LocalMachine


def main() -> int:
    machine = LocalMachine(Path(sys.argv[1]))
    return asyncio.run(supervise(machine.store, machine.settings, on_update=lambda update: None))


if __name__ == "__main__":
    sys.exit(main())
