"""What a driver or a front-end may not do, one case each: the ring breaks, once and for good, and says why."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest

from tests.queue.guest import EVENT_IDX, INDIRECT, INDIRECT_DESC, NEXT, USER, WRITE, Guest, Ring, descriptor
from vhostuser._native import lib
from vhostuser.memory import DirtyLog, GuestMemory, MemoryLost, Region, explain
from vhostuser.protocol import MemoryRegion, QueueBroken
from vhostuser.virtqueue import DeviceQueue, RingSetup

DATA, TABLE = 0x8000, 0x9000
FAR = 1 << 32
TOP = 1 << 64


def broken_by(queue: DeviceQueue) -> QueueBroken:
    """What popping everything ends in; also checks that it stays so and touches nothing more."""
    with pytest.raises(QueueBroken) as caught:
        while queue.pop():
            pass
    for call in (queue.pop, queue.arm, queue.disarm, queue.check):
        with pytest.raises(QueueBroken) as again:
            call()
        assert (again.value.code, again.value.head) == (caught.value.code, caught.value.head), "the code is sticky"
    return caught.value


def row(*values: int) -> Callable[[Ring], None]:
    return lambda ring: ring.describe(0, *values)


def rows(*lines: tuple[int, ...]) -> Callable[[Ring], None]:
    def write(ring: Ring) -> None:
        for index, line in enumerate(lines):
            ring.describe(index, *line)

    return write


def table(*lines: tuple[int, ...], flags: int = INDIRECT, length: int | None = None) -> Callable[[Ring], None]:
    def write(ring: Ring) -> None:
        data = b"".join(descriptor(*line) for line in lines)
        ring.guest.put(TABLE, data)
        ring.describe(0, TABLE, len(data) if length is None else length, flags, 1)

    return write


CHAINS: dict[str, tuple[Callable[[Ring], None], int]] = {
    "next outside of the table": (row(DATA, 1, NEXT, 4), lib.VU_E_HEAD),
    "a descriptor that follows itself": (row(DATA, 1, NEXT, 0), lib.VU_E_LOOP),
    "a loop of two": (rows((DATA, 1, NEXT, 1), (DATA, 1, NEXT, 0)), lib.VU_E_LOOP),
    "a loop of empty descriptors": (rows((DATA, 0, NEXT, 1), (DATA, 0, NEXT, 0)), lib.VU_E_LOOP),
    "readable after writable": (rows((DATA, 1, NEXT | WRITE, 1), (DATA, 1)), lib.VU_E_ORDER),
    "outside of memory": (row(1 << 40, 1), lib.VU_E_RANGE),
    "one byte beyond memory": (row(FAR + (1 << 20) - 7, 8), lib.VU_E_RANGE),
    "from memory into a gap": (row((1 << 20) - 1, 0x10002), lib.VU_E_RANGE),
    "address and length that wrap": (row(TOP - 8, 16), lib.VU_E_OVERFLOW),
    "address and length that wrap to 0": (row(TOP - 8, 8), lib.VU_E_OVERFLOW),
    "an empty table": (row(TABLE, 0, INDIRECT), lib.VU_E_INDIRECT),
    "a table that is not whole descriptors": (row(TABLE, 24, INDIRECT), lib.VU_E_INDIRECT),
    "a table shorter than one": (row(TABLE, 15, INDIRECT), lib.VU_E_INDIRECT),
    "a table that goes on with NEXT": (table((DATA, 1), flags=INDIRECT | NEXT), lib.VU_E_INDIRECT),
    "a table in a table": (table((TABLE, 16, INDIRECT)), lib.VU_E_INDIRECT),
    "a table longer than any chain": (row(0, 16 * 1025, INDIRECT), lib.VU_E_SIZE),
    "a table outside of memory": (row(1 << 40, 16, INDIRECT), lib.VU_E_RANGE),
    "a table that runs out of memory": (row(FAR + (1 << 20) - 8, 16, INDIRECT), lib.VU_E_RANGE),
    "a table that wraps": (row(TOP - 16, 32, INDIRECT), lib.VU_E_OVERFLOW),
    "next outside of a table": (table((DATA, 1, NEXT, 2), (DATA, 1)), lib.VU_E_HEAD),
    "a loop in a table": (table((DATA, 1, NEXT, 1), (DATA, 1, NEXT, 0)), lib.VU_E_LOOP),
}


@pytest.mark.parametrize("case", CHAINS)
def test_a_chain_that_no_driver_may_make_breaks_the_ring(guest: Guest, case: str) -> None:
    make, code = CHAINS[case]
    ring = Ring(guest, 4)
    make(ring)
    ring.offer(0, [0])
    broken = broken_by(ring.open())
    assert (broken.code, broken.head, broken.queue) == (code, 0, 0)


def test_the_order_holds_across_a_table(guest: Guest) -> None:
    ring = Ring(guest, 4)
    guest.put(TABLE, descriptor(DATA, 1))
    rows((DATA, 1, NEXT | WRITE, 1), (TABLE, 16, INDIRECT))(ring)
    ring.offer(0, [0])
    assert broken_by(ring.open()).code == lib.VU_E_ORDER


def test_the_chains_before_the_bad_one_are_served(guest: Guest) -> None:
    ring = Ring(guest, 4)
    rows((DATA, 1), (DATA, 2), (1 << 40, 3))(ring)
    ring.offer(0, [1, 0, 2])
    queue = ring.open(index=7)
    assert [request.readable for request in queue.pop()] == [2, 1]
    broken = broken_by(queue)
    assert (broken.code, broken.head, broken.queue) == (lib.VU_E_RANGE, 2, 7)
    assert queue.base == 2, "the bad one was not taken"


@pytest.mark.parametrize("head", [4, 5, 0xFFFF])
def test_a_head_outside_of_the_table(guest: Guest, head: int) -> None:
    ring = Ring(guest, 4)
    ring.offer(0, [head])
    broken = broken_by(ring.open())
    assert (broken.code, broken.head) == (lib.VU_E_HEAD, head)


def test_a_head_that_is_out_already(guest: Guest) -> None:
    ring = Ring(guest, 4)
    row(DATA, 1)(ring)
    ring.offer(0, [0])
    queue = ring.open()
    (request,) = queue.pop()
    ring.offer(1, [0])
    assert broken_by(queue).code == lib.VU_E_HEAD
    assert request.read() == b"\0", "what was popped before stays usable"
    request.complete()
    queue.flush()
    assert queue.out == 0 and ring.used_index == 1, "and is returned"
    broken = broken_by(queue)
    assert (broken.code, broken.head) == (lib.VU_E_HEAD, 0), "for the reason there was first"


@pytest.mark.parametrize("base", [0, 3, 0xFFFF])
@pytest.mark.parametrize("ahead", [5, 6, 0x7FFF, 0xFFFF])
def test_an_available_index_too_far_ahead(guest: Guest, base: int, ahead: int) -> None:
    ring = Ring(guest, 4)
    ring.available = base + ahead
    broken = broken_by(ring.open(base=base))
    assert (broken.code, broken.head) == (lib.VU_E_INDEX, -1)


def test_4_gib_in_one_chain_and_not_a_byte_more(guests: Callable[..., Guest]) -> None:
    guest = guests((0, 1 << 16), (FAR, 1 << 31))
    ring = Ring(guest, 4)
    for index in range(3):
        ring.describe(index, FAR, 1 << 31, NEXT, index + 1)
    ring.describe(2, DATA, 1, WRITE)
    ring.offer(0, [0])
    assert broken_by(ring.open()).code == lib.VU_E_SIZE
    ring.describe(1, FAR, 1 << 31, WRITE)
    ring.offer(0, [0])
    (request,) = ring.open().pop()
    assert (request.readable, request.writable) == (1 << 31, 1 << 31)


def test_a_queue_does_not_take_all_our_memory(guests: Callable[..., Guest]) -> None:
    """1024 chains of 1024 segments each in two regions: twice what one queue may keep."""
    guest = guests((0, 1 << 20), (1 << 20, 1 << 20))
    ring = Ring(guest, 1024)
    at = 1 << 19
    guest.put(at, b"".join(descriptor((1 << 20) - 1, 2, NEXT, n + 1) for n in range(1023)) + descriptor(0, 1))
    for index in range(1024):
        ring.describe(index, at, 16 * 1024, INDIRECT)
    ring.offer(0, range(1024))
    assert broken_by(ring.open()).code == lib.VU_E_NOMEM


def test_long_chains_cost_memory_only_while_they_are_out(guest: Guest) -> None:
    ring = Ring(guest, 4)
    table(*[(DATA, 1, NEXT, n + 1) for n in range(1023)], (DATA, 1))(ring)
    queue = ring.open()
    for index in range(1100):  # together they would be more than one queue may keep
        ring.offer(index, [0])
        (request,) = queue.pop()
        request.complete()
        queue.flush()


def test_no_more_bytes_are_reported_than_there_was_room_for(guest: Guest) -> None:
    ring = Ring(guest, 4)
    rows((DATA, 1, NEXT, 1), (DATA, 10, WRITE))(ring)
    ring.offer(0, [0])
    queue = ring.open()
    (request,) = queue.pop()
    assert lib.vu_queue_push(queue.native, [request._chain], [0xFFFFFFFF], 1) == 0
    assert ring.used_entry(0) == (0, 10)


# ---- what looks odd and is not


def test_direct_descriptors_may_come_before_a_table(guest: Guest) -> None:
    """2.7.5.3.2: the device must take plain descriptors followed by a single indirect one."""
    ring = Ring(guest, 4)
    table((DATA + 8, 2, NEXT | WRITE, 1), (DATA + 16, 3, WRITE), flags=INDIRECT)(ring)
    rows((DATA, 1, NEXT, 1), (TABLE, 32, INDIRECT))(ring)
    ring.offer(0, [0])
    (request,) = ring.open().pop()
    assert (request.readable, request.writable) == (1, 5)


def test_write_on_an_indirect_descriptor_is_ignored(guest: Guest) -> None:
    """2.7.5.3.2: the device must ignore it."""
    ring = Ring(guest, 4)
    table((DATA, 4), flags=INDIRECT | WRITE)(ring)
    ring.offer(0, [0])
    (request,) = ring.open().pop()
    assert (request.readable, request.writable) == (4, 0)


def test_empty_descriptors_are_passed_over(guest: Guest) -> None:
    ring = Ring(guest, 4)
    rows((1 << 40, 0, NEXT, 1), (DATA, 2, NEXT, 2), (0, 0, NEXT | WRITE, 3), (DATA, 3, WRITE))(ring)
    ring.offer(0, [0])
    (request,) = ring.open().pop()
    assert (request.readable, request.writable) == (2, 3)


def test_a_chain_of_nothing_comes_back(guest: Guest) -> None:
    ring = Ring(guest, 4)
    row(DATA, 0)(ring)
    ring.offer(0, [0])
    queue = ring.open()
    (request,) = queue.pop()
    assert (request.readable, request.writable, request.read(), request.write(b"x")) == (0, 0, b"", 0)
    request.complete()
    queue.flush()
    assert ring.used_entry(0) == (0, 0)


@pytest.mark.parametrize("entries", [5, 256, 1024])
def test_a_table_may_be_longer_than_the_ring(guest: Guest, entries: int) -> None:
    """Linux sizes tables by the device's segment limit, whatever the size of the ring."""
    ring = Ring(guest, 4)
    table(*[(DATA + n, 1, NEXT, n + 1) for n in range(entries - 1)], (DATA, 1, WRITE))(ring)
    ring.offer(0, [0])
    (request,) = ring.open().pop()
    assert (request.readable, request.writable) == (entries - 1, 1)


@pytest.mark.parametrize("at", [TABLE + 1, TABLE + 7, (1 << 20) - 1, (1 << 20) - 16, (1 << 20) - 40])
def test_a_table_may_lie_anywhere(guest: Guest, at: int) -> None:
    """Unaligned, and across two regions."""
    ring = Ring(guest, 4)
    guest.put(DATA, b"abc")
    guest.put(at, b"".join(descriptor(DATA + n, 1, NEXT * (n < 2), n + 1) for n in range(3)))
    ring.describe(0, at, 48, INDIRECT)
    ring.offer(0, [0])
    (request,) = ring.open().pop()
    assert request.read() == b"abc"


def test_indirect_only_if_it_was_negotiated(guest: Guest) -> None:
    ring = Ring(guest, 4, features=EVENT_IDX)
    table((DATA, 1))(ring)
    ring.offer(0, [0])
    assert broken_by(ring.open()).code == lib.VU_E_INDIRECT
    assert broken_by(ring.open(features=EVENT_IDX)).code == lib.VU_E_INDIRECT
    assert ring.open(features=INDIRECT_DESC).pop()


def test_what_was_popped_is_a_copy(guest: Guest) -> None:
    """The driver changes descriptor and table after pop: nothing of it is read again."""
    ring = Ring(guest, 4)
    table((DATA, 4, NEXT, 1), (DATA + 8, 4, WRITE))(ring)
    ring.offer(0, [0])
    guest.put(DATA, b"data")
    queue = ring.open()
    (request,) = queue.pop()
    ring.describe(0, 1 << 50, 0xFFFFFFFF, 0xFFFF, 0xFFFF)
    guest.put(TABLE, b"\xff" * 32)
    guest.put(DATA, b"evil")
    assert request.read() == b"data" and request.write(b"12345") == 4
    request.complete()
    queue.flush()
    assert ring.used_entry(0) == (0, 4) and guest.get(DATA + 8, 5) == b"1234\0"


# ---- the ring itself

SETUPS: dict[str, tuple[dict[str, int], int]] = {
    "size 0": ({"size": 0}, lib.VU_E_SIZE),
    "size 3": ({"size": 3}, lib.VU_E_SIZE),
    "size 65536": ({"size": 65536}, lib.VU_E_SIZE),
    "size 2^31": ({"size": 1 << 31}, lib.VU_E_SIZE),
    "descriptors at an odd place": ({"desc": 8}, lib.VU_E_ALIGN),
    "available ring at an odd place": ({"avail": 1}, lib.VU_E_ALIGN),
    "used ring at an odd place": ({"used": 2}, lib.VU_E_ALIGN),
    "descriptors outside of memory": ({"desc": 1 << 40}, lib.VU_E_RANGE),
    "descriptors that run out of memory": ({"desc": FAR + (1 << 20) - 48}, lib.VU_E_RANGE),
    "descriptors across two regions": ({"desc": (1 << 20) - 32}, lib.VU_E_RANGE),
    "available ring that runs out of memory": ({"avail": FAR + (1 << 20) - 12}, lib.VU_E_RANGE),
    "used ring that runs out of memory": ({"used": FAR + (1 << 20) - 36}, lib.VU_E_RANGE),
    "descriptors that wrap": ({"desc": TOP - 16}, lib.VU_E_OVERFLOW),
    "used ring that wraps": ({"used": TOP - 4}, lib.VU_E_OVERFLOW),
}


@pytest.mark.parametrize("case", SETUPS)
@pytest.mark.parametrize("by_guest", [True, False])
def test_a_ring_that_memory_cannot_hold_is_not_opened(guest: Guest, case: str, by_guest: bool) -> None:
    changes, code = SETUPS[case]
    ring = Ring(guest, 4)
    shift = 0 if by_guest else USER
    places = {name: getattr(ring, name) for name in ("desc", "avail", "used")} | changes
    for name in ("desc", "avail", "used"):
        places[name] += shift if places[name] < TOP - 64 else 0
    with pytest.raises(QueueBroken) as caught:
        ring.open(**places, guest_addresses=by_guest, index=3)
    assert (caught.value.code, caught.value.queue, caught.value.head) == (code, 3, -1)


def test_a_region_that_begins_anywhere_in_its_file_must_not_misalign_a_ring() -> None:
    """The addresses are aligned, what is behind them is not."""
    fd = os.memfd_create("guest")
    os.truncate(fd, 1 << 16)
    memory = GuestMemory([Region.map(fd, MemoryRegion(0, 1 << 15, USER, 8))])
    os.close(fd)
    with pytest.raises(QueueBroken) as caught:
        RingSetup(size=4, desc=0, avail=64, used=128, guest_addresses=True).open(memory)
    assert caught.value.code == lib.VU_E_ALIGN


def test_a_ring_is_found_by_the_front_ends_addresses(guest: Guest) -> None:
    ring = Ring(guest, 4)
    row(DATA, 4)(ring)
    ring.offer(0, [0])
    queue = ring.open(desc=USER + ring.desc, avail=USER + ring.avail, used=USER + ring.used, guest_addresses=False)
    assert len(queue.pop()) == 1


def test_no_memory_no_ring() -> None:
    with pytest.raises(QueueBroken):
        Ring(Guest(), 4).setup().open(GuestMemory())


# ---- memory that goes away


def opened(guest: Guest, log: DirtyLog | None = None) -> tuple[Ring, DeviceQueue]:
    """A ring in the far region with a chain whose buffers are in the near ones; without the event index, so that disarm
    has something to write."""
    ring = Ring(guest, 4, at=FAR, features=INDIRECT_DESC)
    ring.describe(0, DATA, 4096, NEXT, 1)
    ring.describe(1, 1 << 20, 4096, WRITE)
    ring.offer(0, [0])
    return ring, ring.open(log=log)


def test_a_truncated_buffer_costs_the_request(guest: Guest) -> None:
    ring, queue = opened(guest)
    guest.truncate(0, 4096)
    (request,) = queue.pop()
    with pytest.raises(MemoryLost):
        request.read()
    assert request.write(b"status") == 6, "the rest of the request can still be used"
    guest.truncate(1, 0)
    with pytest.raises(MemoryLost):
        request.write(b"status")
    request.complete()
    queue.flush()
    assert ring.used_entry(0) == (0, 6)
    ring.offer(1, [0])
    assert len(queue.pop()) == 1, "and so can the ring"


def test_a_truncated_table_breaks_the_ring(guest: Guest) -> None:
    ring, queue = opened(guest)
    ring.describe(2, TABLE, 16, INDIRECT)
    ring.offer(0, [0, 2])
    guest.truncate(0, 4096)
    (first,) = queue.pop()
    assert first.readable == 4096, "the chain before it is served"
    assert broken_by(queue).code == lib.VU_E_FAULT


@pytest.mark.parametrize("call", ["pop", "arm", "disarm", "flush"])
def test_a_truncated_ring_is_broken(guest: Guest, call: str) -> None:
    _, queue = opened(guest)
    (request,) = queue.pop()
    request.complete()
    guest.truncate(2, 0)
    with pytest.raises(QueueBroken) as caught:
        getattr(queue, call)()
    assert caught.value.code == lib.VU_E_FAULT
    assert "truncated" in str(caught.value)


@pytest.mark.parametrize("call", ["pop", "arm", "disarm", "flush"])
def test_a_revoked_ring_is_broken(guest: Guest, call: str) -> None:
    ring, queue = opened(guest)
    (request,) = queue.pop()
    guest.memory.revoke()
    with pytest.raises(MemoryLost):
        request.read(4096)
    with pytest.raises(MemoryLost):
        request.write(b"x")
    request.complete()
    with pytest.raises(QueueBroken) as caught:
        getattr(queue, call)()
    assert caught.value.code == lib.VU_E_FAULT
    assert ring.used_index == 0, "nothing was written"


def test_a_truncated_log_breaks_the_ring_before_the_driver_is_told(guest: Guest) -> None:
    fd = os.memfd_create("log")
    os.truncate(fd, 1 << 18)
    ring, queue = opened(guest, DirtyLog.map(fd, 1 << 18))
    (request,) = queue.pop()
    request.write(b"x")
    request.complete()
    os.truncate(fd, 0)
    with pytest.raises(QueueBroken):
        queue.flush()
    assert ring.used_index == 0
    os.close(fd)


def test_the_peek_of_a_lost_page_is_not_an_error_yet(guest: Guest) -> None:
    """The chain is popped and can be completed with an error status."""
    _, queue = opened(guest)
    guest.truncate(0, 4096)
    (request,) = queue.pop()
    with pytest.raises(MemoryLost):
        request.read(16)
    request.complete(0)
    queue.flush()


def test_a_closed_queue_is_of_no_use_and_does_no_harm(guest: Guest) -> None:
    _, queue = opened(guest)
    (request,) = queue.pop()
    queue.close()
    queue.close()
    assert queue.base == 1
    for call in (queue.pop, queue.flush, queue.arm, lambda: request.read(4096), lambda: request.write(b"x")):
        with pytest.raises(ValueError, match="closed"):
            call()
    request.complete()


def test_every_code_has_words_of_its_own() -> None:
    codes = {name: getattr(lib, name) for name in dir(lib) if name.startswith("VU_E_")}
    assert len({explain(code) for code in codes.values()}) == len(codes)
    assert len(set(codes.values())) == len(codes)
