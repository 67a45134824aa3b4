"""A ring as a driver sees it: what a guest's virtio driver does, for front-ends, tests and measurements.

What belongs here: the typed face of the native driver side. What does not: eventfds (``frontend.ring``), what requests
mean (``drivers``), the device's side (``virtqueue``).

Every method *touches*: it reads or writes guest memory and may block for as long as a missing page takes to arrive, so
where pages may be missing it is never called on the control thread.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from enum import IntFlag
from struct import Struct
from typing import Literal, NamedTuple

from vhostuser._native import ffi, lib
from vhostuser.memory import GuestMemory, MemoryLost, explain
from vhostuser.protocol import QueueBroken

BATCH = 256
"""The most chains that one ``take_many`` returns."""

Segment = tuple[int, int]
"""A buffer: guest address and bytes."""

_NS = 1_000_000_000


class RingParts(NamedTuple):
    """Guest addresses of a ring's parts. tables: of its indirect tables, where it has some.

    desc and tables are multiples of 16, avail of 2, used of 4; each part lies in one region. Of a packed ring desc is
    the ring, avail the driver area and used the device area, both multiples of 4.
    """

    desc: int
    avail: int
    used: int
    tables: int = 0


class DriverQueue:
    """A ring seen from the driver, cleared when it is made.

    at: where it lies: the guest address (a multiple of 64) from which its parts follow each other, or RingParts. size:
    entries, up to 32768, of a split ring a power of two. indirect: every chain takes one entry and may have up to 128
    buffers. packed: the packed format; what is called a head is then a buffer id. in_order: IN_ORDER was negotiated.
    ``desc``, ``avail``, ``used`` are guest addresses. Belongs to one thread at a time. Raises QueueBroken if it does
    not fit or where the device returned nonsense, MemoryLost where memory is gone.
    """

    def __init__(
        self,
        memory: GuestMemory,
        at: int | RingParts,
        size: int,
        *,
        event_idx: bool = False,
        indirect: bool = False,
        packed: bool = False,
        in_order: bool = False,
    ) -> None:
        flags = _flags(event_idx, indirect, packed) | in_order * lib.VU_DRIVER_IN_ORDER
        error = ffi.new("int *")
        if isinstance(at, RingParts):
            parts = ffi.new("struct vu_driver_parts *", at)
            native = lib.vu_driver_place(memory.native, parts, size, flags, error)
        else:
            native = lib.vu_driver_new(memory.native, at, size, flags, error)
        if native == ffi.NULL:
            raise QueueBroken(0, -1, error[0], explain(error[0]))
        self.native = ffi.gc(native, lib.vu_driver_free)
        self.memory = memory
        self.size = size
        self.packed = packed
        self.desc = int(lib.vu_driver_desc(native))
        self.avail = int(lib.vu_driver_avail(native))
        self.used = int(lib.vu_driver_used(native))
        self._returned = ffi.new("vu_returned[]", BATCH)

    @staticmethod
    def bytes_needed(size: int, *, event_idx: bool = False, indirect: bool = False, packed: bool = False) -> int:
        """How many bytes of guest memory such a ring takes when its parts follow each other."""
        return int(lib.vu_driver_bytes(size, _flags(event_idx, indirect, packed)))

    @property
    def first_base(self) -> int:
        """Where a device begins with this ring when it is new (SET_VRING_BASE)."""
        return 0x8000_8000 if self.packed else 0

    @property
    def base(self) -> int:
        """What GET_VRING_BASE is to say once everything that was published has been taken back. Touches nothing."""
        return int(lib.vu_driver_base(self.native))

    def move(self, memory: GuestMemory) -> None:
        """Goes on in another memory that holds the same ring at the same guest addresses, as after a migration.

        Touches nothing. Raises QueueBroken, and stays where it was, if the ring does not fit.
        """
        _checked(lib.vu_driver_move(self.native, memory.native))
        self.memory = memory

    @property
    def raw(self) -> RawRing:
        """A split ring byte by byte, to write what no driver may."""
        return RawRing(self.memory, self.size, self.desc, self.avail, self.used)

    # ---- offering; buffers are not judged, so that a device's judgement can be tried

    def offer(self, readable: Sequence[Segment] = (), writable: Sequence[Segment] = ()) -> int | None:
        """Adds one chain of buffers; its head, or None when there is no room for it. Visible after ``publish``."""
        return self.offer_in_order([(*buffer, False) for buffer in readable] + [(*buffer, True) for buffer in writable])

    def offer_in_order(self, buffers: Sequence[tuple[int, int, bool]]) -> int | None:
        """``offer`` of (guest address, bytes, writable) buffers in just this order, be it allowed or not."""
        head = lib.vu_driver_add(self.native, buffers, len(buffers))
        return None if head == lib.VU_E_SIZE else _checked(head)

    def offer_many(self, chains: Sequence[tuple[Sequence[Segment], Sequence[Segment]]]) -> list[int]:
        """Adds chains of (readable, writable) buffers in one call; the heads of as many as there was room for."""
        buffers = [(*buffer, writable) for chain in chains for writable, side in enumerate(chain) for buffer in side]
        counts = [len(readable) + len(writable) for readable, writable in chains]
        heads = ffi.new("uint16_t[]", len(chains))
        added = lib.vu_driver_add_many(self.native, buffers, counts, len(chains), heads)
        return [] if added == lib.VU_E_SIZE else list(heads[0 : _checked(added)])

    def publish(self) -> bool:
        """Makes what was offered available; whether the device wants a kick."""
        return _checked(lib.vu_driver_publish(self.native)) > 0

    # ---- taking back

    def take(self) -> tuple[int, int] | None:
        """The head of the next chain that the device returned and how many bytes it wrote, or None."""
        return next(iter(self.take_many(1)), None)

    def take_many(self, most: int = BATCH) -> list[tuple[int, int]]:
        """The heads of up to ``most`` returned chains, at most ``BATCH``, and how many bytes were written into each.

        Those in front of one that breaks the ring come first. In order, a device may return several together and say
        how many bytes for the last alone: the others are taken for full.
        """
        count = _checked(lib.vu_driver_take_many(self.native, self._returned, min(most, BATCH)))
        return [(returned.head, returned.length) for returned in self._returned[0:count]]

    # ---- notifications

    def arm(self) -> bool:
        """Asks the device for calls; whether it has returned something meanwhile."""
        return _checked(lib.vu_driver_arm(self.native)) > 0

    def disarm(self) -> None:
        """Tells the device that no calls are needed."""
        _checked(lib.vu_driver_disarm(self.native))

    def wait(self, call_fd: int = -1, *, timeout: float, spin: float = 0.0) -> bool:
        """Blocks this thread until the device has returned something; False after ``timeout`` seconds.

        Looks for ``spin`` seconds, then sleeps on ``call_fd``, an eventfd that it reads; without one it goes on
        looking, ever more rarely (up to 1 ms late). The GIL is free meanwhile.
        """
        return _checked(lib.vu_driver_wait(self.native, call_fd, int(spin * _NS), int(timeout * _NS))) > 0


class Descriptor(IntFlag):
    """Flags of a descriptor (virtio 1.2, 2.7.5)."""

    NEXT = 1
    WRITE = 2
    INDIRECT = 4


class RawRing:
    """A split ring byte by byte, legal or not; of ``size`` entries at these guest addresses. Keeps no account.

    byteorder: of its numbers; big-endian are those of some legacy drivers.

    Positions and indexes are taken modulo what the ring has; an index is stored behind everything that was stored
    before. Raises LookupError outside of memory, MemoryLost.
    """

    def __init__(
        self,
        memory: GuestMemory,
        size: int,
        desc: int,
        avail: int,
        used: int,
        byteorder: Literal["little", "big"] = "little",
    ) -> None:
        self.byteorder = byteorder
        mark = "<" if byteorder == "little" else ">"
        self._descriptor = Struct(f"{mark}QIHH")
        self._used = Struct(f"{mark}II")
        self.memory = memory
        self.size = size
        self.desc = desc
        self.avail = avail
        self.used = used

    # ---- what a driver writes

    def describe(self, index: int, guest: int, length: int, flags: int = 0, after: int = 0) -> None:
        """Writes a descriptor of the table; ``after`` is its ``next``."""
        self.describe_at(self.desc, index, guest, length, flags, after)

    def describe_at(self, table: int, index: int, guest: int, length: int, flags: int = 0, after: int = 0) -> None:
        """The same in a table anywhere, such as an indirect one."""
        self.memory.write(table + 16 * index, self._descriptor.pack(guest, length, flags, after))

    def make_available(self, index: int, heads: Sequence[int]) -> None:
        """Writes heads into the available ring from ``index`` on, without moving the index."""
        for position, head in enumerate(heads, index):
            self._store(self.avail + 4 + 2 * (position % self.size), head)

    @property
    def available_index(self) -> int:
        return self._load(self.avail + 2)

    @available_index.setter
    def available_index(self, index: int) -> None:
        self._store(self.avail + 2, index)

    @property
    def available_flags(self) -> int:
        return self._load(self.avail)

    @available_flags.setter
    def available_flags(self, flags: int) -> None:
        self._store(self.avail, flags)

    @property
    def used_event(self) -> int:
        return self._load(self.avail + 4 + 2 * self.size)

    @used_event.setter
    def used_event(self, index: int) -> None:
        self._store(self.avail + 4 + 2 * self.size, index)

    # ---- what a device writes

    def use(self, index: int, head: int, length: int) -> None:
        """Writes the used entry of ``index``, without moving the index."""
        self.memory.write(self.used + 4 + 8 * (index % self.size), self._used.pack(head, length))

    def used_entry(self, index: int) -> tuple[int, int]:
        """The head and the length of the used entry of ``index``."""
        head, length = self._used.unpack(self.memory.read(self.used + 4 + 8 * (index % self.size), 8))
        return head, length

    @property
    def used_index(self) -> int:
        return self._load(self.used + 2)

    @used_index.setter
    def used_index(self, index: int) -> None:
        self._store(self.used + 2, index)

    @property
    def used_flags(self) -> int:
        return self._load(self.used)

    @used_flags.setter
    def used_flags(self, flags: int) -> None:
        self._store(self.used, flags)

    @property
    def available_event(self) -> int:
        return self._load(self.used + 4 + 8 * self.size)

    @available_event.setter
    def available_event(self, index: int) -> None:
        self._store(self.used + 4 + 8 * self.size, index)

    def _load(self, guest: int) -> int:
        return int.from_bytes(self.memory.read(guest, 2), self.byteorder)

    def _store(self, guest: int, value: int) -> None:
        stored = (value & 0xFFFF).to_bytes(2, self.byteorder)
        self.memory.publish(guest, int.from_bytes(stored, sys.byteorder))


def _flags(event_idx: bool, indirect: bool, packed: bool) -> int:
    return event_idx * lib.VU_DRIVER_EVENT_IDX | indirect * lib.VU_DRIVER_INDIRECT | packed * lib.VU_DRIVER_PACKED


def _checked(result: int) -> int:
    if result == lib.VU_E_FAULT:
        raise MemoryLost
    if result == lib.VU_E_SYS:
        raise OSError(ffi.errno, explain(result))
    if result < 0:
        raise QueueBroken(0, -1, result, explain(result))
    return result
