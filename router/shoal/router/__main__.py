"""`python -m shoal.router`: see `shoal.router.process`."""

import os
import sys
from collections.abc import MutableMapping


def prepare(environ: MutableMapping[str, str]) -> None:
    """What libraries read when they are loaded.

    gRPC's newer event engine polls in threads of its own beside the one that hands events to
    asyncio, and the hop between them is an eighth of the router's time.
    """
    environ.setdefault("GRPC_EXPERIMENTS", "-event_engine_client")


def main() -> int:
    """Returns the exit status."""
    prepare(os.environ)
    from shoal.router.process import main  # loads gRPC

    return main()


if __name__ == "__main__":
    sys.exit(main())
