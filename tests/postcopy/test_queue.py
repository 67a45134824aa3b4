"""``DeviceQueue`` while pages are missing: what pop waits for, what it does not, and which requests go first."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from vhostuser._native import lib
from vhostuser.driverqueue import DriverQueue
from vhostuser.memory import GuestMemory, MemoryLost, Region
from vhostuser.protocol import MemoryRegion, QueueBroken, RequestRefused
from vhostuser.uffd import TouchPool, Userfaultfd
from vhostuser.virtqueue import DeviceQueue, RingSetup

PAGE = 4096
RING, TABLES, DATA = 0, 8, 32
"""Page numbers: the ring is there from the start, the others are missing."""
EVERY = 1 << 28 | 1 << 29


class World:
    """A driver that sees all of guest memory, and a device for which most of it is missing."""

    def __init__(self, pool: TouchPool) -> None:
        self.fd = os.memfd_create("guest", os.MFD_CLOEXEC)
        os.truncate(self.fd, 64 * PAGE)
        mapped = Region.map(self.fd, MemoryRegion(0, 64 * PAGE, 0, 0))
        self.driver = DriverQueue(GuestMemory([mapped]), RING, 8, event_idx=True)
        self.region = Region.map(self.fd, MemoryRegion(0, 64 * PAGE, 0, 0), hidden=True)
        self.region.no_huge()
        self.uffd = Userfaultfd.open()
        self.uffd.register(self.region.base, self.region.length)
        self.region.reveal()
        self.memory = GuestMemory([self.region])
        driver = self.driver
        setup = RingSetup(8, driver.desc, driver.avail, driver.used, features=EVERY, guest_addresses=True)
        self.queue: DeviceQueue = setup.open(self.memory)
        self.queue.set_touch(pool)

    def offer(self, *pages: int) -> None:
        """A chain of 16 bytes to read on each page."""
        assert self.driver.offer([(page * PAGE, 16) for page in pages]) is not None
        self.driver.publish()

    def offer_table(self, head: int, page: int) -> None:
        """Turns descriptor ``head``, offered before, into an indirect one; its table begins a missing page."""
        row = (page * PAGE).to_bytes(8, "little") + (16).to_bytes(4, "little") + (4).to_bytes(4, "little")
        os.pwrite(self.fd, row, self.driver.desc + 16 * head)

    def place_table(self, page: int, data_page: int) -> None:
        row = (data_page * PAGE).to_bytes(8, "little") + (16).to_bytes(4, "little") + bytes(4)
        self.place(page, row)

    def place(self, page: int, start: bytes | None = None) -> None:
        self.uffd.copy(
            self.region.base + page * PAGE, (bytes([page]) * PAGE if start is None else start).ljust(PAGE, b"\0")
        )

    def faults(self, count: int, readable: Callable[[int], bool]) -> set[int]:
        """The pages that ``count`` threads wait for, all at the same time."""
        pages: set[int] = set()
        while len(pages) < count:
            assert readable(self.uffd.fileno()), f"{len(pages)} of {count} faults were seen"
            pages |= {(fault.address - self.region.base) // PAGE for fault in self.uffd.read()}
        return pages

    def revoke(self) -> None:
        self.memory.revoke()
        self.uffd.unregister(self.region.base, self.region.length)

    def close(self) -> None:
        if not self.uffd.closed:
            self.revoke()
            self.uffd.close()
        self.queue.close()
        os.close(self.fd)


@pytest.fixture
def world(pool: TouchPool) -> Iterator[World]:
    made = World(pool)
    yield made
    made.close()


def test_the_indirect_tables_of_a_batch_are_asked_for_at_once(
    world: World, readable: Callable[[int], bool], background: Any
) -> None:
    for head in range(6):
        world.offer(DATA)
        world.offer_table(head, TABLES + head)
    popped = background(world.queue.pop)
    tables = set(range(TABLES, TABLES + 6))
    assert world.faults(6, readable) == tables, "six threads wait, and none has been answered"
    for table in tables:
        world.place_table(table, DATA + table)
    requests = popped.result()
    world.place(DATA + TABLES)
    assert [request.readable for request in requests] == [16] * 6
    assert requests[0].read() == bytes([DATA + TABLES]) * 16


def test_pop_does_not_wait_for_buffers(world: World) -> None:
    world.offer(DATA, DATA + 1)
    (request,) = world.queue.pop()
    assert request.readable == 32
    assert world.uffd.read() == []


def test_requests_whose_pages_are_here_go_first(world: World, readable: Callable[[int], bool]) -> None:
    queue = world.queue
    world.place(DATA + 3)
    for pages in ((DATA, DATA + 1), (DATA + 3,), (DATA + 2,)):
        world.offer(*pages)
    requests = queue.pop()
    assert queue.resident(requests) == [requests[1]]
    assert requests[1].read() == bytes([DATA + 3]) * 16
    assert world.faults(3, readable) == {DATA, DATA + 1, DATA + 2}
    assert queue.collect() == []
    world.place(DATA + 2)
    assert readable(queue.ahead_fd) and queue.collect() == [requests[2]]
    world.place(DATA + 1)
    world.place(DATA)
    assert readable(queue.ahead_fd) and queue.collect() == [requests[0]]
    assert requests[0].read() == bytes([DATA]) * 16 + bytes([DATA + 1]) * 16
    for request in requests:
        request.complete()
    queue.flush()
    assert queue.out == 0


def test_requests_whose_pages_are_lost_come_back_and_say_so(world: World, readable: Callable[[int], bool]) -> None:
    queue = world.queue
    for page in (DATA, DATA + 1):
        world.offer(page)
    assert queue.resident(requests := queue.pop()) == []
    world.faults(2, readable)
    world.revoke()
    back = []
    while len(back) < 2:
        assert readable(queue.ahead_fd)
        back += queue.collect()
    assert set(back) == set(requests)
    for request in back:
        with pytest.raises(MemoryLost):
            request.read()
        request.complete()
    with pytest.raises(QueueBroken):
        queue.flush()
    assert os.fstat(world.fd).st_blocks * 512 <= TABLES * PAGE, "nothing was allocated in the shared file"


def test_a_table_that_is_lost_breaks_the_ring(world: World, readable: Callable[[int], bool], background: Any) -> None:
    world.offer(DATA)
    world.offer_table(0, TABLES)

    def pop() -> int:
        with pytest.raises(QueueBroken) as caught:
            world.queue.pop()
        return caught.value.code

    popped = background(pop)
    world.faults(1, readable)
    world.revoke()
    assert popped.result() == lib.VU_E_FAULT


def test_no_views_while_pages_may_be_missing(world: World) -> None:
    world.offer(DATA)
    (request,) = world.queue.pop()
    with pytest.raises(RequestRefused, match="postcopy"):
        request.views()


def test_after_the_end_everything_is_as_before(world: World) -> None:
    world.queue.set_touch(None)
    assert world.queue.ahead_fd == -1
    world.place(DATA)
    world.offer(DATA)
    (request,) = world.queue.pop()
    assert world.queue.resident([request]) == [request]
    assert request.read() == bytes([DATA]) * 16
