"""The record of guest memory that a postcopy migration has left with holes.

What belongs here: which memory that is, and when it is over; both outlive a connection, and the process. What does not:
keeping rings from such memory (``regions``).

Nothing here touches guest memory. All methods belong to the control thread.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

log = logging.getLogger("vhostuser")

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


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

    Memory is remembered until one of three things proves that nothing is missing: the front-end says so (``forget``),
    no file has a hole, or somebody who knows has removed the record's file, which is noticed while the process runs. A
    hole that stays proves nothing: the kernel takes back pages of zeros that nobody has written, balloons and
    virtio-mem punch holes.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        """Of the record's file, which is there as long as something is remembered."""
        self._boot = _BOOT_ID.read_text().strip()
        self._files = self._read()
        self._stored = bool(self._files)

    def add(self, fds: Iterable[int]) -> None:
        """Remembers the files behind ``fds``. That the record cannot be written is logged, no more."""
        self._heed_removal()
        self._store(self._files | {self._identify(os.fstat(fd)) for fd in fds})

    def holds(self, fd: int) -> bool:
        """Whether the file behind ``fd`` is remembered and still has holes. Once it is seen whole it is forgotten."""
        self._heed_removal()
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
        """Nothing is missing any more. Removes the file."""
        self._store(frozenset())

    def _heed_removal(self) -> None:
        if self._stored and not self.path.exists():
            log.warning("%s was removed: what it named is taken for whole", self.path)
            self._files = frozenset()
            self._stored = False

    def _identify(self, status: os.stat_result) -> _File:
        return _File(self._boot, status.st_dev, status.st_ino, status.st_size)

    def _read(self) -> frozenset[_File]:
        try:
            rows = json.loads(self.path.read_bytes())
            return frozenset(_File(str(boot), int(device), int(inode), int(size)) for boot, device, inode, size in rows)
        except FileNotFoundError:
            return frozenset()
        except (OSError, ValueError, TypeError, OverflowError, RecursionError) as error:
            log.warning("%s: not a record of guest memory, taken for an empty one: %s", self.path, error)
            return frozenset()

    def _store(self, files: frozenset[_File]) -> None:
        if files == self._files:
            return
        self._files = files
        self._stored = False
        try:
            if files:
                new = self.path.with_name(self.path.name + ".new")
                new.write_text(json.dumps(sorted(files)))
                new.replace(self.path)
                self._stored = True
            else:
                self.path.unlink(missing_ok=True)
        except OSError as error:
            log.error("%s: cannot be written, so a restart in postcopy would lose guest memory: %s", self.path, error)
