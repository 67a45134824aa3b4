"""The back-end's half of postcopy, for one connection, and the record of memory that has holes.

What belongs here: the effects of the handshake on descriptors and mappings, in the order that keeps pages from being
filled with zeros. What does not: which message is allowed when (``protocol.postcopy``), and bringing pages: the
front-end does.

Nothing here touches guest memory. All methods belong to the control thread.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from vhostuser.memory import GuestMemory, MemoryLost, Region
from vhostuser.protocol import RequestRefused
from vhostuser.uffd import NotPermitted, TouchPool, Userfaultfd

log = logging.getLogger("vhostuser")

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class Postcopy:
    """Owns the userfaultfd that is shared with the front-end, from ADVISE until END or until the front-end is lost.

    A fault in a registered region goes to the front-end, which reads it from its duplicate of the descriptor, brings
    the page and wakes us. ``pool``: the touch threads of the process. ``device_fd``: as in ``Userfaultfd.open``.
    ``record``: what END clears; the connection adds to it.
    """

    def __init__(self, pool: TouchPool, *, device_fd: int = -1, record: MemoryRecord | None = None) -> None:
        self._pool = pool
        self._device_fd = device_fd
        self._record = record
        self._uffd: Userfaultfd | None = None
        self._listening = False

    @property
    def active(self) -> bool:
        """Whether pages of guest memory may be missing: from LISTEN until END, or until ``revoke``."""
        return self._listening

    def touch_pool(self) -> TouchPool:
        """For the queues that are opened while ``active``."""
        return self._pool

    def advise(self) -> int:
        """The descriptor to send, which stays ours; the same one when asked again. Raises RequestRefused."""
        if self._uffd is None:
            try:
                self._uffd = Userfaultfd.open(self._device_fd)
            except NotPermitted as error:
                raise RequestRefused(str(error)) from None
        return self._uffd.fileno()

    def listen(self) -> None:
        """From here memory has holes. Again: nothing. Raises RequestRefused without ``advise``."""
        self._shared()
        self._listening = True

    def register(self, regions: Iterable[Region]) -> None:
        """Makes regions usable that were mapped out of reach: the front-end now knows where they are.

        Raises RequestRefused if the kernel will not watch a region, which then stays out of reach.
        """
        uffd = self._shared()
        for region in regions:
            try:
                region.no_huge()
                uffd.register(region.base, region.length)
            except OSError as error:
                raise RequestRefused(
                    f"{region}: userfaultfd cannot watch it ({error.strerror}): share a memfd, tmpfs or hugetlbfs file"
                ) from None
            with suppress(MemoryLost):  # released before the front-end acknowledged it
                region.reveal()

    def release(self, region: Region) -> None:
        """Before the front-end is told that it may forget ``region``: whoever waits in it gets an error.

        The front-end needs the region's base to wake anybody, so afterwards nobody would.
        """
        region.revoke()
        self._shared().unregister(region.base, region.length)

    def end(self, memory: GuestMemory) -> None:
        """Every page has arrived. What was never sent is a hole for good and reads as zeros. Again: nothing.

        Call it before anything that waits for requests under way: nobody answers a fault any more, and one of the last
        pages may have come between a thread's look at it and its falling asleep. This wakes that thread.
        """
        self._part(memory)
        if self._record is not None:
            self._record.forget()

    def revoke(self, memory: GuestMemory) -> None:
        """The front-end is lost: where pages may be missing nobody touches ``memory`` again; who waits gets an error.

        Closing the userfaultfd first would have the kernel place zero pages, for the whole guest and for good. The
        record stays: the next front-end may bring the same memory. Takes 10 ms per GiB of mapped pages; raises
        OSError if the kernel refuses, and then leaves the userfaultfd open, since waiting is better than zeros.
        Again: nothing.
        """
        if self._listening:
            memory.revoke()
        self._part(memory)

    def _shared(self) -> Userfaultfd:
        if self._uffd is None:
            raise RequestRefused("the front-end has no userfaultfd of ours: POSTCOPY_ADVISE comes first")
        return self._uffd

    def _part(self, memory: GuestMemory) -> None:
        """Unregisters and closes. The front-end may hold its duplicate for ever, so closing ours would wake nobody."""
        if self._uffd is None:
            return
        if self._listening:
            for region in memory.regions:
                self._uffd.unregister(region.base, region.length)
        self._listening = False
        self._uffd.close()
        self._uffd = None


class _File(NamedTuple):
    """A file of guest memory. Inode numbers are used again, and start anew at boot, so they are not all."""

    boot: str
    device: int
    inode: int
    size: int


class MemoryRecord:
    """Remembers, in a small file, which guest memory a postcopy migration has left with holes.

    A front-end that loses its back-end in postcopy sends the new one an ordinary memory table and no word of the
    missing pages. Whoever touches one then fills it with zeros before the front-end can place it, and the migration
    dies. A process that is restarted reads the file; content that is none of ours counts as an empty record.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._boot = _BOOT_ID.read_text().strip()
        self._files = self._read()

    def add(self, fds: Iterable[int]) -> None:
        """Remembers the files behind ``fds``. That the record cannot be written is logged, no more."""
        self._store(self._files | {self._identify(os.fstat(fd)) for fd in fds})

    def holds(self, fd: int) -> bool:
        """Whether the file behind ``fd`` is remembered and still has holes. Once it is seen whole it is forgotten."""
        status = os.fstat(fd)
        file = self._identify(status)
        if file not in self._files:
            return False
        # st_blocks and not SEEK_HOLE, which sees no holes on hugetlbfs, and moves an offset that the front-end shares.
        if status.st_blocks * 512 < status.st_size:
            return True
        self._store(self._files - {file})
        return False

    def forget(self) -> None:
        """Removes the file; the memory is whole."""
        self._store(frozenset())

    def _identify(self, status: os.stat_result) -> _File:
        return _File(self._boot, status.st_dev, status.st_ino, status.st_size)

    def _read(self) -> frozenset[_File]:
        try:
            rows = json.loads(self._path.read_bytes())
            return frozenset(_File(str(boot), int(device), int(inode), int(size)) for boot, device, inode, size in rows)
        except FileNotFoundError:
            return frozenset()
        except (OSError, ValueError, TypeError, OverflowError, RecursionError) as error:
            log.warning("%s: not a record of guest memory, taken for an empty one: %s", self._path, error)
            return frozenset()

    def _store(self, files: frozenset[_File]) -> None:
        if files == self._files:
            return
        self._files = files
        try:
            if files:
                new = self._path.with_name(self._path.name + ".new")
                new.write_text(json.dumps(sorted(files)))
                new.replace(self._path)
            else:
                self._path.unlink(missing_ok=True)
        except OSError as error:
            log.error("%s: cannot be written, so a restart in postcopy would lose guest memory: %s", self._path, error)
