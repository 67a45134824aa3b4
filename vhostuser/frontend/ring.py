"""A ring as a front-end keeps it: the driver's queue, its eventfds, and the buffer that tracks requests in flight.

What belongs here: who owns those descriptors, kicks and calls. What does not: what is in the ring (``driverqueue``),
telling a back-end about it (``frontend``).
"""

from __future__ import annotations

import contextlib
import os
from struct import Struct
from typing import NamedTuple, Self

from vhostuser.channel import readable
from vhostuser.driverqueue import DriverQueue
from vhostuser.protocol import Inflight

_INFLIGHT_QUEUE = Struct("=QHHHH")
_INFLIGHT_ENTRY = Struct("=B5xHQ")


class FrontendRing:
    """One ring on the front-end's side: its driver queue and eventfds, which it owns."""

    def __init__(self, index: int, queue: DriverQueue) -> None:
        self.index = index
        self.queue = queue
        self.kick_fd = _event()
        self.call_fd = _event()
        self.err_fd = _event()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def kick(self) -> None:
        """Notifies the back-end."""
        os.eventfd_write(self.kick_fd, 1)

    async def called(self) -> None:
        """Waits for the back-end's notification."""
        await readable(self.call_fd)
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self.call_fd)

    async def broken(self) -> None:
        """Waits until the back-end says that the ring is broken."""
        await readable(self.err_fd)

    def close(self) -> None:
        """Closes the eventfds. Again: nothing."""
        for fd in {self.kick_fd, self.call_fd, self.err_fd} - {-1}:
            os.close(fd)
        self.kick_fd = self.call_fd = self.err_fd = -1


def _event() -> int:
    return os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)


class InflightQueue(NamedTuple):
    """A ring's part of the buffer, split format. version 0: nobody has used it yet. Section "Inflight I/O tracking".

    heads: those that were taken and not returned, in the order in which they were taken.
    """

    features: int
    version: int
    size: int
    last_batch_head: int
    used_index: int
    heads: tuple[int, ...]


class InflightBuffer:
    """The buffer in which a back-end tracks requests in flight, kept for the next one. Owns ``fd``.

    description: its size and place in the file, as GET_INFLIGHT_FD answered and SET_INFLIGHT_FD will say.
    """

    def __init__(self, fd: int, description: Inflight) -> None:
        self.fd = fd
        self.description = description

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def queue(self, index: int) -> InflightQueue:
        """What the buffer says of ring ``index`` now, not judged. Raises IndexError if it has no part in it."""
        given = self.description
        if not 0 <= index < given.num_queues:
            raise IndexError(f"ring {index}, the buffer is for {given.num_queues}")
        each = given.mmap_size // given.num_queues
        part = os.pread(self.fd, each, given.mmap_offset + index * each)
        features, version, size, last_batch_head, used_index = _INFLIGHT_QUEUE.unpack_from(part)
        # The ring may be larger than the queue size that was asked for.
        count = min(max(given.queue_size, size), (len(part) - _INFLIGHT_QUEUE.size) // _INFLIGHT_ENTRY.size)
        entries = part[_INFLIGHT_QUEUE.size :][: count * _INFLIGHT_ENTRY.size]
        taken = [
            (counter, head)
            for head, (inflight, _, counter) in enumerate(_INFLIGHT_ENTRY.iter_unpack(entries))
            if inflight
        ]
        heads = tuple(head for _, head in sorted(taken))
        return InflightQueue(features, version, size, last_batch_head, used_index, heads)

    def close(self) -> None:
        """Closes the file. Again: nothing."""
        if self.fd >= 0:
            os.close(self.fd)
        self.fd = -1
