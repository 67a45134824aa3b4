"""A broken back-end: takes the first request of a ring that starts in postcopy, and never returns it.

Looking at a ring before a thread serves it, and forgetting what was found, does this.

Verdict: request-lost.
"""

from vhostuser._native import ffi, lib
from vhostuser.devices.blk import BlkEngine
from vhostuser.tools.blk import main
from vhostuser.virtqueue import DeviceQueue

right = BlkEngine.run


def run(engine: BlkEngine, queue: DeviceQueue, kick: int, stop: int) -> int:
    if queue.ahead_fd >= 0:
        lib.vu_queue_pop(queue.native, ffi.new("vu_chain *[1]"), 1)
    return right(engine, queue, kick, stop)


BlkEngine.run = run  # type: ignore[method-assign]
main()
