"""Guest memory with holes, and everything that is needed to wait in them: real userfaultfds, no sockets, no QEMU.

The test itself is the front-end: it reads the faults and places the pages, when and in what order it likes. That
works in one process because whoever waits does so in C with the GIL released. Never touch ``Guest.base`` from Python.
"""

from __future__ import annotations

import os
import random
import select
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from vhostuser._native import ffi, lib
from vhostuser.uffd import NotPermitted, TouchPool, Userfaultfd

SMALL, HUGE = 4096, 2 << 20
PATIENCE = 10.0
"""Seconds until something that must happen counts as never happening."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker("postcopy")


@pytest.fixture(scope="session", autouse=True)
def permitted() -> None:
    """Everything here needs a userfaultfd that sees faults in system calls."""
    try:
        Userfaultfd.probe()
    except NotPermitted as error:
        pytest.skip(str(error))


@pytest.fixture(params=[SMALL, HUGE], ids=["4KiB", "2MiB"])
def page_size(request: pytest.FixtureRequest) -> int:
    """Both kinds of guest memory."""
    if request.param == HUGE:
        request.getfixturevalue("huge_pages")
    return int(request.param)


def content(page: int, page_size: int) -> bytes:
    """What page number ``page`` holds once it has been placed; never zeros."""
    return bytes([page % 255 + 1]) * page_size


class Guest:
    """Guest memory at guest address 0: a driver's ring in the first pages, the others are missing."""

    def __init__(self, page_size: int = SMALL, pages: int = 40, *, ring: int = 32, ring_missing: bool = False) -> None:
        self.page_size, self.pages = page_size, pages
        flags = os.MFD_CLOEXEC | (os.MFD_HUGETLB | os.MFD_HUGE_2MB if page_size == HUGE else 0)
        self.fd = os.memfd_create("guest", flags)
        os.ftruncate(self.fd, pages * page_size)
        self._ring = ring
        self.first = -(-int(lib.vu_driver_bytes(ring, 0)) // page_size)
        """The first page behind the ring."""
        self._driver_map = self._new_map(self._new_region(0))
        self._driver = ffi.NULL if ring_missing else ffi.gc(self._new_driver(), lib.vu_driver_free)
        self.uffd = Userfaultfd.open()
        self.region = self._new_region(lib.VU_REGION_HIDDEN)
        self.map = self._new_map(self.region)
        info = ffi.new("struct vu_region_info *")
        lib.vu_region_describe(self.region, info)
        self.base, self.length = int(info.base), int(info.length)
        assert lib.vu_region_no_huge(self.region) == 0
        self.uffd.register(self.base, self.length)
        assert lib.vu_region_reveal(self.region) == 0
        self.queue = self.new_queue()

    def _new_region(self, flags: int) -> Any:
        error = ffi.new("int *")
        region = lib.vu_region_map(self.fd, 0, self.pages * self.page_size, 1 << 40, 0, flags, error)
        assert region != ffi.NULL, error[0]
        return ffi.gc(region, lib.vu_region_put)

    def _new_map(self, region: Any) -> Any:
        error = ffi.new("int *")
        made = lib.vu_map_new([region], 1, error)
        assert made != ffi.NULL, error[0]
        return ffi.gc(made, lib.vu_map_put)

    def _new_driver(self) -> Any:
        error = ffi.new("int *")
        driver = lib.vu_driver_new(self._driver_map, 0, self._ring, 0, error)
        assert driver != ffi.NULL, error[0]
        return driver

    def new_queue(self) -> Any:
        """A device queue on the ring, from its first entry."""
        error = ffi.new("int *")
        avail = 16 * self._ring
        used = -(-(avail + 6 + 2 * self._ring) // 64) * 64
        ring = {"size": self._ring, "flags": lib.VU_RING_GUEST_ADDR, "desc": 0, "avail": avail, "used": used}
        if self._driver != ffi.NULL:
            ring |= {"avail": lib.vu_driver_avail(self._driver), "used": lib.vu_driver_used(self._driver)}
        queue = lib.vu_queue_new(self.map, ffi.new("struct vu_ring *", ring), ffi.NULL, ffi.NULL, ffi.NULL, error)
        assert queue != ffi.NULL, error[0]
        return ffi.gc(queue, lib.vu_queue_free)

    # ---- the driver

    def chain(self, *pages: int, length: int = 16) -> Any:
        """Offers one chain with a segment of ``length`` bytes at the start of each page, and pops it."""
        buffers = [{"guest": page * self.page_size, "length": length, "writable": 0} for page in pages]
        assert lib.vu_driver_add(self._driver, ffi.new("vu_buffer[]", buffers), len(buffers)) >= 0
        lib.vu_driver_publish(self._driver)
        popped = ffi.new("vu_chain *[1]")
        assert lib.vu_queue_pop(self.queue, popped, 1) == 1
        return popped[0]

    def chain_bytes(self, chain: Any) -> bytes:
        """What the device reads from a chain; it must be resident."""
        to = bytearray(chain.readable)
        assert lib.vu_chain_read(self.queue, chain, 0, ffi.from_buffer(to), len(to)) == len(to)
        return bytes(to)

    # ---- fault-ahead

    def submit(self, chain: Any, *, alone: bool = False) -> int:
        return int(lib.vu_ahead_submit(self.queue, chain, alone))

    def collect(self, most: int = 64) -> list[Any]:
        chains = ffi.new("vu_chain *[]", most)
        count = lib.vu_ahead_collect(self.queue, chains, most)
        assert count >= 0
        return [chains[i] for i in range(count)]

    def collected(self, count: int) -> list[Any]:
        """Waits until ``count`` chains have come back."""
        chains: list[Any] = []
        while len(chains) < count:
            assert readable(lib.vu_ahead_fd(self.queue)), f"{len(chains)} of {count} chains came back"
            chains += self.collect()
        return chains

    @property
    def waiting(self) -> int:
        return int(lib.vu_ahead_waiting(self.queue))

    # ---- the front-end

    def faults(self, count: int) -> list[int]:
        """Waits until ``count`` threads wait; the numbers of their pages."""
        pages: list[int] = []
        while len(pages) < count:
            assert readable(self.uffd.fileno()), f"{len(pages)} of {count} faults were seen"
            pages += [(fault.address - self.base) // self.page_size for fault in self.uffd.read()]
        return pages

    def place(self, *pages: int) -> None:
        """Brings pages; whoever waits for one is woken."""
        for page in pages:
            data = content(page, self.page_size)
            try:
                assert self.uffd.copy(self.base + page * self.page_size, data) == self.page_size
            except FileExistsError:
                self.uffd.wake(self.base + page * self.page_size, self.page_size)

    @contextmanager
    def serving(self, order: random.Random | None = None) -> Iterator[None]:
        """Brings every page that is asked for, those that are asked for together in the order of ``order``."""
        stop = os.eventfd(0, os.EFD_CLOEXEC)
        poll = select.poll()
        poll.register(self.uffd.fileno(), select.POLLIN)
        poll.register(stop, select.POLLIN)

        def serve() -> None:
            while stop not in dict(poll.poll()):
                pages = [(fault.address - self.base) // self.page_size for fault in self.uffd.read()]
                if order:
                    order.shuffle(pages)
                with suppress(FileNotFoundError):  # revoked meanwhile, and so no longer registered
                    self.place(*pages)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield
        finally:
            os.eventfd_write(stop, 1)
            thread.join()
            os.close(stop)

    @property
    def blocks(self) -> int:
        """Pages that the file holds, for the front-end and everybody else."""
        return os.fstat(self.fd).st_blocks * 512 // self.page_size

    def revoke(self) -> None:
        """As the back-end does when the front-end is lost."""
        assert lib.vu_map_revoke(self.map) == 0
        self.uffd.unregister(self.base, self.length)

    def close(self) -> None:
        """Again: nothing."""
        if self.fd < 0:
            return
        if not self.uffd.closed:
            lib.vu_map_revoke(self.map)
            self.uffd.unregister(self.base, self.length)
            self.uffd.close()
        for handle in (self.queue, self._driver, self.map, self._driver_map, self.region):
            if handle != ffi.NULL:
                ffi.release(handle)  # harmless where a test has released it before
        os.close(self.fd)
        self.fd = -1


def readable(fd: int) -> bool:
    """Waits until ``fd`` is readable; False if it never is."""
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(PATIENCE * 1000))


class Background:
    """A call that may wait for a page, on a thread of its own."""

    def __init__(self, call: Callable[[], Any]) -> None:
        self._call = call
        self._result: Any = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        self._result = self._call()

    @property
    def done(self) -> bool:
        return not self._thread.is_alive()

    def result(self) -> Any:
        self._thread.join(PATIENCE)
        assert self.done, "the call never came back"
        return self._result


@pytest.fixture(name="readable")
def wait_until_readable() -> Callable[[int], bool]:
    return readable


@pytest.fixture
def background() -> type[Background]:
    return Background


@pytest.fixture
def pool() -> Iterator[TouchPool]:
    """Eight threads, so that a chain's pages can be seen to wait at the same time."""
    made = TouchPool(threads=8, capacity=64)
    yield made
    made.close()


class Guests:
    """Makes guests, whose queue has the pool unless a test gives another one, or None."""

    def __init__(self, pool: TouchPool) -> None:
        self._pool = pool
        self._made: list[Guest] = []

    def __call__(self, *arguments: Any, touch: Any = ..., **settings: Any) -> Guest:
        guest = Guest(*arguments, **settings)
        self._made.append(guest)
        touch = self._pool if touch is ... else touch
        if touch is not None:
            native = touch.native if isinstance(touch, TouchPool) else touch
            assert lib.vu_queue_set_touch(guest.queue, native) == 0
        return guest

    def close(self) -> None:
        """All of them; before their pools are closed."""
        for guest in self._made:
            guest.close()


@pytest.fixture
def guests(pool: TouchPool) -> Iterator[Guests]:
    made = Guests(pool)
    yield made
    made.close()


@pytest.fixture
def pages_of() -> Callable[[Guest, Sequence[int], bytes], None]:
    """Checks that a chain's bytes are those of its pages."""

    def check(guest: Guest, pages: Sequence[int], found: bytes) -> None:
        size = len(found) // len(pages)
        assert found == b"".join(content(page, size) for page in pages)

    return check
