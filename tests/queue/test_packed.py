"""The native device side of packed rings against a plain driver, and against bytes that no driver writes."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.queue import model, packed
from tests.queue.guest import ALL, EVENT_IDX, INDIRECT, INDIRECT_DESC, NEXT, PAGE, USER, WRITE, Guest
from tests.queue.packed import AVAIL, DESC, DISABLE, ENABLE, USED, PackedDriver, PackedRing
from tests.queue.test_device_side import called, complete, pop_all, segments
from vhostuser._native import lib
from vhostuser.memory import DirtyLog
from vhostuser.protocol import QueueBroken
from vhostuser.virtqueue import DeviceQueue, Request

DATA = 0x10000
TABLES = 0x8000
LOG = 1 << 18


@pytest.fixture(scope="module")
def world() -> Iterator[Guest]:
    guest = Guest((0, 1 << 20), (1 << 20, 1 << 16), (1 << 32, 1 << 17))
    yield guest
    guest.close()


def broken_by(queue: DeviceQueue) -> int:
    with pytest.raises(QueueBroken) as caught:
        queue.pop()
    return caught.value.code


# ---- any bytes

addresses = st.sampled_from(
    [0, 1, DATA, TABLES, (1 << 20) - 8, (1 << 20) + (1 << 16) - 1, 1 << 30, 1 << 32, (1 << 32) + 5, (1 << 64) - 16]
)
lengths = st.sampled_from([0, 1, 15, 16, 32, 48, 64, 0x1000, 0x20000, 1 << 31, (1 << 32) - 1])
flag_bits = st.sampled_from([0, NEXT, WRITE, NEXT | WRITE, INDIRECT, INDIRECT | NEXT, INDIRECT | WRITE, 0x7F78])
rows = st.tuples(addresses, lengths, st.integers(0, 0xFFFF), flag_bits)


@settings(max_examples=400, deadline=None)
@given(
    size=st.sampled_from([1, 2, 3, 8]),
    features=st.sampled_from([ALL, EVENT_IDX, INDIRECT_DESC, 0]),
    table=st.lists(
        st.tuples(rows, st.sampled_from([AVAIL, AVAIL, AVAIL, USED, 0, AVAIL | USED])), min_size=8, max_size=8
    ),
    inner=st.lists(rows, min_size=4, max_size=4),
    start=st.integers(0, 20),
    held=st.integers(0, 2),
)
def test_any_bytes_in_a_ring_mean_what_the_model_says(
    world: Guest,
    size: int,
    features: int,
    table: list[tuple[packed.Row, int]],
    inner: list[packed.Row],
    start: int,
    held: int,
) -> None:
    ring = PackedRing(world, size, features=features)
    held = min(held, size, start)
    for position, ((addr, length, identity, flags), bits) in enumerate(table[:size], start):
        turned = 0 if ring.wrap(position) else AVAIL | USED
        ring.describe(position, (addr, length, identity, flags & ~(AVAIL | USED) | bits ^ turned))
    for at in (DATA, TABLES, 1, (1 << 20) - 8, (1 << 32) + 5):
        world.put(at, b"".join(packed.pack(row) for row in inner))
    base = ring.base(start, start - held)
    held = held if base >> 16 else 0  # one in so many bases cannot be told from one without a used half
    queue = ring.open(base=base)
    assert pop_all(queue) == packed.pop(ring, start, held)
    queue.close()


# ---- what drivers write

buffers = st.lists(
    st.tuples(st.integers(DATA, (1 << 20) + (1 << 16) - 70000) | st.integers(1 << 32, (1 << 32) + 60000),
              st.integers(1, 300) | st.integers(4000, 66000)),
    max_size=3,
)  # fmt: skip


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data(), size=st.sampled_from([1, 2, 3, 8, 13]), start=st.sampled_from([0, 1, 13, 25]))
def test_a_conversation_with_a_plain_driver(world: Guest, data: st.DataObject, size: int, start: int) -> None:
    ring = PackedRing(world, size)
    for place in range(start - min(start, size), start):  # what a driver and a device before us have left
        ring.describe(place, (0, 0, 0, ring.used_flags(place)))
    driver = PackedDriver(ring, start)
    log_fd = os.memfd_create("log")
    os.truncate(log_fd, LOG)
    log = DirtyLog.map(log_fd, LOG) if data.draw(st.booleans(), "log") else None
    queue = ring.open(base=ring.base(start, start), log=log)
    out: list[Request] = []
    order: list[int] = []
    pushed: list[tuple[int, int]] = []
    expected_dirty: set[int] = set()
    available = used = start
    call = os.eventfd(0, os.EFD_NONBLOCK)
    queue.set_call(call)
    for _ in range(data.draw(st.integers(1, 16), "steps")):
        step = data.draw(st.sampled_from(["offer", "offer", "pop", "push", "take"]), "step")
        if step == "offer":
            readable, writable = data.draw(buffers), data.draw(buffers)
            identity = driver.offer(
                readable, writable, None if driver.out else data.draw(st.sampled_from([None, TABLES]))
            )
            order += [] if identity is None else [identity]
        elif step == "pop":
            batch = queue.pop(data.draw(st.integers(1, 5), "most"))
            assert [segments(request) for request in batch] == [driver.out[i][1] for i in order[: len(batch)]]
            available += sum(driver.out[i][0] for i in order[: len(batch)])
            order = order[len(batch) :]
            out += batch
        elif step == "push":
            done = [out.pop(data.draw(st.integers(0, len(out) - 1), "which")) for _ in range(min(len(out), 3))]
            for request in done:
                expected_dirty |= complete(data, request, driver.out[request._chain.head][1].writable, world)
            moved = sum(driver.out[request._chain.head][0] for request in done)
            event = data.draw(st.integers(max(0, used - 1), used + size - 1), "event")
            flags = data.draw(st.sampled_from([ENABLE, DISABLE, DESC]), "flags")
            ring.ask(flags, event)
            pushed += [(request._chain.head, -1) for request in done]
            queue.flush()
            wanted = flags == ENABLE or (flags == DESC and used <= event < used + moved)
            assert called(call) == (wanted and bool(done))
            used += moved
        else:
            returned = driver.take()
            assert [identity for identity, _ in returned] == [identity for identity, _ in pushed[: len(returned)]]
            pushed = pushed[len(returned) :]
        assert queue.base == ring.base(available, used)
    driver.take()
    assert queue.out == len(out) == lib.vu_queue_out(queue.native)
    if log:
        assert model.bits(os.pread(log_fd, LOG, 0)) == expected_dirty
    queue.close()
    for fd in (log_fd, call):
        os.close(fd)


@pytest.mark.parametrize("size", [1, 5, 32768])
def test_rings_of_any_size_go_round(guests: object, size: int) -> None:
    guest = Guest((0, 1 << 20))
    ring = PackedRing(guest, size)
    driver, queue = PackedDriver(ring), ring.open()
    few = min(size, 50)
    driver.ids = driver.ids[:few]
    rounds = 3 * size // few if size < 50 else 3
    for _ in range(rounds):
        for _ in range(few):
            assert driver.offer([], [(0xF0000, 1)]) is not None
        requests = queue.pop()
        for request in reversed(requests):
            request.complete(1)
        queue.flush()
        assert len(driver.take()) == few
    assert queue.base == ring.base(rounds * few, rounds * few)
    queue.close()
    guest.close()


def test_the_length_of_what_was_not_written_does_not_count(guest: Guest) -> None:
    ring = PackedRing(guest, 4)
    driver, queue = PackedDriver(ring), ring.open()
    driver.offer([], [(0x8000, 8)])
    queue.pop()[0].complete(0)
    queue.flush()
    assert ring.row(0)[3] == AVAIL | USED
    queue.close()


# ---- where it begins


@pytest.mark.parametrize("turn", [0, 1, 2])
def test_a_base_without_its_used_half_means_that_nothing_is_in_flight(guest: Guest, turn: int) -> None:
    """DPDK's front-end and back-end say the next available place alone."""
    ring = PackedRing(guest, 8)
    start = 8 * turn + 3
    queue = ring.open(base=ring.word(start))
    PackedDriver(ring, start).offer([], [(0x8000, 8)])
    queue.pop()[0].complete()
    queue.flush()
    assert ring.is_used(start) and queue.base == ring.base(start + 1, start + 1)
    queue.close()


@pytest.mark.parametrize("base", [0x8008, 0x7FFF8003, 0x80038002])
def test_a_base_outside_of_the_ring_is_refused(guest: Guest, base: int) -> None:
    """The index too large, the used index too large, and the device ahead of the driver."""
    with pytest.raises(QueueBroken) as caught:
        PackedRing(guest, 8).open(base=base)
    assert caught.value.code == lib.VU_E_INDEX


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"size": 0}, lib.VU_E_SIZE),
        ({"size": 32769}, lib.VU_E_SIZE),
        ({"desc": 8}, lib.VU_E_ALIGN),
        ({"avail": 0x102}, lib.VU_E_ALIGN),
        ({"used": 0x102}, lib.VU_E_ALIGN),
        ({"desc": 1 << 40}, lib.VU_E_RANGE),
        ({"used": (1 << 64) - 4}, lib.VU_E_OVERFLOW),
    ],
)
def test_a_ring_that_memory_cannot_hold_is_not_opened(guest: Guest, changes: dict[str, int], code: int) -> None:
    with pytest.raises(QueueBroken) as caught:
        PackedRing(guest, 8).open(**changes)
    assert caught.value.code == code


# ---- what no driver may do


def test_a_chain_that_goes_round_the_ring_is_a_loop(guest: Guest) -> None:
    ring = PackedRing(guest, 4)
    for position in range(4):
        ring.describe(position, (0x8000, 1, 0, NEXT | ring.available_flags(position)))
    assert broken_by(ring.open()) == lib.VU_E_LOOP


def test_places_that_were_not_returned_are_not_taken_again(guest: Guest) -> None:
    """A driver that turns its flags at once would otherwise hand out more chains than the ring has places."""
    ring = PackedRing(guest, 2)
    driver, queue = PackedDriver(ring), ring.open()
    driver.offer([], [(0x8000, 1)])
    driver.offer([], [(0x8001, 1)])
    requests = queue.pop()
    for position in (2, 3):
        ring.describe(position, (0x9000, 1, 0, WRITE | ring.available_flags(position)))
    assert queue.pop() == [] and not queue.arm()
    requests[0].complete()
    queue.flush()
    assert queue.out == 1
    queue.close()


def test_the_chains_before_the_bad_one_are_served(guest: Guest) -> None:
    ring = PackedRing(guest, 4)
    driver, queue = PackedDriver(ring), ring.open()
    driver.offer([], [(0x8000, 1)])
    ring.describe(1, (1 << 60, 1, 7, ring.available_flags(1)))
    assert [request._chain.head for request in queue.pop()] == [0]
    with pytest.raises(QueueBroken) as caught:
        queue.pop()
    assert (caught.value.code, caught.value.head) == (lib.VU_E_RANGE, 1), "the head is the place in the ring"


@pytest.mark.parametrize("call", ["pop", "arm", "disarm", "flush"])
def test_a_ring_that_is_lost_is_broken(guest: Guest, call: str) -> None:
    ring = PackedRing(guest, 4)
    driver, queue = PackedDriver(ring), ring.open()
    driver.offer([], [(0x8000, 1)])
    for request in queue.pop():
        request.complete()
    guest.truncate(0, 0)
    with pytest.raises(QueueBroken) as caught:
        getattr(queue, call)()
    assert caught.value.code == lib.VU_E_FAULT


# ---- notifications


@pytest.mark.parametrize("features", [0, EVENT_IDX])
@pytest.mark.parametrize("start", [0, 7, 8])
def test_asking_for_kicks(guest: Guest, features: int, start: int) -> None:
    ring = PackedRing(guest, 8, features=features)
    queue = ring.open(base=ring.base(start, start))
    assert not queue.arm()
    assert ring.asked == ((ring.word(start), DESC) if features else (0, ENABLE))
    queue.disarm()
    assert ring.asked[1] == DISABLE
    PackedDriver(ring, start).offer([], [(0x8000, 1)])
    assert queue.arm(), "there is something already"
    queue.close()


def test_a_place_is_not_looked_at_without_the_event_index(guest: Guest) -> None:
    ring = PackedRing(guest, 8, features=0)
    driver, queue = PackedDriver(ring), ring.open()
    call = os.eventfd(0, os.EFD_NONBLOCK)
    queue.set_call(call)
    ring.ask(DESC, 5)
    driver.offer([], [(0x8000, 1)])
    queue.pop()[0].complete()
    queue.flush()
    assert called(call)
    queue.close()
    os.close(call)


def test_several_flushes_between_two_signals_count_together(guest: Guest) -> None:
    """A whole turn without a signal still passes every place."""
    ring = PackedRing(guest, 2)
    driver, queue = PackedDriver(ring), ring.open()
    lengths = [0]
    for _ in range(5):
        driver.offer([], [(0x8000, 1)])
        lib.vu_queue_push(queue.native, [queue.pop()[0]._chain], lengths, 1)
        driver.take()
    ring.ask(DESC, 3)
    call = os.eventfd(0, os.EFD_NONBLOCK)
    queue.set_call(call)
    queue.flush()
    assert called(call)
    queue.close()
    os.close(call)


# ---- the dirty log


def test_writes_to_the_ring_are_marked_where_they_are(guest: Guest) -> None:
    """Whatever SET_VRING_ADDR says of a log address: QEMU gives that of the device area."""
    ring = PackedRing(guest, 8, at=2 * PAGE)
    ring.device = 9 * PAGE
    log_fd = os.memfd_create("log")
    os.truncate(log_fd, PAGE)
    log = DirtyLog.map(log_fd, PAGE)
    places = {"desc": USER + ring.desc, "avail": USER + ring.driver, "used": USER + ring.device}
    queue = ring.open(log=log, log_used=True, guest_addresses=False, **places)
    PackedDriver(ring).offer([(0x8000, 1)], [])
    queue.pop()[0].complete()
    queue.flush()
    assert model.bits(os.pread(log_fd, PAGE, 0)) == {2}
    queue.arm()
    assert model.bits(os.pread(log_fd, PAGE, 0)) == {2, 9}
    queue.close()
    os.close(log_fd)
