"""Requests that are bytes out and bytes back, for devices that have no driver of their own here.

What belongs here: buffers, and whose they are. What does not: what the bytes mean.
"""

from __future__ import annotations

from vhostuser.drivers.pending import Pending
from vhostuser.frontend.ring import FrontendRing


class Plain:
    """Such requests as awaitable calls on a ring, from any number of tasks of one loop. *Touches*: not in postcopy.

    at: guest address of the buffers, ``slots`` times twice ``most`` bytes: so many requests may be under way at once,
    with so many bytes each way. A call that is cancelled leaves its request, and its buffers, to the device.
    """

    def __init__(self, ring: FrontendRing, at: int, *, most: int = 4096, slots: int = 16) -> None:
        self._ring = ring
        self._at = at
        self._most = most
        self._free = list(range(slots))
        self._out: dict[int, int] = {}
        self._pending = Pending(ring, self._collect)

    async def ask(self, data: bytes = b"", room: int = 0) -> bytes:
        """Sends ``data`` with room for ``room`` bytes; what the device has written. Waits for a free slot.

        Raises ValueError for more than there is a buffer for, or for nothing at all; QueueBroken.
        """
        if max(len(data), room) > self._most or (not data and not room):
            raise ValueError(f"{len(data)} bytes and room for {room}: expected some, and at most {self._most} each way")
        while (head := self._submit(data, room)) is None:
            await self._pending.progress()
        if self._ring.queue.publish():
            self._ring.kick()
        return await self._pending.answer(head)

    def _submit(self, data: bytes, room: int) -> int | None:
        if not self._free:
            return None
        sent = self._at + 2 * self._free[-1] * self._most
        self._ring.queue.memory.write(sent, data)
        readable, writable = [(sent, len(data))] * bool(data), [(sent + self._most, room)] * bool(room)
        head = self._ring.queue.offer(readable, writable)
        if head is not None:
            self._out[head] = self._free.pop()
        return head

    def _collect(self) -> list[tuple[int, bytes]]:
        return [(head, self._written(head, length)) for head, length in self._ring.queue.take_many()]

    def _written(self, head: int, length: int) -> bytes:
        slot = self._out.pop(head)
        self._free.append(slot)
        return self._ring.queue.memory.read(self._at + (2 * slot + 1) * self._most, min(length, self._most))
