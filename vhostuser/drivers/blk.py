"""A driver of virtio-blk (virtio 1.3, section 5.2): requests on one ring, and what came of them.

What belongs here: headers, data and status bytes in guest memory, which request is in which slot. What does not: the
ring (``driverqueue``), who starts it (``frontend``).

``BlkDriver`` is for a thread, and may be used where pages are missing; ``Disk`` is for a loop, and only where none are.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from struct import Struct

from vhostuser.driverqueue import DriverQueue, Segment
from vhostuser.drivers.pending import Pending
from vhostuser.frontend.ring import FrontendRing
from vhostuser.protocol import VhostUserError

SECTOR = 512
_HEADER = Struct("<IIQ")
_RANGE = Struct("<QII")
_HEAD_BYTES = 64
"""Of a slot: 16 of header, and the status at 32."""
_STATUS = 32
_UNTOUCHED = 0xFF


class BlkType(IntEnum):
    """Types of requests."""

    IN = 0
    OUT = 1
    FLUSH = 4
    GET_ID = 8
    DISCARD = 11
    WRITE_ZEROES = 13


class BlkStatus(IntEnum):
    """What a device says of a request. NONE is no value of the specification: it has said nothing."""

    OK = 0
    IOERR = 1
    UNSUPP = 2
    NONE = _UNTOUCHED


@dataclass(frozen=True)
class BlkRequest:
    """A request: data for the device, and room in bytes for what it answers. sector: of 512 bytes. type: any number."""

    type: int
    sector: int = 0
    data: bytes = b""
    room: int = 0

    @classmethod
    def read(cls, sector: int, sectors: int) -> BlkRequest:
        """Read so many sectors."""
        return cls(BlkType.IN, sector, room=sectors * SECTOR)

    @classmethod
    def write(cls, sector: int, data: bytes) -> BlkRequest:
        """Write data, of whole sectors if the device is to take it."""
        return cls(BlkType.OUT, sector, data)

    @classmethod
    def flush(cls) -> BlkRequest:
        """Put what was written on the medium."""
        return cls(BlkType.FLUSH)

    @classmethod
    def get_id(cls) -> BlkRequest:
        """Read the serial number, 20 bytes padded with zeros."""
        return cls(BlkType.GET_ID, room=20)

    @classmethod
    def discard(cls, *ranges: tuple[int, int]) -> BlkRequest:
        """Forget (sector, sectors) ranges."""
        return cls(BlkType.DISCARD, data=b"".join(_RANGE.pack(*part, 0) for part in ranges))

    @classmethod
    def write_zeroes(cls, *ranges: tuple[int, int], unmap: bool = False) -> BlkRequest:
        """Make (sector, sectors) ranges read as zeros; unmap: they may be forgotten as well."""
        return cls(BlkType.WRITE_ZEROES, data=b"".join(_RANGE.pack(*part, unmap) for part in ranges))


@dataclass(frozen=True)
class BlkAnswer:
    """What came back. status: a BlkStatus, or whatever else the device wrote. data: as much as there was room for; what
    the device did not write is what was there before. length: bytes that it says it wrote, status included.
    """

    request: BlkRequest
    status: int
    data: bytes
    length: int


class BlkFailed(VhostUserError):
    """The device did not answer a request with OK."""

    def __init__(self, answer: BlkAnswer) -> None:
        self.answer = answer
        kind = BlkType(answer.request.type).name if answer.request.type in list(BlkType) else answer.request.type
        status = BlkStatus(answer.status).name if answer.status in list(BlkStatus) else answer.status
        super().__init__(f"{kind} at sector {answer.request.sector}: {status}")


class BlkDriver:
    """Requests on ``queue``, in slots of guest memory from ``at`` on. Belongs to one thread; every method *touches*.

    depth: requests under way at most. largest: bytes of data or room of one request. cut: data is split into segments
    of so many bytes; 0: it is one segment. The memory is ``bytes_needed`` long and in one region or several.
    """

    def __init__(self, queue: DriverQueue, at: int, *, depth: int = 16, largest: int = 64 * 1024, cut: int = 0) -> None:
        self.queue = queue
        self._at = at
        self._data = at + _aligned(depth * _HEAD_BYTES)
        self._largest = largest
        self._cut = cut
        self._free = list(reversed(range(depth)))
        self._out: dict[int, tuple[int, BlkRequest]] = {}

    @staticmethod
    def bytes_needed(depth: int, largest: int) -> int:
        """Guest memory for the slots."""
        return _aligned(depth * _HEAD_BYTES) + depth * _aligned(largest)

    @property
    def out(self) -> int:
        """Requests under way."""
        return len(self._out)

    def data_at(self, slot: int) -> int:
        """The guest address of a slot's data."""
        return self._data + slot * _aligned(self._largest)

    def submit(self, request: BlkRequest) -> int | None:
        """Adds a request, which ``publish`` shows to the device; its head, or None while there is no room for it.

        Raises ValueError for one that is larger than a slot, or has more buffers than the ring has room for.
        """
        if len(request.data) > self._largest or request.room > self._largest:
            raise ValueError(f"a request of {max(len(request.data), request.room)} bytes, slots have {self._largest}")
        if not self._free:
            return None
        slot = self._free[-1]
        readable, writable = self._place(slot, request)
        head = self.queue.offer(readable, writable)
        if head is not None:
            self._out[head] = (self._free.pop(), request)
        elif not self._out:
            raise ValueError(f"{len(readable) + len(writable)} buffers, the ring has room for fewer")
        return head

    def _place(self, slot: int, request: BlkRequest) -> tuple[list[Segment], list[Segment]]:
        memory, header, data = self.queue.memory, self._at + slot * _HEAD_BYTES, self.data_at(slot)
        memory.write(header, _HEADER.pack(request.type, 0, request.sector))
        memory.write(header + _STATUS, bytes([_UNTOUCHED]))
        memory.write(data, request.data)
        readable = [(header, _HEADER.size), *self._segments(data, len(request.data))]
        return readable, [*self._segments(data, request.room), (header + _STATUS, 1)]

    def _segments(self, guest: int, length: int) -> list[Segment]:
        step = self._cut or max(length, 1)
        return [(guest + offset, min(step, length - offset)) for offset in range(0, length, step)]

    def publish(self) -> bool:
        """Shows the device what was submitted; whether it wants a kick."""
        return self.queue.publish()

    def collect(self) -> list[tuple[int, BlkAnswer]]:
        """What the device has answered since, by head. Raises QueueBroken."""
        return [(head, self._answer(head, length)) for head, length in self.queue.take_many()]

    def _answer(self, head: int, length: int) -> BlkAnswer:
        slot, request = self._out.pop(head)
        self._free.append(slot)
        memory = self.queue.memory
        status = memory.read(self._at + slot * _HEAD_BYTES + _STATUS, 1)[0]
        return BlkAnswer(request, status, memory.read(self.data_at(slot), request.room), length)

    def run(self, requests: Sequence[BlkRequest], ring: FrontendRing, *, timeout: float = 10.0) -> list[BlkAnswer]:
        """Does all of these, as many at once as there are slots, and blocks until they are answered; in their order.

        Nothing else may be under way. Raises TimeoutError when the device says nothing for ``timeout`` seconds.
        """
        answers: dict[int, BlkAnswer] = {}
        waiting = list(enumerate(requests))
        numbers: dict[int, int] = {}
        while len(answers) < len(requests):
            while waiting and (head := self.submit(waiting[0][1])) is not None:
                numbers[head] = waiting.pop(0)[0]
            if self.publish():
                ring.kick()
            if not self.queue.wait(ring.call_fd, timeout=timeout):
                raise TimeoutError(f"{self.out} block requests were not answered for {timeout:g} s")
            answers |= {numbers.pop(head): answer for head, answer in self.collect()}
        return [answers[number] for number in range(len(requests))]


def _aligned(size: int) -> int:
    page = os.sysconf("SC_PAGESIZE")
    return -(-size // page) * page


class Disk:
    """Block requests as awaitable calls on a ring, from any number of tasks of one loop. *Touches*: not in postcopy.

    Calls wait for a free slot. A call that is cancelled leaves its request to the device.
    """

    def __init__(self, ring: FrontendRing, driver: BlkDriver) -> None:
        self._ring = ring
        self._driver = driver
        self._pending = Pending(ring, driver.collect)

    async def read(self, sector: int, sectors: int) -> bytes:
        """Reads sectors. Raises BlkFailed, QueueBroken."""
        return (await self.done(BlkRequest.read(sector, sectors))).data

    async def write(self, sector: int, data: bytes) -> None:
        """Writes whole sectors. Raises BlkFailed, QueueBroken."""
        await self.done(BlkRequest.write(sector, data))

    async def flush(self) -> None:
        """Puts what was written on the medium. Raises BlkFailed, QueueBroken."""
        await self.done(BlkRequest.flush())

    async def get_id(self) -> str:
        """The serial number. Raises BlkFailed, QueueBroken."""
        return (await self.done(BlkRequest.get_id())).data.split(b"\0")[0].decode("latin-1")

    async def done(self, request: BlkRequest) -> BlkAnswer:
        """The answer to any request, if it is OK. Raises BlkFailed, QueueBroken."""
        answer = await self.request(request)
        if answer.status != BlkStatus.OK:
            raise BlkFailed(answer)
        return answer

    async def request(self, request: BlkRequest) -> BlkAnswer:
        """The answer to any request. Raises QueueBroken."""
        while (head := self._driver.submit(request)) is None:
            await self._pending.progress()
        if self._driver.publish():
            self._ring.kick()
        return await self._pending.answer(head)
