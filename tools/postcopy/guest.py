"""Guest memory of a run: whole as at the source, then emptied as at the destination; its files are read past faults.

What belongs here: the files and what is in them. What does not: what must be in them (``truth``), bringing pages
(``pages``).
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Self

from vhostuser.frontend import SharedMemory
from vhostuser.protocol import RequestRefused
from vhostuser.tools.postcopy.plan import Area, Plan

HUGE = 2 << 20
_FREE = Path("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages")
_TOTAL = "/proc/sys/vm/nr_hugepages"


class GuestError(Exception):
    """The machine has no such memory: one line, and the cure."""


class Guest:
    """Owns guest memory. one_file: all regions lie in one file, behind each other, and not each in its own.

    Raises GuestError.
    """

    def __init__(self, plan: Plan, *, one_file: bool = False) -> None:
        self._plan = plan
        if plan.page_size == HUGE:
            _require_huge_pages(plan.size // HUGE)
        try:
            self.memory = _in_one_file(plan) if one_file else _in_files(plan)
        except (OSError, RequestRefused) as error:
            raise GuestError(f"{plan.size >> 20} MiB of guest memory: {error}") from None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.memory.close()

    def read(self, area: Area) -> bytes:
        """What the file holds; never waits. A missing page reads as zeros, and is not filled by it."""
        number, offset = self._plan.locate(area.guest)
        shared = self.memory.regions[number]
        return os.pread(shared.fd, area.size, shared.region.offset + offset)

    def write(self, guest: int, data: bytes) -> None:
        """As a CPU does: where the page is missing it waits for it. Never on the control thread."""
        self.memory.write(guest, data)

    def empty(self) -> None:
        """Makes every page missing."""
        for fd, status in self._files():
            os.truncate(fd, 0)
            os.truncate(fd, status.st_size)

    @property
    def present(self) -> int:
        """Pages in the files, whoever put them there."""
        return sum(status.st_blocks for _, status in self._files()) * 512 // self._plan.page_size

    def _files(self) -> Iterable[tuple[int, os.stat_result]]:
        """A descriptor and the state of each."""
        found = [(fd, os.fstat(fd)) for fd in self.memory.fds]
        return {status.st_ino: (fd, status) for fd, status in found}.values()


def _in_files(plan: Plan) -> SharedMemory:
    return SharedMemory(*((region.guest, region.size) for region in plan.regions), hugetlb=plan.page_size == HUGE)


def _in_one_file(plan: Plan) -> SharedMemory:
    memory = SharedMemory()
    fd = os.memfd_create("guest", os.MFD_CLOEXEC | (os.MFD_HUGETLB if plan.page_size == HUGE else 0))
    try:
        os.truncate(fd, plan.size)
        offset = 0
        for region in plan.regions:
            memory.add(region.guest, region.size, offset=offset, file=fd)
            offset += region.size
    except BaseException:
        memory.close()
        raise
    finally:
        os.close(fd)
    return memory


def _require_huge_pages(wanted: int) -> None:
    try:
        free = int(_FREE.read_text())
    except OSError:
        raise GuestError("--page-size=2M: this kernel has no huge pages of 2 MiB") from None
    if free < wanted:
        raise GuestError(
            f"--page-size=2M: {wanted} free huge pages of 2 MiB are needed, there are {free}: "
            f"as root, write a number that is {wanted - free} larger to {_TOTAL}, or give less --memory"
        )
