"""What all tests share: torch's threads sleep while they wait, as they do in a worker."""

from shoal.worker.host import share_cores

share_cores()
