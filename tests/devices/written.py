"""Which pages of a mapping were written, as the kernel knows it: write-protected by userfaultfd, asked by PAGEMAP_SCAN.

What belongs here: the two ioctls that nobody but tests needs. What does not: logs.
"""

from __future__ import annotations

import fcntl
import os
import struct
from array import array
from pathlib import Path

import pytest

from vhostuser.uffd import NotPermitted, Userfaultfd

PAGE = 4096
_FEATURES = 1 << 12 | 1 << 13 | 1 << 15  # WP_HUGETLBFS_SHMEM, WP_UNPOPULATED, WP_ASYNC (Linux 6.7)
_REGISTER = 0xC020AA00
_WRITE_PROTECT = 2
_SCAN = 0xC0606610
_CLEAR = 1 | 2  # PM_SCAN_WP_MATCHING, PM_SCAN_CHECK_WPASYNC
_IS_WRITTEN = 2
_MOST = 4096


class Written:
    """Pages of one mapping that were written through it, by anybody in this process and by the kernel for it."""

    def __init__(self, host: int, length: int) -> None:
        """Skips the test where the kernel cannot tell."""
        self._span = (host, length)
        try:
            self._uffd = Userfaultfd.open(features=_FEATURES)
        except (NotPermitted, OSError) as error:
            pytest.skip(f"no userfaultfd that tells what was written (Linux 6.7): {error}")
        fcntl.ioctl(self._uffd.fileno(), _REGISTER, struct.pack("=QQQQ", host, length, _WRITE_PROTECT, 0))
        self._pagemap = os.open("/proc/self/pagemap", os.O_RDONLY)
        self.take()

    def take(self) -> set[int]:
        """Numbers of the pages that were written since last asked, counted from the start of the mapping."""
        host, length = self._span
        found: set[int] = set()
        at = host
        while at < host + length:
            regions = array("Q", bytes(24 * _MOST))
            place, _ = regions.buffer_info()
            asked = (96, _CLEAR, at, host + length, 0, place, _MOST, 0, 0, _IS_WRITTEN, 0, _IS_WRITTEN)
            scanned = bytearray(struct.pack("=12Q", *asked))
            count = fcntl.ioctl(self._pagemap, _SCAN, scanned)
            for start, end in zip(regions[: 3 * count : 3], regions[1 : 3 * count : 3], strict=True):
                found |= set(range((start - host) // PAGE, (end - host) // PAGE))
            at = struct.unpack("=12Q", scanned)[4]
        return found

    def close(self) -> None:
        os.close(self._pagemap)
        self._uffd.close()


def other_mapping(fd: int, host: int) -> int:
    """Where this process has the file mapped a second time, beside the mapping at ``host``."""
    inode = os.fstat(fd).st_ino
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    starts = {int(line[0].split("-")[0], 16) for line in lines if line[4] == str(inode)}
    (other,) = starts - {host}
    return other
