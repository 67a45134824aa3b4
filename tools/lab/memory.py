"""The file behind a machine's memory, as it can be seen and held from outside: which pages it has, and that they stay.

What is in those pages is the guest's affair.
"""

from __future__ import annotations

import contextlib
import hashlib
import mmap
import os
from pathlib import Path

#: Linux 5.14; the mmap module of Python 3.11 does not have it.
MADV_POPULATE_WRITE = 23


class GuestMemory:
    """The memfd of a QEMU, open, which outlives the process as long as this is not closed: a context manager."""

    def __init__(self, pid: int) -> None:
        (path,) = [link for link in Path(f"/proc/{pid}/fd").iterdir() if _is_memory(link)]
        self._file = path.open("r+b", buffering=0)

    def __enter__(self) -> GuestMemory:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def pages(self) -> set[int]:
        """The offsets at which it has pages; the rest is holes."""
        fd = self._file.fileno()
        found: set[int] = set()
        end = 0
        with contextlib.suppress(OSError):  # ENXIO: only a hole follows
            while True:
                start = os.lseek(fd, end, os.SEEK_DATA)
                end = os.lseek(fd, start, os.SEEK_HOLE)
                found.update(range(start, end, mmap.PAGESIZE))
        return found

    def md5(self) -> str:
        """The checksum of its content; a read makes no pages where there are none."""
        self._file.seek(0)
        return hashlib.file_digest(self._file, "md5").hexdigest()

    def hold(self) -> None:
        """Fill its holes with zeros and have the kernel take no page back that it has now; no byte changes.

        A page of a memfd that has only been read is clean, and reclaim drops it although there is no swap. Here each
        page is written to, with nothing. Pages of hugetlbfs are never reclaimed: not for those.
        """
        with mmap.mmap(self._file.fileno(), os.fstat(self._file.fileno()).st_size) as mapping:
            mapping.madvise(MADV_POPULATE_WRITE)


def _is_memory(descriptor: Path) -> bool:
    try:
        return descriptor.readlink().name.startswith("memfd:memory-backend-memfd")
    except FileNotFoundError:  # closed since it was listed
        return False
