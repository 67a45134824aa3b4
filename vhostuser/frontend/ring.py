"""A ring as a front-end keeps it: the driver's queue, its eventfds, and the buffer that tracks requests in flight.

What belongs here: who owns those descriptors, kicks and calls. What does not: what is in the ring (``driverqueue``),
telling a back-end about it (``frontend``).
"""

from __future__ import annotations

import contextlib
import os
from typing import Self

from vhostuser.channel import readable
from vhostuser.driverqueue import DriverQueue
from vhostuser.protocol import Inflight, QueueRegionPacked, QueueRegionSplit


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

    async def returned(self) -> tuple[int, int]:
        """Waits for the next chain that the device has returned: its head, and how many bytes were written into it.

        *Touches* guest memory. For one task at a time. Raises QueueBroken.
        """
        # A call may come without a reason, and what was returned before calls were asked for comes without one.
        while (taken := self.queue.take()) is None:
            if not self.queue.arm():
                await self.called()
        return taken

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

    def queue(self, index: int) -> QueueRegionSplit:
        """What the buffer says of split ring ``index`` now, not judged. Raises IndexError if it has no part in it."""
        return QueueRegionSplit.parse(self._part(index))

    def packed_queue(self, index: int) -> QueueRegionPacked:
        """The same of a packed ring."""
        return QueueRegionPacked.parse(self._part(index))

    def _part(self, index: int) -> bytes:
        given = self.description
        if not 0 <= index < given.num_queues:
            raise IndexError(f"ring {index}, the buffer is for {given.num_queues}")
        each = given.mmap_size // given.num_queues
        return os.pread(self.fd, each, given.mmap_offset + index * each)

    def close(self) -> None:
        """Closes the file. Again: nothing."""
        if self.fd >= 0:
            os.close(self.fd)
        self.fd = -1
