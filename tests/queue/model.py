"""What split rings mean, written slowly and plainly (virtio 1.2, 2.7): the judge of the native code.

Nothing here is taken from the code under test but the numbers of its errors.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field

from tests.queue.guest import INDIRECT, INDIRECT_DESC, NEXT, WRITE, Guest, Ring, descriptor
from vhostuser._native import lib

Range = tuple[int, int]
"""(guest address, bytes)"""


class Bad(Exception):
    """The chain must be refused with this code."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


def split(regions: tuple[Range, ...], guest: int, length: int) -> list[Range]:
    """Cuts a range where regions end."""
    pieces = []
    while length:
        for start, size in regions:
            if start <= guest < start + size:
                run = min(length, start + size - guest)
                pieces.append((guest, run))
                guest, length = guest + run, length - run
                break
        else:
            raise Bad(lib.VU_E_RANGE)
    return pieces


@dataclass
class Chain:
    head: int
    readable: list[Range] = field(default_factory=list)
    writable: list[Range] = field(default_factory=list)

    def add(self, regions: tuple[Range, ...], addr: int, length: int, writable: bool) -> None:
        if self.writable and not writable:
            raise Bad(lib.VU_E_ORDER)
        if addr + length >= 1 << 64:
            raise Bad(lib.VU_E_OVERFLOW)
        if size(self.readable) + size(self.writable) + length > 1 << 32:
            raise Bad(lib.VU_E_SIZE)
        (self.writable if writable else self.readable).extend(split(regions, addr, length))


def size(ranges: list[Range]) -> int:
    return sum(length for _, length in ranges)


def descriptors(guest: Guest, table: int, count: int, index: int) -> Iterator[tuple[int, int, int, int]]:
    """The descriptors of one table from ``index`` on, in their order; a loop or a wild ``next`` is refused."""
    for _ in range(count):
        addr, length, flags, after = struct.unpack("<QIHH", guest.get(table + 16 * index, 16))
        yield addr, length, flags, after
        if not flags & NEXT:
            return
        if after >= count:
            raise Bad(lib.VU_E_HEAD)
        index = after
    raise Bad(lib.VU_E_LOOP)  # more descriptors than the table has: some came twice


def parse(ring: Ring, head: int) -> Chain:
    """What the driver offered with this head, or Bad."""
    guest, chain = ring.guest, Chain(head)
    if head >= ring.size:
        raise Bad(lib.VU_E_HEAD)
    for addr, length, flags, _ in descriptors(guest, ring.desc, ring.size, head):
        if not flags & INDIRECT:
            chain.add(guest.regions, addr, length, bool(flags & WRITE))
            continue
        if not ring.features & INDIRECT_DESC or flags & NEXT or length == 0 or length % 16:
            raise Bad(lib.VU_E_INDIRECT)
        if length // 16 > max(ring.size, 1024):
            raise Bad(lib.VU_E_SIZE)
        if addr + length >= 1 << 64:
            raise Bad(lib.VU_E_OVERFLOW)
        split(guest.regions, addr, length)
        for inner, inner_length, inner_flags, _ in descriptors(guest, addr, length // 16, 0):
            if inner_flags & INDIRECT:
                raise Bad(lib.VU_E_INDIRECT)
            chain.add(guest.regions, inner, inner_length, bool(inner_flags & WRITE))
    return chain


def pop(ring: Ring, base: int, taken: set[int]) -> tuple[list[Chain], int]:
    """Everything available from ``base`` on, up to the first thing that is wrong, and its code (or 0)."""
    count = (ring.available - base) & 0xFFFF
    if count > ring.size:
        return [], lib.VU_E_INDEX
    chains: list[Chain] = []
    for position in range(count):
        at = ring.avail + 4 + 2 * ((base + position) % ring.size)
        head = int.from_bytes(ring.guest.get(at, 2), "little")
        try:
            if head in taken | {chain.head for chain in chains}:
                raise Bad(lib.VU_E_HEAD)
            chains.append(parse(ring, head))
        except Bad as bad:
            return chains, bad.code
    return chains, 0


def prefix(ranges: list[Range], length: int) -> list[Range]:
    """The first bytes of these ranges."""
    cut = []
    for guest, size_here in ranges:
        if length <= 0:
            break
        cut.append((guest, min(size_here, length)))
        length -= size_here
    return cut


def addresses(ranges: list[Range]) -> list[int]:
    """Every byte's address, in order."""
    return [guest + offset for guest, length in ranges for offset in range(length)]


def pages(ranges: list[Range]) -> set[int]:
    """The pages of 4096 bytes that the ranges touch."""
    return {
        page for guest, length in ranges if length for page in range(guest // 4096, (guest + length - 1) // 4096 + 1)
    }


def bits(log: bytes) -> set[int]:
    """The pages whose bits are set in a dirty log."""
    found = re.finditer(rb"[^\0]", log, re.DOTALL)
    return {8 * byte.start() + bit for byte in found for bit in range(8) if byte[0][0] >> bit & 1}


def wants_event(event: int, before: int, now: int) -> bool:
    """Whether the index, going from ``before`` to ``now`` one by one, goes beyond ``event``."""
    while before != now:
        if before == event:
            return True
        before = (before + 1) & 0xFFFF
    return False


class Driver:
    """A driver of a ring, as plain as it can be: free descriptors in a list, chains written byte by byte."""

    def __init__(self, ring: Ring, index: int = 0) -> None:
        self.ring = ring
        self.free = list(range(ring.size))
        self.chains: dict[int, tuple[list[int], Chain]] = {}
        self.index = self.seen = index & 0xFFFF
        ring.available = ring.used_index = index

    def offer(
        self, readable: list[Range], writable: list[Range], table: int | None = None, direct: int = 0
    ) -> int | None:
        """One chain; with ``table``, all but the first ``direct`` buffers go into an indirect table there."""
        buffers = [(*buffer, 0) for buffer in readable] + [(*buffer, WRITE) for buffer in writable]
        inner = buffers[direct:] if table is not None else []
        outer = buffers[:direct] if table is not None else buffers
        if table is not None:
            last = len(inner) - 1
            rows = [descriptor(a, n, f | NEXT * (i < last), (i + 1) * (i < last)) for i, (a, n, f) in enumerate(inner)]
            self.ring.guest.put(table, b"".join(rows))
            outer.append((table, 16 * len(inner), INDIRECT))
        if not outer or len(outer) > len(self.free):
            return None
        used = [self.free.pop(0) for _ in outer]
        for position, (index, (addr, length, flags)) in enumerate(zip(used, outer, strict=True)):
            more = position + 1 < len(used)
            self.ring.describe(index, addr, length, flags | NEXT * more, used[position + 1] if more else 0)
        regions = self.ring.guest.regions
        pieces = [[piece for part in parts for piece in split(regions, *part)] for parts in (readable, writable)]
        self.chains[used[0]] = (used, Chain(used[0], *pieces))
        self.index = self.ring.offer(self.index, [used[0]])
        return used[0]

    def take(self) -> list[tuple[int, int]]:
        """What the device returned: (head, length). Fails if it was not ours to return."""
        returned = []
        while self.seen != self.ring.used_index:
            head, length = self.ring.used_entry(self.seen)
            used, chain = self.chains.pop(head)
            assert length <= size(chain.writable), "more written than there was room for"
            self.free += used
            self.seen = (self.seen + 1) & 0xFFFF
            returned.append((head, length))
        return returned
