"""A driver of virtio-net (virtio 1.3, section 5.1): frames out on one ring, frames in on another.

What belongs here: the header in front of frames, buffers in guest memory, frames over several buffers. What does not:
the rings (``driverqueue``), offloads (headers are written as zeros), the control queue.

Everything here *touches* guest memory: where pages are missing it belongs to a thread.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from struct import Struct
from typing import Self

from vhostuser.driverqueue import DriverQueue
from vhostuser.protocol import VirtioFeature

MRG_RXBUF = 15
"""The feature bit: a frame may take several buffers."""

_HEADER = Struct("<BBHHHH")
_NUM_BUFFERS = Struct("<H")


@dataclass(frozen=True)
class NetHeader:
    """What stands in front of a frame. num_buffers: how many buffers a received frame takes; None: not on the wire."""

    flags: int = 0
    gso_type: int = 0
    hdr_len: int = 0
    gso_size: int = 0
    csum_start: int = 0
    csum_offset: int = 0
    num_buffers: int | None = None

    @staticmethod
    def size(features: int) -> int:
        """Bytes of a header under these negotiated virtio features: 12 where it has num_buffers, else 10."""
        with_count = features >> MRG_RXBUF & 1 or features & VirtioFeature.VERSION_1.mask
        return _HEADER.size + (_NUM_BUFFERS.size if with_count else 0)

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        """From 10 or 12 bytes."""
        if len(data) == _HEADER.size:
            return cls(*_HEADER.unpack(data))
        return cls(*_HEADER.unpack_from(data), *_NUM_BUFFERS.unpack_from(data, _HEADER.size))

    def pack(self) -> bytes:
        """Its 10 or 12 bytes."""
        fields = (self.flags, self.gso_type, self.hdr_len, self.gso_size, self.csum_start, self.csum_offset)
        return _HEADER.pack(*fields) + (b"" if self.num_buffers is None else _NUM_BUFFERS.pack(self.num_buffers))


class FrameSender:
    """Sends frames on ``queue`` from ``slots`` buffers of ``slot_bytes`` at guest address ``at``.

    features: the negotiated virtio features.
    """

    def __init__(self, queue: DriverQueue, at: int, *, features: int, slots: int = 64, slot_bytes: int = 2048) -> None:
        self.queue = queue
        self._header = bytes(NetHeader.size(features))
        self._at = at
        self._slot_bytes = slot_bytes
        self._free = list(reversed(range(slots)))
        self._out: dict[int, int] = {}

    def send(self, frames: Iterable[bytes]) -> int:
        """Offers frames; how many there was room for. The device sees them after the queue's ``publish``.

        Raises ValueError for a frame larger than a slot.
        """
        count = 0
        for frame in frames:
            data = self._header + frame
            if len(data) > self._slot_bytes:
                raise ValueError(f"a frame of {len(frame)} bytes, slots have {self._slot_bytes}")
            if not self._free or not self._offer(data):
                break
            count += 1
        return count

    def _offer(self, data: bytes) -> bool:
        slot = self._free[-1]
        guest = self._at + slot * self._slot_bytes
        self.queue.memory.write(guest, data)
        head = self.queue.offer([(guest, len(data))])
        if head is None:
            return False
        self._out[head] = self._free.pop()
        return True

    def collect(self) -> int:
        """Takes back the buffers of frames that were sent; how many."""
        returned = self.queue.take_many()
        self._free += [self._out.pop(head) for head, _ in returned]
        return len(returned)


class FrameReceiver:
    """Receives frames on ``queue`` into ``slots`` buffers of ``slot_bytes`` at guest address ``at``."""

    def __init__(self, queue: DriverQueue, at: int, *, features: int, slots: int = 64, slot_bytes: int = 2048) -> None:
        self.queue = queue
        self._header_bytes = NetHeader.size(features)
        self._at = at
        self._slot_bytes = slot_bytes
        self._free = list(reversed(range(slots)))
        self._out: dict[int, int] = {}
        self._parts: list[bytes] = []

    def post(self) -> int:
        """Offers every free buffer; how many. The device sees them after the queue's ``publish``."""
        count = 0
        while self._free:
            slot = self._free[-1]
            head = self.queue.offer(writable=[(self._at + slot * self._slot_bytes, self._slot_bytes)])
            if head is None:
                break
            self._out[head] = self._free.pop()
            count += 1
        return count

    def receive(self) -> list[tuple[NetHeader, bytes]]:
        """Frames that came since, whole. A frame whose last buffer is still to come is kept for the next call."""
        frames = []
        for head, length in self.queue.take_many():
            slot = self._out.pop(head)
            self._free.append(slot)
            self._parts.append(self.queue.memory.read(self._at + slot * self._slot_bytes, length))
            header = NetHeader.unpack(self._parts[0][: self._header_bytes])
            if len(self._parts) >= (header.num_buffers or 1):
                frames.append((header, b"".join(self._parts)[self._header_bytes :]))
                self._parts = []
        return frames
