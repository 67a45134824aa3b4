"""A split ring as it lies in guest memory (virtio 1.3, section 2.7): where each field is, and reading and writing it.

What belongs here: addresses and fields. What does not: what they mean (``queue``).
"""

from __future__ import annotations

from struct import Struct
from typing import NamedTuple

from vhostuser._native import lib
from vhostuser.memory import GuestMemory

NEXT, WRITE, INDIRECT = 1, 2, 4
NO_INTERRUPT = NO_NOTIFY = 1

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
    """Fields of a ring of ``size`` entries at these guest addresses. Positions are taken modulo the size."""

    def __init__(self, memory: GuestMemory, size: int, desc: int, avail: int, used: int) -> None:
        self.memory = memory
        self.size = size
        self.desc = desc
        self.avail = avail
        self.used = used

    # ---- the driver's

    def descriptor(self, index: int) -> Descriptor:
        return self.descriptor_at(self.desc, index)

    def descriptor_at(self, table: int, index: int) -> Descriptor:
        raw = b"".join(self.memory.read(*piece) for piece in pieces(self.memory, table + 16 * index, 16))
        return Descriptor(*_DESCRIPTOR.unpack(raw))

    def avail_flags(self) -> int:
        return self._load(self.avail)

    def avail_index(self) -> int:
        return self._load(self.avail + 2)

    def avail_head(self, position: int) -> int:
        return self._load(self.avail + 4 + 2 * (position % self.size))

    def used_event(self) -> int:
        return self._load(self.avail + 4 + 2 * self.size)

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

    def _load(self, guest: int) -> int:
        return int.from_bytes(self.memory.read(guest, 2), "little")
