"""A broken back-end: its touch threads are woken and tell the ring's thread so on a descriptor that it does not hear.

Every page comes and every thread is woken, but the requests that waited are not taken up again unless another kick
happens to come.

Verdict: never-woken.
"""

import os
from typing import Any

from vhostuser.ring import Ring
from vhostuser.tools.blk import main
from vhostuser.virtqueue import DeviceQueue

right = Ring.open


def open_deaf(ring: Ring, *arguments: Any) -> DeviceQueue:
    queue = right(ring, *arguments)
    if queue.ahead_fd >= 0:
        silent, _ = os.pipe2(os.O_CLOEXEC)  # its other end stays open, so it never becomes readable
        os.dup2(silent, queue.ahead_fd, inheritable=False)
        os.close(silent)
    return queue


Ring.open = open_deaf  # type: ignore[method-assign]
main()
