"""A split ring as it lies in guest memory (virtio 1.3, section 2.7): where each field is, and reading and writing it.

What belongs here: addresses, fields, and what the split format makes of the steps that a queue takes. What does not:
the order of those steps (``queue``), the other format (``packed``).
"""

from __future__ import annotations

from collections.abc import Iterator
from struct import Struct
from typing import NamedTuple

from vhostuser._native import lib
from vhostuser.memory import GuestMemory

NEXT, WRITE, INDIRECT = 1, 2, 4
NO_INTERRUPT = NO_NOTIFY = 1

Part = tuple[int, int]
"""Bytes and alignment of a part of a ring."""
Store = tuple[int, int]
"""A guest address, and 16 bits for it."""

_DESCRIPTOR = Struct("<QIHH")
_USED = Struct("<II")


class Bad(Exception):
    """The ring, or what it holds, is not as the specification wants it; the code is one of ``api.h``."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


class Descriptor(NamedTuple):
    """One entry of a table; ``after`` is its ``next``."""

    guest: int
    length: int
    flags: int
    after: int


def pieces(memory: GuestMemory, guest: int, length: int) -> list[tuple[int, int]]:
    """A range of guest addresses, cut where regions end. Raises Bad where nothing is mapped."""
    found = []
    while length:
        for region in memory.regions:
            if region.guest <= guest < region.guest + region.size:
                run = min(length, region.guest + region.size - guest)
                break
        else:
            raise Bad(lib.VU_E_RANGE)
        found.append((guest, run))
        guest, length = guest + run, length - run
    return found


class Ring:
    """Fields of a split ring of ``size`` entries at these guest addresses. Positions are taken modulo the size."""

    MODULUS = 65536
    ENTRY = 8
    """Bytes in which a chain is returned."""

    def __init__(self, memory: GuestMemory, size: int, desc: int, avail: int, used: int) -> None:
        self.memory = memory
        self.size = size
        self.desc = desc
        self.avail = avail
        self.used = used

    @staticmethod
    def parts(size: int) -> tuple[Part, Part, Part]:
        """Of a ring of so many entries. Raises Bad where there is none."""
        if not 0 < size <= 32768 or size & (size - 1):
            raise Bad(lib.VU_E_SIZE)
        return (16 * size, 16), (6 + 2 * size, 2), (6 + 8 * size, 4)

    # ---- positions

    @property
    def modulus(self) -> int:
        """How many positions there are before they repeat."""
        return self.MODULUS

    def bases(self, base: int) -> tuple[int, int]:
        """Where chains are taken and given back first; the used index is read when the ring starts."""
        return base, 0

    def base(self, taken: int, used: int) -> int:
        """For GET_VRING_BASE."""
        return taken

    def started_at(self, used: int) -> int:
        """Where chains are given back: the used index is the ring's, not ours, since a guest that boots again begins
        at 0."""
        return self.used_index()

    # ---- chains

    def ahead(self, taken: int, used: int) -> int:
        """How many chains wait to be taken, at least. Raises Bad."""
        ahead = (self.avail_index() - taken) % 65536
        if ahead > self.size:
            raise Bad(lib.VU_E_INDEX)
        return ahead

    def name(self, head: int) -> tuple[int, int]:
        """How the driver knows the chain that begins there, and how many positions it takes."""
        return head, 1

    def linked(self, table: int, count: int, index: int) -> Iterator[Descriptor]:
        """The descriptors of one table from ``index`` on. One that has no end comes around."""
        for _ in range(count):
            if index >= count:
                raise Bad(lib.VU_E_HEAD)
            descriptor = self.descriptor_at(table, index)
            yield descriptor
            if not descriptor.flags & NEXT:
                return
            index = descriptor.after
        raise Bad(lib.VU_E_LOOP)

    def descriptor(self, index: int) -> Descriptor:
        return self.descriptor_at(self.desc, index)

    def descriptor_at(self, table: int, index: int) -> Descriptor:
        raw = b"".join(self.memory.read(*piece) for piece in pieces(self.memory, table + 16 * index, 16))
        return Descriptor(*_DESCRIPTOR.unpack(raw))

    # ---- the driver's

    def avail_flags(self) -> int:
        return self._load(self.avail)

    def avail_index(self) -> int:
        return self._load(self.avail + 2)

    def avail_head(self, position: int) -> int:
        return self._load(self.avail + 4 + 2 * (position % self.size))

    def used_event(self) -> int:
        return self._load(self.avail + 4 + 2 * self.size)

    def looks_at_event(self) -> bool:
        """Does the driver say when to call it?"""
        return True

    # ---- ours

    def used_index(self) -> int:
        return self._load(self.used + 2)

    def used_entry_at(self, position: int) -> int:
        """The guest address of a used entry."""
        return self.used + 4 + 8 * (position % self.size)

    @property
    def avail_event_at(self) -> int:
        return self.used + 4 + 8 * self.size

    def put(self, guest: int, value: int) -> None:
        """Stores 16 bits."""
        self.memory.write(guest, value.to_bytes(2, "little"))

    def put_used(self, position: int, head: int, length: int) -> None:
        self.memory.write(self.used_entry_at(position), _USED.pack(head, length))

    def show(self, used: int) -> list[int]:
        """Lets the driver have what was put up to there; where that was written."""
        self.put(self.used + 2, used)
        return [self.used + 2]

    def asking(self, taken: int, *, event_idx: bool) -> list[Store]:
        """What asks for a kick with the next chain."""
        return [(self.avail_event_at, taken)] if event_idx else [(self.used, 0)]

    def declining(self, *, event_idx: bool) -> list[Store]:
        """What asks for no kicks."""
        return [] if event_idx else [(self.used, NO_NOTIFY)]

    def logged_at(self, guest: int, log: int) -> int:
        """Where in the log a write to the ring is marked. log: as SET_VRING_ADDR has it."""
        return log + guest - self.used

    def _load(self, guest: int) -> int:
        return int.from_bytes(self.memory.read(guest, 2), "little")
