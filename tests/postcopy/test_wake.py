"""Waking by guest addresses: which threads look again, and how much is said to have been issued."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.postcopy.test_postcopy import PAGES, USER, File, Reading, listen, wait_for_faults
from vhostuser.memory import GuestMemory, Region
from vhostuser.postcopy import Postcopy
from vhostuser.protocol import MemoryRegion, WakeRange
from vhostuser.uffd import TouchPool

END = 1 << 64
FAR = 1 << 40
"""Where a second region lies, with a hole before it."""

Readable = Callable[[int], bool]


@pytest.fixture
def half(pool: TouchPool) -> Iterator[Postcopy]:
    made = Postcopy(pool)
    yield made
    made.revoke(GuestMemory())


@pytest.fixture
def file(page_size: int) -> Iterator[File]:
    huge = os.MFD_HUGETLB | os.MFD_HUGE_2MB if page_size > 4096 else 0
    fd = os.memfd_create("guest", os.MFD_CLOEXEC | huge)
    os.ftruncate(fd, 2 * PAGES * page_size)
    yield File(fd, page_size)
    os.close(fd)


class Waiters:
    """Two regions with a thread in one page of each; the pages are there by now, but nobody has been woken."""

    PAGE = 2

    def __init__(self, half: Postcopy, file: File, background: Any, readable: Readable) -> None:
        self.half = half
        self.page_size = file.page_size
        self.size = PAGES * self.page_size
        places = [MemoryRegion(guest, self.size, USER + guest, offset) for guest, offset in ((0, 0), (FAR, self.size))]
        self.regions = [Region.map(file.fd, place, hidden=True) for place in places]
        self.memory = listen(half, *self.regions)
        reading = Reading(background)
        at = self.PAGE * self.page_size
        self.threads = [reading(self.memory, guest) for guest in (at, FAR + at)]
        wait_for_faults(half, 2, readable)
        for region in self.regions:
            self._place(region)

    def _place(self, region: Region) -> None:
        assert self.half._uffd is not None
        self.half._uffd.copy(region.base + self.PAGE * self.page_size, b"\5" * self.page_size, wake=False)

    def wake(self, *ranges: tuple[int, int]) -> int:
        return self.half.wake(self.memory, [WakeRange(*one) for one in ranges])

    def asleep(self) -> list[int]:
        """The numbers of the regions whose thread sleeps."""
        return [number for number, thread in enumerate(self.threads) if not thread.done]


@pytest.fixture
def waiters(half: Postcopy, file: File, background: Any, readable: Readable) -> Iterator[Waiters]:
    made = Waiters(half, file, background, readable)
    assert made.asleep() == [0, 1], "placing alone wakes nobody"
    yield made
    made.wake((0, END - 1))
    assert [thread.result() for thread in made.threads] == [b"\5", b"\5"]
    half.end(made.memory)


def test_one_page(waiters: Waiters) -> None:
    size = waiters.page_size
    assert waiters.wake((2 * size, size)) == size
    assert waiters.threads[0].result() == b"\5"
    assert waiters.asleep() == [1]
    assert waiters.wake((FAR + 2 * size, size)) == size
    assert waiters.threads[1].result() == b"\5"


def test_other_pages_leave_it_asleep(waiters: Waiters) -> None:
    size = waiters.page_size
    assert waiters.wake((0, 2 * size), (3 * size, size), (FAR + 3 * size, 5 * size)) == 8 * size
    assert waiters.asleep() == [0, 1]


def test_a_range_over_several_regions_and_the_hole_between_them(waiters: Waiters) -> None:
    size = waiters.page_size
    assert waiters.wake((size, FAR)) == waiters.size
    assert waiters.threads[0].result() == b"\5"
    assert waiters.wake((size, FAR + size + 1)) == waiters.size - size + 2 * size + 1
    assert waiters.threads[1].result() == b"\5"


def test_a_range_within_a_page_wakes_the_page(waiters: Waiters) -> None:
    """Who places 4 KiB of a huge page at a time names ranges that the kernel would take for another page."""
    size = waiters.page_size
    assert waiters.wake((3 * size - 1, 1), (FAR + 2 * size + 17, 0), (FAR + 2 * size + 17, 3)) == 4
    assert [thread.result() for thread in waiters.threads] == [b"\5", b"\5"]


def test_nothing_is_issued_where_nothing_is_mapped(waiters: Waiters) -> None:
    assert waiters.wake() == 0
    assert waiters.wake((0, 0), (2 * waiters.page_size, 0), (END - 1, 1), (END - 1, 0)) == 0
    assert waiters.wake((waiters.size, FAR - waiters.size), (FAR + waiters.size, END - FAR - waiters.size)) == 0
    assert waiters.asleep() == [0, 1]


def test_each_range_counts_for_itself(waiters: Waiters) -> None:
    assert waiters.wake((0, END)) == 2 * waiters.size
    assert waiters.wake((0, 100), (0, 100), (50, 100)) == 300


def test_a_region_that_is_not_registered_yet_counts_and_has_no_waiters(half: Postcopy, file: File) -> None:
    region = file.map()
    half.advise()
    half.listen()
    memory = GuestMemory([region])
    assert half.wake(memory, [WakeRange(0, region.size)]) == region.size
    half.end(memory)
