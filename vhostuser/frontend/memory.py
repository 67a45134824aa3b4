"""Guest memory of a front-end, which shares it with any number of back-ends, and the dirty log.

What belongs here: the files, who closes them, regions that come and go. What does not: telling a back-end about them
(``frontend``), placing missing pages in postcopy (``faultserver``), what lies in the memory (``driverqueue``).

Making, adding and removing never touch guest memory; ``read`` and ``write`` do, and may block where pages are missing.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import Self

from vhostuser.memory import DirtyLog, GuestMemory, Region
from vhostuser.protocol import Log, MemoryRegion, MemoryTable

_LOG_PAGE = 4096


class SharedRegion:
    """One region: its file, which this owns, and our own mapping of it, whose user addresses are ours, as with QEMU.

    ``region.base``, ``length`` and ``page_size`` are what a userfaultfd of ours would watch.
    """

    def __init__(self, fd: int, guest: int, size: int, offset: int = 0) -> None:
        """Takes ``fd`` over, if nothing is raised. Raises RequestRefused when it cannot be mapped."""
        self.region = Region.map(fd, MemoryRegion(guest, size, 0, offset), own=True)
        self.fd = fd

    def describe(self) -> MemoryRegion:
        """What a message says of it."""
        region = self.region
        return MemoryRegion(region.guest, region.size, region.host, region.offset)

    def close(self) -> None:
        """Closes the file; the mapping goes with its last reference. Again: nothing."""
        if self.fd >= 0:
            os.close(self.fd)
        self.fd = -1

    def __repr__(self) -> str:
        return f"<SharedRegion of {self.region!r}>"


class SharedMemory:
    """Guest memory of a front-end. Owns the files of its regions; nothing of it is placed or touched by making it.

    regions: (guest address, bytes) of each; for more say in how, use ``add``. hugetlb: back them with 2 MiB pages.
    sealed: seal the files against shrinking, so that a back-end may use them without a copy. directory: make the files
    there, without a name, and not as memfds: a mount of tmpfs or hugetlbfs.

    ``map`` is our own view. It is replaced when regions come and go: who has the old one keeps what was mapped.
    """

    def __init__(
        self,
        *regions: tuple[int, int],
        hugetlb: bool = False,
        sealed: bool = False,
        directory: Path | None = None,
    ) -> None:
        self.regions: tuple[SharedRegion, ...] = ()
        self.map = GuestMemory()
        self._hugetlb = hugetlb
        self._sealed = sealed
        self._directory = directory
        try:
            for guest, size in regions:
                self.add(guest, size)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---- regions come and go; back-ends are told by the caller

    def add(self, guest: int, size: int, *, offset: int = 0, file: int | None = None) -> SharedRegion:
        """One more region of ``size`` bytes at guest address ``guest``, which begins at ``offset`` of its file.

        file: a descriptor of the file to use, which stays the caller's; None: a new one that reaches to the end of the
        region. Raises RequestRefused if the region overlaps another, or lies outside of its file, OSError.
        """
        fd = self._new_file(guest, offset + size) if file is None else os.dup(file)
        try:
            added = SharedRegion(fd, guest, size, offset)
            self.map = self.map.add(added.region)
        except BaseException:
            os.close(fd)
            raise
        self.regions += (added,)
        return added

    def remove(self, region: SharedRegion) -> None:
        """Takes a region out and closes its file. Raises ValueError if it is none of these."""
        if region not in self.regions:
            raise ValueError(f"{region} is not of this memory")
        self.map = self.map.remove(region.region)
        self.regions = tuple(kept for kept in self.regions if kept is not region)
        region.close()

    def _new_file(self, guest: int, size: int) -> int:
        if self._directory is not None:
            fd = os.open(self._directory, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
        else:
            flags = self._hugetlb * os.MFD_HUGETLB | self._sealed * os.MFD_ALLOW_SEALING
            fd = os.memfd_create(f"guest {guest:#x}", os.MFD_CLOEXEC | flags)
        try:
            os.truncate(fd, size)
            if self._sealed:
                fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
        except OSError:
            os.close(fd)
            raise
        return fd

    # ---- what messages say

    @property
    def fds(self) -> tuple[int, ...]:
        """The regions' files, in order; they stay ours."""
        return tuple(region.fd for region in self.regions)

    def table(self) -> MemoryTable:
        """What SET_MEM_TABLE says of it."""
        return MemoryTable(tuple(region.describe() for region in self.regions))

    @property
    def end(self) -> int:
        """The guest address behind the last byte."""
        return max((region.region.guest + region.region.size for region in self.regions), default=0)

    # ---- content; touches guest memory

    def read(self, guest: int, length: int) -> bytes:
        """Copies out. Raises LookupError outside of memory, MemoryLost if it is gone."""
        return self.map.read(guest, length)

    def write(self, guest: int, data: bytes | bytearray | memoryview) -> None:
        """Copies in. Raises as ``read``."""
        self.map.write(guest, data)

    def close(self) -> None:
        """Closes the files and lets go of the mappings, which go with their last reference. Again: nothing."""
        for region in self.regions:
            region.close()
        self.regions = ()
        self.map = GuestMemory()


class SharedLog:
    """A dirty log for guest addresses below ``end``: a bit for each 4096 bytes. Owns its file. Section "Migration"."""

    def __init__(self, end: int) -> None:
        # Whole words, since that is how back-ends mark it.
        words = -(-end // (_LOG_PAGE * 64))
        self.size = max(words, 1) * 8
        self.fd = os.memfd_create("dirty log", os.MFD_CLOEXEC)
        try:
            os.truncate(self.fd, self.size)
            self.log = DirtyLog.map(self.fd, self.size)
        except BaseException:
            os.close(self.fd)
            raise

    def take(self) -> list[tuple[int, int]]:
        """Reads and clears the log: the (guest address, bytes) of each run of pages that was written, lowest first.

        What a back-end marks meanwhile is found now or the next time. Raises MemoryLost if the log was truncated.
        """
        return self.log.take()

    def describe(self) -> Log:
        """What SET_LOG_BASE says of it."""
        return Log(self.size, 0)

    def close(self) -> None:
        """Closes the file; the mapping goes with its last reference. Again: nothing."""
        if self.fd >= 0:
            os.close(self.fd)
        self.fd = -1
