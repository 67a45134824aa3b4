"""Guest memory that a test sees as plain bytes while the code under test maps it, and a split ring written by hand.

What belongs here: bytes. What is right or wrong about them is in ``model``.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import struct
from collections.abc import Iterable, Sequence

from vhostuser.memory import DirtyLog, GuestMemory, Region
from vhostuser.protocol import MemoryRegion, VirtioFeature
from vhostuser.virtqueue import DeviceQueue, InflightRegion, RingSetup

PAGE = 4096
USER = 1 << 46
"""A guest address plus this is its user address, unless a test says otherwise."""

NEXT, WRITE, INDIRECT = 1, 2, 4
EVENT_IDX, INDIRECT_DESC = 1 << VirtioFeature.RING_EVENT_IDX, 1 << VirtioFeature.RING_INDIRECT_DESC
ALL = EVENT_IDX | INDIRECT_DESC


class Guest:
    """Regions of (guest address, bytes), each a memfd of its own; ``sealed``: none can be made smaller."""

    def __init__(self, *regions: tuple[int, int], sealed: bool = False) -> None:
        self.regions = regions
        self.fds = [os.memfd_create("guest", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING) for _ in regions]
        self.views: list[mmap.mmap] = []
        for fd, (_, size) in zip(self.fds, regions, strict=True):
            os.truncate(fd, size)
            self.views.append(mmap.mmap(fd, size))
            if sealed:
                fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
        self.memory = GuestMemory(
            [
                Region.map(fd, MemoryRegion(guest, size, USER + guest, 0))
                for fd, (guest, size) in zip(self.fds, regions, strict=True)
            ]
        )

    def _pieces(self, guest: int, length: int) -> Iterable[tuple[mmap.mmap, int, int]]:
        while length:
            for view, (start, size) in zip(self.views, self.regions, strict=True):
                if start <= guest < start + size:
                    run = min(length, start + size - guest)
                    yield view, guest - start, run
                    guest, length = guest + run, length - run
                    break
            else:
                raise LookupError(hex(guest))

    def put(self, guest: int, data: bytes) -> None:
        done = 0
        for view, offset, run in self._pieces(guest, len(data)):
            view[offset : offset + run] = data[done : done + run]
            done += run

    def get(self, guest: int, length: int) -> bytes:
        return b"".join(view[offset : offset + run] for view, offset, run in self._pieces(guest, length))

    def truncate(self, number: int, size: int) -> None:
        """Cuts a region's file as a hostile front-end would; our own view of it must not be used any more."""
        self.views[number].close()
        os.truncate(self.fds[number], size)

    def close(self) -> None:
        for view in self.views:
            view.close()
        for fd in self.fds:
            os.close(fd)


class Ring:
    """A split ring in the memory of a guest, from guest address ``at``; every field may be set to anything."""

    def __init__(self, guest: Guest, size: int, at: int = 0, features: int = ALL) -> None:
        self.guest, self.size, self.features = guest, size, features
        self.desc = at
        self.avail = at + 16 * size
        self.used = (self.avail + 6 + 2 * size + 3) & ~3
        self.end = self.used + 6 + 8 * size

    def setup(self, **changes: object) -> RingSetup:
        fields: dict[str, object] = {
            "size": self.size,
            "desc": self.desc,
            "avail": self.avail,
            "used": self.used,
            "features": self.features,
            "guest_addresses": True,
        }
        return RingSetup(**(fields | changes))  # type: ignore[arg-type]

    def open(
        self, log: DirtyLog | None = None, inflight: InflightRegion | None = None, **changes: object
    ) -> DeviceQueue:
        return self.setup(**changes).open(self.guest.memory, log=log, inflight=inflight)

    # ---- what a driver writes

    def describe(self, index: int, addr: int, length: int, flags: int = 0, after: int = 0) -> None:
        self.guest.put(self.desc + 16 * index, descriptor(addr, length, flags, after))

    def offer(self, index: int, heads: Sequence[int]) -> int:
        """Puts heads into the available ring from ``index`` on and publishes them; the new index."""
        for position, head in enumerate(heads):
            self.guest.put(self.avail + 4 + 2 * ((index + position) % self.size), struct.pack("<H", head))
        self.available = (index + len(heads)) & 0xFFFF
        return self.available

    @property
    def available(self) -> int:
        return self._get16(self.avail + 2)

    @available.setter
    def available(self, index: int) -> None:
        self.guest.put(self.avail + 2, struct.pack("<H", index & 0xFFFF))

    def avail_flags(self, flags: int) -> None:
        self.guest.put(self.avail, struct.pack("<H", flags))

    def used_event(self, index: int) -> None:
        self.guest.put(self.avail + 4 + 2 * self.size, struct.pack("<H", index & 0xFFFF))

    # ---- what a device writes

    @property
    def used_flags(self) -> int:
        return self._get16(self.used)

    @property
    def used_index(self) -> int:
        return self._get16(self.used + 2)

    @used_index.setter
    def used_index(self, index: int) -> None:
        self.guest.put(self.used + 2, struct.pack("<H", index & 0xFFFF))

    @property
    def avail_event(self) -> int:
        return self._get16(self.used + 4 + 8 * self.size)

    def used_entry(self, index: int) -> tuple[int, int]:
        entry: tuple[int, int] = struct.unpack("<II", self.guest.get(self.used + 4 + 8 * (index % self.size), 8))
        return entry

    def return_chains(self, index: int, chains: Sequence[tuple[int, int]]) -> None:
        """What a device does: entries of (head, length) from ``index`` on, then the index."""
        for position, (head, length) in enumerate(chains):
            at = self.used + 4 + 8 * ((index + position) % self.size)
            self.guest.put(at, struct.pack("<II", head, length))
        self.used_index = index + len(chains)

    def _get16(self, at: int) -> int:
        return int.from_bytes(self.guest.get(at, 2), "little")


def descriptor(addr: int, length: int, flags: int = 0, after: int = 0) -> bytes:
    return struct.pack("<QIHH", addr, length, flags, after)
