"""`python -m shoal.worker.parallel RANK NODE LOG_FORMAT`: one rank of a group on this machine.

Standard input: one line, the invitation in base64; its end is the driver's.
"""

import os
import sys
from base64 import b64decode

from shoal.api.lifeline import watch_lifeline
from shoal.worker import logs
from shoal.worker.host import share_cores
from shoal.worker.parallel.invitation import Invitation


def main() -> int:
    rank, node, log_format = int(sys.argv[1]), sys.argv[2], sys.argv[3]
    logs.configure(log_format, sys.stdout)
    line = b""
    while not line.endswith(b"\n"):  # unbuffered: what follows is the lifeline's
        byte = os.read(0, 1 << 16)
        if not byte:
            return 1
        line += byte
    watch_lifeline()
    share_cores()
    from shoal.worker.parallel.rank import run_rank

    run_rank(Invitation.unpack(b64decode(line)), rank, node)
    return 0


if __name__ == "__main__":
    sys.exit(main())
