"""A packed ring as it lies in guest memory (virtio 1.3, section 2.8).

What belongs here: what the packed format makes of the steps that a queue takes. What does not: the order of those steps
(``queue``).
"""

from __future__ import annotations

from collections.abc import Iterator
from struct import Struct

from tests.conformance.plain.ring import INDIRECT, NEXT, WRITE, Bad, Descriptor, Part, Ring, Store
from vhostuser._native import lib
from vhostuser.memory import GuestMemory

AVAIL, USED = 1 << 7, 1 << 15
ENABLE, DISABLE, DESC = 0, 1, 2

_DESCRIPTOR = Struct("<QIHH")
_USED = Struct("<IH")
_WRAP = 1 << 15


class PackedRing(Ring):
    """Of such a ring ``avail`` is the driver area and ``used`` the device area. Positions go twice around the ring, the
    first time with a wrap counter of 1."""

    ENTRY = 16

    def __init__(self, memory: GuestMemory, size: int, desc: int, avail: int, used: int) -> None:
        super().__init__(memory, size, desc, avail, used)
        self.pending: list[Store] = []
        """Flags of what was put and not shown."""

    @staticmethod
    def parts(size: int) -> tuple[Part, Part, Part]:
        if not 0 < size <= 32768:
            raise Bad(lib.VU_E_SIZE)
        return (16 * size, 16), (4, 4), (4, 4)

    # ---- positions

    @property
    def modulus(self) -> int:
        return 2 * self.size

    def position(self, word: int) -> int:
        """What 16 bits of a base, or of an event suppression structure, say."""
        return word % _WRAP + (0 if word & _WRAP else self.size)

    def word(self, position: int) -> int:
        """The same the other way round."""
        return position % self.size | _WRAP * self.wrap(position)

    def wrap(self, position: int) -> bool:
        return position % self.modulus < self.size

    def bases(self, base: int) -> tuple[int, int]:
        """DPDK gives the lower half alone."""
        taken = self.position(base & 0xFFFF)
        used = self.position(base >> 16) if base >> 16 else taken
        if base % _WRAP >= self.size or (base >> 16) % _WRAP >= self.size:
            raise Bad(lib.VU_E_INDEX)
        return taken, used

    def base(self, taken: int, used: int) -> int:
        return self.word(taken) | self.word(used) << 16

    def started_at(self, used: int) -> int:
        return used

    # ---- chains

    def ahead(self, taken: int, used: int) -> int:
        """Descriptors that are available in a row; every chain has one or more."""
        room = self.size - (taken - used) % self.modulus
        return next((count for count in range(room) if not self.is_available(taken + count)), room)

    def is_available(self, position: int) -> bool:
        return self.descriptor(position).flags & (AVAIL | USED) == self.mark(position)

    def mark(self, position: int) -> int:
        """The flags of a descriptor there that is available."""
        return AVAIL if self.wrap(position) else USED

    def avail_head(self, position: int) -> int:
        """Where the chain begins."""
        return position

    def name(self, head: int) -> tuple[int, int]:
        """The buffer id is that of the last descriptor."""
        chain = list(self.linked(self.desc, self.size, head))
        return chain[-1].after, len(chain)

    def linked(self, table: int, count: int, index: int) -> Iterator[Descriptor]:
        """Descriptors follow each other: those of the ring as long as they say NEXT, those of a table to its end."""
        for offset in range(count):
            descriptor = self.descriptor_at(table, (index + offset) % count)
            if table != self.desc:
                yield descriptor._replace(flags=descriptor.flags & (WRITE | INDIRECT))
                continue
            yield descriptor
            if not descriptor.flags & NEXT:
                return
        if table == self.desc:
            raise Bad(lib.VU_E_LOOP)

    def descriptor(self, index: int) -> Descriptor:
        return super().descriptor(index % self.size)

    def descriptor_at(self, table: int, index: int) -> Descriptor:
        """Its ``after`` is the buffer id."""
        guest, length, _, _ = split = super().descriptor_at(table, index)
        return Descriptor(guest, length, split.after, split.flags)

    # ---- the driver's

    def avail_flags(self) -> int:
        return self._load(self.avail + 2)

    def looks_at_event(self) -> bool:
        return self.avail_flags() == DESC

    def used_event(self) -> int:
        return self.position(self._load(self.avail))

    # ---- ours

    def used_entry_at(self, position: int) -> int:
        return self.desc + 16 * (position % self.size)

    @property
    def avail_event_at(self) -> int:
        return self.used

    def put_used(self, position: int, head: int, length: int) -> None:
        self.memory.write(self.used_entry_at(position) + 8, _USED.pack(length, head))
        self.pending.append((self.used_entry_at(position) + 14, self.used_flags(position, length)))

    def used_flags(self, position: int, length: int) -> int:
        """The flags of a descriptor there that is used; WRITE: something was written."""
        return (AVAIL | USED) * self.wrap(position) | WRITE * (length > 0)

    def show(self, used: int) -> list[int]:
        """Those of the first last: it hides the others."""
        shown = list(reversed(self.pending))
        self.pending.clear()
        for guest, flags in shown:
            self.put(guest, flags)
        return [guest for guest, _ in shown]

    def asking(self, taken: int, *, event_idx: bool) -> list[Store]:
        if event_idx:
            return [(self.avail_event_at, self.word(taken)), (self.used + 2, DESC)]
        return [(self.used + 2, ENABLE)]

    def declining(self, *, event_idx: bool) -> list[Store]:
        return [(self.used + 2, DISABLE)]

    def logged_at(self, guest: int, log: int) -> int:
        """QEMU's log address is that of the device area, for the ring too."""
        return guest
