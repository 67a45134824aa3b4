"""The in-flight region: what is in it at every step, what a crash at any step leaves, and what a liar may put there."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.queue.guest import PAGE, Guest, Ring
from vhostuser._native import lib
from vhostuser.protocol import Inflight, QueueBroken, RequestRefused
from vhostuser.virtqueue import DeviceQueue, InflightRegion

SIZE = 8


class Region:
    """An in-flight region of one queue as bytes, laid out by the specification ("Inflight I/O tracking")."""

    HEADER = struct.Struct("<QHHHH")  # features, version, desc_num, last_batch_head, used_idx
    ENTRY = struct.Struct("<B5xHQ")  # inflight, next, counter

    def __init__(self, queues: int = 1, queue_size: int = SIZE, index: int = 0) -> None:
        self.fd, self.size = InflightRegion.create(queues, queue_size)
        self.native = InflightRegion.map(self.fd, Inflight(self.size, 0, queues, queue_size))
        self.at = self.size // queues * index

    @property
    def header(self) -> tuple[int, int, int, int]:
        _, *rest = self.HEADER.unpack(os.pread(self.fd, 16, self.at))
        return tuple(rest)

    @header.setter
    def header(self, fields: tuple[int, int, int, int]) -> None:
        os.pwrite(self.fd, self.HEADER.pack(0, *fields), self.at)

    def entry(self, head: int) -> tuple[int, int, int]:
        return self.ENTRY.unpack(os.pread(self.fd, 16, self.at + 16 + 16 * head))

    def set_entry(self, head: int, inflight: int, following: int, counter: int) -> None:
        os.pwrite(self.fd, self.ENTRY.pack(inflight, following, counter), self.at + 16 + 16 * head)

    def taken(self, size: int = SIZE) -> list[int]:
        """Heads marked as in flight, in the order of their counters."""
        entries = {head: self.entry(head) for head in range(size)}
        return sorted((head for head in entries if entries[head][0]), key=lambda head: entries[head][2])

    def close(self) -> None:
        os.close(self.fd)


@pytest.fixture
def region() -> Iterator[Region]:
    made = Region()
    yield made
    made.close()


@pytest.fixture
def ring(guest: Guest) -> Ring:
    made = Ring(guest, SIZE)
    for head in range(SIZE):
        made.describe(head, 0x8000 + head, 1, 2)
    return made


def heads(queue: DeviceQueue, most: int = 128) -> list[int]:
    return [request._chain.head for request in queue.pop(most)]


def broken_code(queue: DeviceQueue) -> int:
    with pytest.raises(QueueBroken) as caught:
        queue.pop()
    return caught.value.code


# ---- the order of writes


def test_a_fresh_region_is_set_up_by_the_first_pop(ring: Ring, region: Region) -> None:
    queue = ring.open(inflight=region.native)
    assert region.header == (0, 0, 0, 0), "opening touches nothing"
    queue.pop()
    assert region.header == (1, SIZE, 0, 0)


def test_every_step_is_noted(ring: Ring, region: Region) -> None:
    queue = ring.open(inflight=region.native)
    ring.offer(0, [3, 1, 4])
    requests = queue.pop()
    assert [region.entry(head)[::2] for head in (3, 1, 4)] == [(1, 0), (1, 1), (1, 2)]
    requests[2].complete()
    requests[0].complete()
    assert region.taken() == [3, 1, 4], "completed, but not returned"
    queue.flush()
    # A batch: each entry names the one before it, last_batch_head the last one.
    assert region.header == (1, SIZE, 3, 2)
    assert region.entry(3)[:2] == (0, 4) and region.taken() == [1]
    requests[1].complete()
    queue.flush()
    assert region.header == (1, SIZE, 1, 3) and region.taken() == []


def test_queues_do_not_share_their_parts(ring: Ring) -> None:
    region = Region(queues=3, index=1)
    ring.offer(0, [5])
    queue = ring.open(inflight=region.native, index=1)
    queue.pop()
    assert region.taken() == [5]
    whole = os.pread(region.fd, region.size, 0)
    part = region.size // 3
    assert not any(whole[:part]) and not any(whole[2 * part :])
    region.close()


# ---- recovery


def crash(queue: DeviceQueue) -> None:
    """Ends a queue as SIGKILL does: nothing more is written."""
    queue.close()


def test_what_was_taken_comes_again_first_and_in_its_order(ring: Ring, region: Region) -> None:
    queue = ring.open(inflight=region.native)
    ring.offer(0, [6, 2, 7, 0])
    requests = queue.pop()
    requests[1].complete()
    queue.flush()
    crash(queue)
    ring.offer(4, [2])
    again = ring.open(inflight=region.native, base=ring.used_index)  # as QEMU does: it knows the used index only
    assert heads(again, 2) == [6, 7], "at most as many as asked"
    assert again.arm(), "there is more to pop"
    assert heads(again) == [0] and heads(again) == [2]
    assert region.taken() == [6, 7, 0, 2], "the counter goes on"
    assert again.base == 5


@pytest.mark.parametrize("start", [0, 0xFFFE])
@pytest.mark.parametrize("finished", range(4))
def test_a_crash_between_the_used_index_and_the_region(ring: Ring, region: Region, start: int, finished: int) -> None:
    """A batch of three was returned; of its entries ``finished`` had been cleared, and used_idx had not moved."""
    ring.used_index = start
    queue = ring.open(inflight=region.native, base=start)
    ring.offer(start, [0, 1, 2, 3, 4])
    requests = queue.pop()
    for request in requests[:3]:
        request.complete()
    queue.flush()
    crash(queue)
    for head in (0, 1, 2)[finished:]:
        _, following, counter = region.entry(head)
        region.set_entry(head, 1, following, counter)
    version, desc_num, last, _ = region.header
    region.header = (version, desc_num, last, start)
    again = ring.open(inflight=region.native)
    assert heads(again) == [3, 4], "what the driver has back is not served twice"
    assert region.header[3] == ring.used_index


def test_a_crash_in_the_middle_of_linking_a_batch(ring: Ring, region: Region) -> None:
    """last_batch_head has moved, the used index has not: nothing was returned."""
    queue = ring.open(inflight=region.native)
    ring.offer(0, [0, 1])
    queue.pop()
    crash(queue)
    version, desc_num, _, used = region.header
    region.set_entry(1, 1, 0, 1)
    region.header = (version, desc_num, 1, used)
    assert heads(ring.open(inflight=region.native)) == [0, 1]


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_no_request_is_lost_or_served_twice_wherever_it_ends(data: st.DataObject) -> None:
    """A life of offers, completions and crashes, against the plain statement: offered is either out or returned."""
    guest, region = Guest((0, 1 << 16)), Region()
    ring = Ring(guest, SIZE)
    for head in range(SIZE):
        ring.describe(head, 0x8000 + head, 1, 2)
    start = data.draw(st.sampled_from([0, 0xFFFA]), "start")
    ring.used_index = ring.available = start
    queue = ring.open(inflight=region.native, base=start)
    free, with_device, out = list(range(SIZE)), [], []
    for _ in range(data.draw(st.integers(1, 20), "steps")):
        step = data.draw(st.sampled_from(["offer", "pop", "push", "crash"]), "step")
        if step == "offer" and free:
            with_device.append(free.pop(data.draw(st.integers(0, len(free) - 1))))
            ring.offer(ring.available, with_device[-1:])
        elif step == "pop":
            out += queue.pop(data.draw(st.integers(1, 3)))
            assert [request._chain.head for request in out] == with_device[: len(out)]
        elif step == "push":
            for _ in range(min(len(out), data.draw(st.integers(1, 3)))):
                # In any order: what stays out keeps the order in which it was taken.
                place = data.draw(st.integers(0, len(out) - 1))
                out.pop(place).complete()
                free.append(with_device.pop(place))
            queue.flush()
        else:
            crash(queue)
            queue, out = ring.open(inflight=region.native, base=ring.used_index), []
    assert region.taken() == with_device[: len(region.taken())]
    queue.close()
    region.close()
    guest.close()


def test_a_fresh_region_with_a_ring_that_is_not(ring: Ring, region: Region) -> None:
    """After a migration: used_idx 0 beside a used index of 1000 does not tell of 1000 returned chains (spdk#3766)."""
    ring.used_index = 1000
    ring.offer(1000, [0, 1])
    queue = ring.open(inflight=region.native, base=1000)
    assert heads(queue) == [0, 1]
    assert region.taken() == [0, 1] and region.header == (1, SIZE, 0, 1000)
    crash(queue)
    assert heads(ring.open(inflight=region.native, base=1000)) == [0, 1]


def test_a_ring_that_the_guest_has_set_up_anew(ring: Ring, region: Region) -> None:
    """Everything was returned, then the guest was rebooted: the old region says used_idx 1, the ring says 0."""
    queue = ring.open(inflight=region.native)
    ring.offer(0, [0])
    queue.pop()[0].complete()
    queue.flush()
    queue.close()
    ring.used_index = 0
    ring.offer(0, [3])
    queue = ring.open(inflight=region.native)
    assert heads(queue) == [3] and region.taken() == [3]


def test_an_orderly_stop_goes_on_from_its_base(ring: Ring, region: Region) -> None:
    queue = ring.open(inflight=region.native)
    ring.offer(0, [0, 1])
    for request in queue.pop():
        request.complete()
    queue.flush()
    base = queue.base
    queue.close()
    ring.offer(2, [2])
    assert heads(ring.open(inflight=region.native, base=base)) == [2]


# ---- a region that lies


def test_a_region_that_nobody_has_used_has_nothing_in_flight(ring: Ring, region: Region) -> None:
    """Version 0: whatever else is in it is neither recovered nor left for the next time."""
    region.set_entry(5, 1, 0, 7)
    ring.offer(0, [1])
    assert heads(ring.open(inflight=region.native)) == [1]
    assert region.taken() == [1]


LIES = {
    "another ring size": {"header": (1, SIZE * 2, 0, 0)},
    "a ring size of 0": {"header": (1, 0, 0, 0)},
    "a version to come": {"header": (2, SIZE, 0, 0)},
    "a batch that starts outside": {"header": (1, SIZE, SIZE, 0xFFFF)},
    "a batch that leads outside": {"header": (1, SIZE, 2, 0xFFFE), "entry": (2, 1, 0xFFFF, 0)},
    "a batch that turns in a circle": {"header": (1, SIZE, 2, 0xFFFE), "entry": (2, 1, 2, 0)},
    "more returned than the ring holds": {"header": (1, SIZE, 0, 0xFFFF - SIZE)},
    "a used index from the future": {"header": (1, SIZE, 0, 1)},
}


@pytest.mark.parametrize("lie", LIES)
def test_a_region_that_contradicts_the_ring_is_refused(ring: Ring, region: Region, lie: str) -> None:
    region.set_entry(5, 1, 0, 0)
    region.header = LIES[lie]["header"]  # type: ignore[assignment]
    if entry := LIES[lie].get("entry"):
        region.set_entry(*entry)
    queue = ring.open(inflight=region.native)
    assert broken_code(queue) == lib.VU_E_INFLIGHT
    assert queue.broken is not None and queue.broken.head == -1


def test_equal_counters_and_the_largest_one(ring: Ring, region: Region) -> None:
    region.header = (1, SIZE, 0, 0)
    for head, counter in ((4, (1 << 64) - 1), (2, 7), (1, 7)):
        region.set_entry(head, 1, 0, counter)
    queue = ring.open(inflight=region.native)
    ring.offer(3, [0])
    assert heads(queue) == [1, 2, 4] and heads(queue) == [0]


def test_a_chain_in_flight_that_is_broken_breaks_the_ring(ring: Ring, region: Region) -> None:
    region.header = (1, SIZE, 0, 0)
    region.set_entry(2, 1, 0, 0)
    ring.describe(2, 1 << 50, 1)
    assert broken_code(ring.open(inflight=region.native)) == lib.VU_E_RANGE


def test_a_truncated_region_breaks_the_ring(ring: Ring, region: Region) -> None:
    queue = ring.open(inflight=region.native)
    ring.offer(0, [0])
    queue.pop()[0].complete()
    os.truncate(region.fd, 0)
    with pytest.raises(QueueBroken):
        queue.flush()
    assert queue.broken is not None and queue.broken.code == lib.VU_E_FAULT
    assert broken_code(ring.open(inflight=region.native)) == lib.VU_E_FAULT


@pytest.mark.parametrize(
    "described",
    [
        Inflight(PAGE, 0, 0, SIZE),
        Inflight(PAGE, 0, 1, 0),
        Inflight(PAGE, 0, 1, 32769),
        Inflight(143, 0, 1, SIZE),
        Inflight(192, 0, 65535, 32768),
        Inflight(PAGE + 1, 0, 1, SIZE),
        Inflight(PAGE, 8, 1, SIZE),
        Inflight(PAGE - 4, 4, 1, SIZE),
        Inflight((1 << 64) - 1, 0, 1, SIZE),
        Inflight(PAGE, (1 << 64) - 8, 1, SIZE),
    ],
)
def test_a_region_that_does_not_fit_its_file_or_its_numbers_is_refused(described: Inflight) -> None:
    fd = os.memfd_create("inflight")
    os.truncate(fd, PAGE)
    with pytest.raises(RequestRefused, match="in-flight region of"):
        InflightRegion.map(fd, described)
    os.close(fd)


def test_a_region_may_begin_anywhere_in_its_file(ring: Ring) -> None:
    fd = os.memfd_create("inflight")
    os.truncate(fd, 2 * PAGE)
    native = InflightRegion.map(fd, Inflight(PAGE, 136, 1, SIZE))
    ring.open(inflight=native).pop()
    assert os.pread(fd, 12, 136) == struct.pack("<QHH", 0, 1, SIZE)
    os.close(fd)


def test_a_ring_must_have_its_part(ring: Ring) -> None:
    fd = os.memfd_create("region of another program")
    size = 2 * (16 + 4 * 16 + 48)
    os.truncate(fd, size)
    strange = InflightRegion.map(fd, Inflight(size, 0, 2, 4))
    os.close(fd)
    for changes in ({"index": 2}, {"index": 1}):  # no such part; a part for 4 entries, a ring of 8
        with pytest.raises(QueueBroken) as caught:
            ring.open(inflight=strange, **changes)
        assert caught.value.code == lib.VU_E_INFLIGHT


def test_our_own_regions_have_room_for_more_than_was_asked_for(ring: Ring) -> None:
    """As QEMU 10 needs it: it asks for 128 entries, and the guest takes up to 1024."""
    region = Region(queues=2, queue_size=4)
    assert region.native.queue_size == 1024
    assert region.size == 2 * (16 + 1024 * 16 + 48)
    ring.open(inflight=region.native, index=1).close()
    region.close()
    with pytest.raises(RequestRefused):
        InflightRegion.create(0, 8)
