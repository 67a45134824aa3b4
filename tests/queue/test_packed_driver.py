"""The native driver side of packed rings against a plain device, against our own, and against devices that lie."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.queue import model
from tests.queue.guest import ALL, EVENT_IDX, WRITE, Guest
from tests.queue.packed import DESC, DISABLE, ENABLE, PACKED, PackedDevice, PackedRing
from vhostuser._native import lib
from vhostuser.driverqueue import DriverQueue
from vhostuser.memory import MemoryLost
from vhostuser.protocol import QueueBroken
from vhostuser.virtqueue import DeviceQueue, RingSetup

MIB = 1 << 20
DATA = 1 << 32


@pytest.fixture(scope="module")
def world() -> Iterator[Guest]:
    guest = Guest((0, 8 * MIB), (DATA, MIB))
    yield guest
    guest.close()


def ring_of(queue: DriverQueue, guest: Guest) -> PackedRing:
    """The same ring, as bytes."""
    ring = PackedRing.__new__(PackedRing)
    ring.guest, ring.size, ring.features = guest, queue.size, ALL | PACKED
    ring.desc, ring.driver, ring.device = queue.desc, queue.avail, queue.used
    return ring


def device_of(queue: DriverQueue, guest: Guest, features: int = ALL) -> DeviceQueue:
    setup = RingSetup(
        queue.size,
        queue.desc,
        queue.avail,
        queue.used,
        base=queue.first_base,
        features=features | PACKED,
        guest_addresses=True,
    )
    return setup.open(guest.memory)


buffers = st.lists(st.tuples(st.integers(DATA, DATA + 0x1000), st.integers(1, 0x2000)), max_size=3)


@settings(max_examples=200, deadline=None)
@given(data=st.data(), size=st.sampled_from([1, 2, 3, 8]), indirect=st.booleans(), event_idx=st.booleans())
def test_a_conversation_with_a_plain_device(
    world: Guest, data: st.DataObject, size: int, indirect: bool, event_idx: bool
) -> None:
    queue = DriverQueue(world.memory, 64, size, event_idx=event_idx, indirect=indirect, packed=True)
    ring = ring_of(queue, world)
    device = PackedDevice(ring)
    offered: dict[int, model.Chain] = {}
    unseen: list[int] = []
    returned: list[tuple[int, int]] = []
    places: dict[int, int] = {}
    published = 0
    for _ in range(data.draw(st.integers(1, 20), "steps")):
        step = data.draw(st.sampled_from(["offer", "publish", "pop", "push", "take", "arm"]), "step")
        if step == "offer":
            readable, writable = data.draw(buffers), data.draw(buffers)
            head = queue.offer(readable, writable)
            wanted = 1 if indirect else len(readable) + len(writable)
            assert (head is not None) == (sum(places.values()) + wanted <= size and bool(readable or writable))
            if head is not None:
                assert head not in offered
                offered[head], places[head] = model.Chain(head, readable, writable), wanted
                unseen.append(head)
                assert not ring.is_available(published), "not before it is published"
        elif step == "publish":
            moved = sum(places[head] for head in unseen)
            event = data.draw(st.integers(max(0, published - 1), published + size - 1))
            flags = data.draw(st.sampled_from([ENABLE, DISABLE, DESC]))
            world.put(ring.device, struct.pack("<HH", ring.word(event), flags))
            passed = flags != DISABLE if not event_idx or flags != DESC else published <= event < published + moved
            assert queue.publish() == (passed and bool(unseen))
            published, unseen = published + moved, []
        elif step == "pop":
            assert all(chain == offered[chain.head] for chain in device.take())
            assert device.next == published
        elif step == "push" and device.out:
            head = data.draw(st.sampled_from(sorted(device.out)))
            length = data.draw(st.integers(0, model.size(device.out[head][0].writable)))
            device.give_back(head, length)
            returned.append((head, length))
        elif step == "take":
            expected = returned.pop(0) if returned else None
            assert queue.take() == expected
            if expected is not None:
                del offered[expected[0]], places[expected[0]]
        elif step == "arm":
            assert queue.arm() == bool(returned)
            word, flags = struct.unpack("<HH", world.get(ring.driver, 4))
            seen = device.used - sum(places[head] for head, _ in returned)
            assert (word, flags) == (ring.word(seen), DESC) if event_idx else flags == ENABLE


@pytest.mark.parametrize("indirect", [False, True])
@pytest.mark.parametrize("size", [1, 7, 128])
def test_both_native_sides_go_round(world: Guest, size: int, indirect: bool) -> None:
    driver = DriverQueue(world.memory, 0, size, event_idx=True, indirect=indirect, packed=True)
    device = device_of(driver, world)
    per_chain = 1 if indirect or size == 1 else 2
    for turn in range(40):
        heads = [driver.offer([(DATA, 1)] * (per_chain - 1), [(DATA + n, 1)]) for n in range(size // per_chain)]
        assert None not in heads
        asked = turn % 3 != 1
        assert driver.publish() == asked, "a kick is wanted only when the device has asked"
        requests = []
        while batch := device.pop():
            requests += batch
        assert [request._chain.head for request in requests] == heads
        for request in requests:
            request.complete(1)
        device.flush()
        if turn % 3 != 0:
            assert device.arm() is False
        else:
            device.disarm()
        assert driver.take_many() == [(head, 1) for head in heads]
    assert driver.take() is None
    device.close()


@pytest.mark.parametrize("event_idx", [False, True])
def test_a_driver_that_does_not_want_calls_gets_none(world: Guest, event_idx: bool) -> None:
    queue = DriverQueue(world.memory, 0, 8, event_idx=event_idx, packed=True)
    device = device_of(queue, world, EVENT_IDX * event_idx)
    call = os.eventfd(0, os.EFD_NONBLOCK)
    device.set_call(call)
    queue.disarm()
    for turn in range(40):
        queue.offer([(DATA, 1)])
        if turn == 20:
            assert queue.arm() is False
        queue.publish()
        device.pop()[0].complete()
        device.flush()
        assert queue.take() is not None
        if turn < 20:
            with pytest.raises(BlockingIOError):
                os.eventfd_read(call)
    assert os.eventfd_read(call) >= 1
    device.close()
    os.close(call)


@pytest.mark.parametrize(
    ("identity", "length", "code"),
    [(5, 0, lib.VU_E_HEAD), (0xFFFF, 0, lib.VU_E_HEAD), (1, 0, lib.VU_E_HEAD), (0, 17, lib.VU_E_SIZE)],
    ids=["none", "outside", "not-out", "too-long"],
)
def test_a_device_that_lies_is_noticed(world: Guest, identity: int, length: int, code: int) -> None:
    queue = DriverQueue(world.memory, 0, 4, packed=True)
    assert queue.offer([], [(DATA, 16)]) == 0
    queue.publish()
    ring = ring_of(queue, world)
    ring.describe(0, (0, length, identity, ring.used_flags(0) | WRITE))
    with pytest.raises(QueueBroken) as caught:
        queue.take()
    assert caught.value.code == code


@pytest.mark.parametrize("size", [0, 32769])
def test_sizes_that_no_ring_has(world: Guest, size: int) -> None:
    with pytest.raises(QueueBroken) as caught:
        DriverQueue(world.memory, 0, size, packed=True)
    assert caught.value.code == lib.VU_E_SIZE


def test_lost_memory_is_told() -> None:
    guest = Guest((0, MIB))
    queue = DriverQueue(guest.memory, 0, 8, packed=True)
    guest.truncate(0, 0)
    for call in (lambda: queue.offer([(0, 1)]), queue.take, queue.arm, queue.disarm):
        with pytest.raises(MemoryLost):
            call()
    guest.close()
