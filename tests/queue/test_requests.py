"""Requests as a device in Python sees them."""

from __future__ import annotations

import fcntl
import gc
import os
import time
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.queue.guest import NEXT, WRITE, Guest, Ring
from vhostuser._native import lib
from vhostuser.memory import GuestMemory, Region
from vhostuser.protocol import MemoryRegion, RequestRefused
from vhostuser.queuestats import QueueStats
from vhostuser.virtqueue import BATCH, DeviceQueue, Request

BORDER = 1 << 20
FAR = 1 << 32
ROOM = 70_000


def one(guest: Guest, readable: list[tuple[int, int]], writable: list[tuple[int, int]]) -> tuple[DeviceQueue, Request]:
    ring = Ring(guest, 8)
    parts = [(*part, 0) for part in readable] + [(*part, WRITE) for part in writable]
    for index, (at, length, flags) in enumerate(parts):
        ring.describe(index, at, length, flags | NEXT * (index + 1 < len(parts)), index + 1)
    ring.used_index = 0
    ring.offer(0, [0])
    queue = ring.open()
    (request,) = queue.pop()
    return queue, request


def cut(total: int, cuts: list[int]) -> list[tuple[int, int]]:
    """Buffers of ``total`` bytes in all: the first one across two regions, the others apart from each other."""
    edges = [0, *sorted(cuts), total]
    lengths = [high - low for low, high in pairwise(edges)]
    starts = [BORDER - lengths[0] // 2, *(FAR + 2 * low for low in edges[1:-1])]
    return list(zip(starts, lengths, strict=True))


@settings(max_examples=150, deadline=None)
@given(
    cuts=st.lists(st.integers(1, 40) | st.integers(1, ROOM - 1), max_size=5, unique=True),
    offset=st.integers(0, 50) | st.integers(0, ROOM + 5),
    length=st.integers(0, 50) | st.integers(0, ROOM + 5),
)
def test_reads_and_writes_are_slices(cuts: list[int], offset: int, length: int) -> None:
    """However the driver has cut the buffer, across regions, and beyond the bytes that pop brought along."""
    guest = Guest((0, BORDER), (BORDER, BORDER), (FAR, BORDER))
    parts, content, blob = cut(ROOM, cuts), os.urandom(ROOM), os.urandom(length)
    for (at, size), (low, _) in zip(parts, pairwise([0, *sorted(cuts), ROOM]), strict=True):
        guest.put(at, content[low : low + size])
    queue, request = one(guest, parts, [])
    assert request.read(length, offset) == content[offset : offset + length]
    assert request.read() == content
    into = bytearray(length)
    assert request.read_into(into, offset) == len(content[offset : offset + length])
    assert into == content[offset : offset + length].ljust(length, b"\0")
    queue.close()
    queue, request = one(guest, [], parts)
    room = max(min(length, ROOM - offset), 0)
    assert request.write(memoryview(blob), offset) == room
    expected = content[:offset] + blob[:room] + content[offset + room :]
    assert b"".join(guest.get(*part) for part in parts) == expected
    queue.close()
    guest.close()


def test_every_kind_of_bytes_can_be_written(guest: Guest) -> None:
    _, request = one(guest, [], [(0x8000, 8)])
    for data in (b"bytes", bytearray(b"array"), memoryview(b"xviewx")[1:5], memoryview(bytearray(b"views"))):
        assert request.write(data) == len(data)
        assert guest.get(0x8000, len(data)) == bytes(data)


def test_offsets_below_0_are_the_callers_fault(guest: Guest) -> None:
    _, request = one(guest, [(0x8000, 64)], [(0x9000, 64)])
    with pytest.raises(OverflowError):
        request.read(4, -1)
    with pytest.raises(OverflowError):
        request.write(b"data", -1)


def test_the_driver_is_told_how_far_was_written(guest: Guest) -> None:
    ring = Ring(guest, 8)
    for told, expected in ((None, 6), (3, 3), (100, 8)):
        queue, request = one(guest, [], [(0x8000, 8)])
        request.write(b"yz", 4)
        request.write(b"x", 0)
        request.complete(told)
        queue.flush()
        assert ring.used_entry(0) == (0, expected)
        queue.close()


def test_a_request_is_completed_once(guest: Guest) -> None:
    queue, request = one(guest, [], [(0x8000, 8)])
    assert not request.completed
    request.complete()
    assert request.completed
    with pytest.raises(ValueError, match="before"):
        request.complete()
    queue.flush()
    with pytest.raises(ValueError, match="before"):
        request.complete()
    assert queue.out == 0


def test_completions_go_together_and_are_announced_once(guest: Guest) -> None:
    ring = Ring(guest, 8)
    for head in range(8):
        ring.describe(head, 0x8000, 4)
    ring.offer(0, range(8))
    queue = ring.open()
    call = os.eventfd(0, os.EFD_NONBLOCK)
    queue.set_call(call)
    announced: list[int] = []
    queue.on_finished = lambda _: announced.append(queue.out)
    requests = queue.pop(5) + queue.pop(2)
    assert (len(requests), queue.out, queue.base) == (7, 7, 7)
    for request in reversed(requests):
        request.complete()
    assert announced == [7] and ring.used_index == 0
    queue.flush()
    assert ring.used_index == 7 and queue.out == 0
    assert [ring.used_entry(n)[0] for n in range(7)] == [6, 5, 4, 3, 2, 1, 0]
    assert os.eventfd_read(call) == 1
    queue.pop()[0].complete()
    assert announced == [7, 1]
    os.close(call)


def test_a_pop_is_bounded(guest: Guest) -> None:
    ring = Ring(guest, 1024)
    ring.offer(0, range(1024))
    queue = ring.open()
    assert len(queue.pop()) == len(queue.pop(10**6)) == BATCH


# ---- views


def test_views_are_the_memory_itself() -> None:
    sealed = Guest((0, BORDER), (BORDER, 1 << 16), sealed=True)
    sealed.put(0x8000, b"read me")
    queue, request = one(sealed, [(0x8000, 7)], [(BORDER - 4, 8)])
    readable, writable = request.views()
    assert [bytes(view) for view in readable] == [b"read me"] and all(view.readonly for view in readable)
    assert [len(view) for view in writable] == [4, 4], "a buffer in two regions is two segments"
    writable[0][:] = b"abcd"
    writable[1][:] = b"efgh"
    assert sealed.get(BORDER - 4, 8) == b"abcdefgh"
    request.complete(8)
    queue.flush()
    queue.close()
    with pytest.raises(RequestRefused):
        request.views()
    # The view alone keeps the mapping.
    sealed.close()
    del queue, request, sealed, readable
    gc.collect()
    assert bytes(writable[0]) == b"abcd"


def test_no_views_of_memory_that_can_be_truncated(guest: Guest) -> None:
    _, request = one(guest, [(0x8000, 7)], [])
    with pytest.raises(RequestRefused, match="F_SEAL_SHRINK"):
        request.views()


def test_no_views_of_memory_whose_pages_can_run_out() -> None:
    """Nothing is reserved for a file of huge pages: where there are none left, the first touch is lost as well."""
    try:
        fd = os.memfd_create("guest", os.MFD_CLOEXEC | os.MFD_HUGETLB | os.MFD_ALLOW_SEALING)
    except OSError as error:
        pytest.skip(f"no huge pages: {error}")
    os.truncate(fd, 2 << 20)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
    assert not GuestMemory([Region.map(fd, MemoryRegion(0, 2 << 20, 0, 0))]).sealed
    os.close(fd)


def test_nothing_is_copied_for_a_request_that_went_back(guest: Guest) -> None:
    """Its segments, when there were many, are gone."""
    ring = Ring(guest, 128)
    for index in range(128):
        ring.describe(index, 0x8000 + index, 1, NEXT * (index < 127) | WRITE * (index > 99), index + 1)
    ring.offer(0, [0])
    queue = ring.open()
    (request,) = queue.pop()
    request.complete()
    queue.flush()
    assert request.read_into(bytearray(100)) == 0
    assert request.write(b"late") == 0


# ---- notifications


def pushed(guest: Guest, features: int) -> tuple[Ring, DeviceQueue, int]:
    """A queue with a call descriptor and one request that is completed but not flushed."""
    ring = Ring(guest, 8, features=features)
    ring.describe(0, 0x8000, 4)
    ring.offer(0, [0])
    queue = ring.open()
    call = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
    queue.set_call(call)
    queue.pop()[0].complete()
    return ring, queue, call


def calls(fd: int) -> int:
    try:
        return os.eventfd_read(fd)
    except BlockingIOError:
        return 0


def test_a_driver_that_wants_no_interrupts_gets_none_but_the_forced_one(guest: Guest) -> None:
    ring, queue, call = pushed(guest, 0)
    ring.avail_flags(1)
    queue.flush()
    assert calls(call) == 0
    queue.force_signal()
    queue.flush()
    assert calls(call) == 1, "also when nothing was returned"
    queue.flush()
    assert calls(call) == 0, "once"
    os.close(call)


@pytest.mark.parametrize("forced", [False, True])
def test_a_call_waits_for_its_descriptor(guest: Guest, forced: bool) -> None:
    """The front-end may kick first and give the call descriptor later."""
    ring, queue, call = pushed(guest, 0)
    queue.set_call(-1)
    if forced:
        ring.avail_flags(1)
        queue.force_signal()
    queue.flush()
    queue.set_call(call)
    queue.flush()
    assert calls(call) == 1
    os.close(call)


def test_nothing_new_no_call(guest: Guest) -> None:
    _, queue, call = pushed(guest, 0)
    queue.flush()
    assert calls(call) == 1
    queue.flush()
    assert calls(call) == 0
    os.close(call)


def test_a_call_descriptor_that_is_full_or_of_no_use_does_no_harm(guest: Guest) -> None:
    ring, queue, call = pushed(guest, 0)
    os.eventfd_write(call, (1 << 64) - 2)
    queue.flush()
    assert ring.used_index == 1
    queue.set_call(os.open("/dev/null", os.O_RDONLY))
    ring.offer(1, [0])
    queue.pop()[0].complete()
    queue.flush()
    assert ring.used_index == 2
    os.close(call)


@pytest.mark.parametrize("features", [0, 1 << 29])
def test_arming_looks_again(guest: Guest, features: int) -> None:
    """Between the last pop and the wish for kicks the driver may have come: arm says so, or it would sleep for ever."""
    ring = Ring(guest, 8, features=features)
    queue = ring.open()
    queue.disarm()
    assert ring.used_flags == (0 if features else 1)
    assert queue.pop() == [] and queue.arm() is False
    assert ring.used_flags == 0
    ring.offer(0, [0])
    assert queue.arm() is True
    queue.pop()
    assert queue.arm() is False
    assert ring.avail_event == (1 if features else 0)


def test_kernel_and_python_agree_on_what_is_out(guest: Guest) -> None:
    ring = Ring(guest, 8)
    ring.offer(0, range(3))
    queue = ring.open()
    requests = queue.pop()
    assert queue.out == lib.vu_queue_out(queue.native) == 3
    requests[0].complete()
    queue.flush()
    assert queue.out == lib.vu_queue_out(queue.native) == 2


def test_what_a_queue_has_done_is_counted(guest: Guest) -> None:
    """Requests, bytes both ways, batches, kicks and calls; each request once in the histogram of its time."""
    ring = Ring(guest, 8)
    for head, (length, flags) in enumerate([(100, 0), (50, WRITE), (30, WRITE)]):
        ring.describe(head, 0x8000, length, flags)
    ring.offer(0, range(3))
    queue = ring.open()
    call = os.eventfd(0)
    queue.set_call(call)
    assert queue.stats() == QueueStats()
    before = time.monotonic_ns()
    first, second, third = queue.pop()
    assert before <= queue.stats().oldest <= time.monotonic_ns()
    assert queue.stats().out == 3
    queue.kicked()
    second.complete(7)
    first.complete()
    queue.force_signal()
    queue.flush()
    stats = queue.stats()
    assert (stats.returned, stats.readable, stats.written, stats.batches) == (2, 100, 7, 1)
    assert (stats.kicks, stats.calls, stats.out) == (1, 1, 1)
    assert sum(stats.histogram) == 2
    assert stats.oldest
    assert 0 < stats.served_ns <= 2 * (time.monotonic_ns() - before)
    third.complete(1000)
    queue.flush()
    assert queue.stats().written == 7 + 30, "no more than there is room for"
    assert (queue.stats().out, queue.stats().oldest) == (0, 0)
    both = queue.stats() + queue.stats()
    assert (both.returned, sum(both.histogram), both.out) == (6, 6, 0)
    os.close(call)


def test_rings_leave_nothing_mapped(guest: Guest) -> None:
    def mapped() -> int:
        return len(Path("/proc/self/maps").read_text().splitlines())

    ring = Ring(guest, 8)
    ring.open().close()
    gc.collect()
    before = mapped()
    for _ in range(200):
        guests_own = Guest((0, 1 << 20))
        Ring(guests_own, 1024).open().pop()
        guests_own.close()
    del guests_own
    gc.collect()
    assert mapped() <= before + 2
