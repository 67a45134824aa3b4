"""The native driver side of split rings against a plain device, and against devices that lie."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.queue import model
from tests.queue.guest import ALL, EVENT_IDX, Guest, Ring
from vhostuser._native import lib
from vhostuser.driverqueue import DriverQueue
from vhostuser.memory import MemoryLost
from vhostuser.protocol import QueueBroken

MIB = 1 << 20
DATA = 1 << 32


@pytest.fixture(scope="module")
def world() -> Iterator[Guest]:
    guest = Guest((0, 8 * MIB), (DATA, MIB))
    yield guest
    guest.close()


def ring_of(queue: DriverQueue, guest: Guest) -> Ring:
    """The same ring, as bytes."""
    ring = Ring(guest, queue.size, features=ALL)
    ring.desc, ring.avail, ring.used = queue.desc, queue.avail, queue.used
    return ring


buffers = st.lists(st.tuples(st.integers(DATA, DATA + 0x1000), st.integers(1, 0x2000)), max_size=3)


@settings(max_examples=200, deadline=None)
@given(data=st.data(), size=st.sampled_from([1, 2, 8]), indirect=st.booleans(), event_idx=st.booleans())
def test_a_conversation_with_a_plain_device(
    world: Guest, data: st.DataObject, size: int, indirect: bool, event_idx: bool
) -> None:
    queue = DriverQueue(world.memory, 64, size, event_idx=event_idx, indirect=indirect)
    ring = ring_of(queue, world)
    offered: dict[int, model.Chain] = {}
    out: list[model.Chain] = []
    returned: list[tuple[int, int]] = []
    taken = used = published = 0
    for _ in range(data.draw(st.integers(1, 20), "steps")):
        step = data.draw(st.sampled_from(["offer", "publish", "pop", "push", "take", "arm"]), "step")
        if step == "offer":
            readable, writable = data.draw(buffers), data.draw(buffers)
            head = queue.offer(readable, writable)
            held = sum(len(chain.readable) + len(chain.writable) for chain in offered.values())
            room = len(offered) < size if indirect else held + len(readable) + len(writable) <= size
            assert (head is not None) == (room and bool(readable or writable))
            if head is not None:
                assert head not in offered
                offered[head] = model.Chain(head, readable, writable)
        elif step == "publish":
            before, event = ring.available, data.draw(st.integers(0, 20))
            world.put(ring.used + 4 + 8 * size, event.to_bytes(2, "little"))
            world.put(ring.used, flags := data.draw(st.sampled_from([b"\0\0", b"\1\0"])))
            kick = queue.publish()
            wanted = model.wants_event(event, before, ring.available) if event_idx else flags == b"\0\0"
            assert kick == (wanted and ring.available != before)
            published = ring.available
        elif step == "pop":
            chains, code = model.pop(ring, taken, {chain.head for chain in out})
            assert code == 0 and all(chain == offered[chain.head] for chain in chains)
            taken, out = published, out + chains
        elif step == "push" and out:
            chain = out.pop(data.draw(st.integers(0, len(out) - 1)))
            length = data.draw(st.integers(0, model.size(chain.writable)))
            ring.return_chains(used, [(chain.head, length)])
            used += 1
            returned.append((chain.head, length))
        elif step == "take":
            expected = returned.pop(0) if returned else None
            assert queue.take() == expected
            if expected is not None:
                del offered[expected[0]]
        elif step == "arm":
            assert queue.arm() == bool(returned)
            asked = int.from_bytes(world.get(ring.avail + 4 + 2 * size, 2), "little")
            assert asked == event_idx * (used - len(returned))


@pytest.mark.parametrize("size", [1, 32768])
@pytest.mark.parametrize("indirect", [False, True])
def test_the_smallest_and_the_largest_ring(world: Guest, size: int, indirect: bool) -> None:
    if DriverQueue.bytes_needed(size, indirect=indirect) > 8 * MIB:
        size = 2048
    queue = DriverQueue(world.memory, 0, size, indirect=indirect)
    for _ in range(size):
        assert queue.offer([(DATA, 1)]) is not None
    assert queue.offer([(DATA, 1)]) is None
    queue.publish()
    heads = [chain.head for chain in model.pop(ring_of(queue, world), 0, set())[0][:2]] if size == 1 else [0]
    assert heads == [0]


def test_both_native_sides_go_round_the_indexes(world: Guest) -> None:
    driver = DriverQueue(world.memory, 0, 128, event_idx=True)
    ring = ring_of(driver, world)
    device = ring.open(features=EVENT_IDX)
    for turn in range(66000 // 128):
        heads = [driver.offer([], [(DATA + n, 1)]) for n in range(128)]
        asked = turn % 3 != 1
        assert driver.publish() == asked, "a kick is wanted only when the device has asked"
        requests = device.pop()
        assert len(requests) == 128
        for request in requests:
            request.complete(1)
        device.flush()
        if turn % 3 != 0:
            assert device.arm() is False
        assert [driver.take() for _ in range(128)] == [(head, 1) for head in heads]
    assert driver.take() is None
    device.close()


@pytest.mark.parametrize("event_idx", [False, True])
def test_a_driver_that_does_not_want_calls_gets_none(world: Guest, event_idx: bool) -> None:
    queue = DriverQueue(world.memory, 0, 8, event_idx=event_idx)
    device = ring_of(queue, world).open(features=EVENT_IDX * event_idx)
    queue.disarm()
    for turn in range(20):
        queue.offer([(DATA, 1)])
        queue.publish()
        (request,) = device.pop()
        request.complete()
        assert lib.vu_queue_push(device.native, [request._chain], [0], 1) == 0
        assert lib.vu_queue_signal(device.native) == 0
        assert queue.take() == (0, 0), turn
    device._finished.clear()
    device.close()


LIES: dict[str, tuple[Callable[[Ring], None], int]] = {
    "a head that is no descriptor": (lambda ring: ring.return_chains(0, [(4, 0)]), lib.VU_E_HEAD),
    "a head above 16 bits": (lambda ring: ring.return_chains(0, [(0x10000, 0)]), lib.VU_E_HEAD),
    "one that was not offered": (lambda ring: ring.return_chains(0, [(3, 0)]), lib.VU_E_HEAD),
    "the inside of a chain": (lambda ring: ring.return_chains(0, [(1, 0)]), lib.VU_E_HEAD),
    "more bytes than there was room for": (lambda ring: ring.return_chains(0, [(0, 11)]), lib.VU_E_SIZE),
    "more entries than the ring has": (lambda ring: setattr(ring, "used_index", 5), lib.VU_E_INDEX),
    "the same chain twice": (lambda ring: ring.return_chains(0, [(0, 1), (0, 1)]), lib.VU_E_HEAD),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_device_that_lies_is_found_out(world: Guest, lie: str) -> None:
    queue = DriverQueue(world.memory, 0, 4)
    assert queue.offer([(DATA, 5)], [(DATA, 10)]) == 0
    queue.publish()
    tell, code = LIES[lie]
    tell(ring_of(queue, world))
    with pytest.raises(QueueBroken) as caught:
        while queue.take():
            pass
    assert caught.value.code == code


@pytest.mark.parametrize(
    ("at", "size", "code"),
    [
        (0, 3, lib.VU_E_SIZE),
        (0, 0, lib.VU_E_SIZE),
        (0, 65536, lib.VU_E_SIZE),
        (1, 8, lib.VU_E_ALIGN),
        (8 * MIB - 64, 8, lib.VU_E_RANGE),
        ((1 << 64) - 64, 8, lib.VU_E_RANGE),
    ],
)
def test_a_ring_that_does_not_fit_is_refused(world: Guest, at: int, size: int, code: int) -> None:
    with pytest.raises(QueueBroken) as caught:
        DriverQueue(world.memory, at, size)
    assert caught.value.code == code


def test_a_lost_ring_is_an_error(guest: Guest) -> None:
    queue = DriverQueue(guest.memory, 0, 8)
    guest.memory.revoke()
    for call in (queue.take, queue.arm, queue.disarm, lambda: queue.offer([(0, 1)])):
        with pytest.raises(MemoryLost):
            call()
