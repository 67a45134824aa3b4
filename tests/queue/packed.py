"""Packed rings, written slowly and plainly (virtio 1.2, 2.8): bytes in guest memory, what they mean, and a driver.

Positions are counted from the first descriptor on and never wrap; where they lie in the ring and what the wrap counter
is there follows from them. Nothing here is taken from the code under test but the numbers of its errors.
"""

from __future__ import annotations

import struct

from tests.queue.guest import ALL, INDIRECT, INDIRECT_DESC, NEXT, WRITE, Guest
from tests.queue.model import Bad, Chain, Range, size, split
from vhostuser._native import lib
from vhostuser.memory import DirtyLog
from vhostuser.protocol import VirtioFeature
from vhostuser.virtqueue import DeviceQueue, InflightRegion, RingSetup

AVAIL, USED = 1 << 7, 1 << 15
ENABLE, DISABLE, DESC = 0, 1, 2
PACKED = 1 << VirtioFeature.RING_PACKED

Row = tuple[int, int, int, int]
"""A descriptor: address, length, buffer id, flags."""


def pack(row: Row) -> bytes:
    return struct.pack("<QIHH", *row)


class PackedRing:
    """A packed ring in the memory of a guest, from guest address ``at``; every field may be set to anything."""

    def __init__(self, guest: Guest, size: int, at: int = 0, features: int = ALL) -> None:
        self.guest, self.size, self.features = guest, size, features | PACKED
        self.desc = at
        self.driver = at + 16 * size
        self.device = self.driver + 4
        guest.put(at, bytes(16 * size + 8))

    def open(
        self, log: DirtyLog | None = None, inflight: InflightRegion | None = None, **changes: object
    ) -> DeviceQueue:
        fields: dict[str, object] = {
            "size": self.size,
            "desc": self.desc,
            "avail": self.driver,
            "used": self.device,
            "base": self.base(0, 0),
            "features": self.features,
            "guest_addresses": True,
        }
        return RingSetup(**(fields | changes)).open(self.guest.memory, log=log, inflight=inflight)  # type: ignore

    # ---- places

    def wrap(self, position: int) -> bool:
        """The wrap counter: it begins with 1 (2.8.1) and turns with every round."""
        return position // self.size % 2 == 0

    def word(self, position: int) -> int:
        return position % self.size | self.wrap(position) << 15

    def base(self, available: int, used: int) -> int:
        """As SET_VRING_BASE has it."""
        return self.word(available) | self.word(used) << 16

    def available_flags(self, position: int) -> int:
        return AVAIL if self.wrap(position) else USED

    def used_flags(self, position: int) -> int:
        return AVAIL | USED if self.wrap(position) else 0

    # ---- bytes

    def describe(self, position: int, row: Row) -> None:
        self.guest.put(self.desc + 16 * (position % self.size), pack(row))

    def row(self, position: int) -> Row:
        return struct.unpack("<QIHH", self.guest.get(self.desc + 16 * (position % self.size), 16))

    def is_available(self, position: int) -> bool:
        return self.row(position)[3] & (AVAIL | USED) == self.available_flags(position)

    def is_used(self, position: int) -> bool:
        return self.row(position)[3] & (AVAIL | USED) == self.used_flags(position)

    def ask(self, flags: int, position: int = 0) -> None:
        """What the driver says about calls."""
        self.guest.put(self.driver, struct.pack("<HH", self.word(position), flags))

    @property
    def asked(self) -> tuple[int, int]:
        """What the device says about kicks: place and flags."""
        word, flags = struct.unpack("<HH", self.guest.get(self.device, 4))
        return word, flags


# ---- what a device has to see


def parse(ring: PackedRing, position: int, held: int) -> tuple[Chain, int]:
    """The chain that begins at this position, with its id, and how many places it has; or Bad."""
    chain, count = Chain(0), 0
    while True:
        if held + count >= ring.size:
            raise Bad(lib.VU_E_LOOP)
        addr, length, chain.head, flags = ring.row(position + count)
        count += 1
        if flags & INDIRECT:
            parse_table(ring, chain, addr, length, flags)
        else:
            chain.add(ring.guest.regions, addr, length, bool(flags & WRITE))
        if not flags & NEXT:
            return chain, count


def parse_table(ring: PackedRing, chain: Chain, addr: int, length: int, flags: int) -> None:
    if not ring.features & INDIRECT_DESC or flags & NEXT or length == 0 or length % 16:
        raise Bad(lib.VU_E_INDIRECT)
    if length // 16 > max(ring.size, 1024):
        raise Bad(lib.VU_E_SIZE)
    if addr + length >= 1 << 64:
        raise Bad(lib.VU_E_OVERFLOW)
    split(ring.guest.regions, addr, length)
    for inner in struct.iter_unpack("<QIHH", ring.guest.get(addr, length)):
        if inner[3] & INDIRECT:
            raise Bad(lib.VU_E_INDIRECT)
        chain.add(ring.guest.regions, inner[0], inner[1], bool(inner[3] & WRITE))


def pop(ring: PackedRing, position: int, held: int = 0) -> tuple[list[Chain], int]:
    """Everything available from ``position`` on, up to the first thing that is wrong, and its code (or 0)."""
    chains: list[Chain] = []
    while held < ring.size and ring.is_available(position):
        try:
            chain, count = parse(ring, position, held)
        except Bad as bad:
            return chains, bad.code
        chains.append(chain)
        position, held = position + count, held + count
    return chains, 0


# ---- a driver


class PackedDriver:
    """As plain as it can be: chains written byte by byte, ids in any order, an account of what is out."""

    def __init__(self, ring: PackedRing, position: int = 0) -> None:
        self.ring = ring
        self.next = self.seen = position
        self.ids = list(range(ring.size))
        self.out: dict[int, tuple[int, Chain]] = {}

    @property
    def held(self) -> int:
        return sum(count for count, _ in self.out.values())

    def offer(self, readable: list[Range], writable: list[Range], table: int | None = None) -> int | None:
        """One chain, its id; with ``table``, in an indirect table there. None: there is no room, or nothing in it."""
        buffers = [(*buffer, 0) for buffer in readable] + [(*buffer, WRITE) for buffer in writable]
        identity = self.ids[0] if self.ids else 0
        rows: list[Row] = []
        for number, (addr, length, flags) in enumerate(buffers):
            more = NEXT if number + 1 < len(buffers) else 0
            rows.append((addr, length, identity, flags | (more if table is None else 0)))
        if table is not None and rows:
            self.ring.guest.put(table, b"".join(pack(row) for row in rows))
            rows = [(table, 16 * len(rows), identity, INDIRECT)]
        if not rows or len(rows) > self.ring.size - self.held:
            return None
        for offset in reversed(range(len(rows))):  # the first one last: the device looks at it
            addr, length, _, flags = rows[offset]
            position = self.next + offset
            self.ring.describe(position, (addr, length, identity, flags | self.ring.available_flags(position)))
        self.next += len(rows)
        self.ids.remove(identity)
        pieces = [
            [piece for part in parts for piece in split(self.ring.guest.regions, *part)]
            for parts in (readable, writable)
        ]
        self.out[identity] = (len(rows), Chain(identity, *pieces))
        return identity

    def take(self) -> list[tuple[int, int]]:
        """What the device returned: (id, length). Fails if it was not ours to return."""
        returned = []
        while self.out and self.ring.is_used(self.seen):
            _, length, identity, flags = self.ring.row(self.seen)
            count, chain = self.out.pop(identity)
            assert bool(flags & WRITE) == bool(length), "WRITE says whether something was written"
            assert length <= size(chain.writable), "more written than there was room for"
            self.ids.append(identity)
            self.seen += count
            returned.append((identity, length))
        return returned


class PackedDevice:
    """A device as plain as the driver: takes what is available, returns it in any order."""

    def __init__(self, ring: PackedRing) -> None:
        self.ring = ring
        self.next = self.used = 0
        self.out: dict[int, tuple[Chain, int]] = {}

    def take(self) -> list[Chain]:
        taken = []
        while self.held < self.ring.size and self.ring.is_available(self.next):
            chain, count = parse(self.ring, self.next, self.held)
            self.out[chain.head] = chain, count
            self.next += count
            taken.append(chain)
        return taken

    @property
    def held(self) -> int:
        return sum(count for _, count in self.out.values())

    def give_back(self, identity: int, length: int) -> None:
        _, count = self.out.pop(identity)
        flags = self.ring.used_flags(self.used) | (WRITE if length else 0)
        self.ring.describe(self.used, (0, length, identity, flags))
        self.used += count
