"""The thread of one ring: looks at it, sleeps until a kick, ends when it is told to.

What belongs here: when. What does not: what is done with a chain (``disk``), the ring itself (``queue``).
"""

from __future__ import annotations

import os
import select
from typing import Any

from tests.conformance.plain.queue import Chain, Queue
from tests.conformance.plain.ring import Bad
from vhostuser._native import lib
from vhostuser.memory import MemoryLost

# Milliseconds between two looks at a ring without kicks.
_LOOK = 1


class Engine:
    """A ``vhostuser.device.Engine``; ``serve`` does what a chain asks for and returns how many bytes it wrote."""

    def serve(self, chain: Chain) -> int:
        raise NotImplementedError

    def run(self, queue: Any, kick: int, stop: int) -> int:
        """Serves until ``stop`` is readable. Raises QueueBroken."""
        head = -1
        try:
            while not self.stopped(stop):
                chain = queue.take()
                if chain is not None:
                    head = chain.head
                    self.finish(queue, chain)
                elif not queue.arm():
                    kick = self.rest(queue, kick, stop)
                    queue.disarm()
        except Bad as bad:
            raise queue.broken_by(bad.code, head) from None
        except MemoryLost:
            raise queue.broken_by(lib.VU_E_FAULT) from None
        except LookupError:
            raise queue.broken_by(lib.VU_E_RANGE, head) from None
        return 0

    def finish(self, queue: Queue, chain: Chain) -> None:
        """One request from beginning to end."""
        queue.give_back(chain, self.serve(chain))
        queue.signal()

    def stopped(self, stop: int) -> bool:
        """Were we told to end?"""
        return bool(select.select([stop], [], [], 0)[0])

    def rest(self, queue: Queue, kick: int, stop: int) -> int:
        """Sleeps until a kick or the stop; the kick from then on, -1 where there is none any more."""
        poll = select.poll()
        poll.register(stop, select.POLLIN)
        if kick >= 0:
            poll.register(kick, select.POLLIN)
        for fd, events in poll.poll(None if kick >= 0 else _LOOK):
            if fd == kick and not (events & select.POLLIN and os.read(kick, 8)):
                return -1  # the other end of a pipe is gone
        return kick
