"""The dirty log: a bit for each page that was written, set before the driver can know of it, and no other bit."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.queue import model
from tests.queue.guest import ALL, EVENT_IDX, NEXT, PAGE, WRITE, Guest, Ring
from vhostuser._native import lib
from vhostuser.memory import DirtyLog
from vhostuser.protocol import QueueBroken, RequestRefused

LOG = 1 << 12
COVERED = LOG * 8 * PAGE
TOP = 1 << 64


class Log:
    """A log of guest addresses 0 to 128 MiB, and its bits."""

    def __init__(self, offset: int = 0, size: int = LOG) -> None:
        self.fd = os.memfd_create("log")
        os.truncate(self.fd, offset + size)
        self.offset, self.size = offset, size
        self.native = DirtyLog.map(self.fd, size, offset)

    def pages(self) -> set[int]:
        """The pages marked since last asked."""
        found = model.bits(os.pread(self.fd, self.size, self.offset))
        os.pwrite(self.fd, bytes(self.size), self.offset)
        assert not any(os.pread(self.fd, self.offset, 0)), "a mark before the log's own bytes"
        return found

    def close(self) -> None:
        os.close(self.fd)


@pytest.fixture
def log() -> Iterator[Log]:
    made = Log()
    yield made
    made.close()


@pytest.fixture(scope="module", params=[0, 1, 4096, 5000])
def placed(request: pytest.FixtureRequest) -> Iterator[Log]:
    made = Log(offset=request.param)
    yield made
    made.close()


@given(start=st.integers(0, COVERED - 1), length=st.integers(0, 70 * PAGE))
def test_every_page_of_a_range_and_no_other(placed: Log, start: int, length: int) -> None:
    if start + length > COVERED:
        with pytest.raises(LookupError):
            placed.native.mark(start, length)
        assert not placed.pages(), "a range that is refused is not marked in part"
    else:
        placed.native.mark(start, length)
        assert placed.pages() == model.pages([(start, length)])


@pytest.mark.parametrize(
    ("start", "length"), [(COVERED, 1), (COVERED - 1, 2), (TOP - 1, 1), (TOP - PAGE, PAGE), (1, TOP - 1), (0, TOP - 1)]
)
def test_pages_outside_of_the_log_are_an_error(log: Log, start: int, length: int) -> None:
    with pytest.raises(LookupError):
        log.native.mark(start, length)
    assert not log.pages()


def test_marks_add_up(log: Log) -> None:
    for page in (0, 7, 8, 63, 64, 1, 0):
        log.native.mark(page * PAGE, 1)
    assert log.pages() == {0, 1, 7, 8, 63, 64}


@pytest.mark.parametrize(("size", "offset"), [(0, 0), (4097, 0), (4096, 1), (1, 4096), (TOP - 1, 0), (1, TOP - 1)])
def test_a_log_that_its_file_cannot_hold_is_refused(size: int, offset: int) -> None:
    fd = os.memfd_create("log")
    os.truncate(fd, 4096)
    with pytest.raises(RequestRefused, match="dirty log of"):
        DirtyLog.map(fd, size, offset)
    os.close(fd)


# ---- what a device writes


@pytest.fixture
def ring(guest: Guest) -> Ring:
    """One chain: a page to read, then writable buffers of 10 bytes, of two pages and a bit, and of 10 in the far."""
    made = Ring(guest, 4)
    made.describe(0, 0x10000, PAGE, NEXT, 1)
    made.describe(1, 0x20FFB, 10, NEXT | WRITE, 2)
    made.describe(2, 0x30000, 2 * PAGE + 10, NEXT | WRITE, 3)
    made.describe(3, 0x50000, 10, WRITE)
    return made


@pytest.mark.parametrize(
    ("told", "written", "pages"),
    [
        (0, None, set()),
        (None, None, set()),
        (1, None, {0x20}),
        (5, None, {0x20}),
        (6, None, {0x20, 0x21}),
        (11, None, {0x20, 0x21, 0x30}),
        (1 << 31, None, {0x20, 0x21, 0x30, 0x31, 0x32, 0x50}),
        (None, (0, 5), {0x20}),
        (None, (4, 2), {0x20, 0x21}),
        (None, (10 + 2 * PAGE + 10, 10), {0x20, 0x21, 0x30, 0x31, 0x32, 0x50}),
        (1, (4, 2), {0x20, 0x21}),  # what was written is dirty, whatever the driver is told
        (0, (0, 1), {0x20}),
    ],
)
def test_written_buffers_and_not_readable_ones(
    ring: Ring, log: Log, told: int | None, written: tuple[int, int] | None, pages: set[int]
) -> None:
    ring.offer(0, [0])
    queue = ring.open(log=log.native)
    (request,) = queue.pop()
    if written:
        request.write(b"x" * written[1], written[0])
    request.complete(told)
    assert not log.pages()
    queue.flush()
    assert log.pages() == pages


def test_without_a_log_nothing_is_marked_and_with_a_new_one_all_is(ring: Ring, log: Log) -> None:
    queue = ring.open()
    ring.offer(0, [0])
    (request,) = queue.pop()
    request.complete(100)
    queue.flush()
    assert not log.pages()
    queue.close()
    ring.offer(1, [0])
    queue = ring.open(log=log.native, base=1)
    queue.pop()[0].complete(100)
    queue.flush()
    assert log.pages() == {0x20, 0x21, 0x30}


def test_a_buffer_outside_of_the_log_breaks_the_ring_and_is_not_returned(ring: Ring) -> None:
    short = Log(size=4)  # 32 pages
    queue = ring.open(log=short.native)
    ring.offer(0, [0])
    (request,) = queue.pop()
    request.complete(1)
    with pytest.raises(QueueBroken) as caught:
        queue.flush()
    assert (caught.value.code, caught.value.head) == (lib.VU_E_RANGE, 0)
    assert ring.used_index == 0
    short.close()


# ---- the ring's own writes


@pytest.mark.parametrize("features", [ALL, EVENT_IDX, 0])
def test_writes_to_the_used_ring_if_that_was_asked_for(guest: Guest, log: Log, features: int) -> None:
    ring = Ring(guest, 1024, features=features)
    ring.describe(0, 0, 0)
    at = 0x40000 - 4 - 8  # so that entries, index, and avail_event lie on pages of their own
    end = (at + 4 + 8 * 1024) // PAGE
    ring.used_index = 0xFFFF
    ring.offer(0xFFFF, [0])
    setup = ring.setup(log=at, log_used=True, base=0xFFFF)
    queue = setup.open(guest.memory, log=log.native)
    queue.arm()
    assert log.pages() == ({end} if features & EVENT_IDX else {0x3F})
    queue.disarm()
    assert log.pages() == (set() if features & EVENT_IDX else {0x3F})
    (request,) = queue.pop()
    assert not log.pages(), "pop writes nothing"
    request.complete()
    queue.flush()
    # The index at 2, the entry of index 1023 at the end.
    assert log.pages() == {0x3F, (at + 4 + 8 * 1023) // PAGE}
    ring.offer(0, [0])
    (request,) = queue.pop()
    request.complete()
    queue.flush()
    assert log.pages() == {0x3F}, "entry 0 and the index"
    queue.close()


def test_the_used_ring_is_not_logged_unasked(ring: Ring, log: Log) -> None:
    ring.offer(0, [0])
    queue = ring.setup(log=0x40000).open(ring.guest.memory, log=log.native)
    queue.arm()
    queue.pop()[0].complete()
    queue.flush()
    assert not log.pages()


@pytest.mark.parametrize(
    ("at", "code"), [(COVERED, lib.VU_E_RANGE), (COVERED - 37, lib.VU_E_RANGE), (TOP - 8, lib.VU_E_OVERFLOW)]
)
def test_a_used_ring_that_the_log_cannot_hold_is_refused(ring: Ring, log: Log, at: int, code: int) -> None:
    with pytest.raises(QueueBroken) as caught:
        ring.setup(log=at, log_used=True).open(ring.guest.memory, log=log.native)
    assert caught.value.code == code
    ring.setup(log=COVERED - 38, log_used=True).open(ring.guest.memory, log=log.native).close()
    ring.setup(log=at, log_used=True).open(ring.guest.memory).close()


def test_an_event_is_signalled_once_for_a_batch(guest: Guest, log: Log) -> None:
    """SET_LOG_FD: the log has changed. Where nothing was marked nobody is told."""
    event = os.eventfd(0, os.EFD_NONBLOCK)
    log.native.tell(event)
    ring = Ring(guest, 4)
    for head in range(4):
        ring.describe(head, 0x10000 + head * PAGE, 10, WRITE)
    ring.offer(0, range(4))
    queue = ring.open(log=log.native)
    requests = queue.pop()
    queue.flush()
    assert signalled(event) == 0
    for request in requests[:3]:
        request.write(b"x")
        request.complete()
    queue.flush()
    assert signalled(event) == 1
    requests[3].complete()
    queue.flush()
    assert signalled(event) == 0
    os.close(event)


def signalled(event: int) -> int:
    try:
        return os.eventfd_read(event)
    except BlockingIOError:
        return 0
