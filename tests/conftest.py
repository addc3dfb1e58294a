"""What all tests share: how torch's threads wait, and that Ctrl-C works."""

import signal

from shoal.worker.host import share_cores

share_cores()  # as a worker does, before anything imports torch

# A shell starts background jobs with the interrupt ignored, and children inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
