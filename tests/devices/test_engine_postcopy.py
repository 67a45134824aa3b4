"""While pages are missing the engine serves what it can, asks for everything else at once, and never invents a byte."""

from __future__ import annotations

import os
import select
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from vhostuser._native import lib
from vhostuser.uffd import NotPermitted, TouchPool, Userfaultfd

pytestmark = pytest.mark.postcopy

IN, OUT, FLUSH = 0, 1, 4
OK, IOERR = 0, 1
SECTORS = 512
PAGE = 4096


@pytest.fixture
def pool() -> Iterator[TouchPool]:
    touch = TouchPool(threads=32)
    yield touch
    touch.close()


class Holes:
    """A disk whose ``fragile`` memory has no page yet, and the engine on a thread. We bring the pages."""

    def __init__(self, disk: Any, pool: TouchPool) -> None:
        self.disk = disk
        self.codes: list[int] = []
        try:
            self.uffd = Userfaultfd.open()
        except NotPermitted as error:
            pytest.skip(str(error))
        self.guest = disk.fragile.guest
        self.host = int(lib.vu_map_guest_to_host(disk.map, self.guest))
        self.uffd.register(self.host, disk.fragile.size)
        assert lib.vu_queue_set_touch(disk.queue, pool.native) == 0
        os.eventfd_read(disk.stop)
        self.kick = os.eventfd(0, os.EFD_NONBLOCK)
        self._thread = threading.Thread(target=self._serve, daemon=True)

    def _serve(self) -> None:
        self.codes.append(lib.vu_blk_run(self.disk.blk, self.disk.queue, self.kick, self.disk.stop))

    def start(self) -> None:
        self._thread.start()

    def faults(self, count: int) -> set[int]:
        """Waits until ``count`` pages have been asked for, without bringing one; their offsets."""
        found: set[int] = set()
        while len(found) < count:
            assert select.select([self.uffd], [], [], 5)[0], f"only {len(found)} pages were asked for"
            found |= {fault.address // PAGE * PAGE - self.host for fault in self.uffd.read()}
        return found

    def bring(self, offset: int, content: bytes = bytes(PAGE)) -> None:
        self.uffd.copy(self.host + offset, content)

    def completed(self) -> dict[int, int]:
        """Waits for the next call; what was used."""
        assert select.select([self.disk.call], [], [], 5)[0], "no call came"
        os.eventfd_read(self.disk.call)
        used: dict[int, int] = self.disk.completed()
        return used

    def until_it_sleeps(self) -> None:
        """Returns when the engine has nothing to do: from then on it sees a stop before what is offered after it."""
        stat = Path(f"/proc/self/task/{self._thread.native_id}/stat")
        while stat.read_text().rpartition(")")[2].split()[0] != "S":
            os.sched_yield()

    def stop(self) -> int:
        os.eventfd_write(self.disk.stop, 1)
        self._thread.join(5)
        assert self.codes, "the engine did not stop"
        return self.codes[0]

    def close(self) -> None:
        lib.vu_map_revoke(self.disk.map)
        self.uffd.unregister(self.host, self.disk.fragile.size)
        if not self.codes:
            self.stop()
        self.uffd.close()
        os.close(self.kick)


@pytest.fixture
def holes(pool: TouchPool, disks: Any) -> Iterator[Holes]:
    made = Holes(disks(SECTORS), pool)
    yield made
    made.close()


def read_into_hole(holes: Holes, sector: int, pages: int = 1) -> tuple[int, int]:
    """Offers a read into missing pages; its head and where the status will be."""
    disk = holes.disk
    status = disk.place(b"?")
    return disk.offer(disk.place(disk.header(IN, sector)), [(holes.guest, pages * PAGE), *status]), status[0][0]


def test_a_request_that_waits_does_not_hold_up_those_behind_it(holes: Holes) -> None:
    disk = holes.disk
    waiting, status = read_into_hole(holes, 8)
    flush = disk.offer(disk.place(disk.header(FLUSH)), disk.place(b"?"))
    holes.start()
    assert holes.completed() == {flush: 1}
    later = disk.offer(disk.place(disk.header(FLUSH)), disk.place(b"?"))
    os.eventfd_write(holes.kick, 1)
    assert holes.completed() == {later: 1}
    assert holes.faults(1) == {0}
    holes.bring(0, b"\xaa" * PAGE)
    assert holes.completed() == {waiting: PAGE + 1}
    assert (disk.memory.get(status, 1), disk.fragile.get(holes.guest, PAGE)) == (b"\0", disk_pattern(8, 16))


def disk_pattern(low: int, high: int) -> bytes:
    return b"".join(bytes([sector % 251 + 1]) * 512 for sector in range(low, high))


def test_all_missing_pages_of_a_request_are_asked_for_at_once(holes: Holes) -> None:
    waiting, _ = read_into_hole(holes, 0, pages=32)
    holes.disk.offer(holes.disk.place(holes.disk.header(FLUSH)), holes.disk.place(b"?"))
    holes.start()
    holes.completed()
    # Not one page has been brought, so none of these waited for another.
    assert holes.faults(32) == {page * PAGE for page in range(32)}
    for page in range(32):
        holes.bring(page * PAGE)
    assert holes.completed() == {waiting: 32 * PAGE + 1}


def test_what_is_written_to_the_disk_is_what_the_source_sent(holes: Holes) -> None:
    disk = holes.disk
    head = disk.offer([*disk.place(disk.header(OUT, 16)), (holes.guest, PAGE)], disk.place(b"?"))
    holes.start()
    holes.faults(1)
    holes.bring(0, b"\x55" * PAGE)
    assert holes.completed() == {head: 1}
    assert disk.content()[16 * 512 : 24 * 512] == b"\x55" * PAGE


def test_a_stop_waits_for_requests_that_wait(holes: Holes) -> None:
    waiting, _ = read_into_hole(holes, 8)
    flush = holes.disk.offer(holes.disk.place(holes.disk.header(FLUSH)), holes.disk.place(b"?"))
    holes.start()
    assert holes.completed() == {flush: 1}
    holes.until_it_sleeps()
    os.eventfd_write(holes.disk.stop, 1)
    late = holes.disk.offer(holes.disk.place(holes.disk.header(FLUSH)), holes.disk.place(b"?"))
    os.eventfd_write(holes.kick, 1)
    holes.faults(1)
    assert not holes.codes
    holes.bring(0)
    used = holes.completed()
    assert holes.stop() == 0
    assert waiting in used
    assert late not in used, "a request was taken after the stop"


def test_memory_that_is_given_up_fails_the_request_and_nothing_is_placed(holes: Holes) -> None:
    disk = holes.disk
    status = disk.place(b"?")
    head = disk.offer([*disk.place(disk.header(OUT, 16)), (holes.guest, 4 * PAGE)], status)
    flush = disk.offer(disk.place(disk.header(FLUSH)), disk.place(b"?"))
    holes.start()
    assert holes.completed() == {flush: 1}
    holes.faults(4)
    lib.vu_region_revoke(disk.fragile.region)
    holes.uffd.unregister(holes.host, disk.fragile.size)
    assert holes.completed() == {head: 1}
    assert disk.memory.get(status[0][0], 1) == bytes([IOERR])
    assert disk.content() == disk_pattern(0, SECTORS)
    assert os.fstat(disk.fragile.fd).st_blocks == 0
    assert holes.stop() == 0


def test_the_loss_of_all_memory_ends_the_thread(holes: Holes) -> None:
    read_into_hole(holes, 8, pages=4)
    holes.start()
    holes.faults(1)
    lib.vu_map_revoke(holes.disk.map)
    holes.uffd.unregister(holes.host, holes.disk.fragile.size)
    holes._thread.join(5)
    assert holes.codes == [lib.VU_E_FAULT]
    assert os.fstat(holes.disk.fragile.fd).st_blocks == 0
