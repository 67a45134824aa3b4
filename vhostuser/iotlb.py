"""The device IOTLB: what I/O virtual addresses mean where a guest's IOMMU stands before its devices.

What belongs here: the typed face of the native table. What does not: messages (``iommu_requests``), rings
(``virtqueue``).

Control thread only, which never waits here: rings look translations up in C. Section "IOMMU support".
"""

from __future__ import annotations

from typing import NamedTuple

from vhostuser._native import ffi, lib
from vhostuser.memory import GuestMemory, explain
from vhostuser.protocol import RequestRefused

_BATCH = 64


class Question(NamedTuple):
    """A translation that a ring has asked for. access: 1 read, 2 write, 3 both. denied: it came, and does not permit
    that; the ring is broken."""

    iova: int
    access: int
    ring: int
    denied: bool


class DeviceIotlb:
    """Translations of one connection, for ``rings`` rings. Raises OSError where no descriptor is left."""

    def __init__(self, rings: int) -> None:
        error = ffi.new("int *")
        native = lib.vu_iotlb_new(rings, error)
        if native == ffi.NULL:
            raise OSError(ffi.errno, f"no device IOTLB: {explain(error[0])}")
        self.native = ffi.gc(native, lib.vu_iotlb_put)
        self.fd: int = lib.vu_iotlb_fd(native)
        """Readable when ``take`` has something."""

    def __len__(self) -> int:
        """Translations; those that are neighbours on both sides count as one."""
        return int(lib.vu_iotlb_count(self.native))

    def look(self, iova: int) -> tuple[int, int] | None:
        """The front-end's address and the access that is permitted; None where nothing is known. Asks nobody."""
        user = ffi.new("uint64_t *")
        access: int = lib.vu_iotlb_look(self.native, iova, user)
        return (int(user[0]), access) if access else None

    def take(self) -> list[Question]:
        """What was asked and not taken before."""
        raw = ffi.new("struct vu_iotlb_question[]", _BATCH)
        taken: list[Question] = []
        while count := lib.vu_iotlb_take(self.native, raw, _BATCH):
            taken += [Question(each.iova, each.access, each.ring, bool(each.denied)) for each in raw[0:count]]
        return taken

    def update(self, memory: GuestMemory, iova: int, size: int, user: int, access: int) -> None:
        """``size`` bytes from ``iova`` on are the front-end's memory from ``user`` on. Wakes rings that waited for it.

        What is there already must say the same, and gains the access. Raises RequestRefused.
        """
        self._check(lib.vu_iotlb_update(self.native, memory.native, iova, size, user, access), iova, size)

    def invalidate(self, iova: int, size: int) -> None:
        """Forgets a part; 0 bytes from 0 are everything. What rings have in use they go on using: ask ``Ring.uses``,
        and halt those. Raises RequestRefused."""
        self._check(lib.vu_iotlb_invalidate(self.native, iova, size), iova, size)

    def clear(self) -> None:
        """Forgets everything, questions too. Only while no ring runs."""
        lib.vu_iotlb_clear(self.native)

    def close(self) -> None:
        """Lets go of it; queues that are open keep their own reference. Nothing else may be called any more."""
        ffi.release(self.native)

    def _check(self, code: int, iova: int, size: int) -> None:
        if code:
            raise RequestRefused(f"translation of {size:#x} bytes at I/O virtual address {iova:#x}: {explain(code)}")
