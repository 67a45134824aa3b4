"""A ring as a driver sees it: what a guest's virtio driver does, for front-ends, tests and measurements.

What belongs here: the typed face of the native driver side. What does not: eventfds (``frontend_ring``), what requests
mean (``drivers``), the device's side (``virtqueue``).

Every method *touches*: it reads or writes guest memory and may block for as long as a missing page takes to arrive, so
where pages may be missing it is never called on the control thread.
"""

from __future__ import annotations

from collections.abc import Sequence

from vhostuser._native import ffi, lib
from vhostuser.memory import GuestMemory, MemoryLost, explain
from vhostuser.protocol import QueueBroken


class DriverQueue:
    """A split ring seen from the driver, laid out at guest address ``at`` (a multiple of 64) and cleared.

    size: entries, a power of two up to 32768. With ``indirect`` every chain takes one entry and may have up to 128
    buffers. ``desc``, ``avail``, ``used`` are guest addresses. Belongs to one thread at a time; every method *touches*.
    Raises QueueBroken if it does not fit or where the device returned nonsense, MemoryLost where memory is gone.
    """

    def __init__(
        self, memory: GuestMemory, at: int, size: int, *, event_idx: bool = False, indirect: bool = False
    ) -> None:
        flags = event_idx * lib.VU_DRIVER_EVENT_IDX | indirect * lib.VU_DRIVER_INDIRECT
        error = ffi.new("int *")
        native = lib.vu_driver_new(memory.native, at, size, flags, error)
        if native == ffi.NULL:
            raise QueueBroken(0, -1, error[0], explain(error[0]))
        self.native = ffi.gc(native, lib.vu_driver_free)
        self.size = size
        self.desc = int(lib.vu_driver_desc(native))
        self.avail = int(lib.vu_driver_avail(native))
        self.used = int(lib.vu_driver_used(native))
        self._head = ffi.new("uint16_t *")
        self._length = ffi.new("uint32_t *")

    @staticmethod
    def bytes_needed(size: int, *, event_idx: bool = False, indirect: bool = False) -> int:
        """How many bytes of guest memory such a ring takes."""
        flags = event_idx * lib.VU_DRIVER_EVENT_IDX | indirect * lib.VU_DRIVER_INDIRECT
        return int(lib.vu_driver_bytes(size, flags))

    def offer(self, readable: Sequence[tuple[int, int]] = (), writable: Sequence[tuple[int, int]] = ()) -> int | None:
        """Adds one chain of (guest address, bytes) buffers, not judged; its head, or None when there is no room for it.

        The device sees it after ``publish``.
        """
        buffers = [(*buffer, 0) for buffer in readable] + [(*buffer, 1) for buffer in writable]
        head = lib.vu_driver_add(self.native, buffers, len(buffers))
        return None if head == lib.VU_E_SIZE else _checked(head)

    def publish(self) -> bool:
        """Makes what was offered available; whether the device wants a kick."""
        return _checked(lib.vu_driver_publish(self.native)) > 0

    def take(self) -> tuple[int, int] | None:
        """The head of the next chain that the device returned and how many bytes it wrote, or None."""
        if not _checked(lib.vu_driver_take(self.native, self._head, self._length)):
            return None
        return self._head[0], self._length[0]

    def arm(self) -> bool:
        """Asks the device for calls; whether it has returned something meanwhile."""
        return _checked(lib.vu_driver_arm(self.native)) > 0

    def disarm(self) -> None:
        """Tells the device that no calls are needed."""
        _checked(lib.vu_driver_disarm(self.native))


def _checked(result: int) -> int:
    if result == lib.VU_E_FAULT:
        raise MemoryLost
    if result < 0:
        raise QueueBroken(0, -1, result, explain(result))
    return result
