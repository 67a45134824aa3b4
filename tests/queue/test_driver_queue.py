"""The driver's queue in batches, in any layout, over a migration, waiting, and written byte by byte."""

import os
import threading
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.queue.guest import EVENT_IDX, Guest
from vhostuser._native import lib
from vhostuser.driverqueue import Descriptor, DriverQueue, RingParts
from vhostuser.memory import MemoryLost
from vhostuser.protocol import QueueBroken, VirtioFeature
from vhostuser.virtqueue import DeviceQueue, RingSetup

MIB = 1 << 20
DATA = MIB
INDIRECT = VirtioFeature.RING_INDIRECT_DESC.mask


@pytest.fixture
def world() -> Iterator[Guest]:
    guest = Guest((0, 2 * MIB), (1 << 40, 64 * 1024))
    yield guest
    guest.close()


def device_of(queue: DriverQueue, features: int = 0) -> DeviceQueue:
    setup = RingSetup(queue.size, queue.desc, queue.avail, queue.used, features=features, guest_addresses=True)
    return setup.open(queue.memory)


def judged(device: DeviceQueue) -> int:
    """Why the device refuses the ring."""
    with pytest.raises(QueueBroken) as caught:
        device.pop()
    device.close()
    return caught.value.code


segments = st.lists(st.tuples(st.integers(DATA, 2 * MIB - 256), st.integers(1, 256)), max_size=3)
chains = st.tuples(segments, segments).filter(any)


Chain = tuple[list[tuple[int, int]], list[tuple[int, int]]]


@given(st.lists(chains, max_size=12), st.booleans(), st.booleans())
def test_a_batch_is_what_single_calls_make(batch: list[Chain], indirect: bool, event_idx: bool) -> None:
    """Against the slow way: the same chains one by one on a second ring give the same bytes and heads."""
    guest = Guest((0, 2 * MIB))
    options = {"indirect": indirect, "event_idx": event_idx}
    one, many = DriverQueue(guest.memory, 0, 16, **options), DriverQueue(guest.memory, MIB // 2, 16, **options)
    alone = []
    for chain in batch:
        head = one.offer(*chain)
        if head is None:
            break
        alone.append(head)
    assert many.offer_many(batch) == alone
    assert one.publish() == many.publish()
    features = indirect * INDIRECT | event_idx * EVENT_IDX
    devices = [device_of(queue, features) for queue in (one, many)]
    popped = [device.pop() for device in devices]
    assert [(r.readable, r.writable) for r in popped[0]] == [(r.readable, r.writable) for r in popped[1]]
    for device, requests in zip(devices, popped, strict=True):
        for request in requests:
            request.complete(request.writable)
        device.flush()
        device.close()
    singly = [one.take() for _ in alone]
    assert many.take_many() == singly
    assert many.take_many() == []
    guest.close()


def test_the_parts_may_lie_anywhere(world: Guest) -> None:
    parts = RingParts(desc=1 << 40, avail=MIB + 2, used=128, tables=MIB + 64)
    queue = DriverQueue(world.memory, parts, 8, indirect=True)
    assert (queue.desc, queue.avail, queue.used) == parts[:3]
    queue.offer([(DATA, 3)], [(DATA + 100, 5)])
    queue.publish()
    device = device_of(queue, INDIRECT)
    (request,) = device.pop()
    assert (request.readable, request.writable) == (3, 5)
    request.complete(5)
    device.flush()
    device.close()
    assert queue.take() == (0, 5)


@pytest.mark.parametrize(
    ("parts", "code"),
    [
        (RingParts(8, 4096, 8192), lib.VU_E_ALIGN),
        (RingParts(0, 4097, 8192), lib.VU_E_ALIGN),
        (RingParts(0, 4096, 8194), lib.VU_E_ALIGN),
        (RingParts(0, 4096, 8192, 8), lib.VU_E_ALIGN),
        (RingParts(2 * MIB - 16, 4096, 8192), lib.VU_E_RANGE),
        (RingParts(0, (1 << 64) - 2, 8192), lib.VU_E_RANGE),
        (RingParts(0, 4096, 8192, 2 * MIB - 16), lib.VU_E_RANGE),
    ],
)
def test_parts_that_do_not_fit_are_refused(world: Guest, parts: RingParts, code: int) -> None:
    with pytest.raises(QueueBroken) as caught:
        DriverQueue(world.memory, parts, 8, indirect=True)
    assert caught.value.code == code


def test_a_queue_goes_on_in_memory_that_was_copied(world: Guest) -> None:
    """As at the destination of a migration: what was offered here is taken back there."""
    queue = DriverQueue(world.memory, 0, 8)
    queue.offer(writable=[(DATA, 4)])
    queue.publish()
    there = Guest((0, 2 * MIB), (1 << 40, 64 * 1024))
    there.put(0, world.get(0, MIB))
    queue.move(there.memory)
    device = device_of(queue)
    (request,) = device.pop()
    request.write(b"abcd")
    request.complete()
    device.flush()
    device.close()
    assert queue.take() == (0, 4)
    assert (there.get(DATA, 4), world.get(DATA, 4)) == (b"abcd", bytes(4))
    small = Guest((0, 4096))
    with pytest.raises(QueueBroken):
        DriverQueue(there.memory, 64 * 1024, 8).move(small.memory)
    there.close()
    small.close()


# ---- order


def test_buffers_go_out_in_just_the_order_given(world: Guest) -> None:
    """A device must refuse a readable buffer behind a writable one; to try that it must be possible to offer one."""
    queue = DriverQueue(world.memory, 0, 8)
    queue.offer_in_order([(DATA, 1, True), (DATA, 2, False)])
    queue.publish()
    device = device_of(queue)
    assert judged(device) == lib.VU_E_ORDER


# ---- waiting


def used_later(queue: DriverQueue, call: int, *, asleep: bool) -> threading.Thread:
    """A device in a thread that returns one chain; asleep: once the driver has asked for a call."""
    device = device_of(queue)
    device.set_call(call)
    (request,) = device.pop()
    queue.disarm()

    def use() -> None:
        while asleep and queue.raw.available_flags:
            os.sched_yield()
        request.complete(0)
        device.flush()
        device.close()

    thread = threading.Thread(target=use)
    thread.start()
    return thread


@pytest.mark.parametrize(("spin", "polled"), [(0.0, False), (0.0, True), (5.0, False)])
def test_waiting_ends_when_something_is_used(world: Guest, spin: float, polled: bool) -> None:
    queue = DriverQueue(world.memory, 0, 8)
    queue.offer([(DATA, 1)])
    queue.publish()
    call = os.eventfd(0, os.EFD_NONBLOCK)
    thread = used_later(queue, call, asleep=not spin and not polled)
    assert queue.wait(-1 if polled else call, timeout=5, spin=spin)
    assert queue.take() == (0, 0)
    thread.join()
    os.close(call)


@pytest.mark.parametrize("polled", [False, True])
def test_waiting_ends_in_time(world: Guest, polled: bool) -> None:
    queue = DriverQueue(world.memory, 0, 8)
    call = os.eventfd(0, os.EFD_NONBLOCK)
    assert not queue.wait(-1 if polled else call, timeout=0)
    assert not queue.wait(-1 if polled else call, timeout=0.005)
    os.eventfd_write(call, 1)  # a call for nothing
    assert not queue.wait(-1 if polled else call, timeout=0.005)
    os.close(call)


def test_waiting_ends_when_the_ring_is_lost(world: Guest) -> None:
    queue = DriverQueue(world.memory, 0, 8)
    world.memory.revoke()
    with pytest.raises(MemoryLost):
        queue.wait(timeout=5)
    with pytest.raises(MemoryLost):
        queue.take_many()


# ---- byte by byte

ILLEGAL: dict[str, tuple[Callable[[DriverQueue], object], int]] = {
    "a loop": (lambda q: [q.raw.describe(i, DATA, 1, Descriptor.NEXT, (i + 1) % 2) for i in range(2)], lib.VU_E_LOOP),
    "a head out of range": (lambda q: q.raw.make_available(0, [8]), lib.VU_E_HEAD),
    "a next out of range": (lambda q: q.raw.describe(0, DATA, 1, Descriptor.NEXT, 8), lib.VU_E_HEAD),
    "an indirect table that holds another": (
        lambda q: (
            q.raw.describe(0, DATA, 16, Descriptor.INDIRECT),
            q.raw.describe_at(DATA, 0, DATA + 16, 16, Descriptor.INDIRECT),
        ),
        lib.VU_E_INDIRECT,
    ),
    "a readable buffer behind a writable one": (
        lambda q: (
            q.raw.describe(0, DATA, 1, Descriptor.WRITE | Descriptor.NEXT, 1),
            q.raw.describe(1, DATA, 1),
        ),
        lib.VU_E_ORDER,
    ),
    "an address outside of memory": (lambda q: q.raw.describe(0, 1 << 50, 1), lib.VU_E_RANGE),
}


@pytest.mark.parametrize("rule", ILLEGAL)
def test_illegal_rings_can_be_built(world: Guest, rule: str) -> None:
    """Each is one that our device side refuses, by the very rule it was built to break."""
    queue = DriverQueue(world.memory, 0, 8)
    device = device_of(queue, INDIRECT)
    build, code = ILLEGAL[rule]
    queue.raw.make_available(0, [0])
    build(queue)
    queue.raw.available_index = 1
    assert judged(device) == code


def test_an_index_that_jumps(world: Guest) -> None:
    queue = DriverQueue(world.memory, 0, 8)
    device = device_of(queue)
    queue.raw.available_index = 9
    assert judged(device) == lib.VU_E_INDEX


def test_every_field_of_the_raw_ring_is_where_the_specification_has_it(world: Guest) -> None:
    raw = DriverQueue(world.memory, RingParts(0, 4096, 8192), 4).raw
    raw.available_flags, raw.available_index, raw.used_event = 1, 2, 3
    raw.make_available(5, [7, 8])
    assert world.get(4096, 14) == bytes.fromhex("0100 0200 0000 0700 0800 0000 0300")
    raw.used_flags, raw.used_index, raw.available_event = 4, 5, 6
    raw.use(6, 0x11111111, 0x22222222)
    assert (
        world.get(8192, 38) == bytes.fromhex("0400 0500") + bytes(16) + b"\x11" * 4 + b"\x22" * 4 + bytes(8) + b"\6\0"
    )
    assert (raw.available_flags, raw.available_index, raw.used_event) == (1, 2, 3)
    assert (raw.used_flags, raw.used_index, raw.available_event, raw.used_entry(2)) == (
        4,
        5,
        6,
        (0x11111111, 0x22222222),
    )
    with pytest.raises(LookupError):
        DriverQueue(world.memory, 0, 4).raw._store(1 << 50, 0)
