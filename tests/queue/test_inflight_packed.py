"""The in-flight region of packed rings: what is in it after every step, what a crash at any store leaves, and lies.

The specification's procedure is written out here once more, store by store, so that it can be cut off behind each.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.queue.guest import INDIRECT, NEXT, WRITE, Guest
from tests.queue.packed import PackedDriver, PackedRing
from vhostuser._native import lib
from vhostuser.protocol import Inflight, QueueBroken
from vhostuser.virtqueue import DeviceQueue, InflightRegion

SIZE = 8
HEADER = struct.Struct("<QHHHHHHBB10x")
ENTRY = struct.Struct("<BxHHHQHHIQ")
FIELDS = [
    *("features", "version", "desc_num", "free_head", "old_free_head"),
    *("used_idx", "old_used_idx", "used_wrap", "old_used_wrap"),
]
ENTRY_FIELDS = ["inflight", "next", "last", "num", "counter", "id", "flags", "len", "addr"]


class Region:
    """An in-flight region of one packed queue as bytes."""

    def __init__(self) -> None:
        self.fd, self.size = InflightRegion.create(1, SIZE, packed=True)
        self.native = InflightRegion.map(self.fd, Inflight(self.size, 0, 1, SIZE), packed=True)

    @property
    def bytes(self) -> bytes:
        return os.pread(self.fd, self.size, 0)

    @bytes.setter
    def bytes(self, content: bytes) -> None:
        os.pwrite(self.fd, content, 0)

    @property
    def header(self) -> dict[str, int]:
        return dict(zip(FIELDS, HEADER.unpack(os.pread(self.fd, 32, 0)), strict=True))

    def entry(self, index: int) -> dict[str, int]:
        return dict(zip(ENTRY_FIELDS, ENTRY.unpack(os.pread(self.fd, 32, 32 + 32 * index)), strict=True))

    def set(self, **changes: int) -> None:
        os.pwrite(self.fd, HEADER.pack(*(self.header | changes).values()), 0)

    def set_entry(self, index: int, **changes: int) -> None:
        os.pwrite(self.fd, ENTRY.pack(*(self.entry(index) | changes).values()), 32 + 32 * index)

    def taken(self) -> list[int]:
        """Ids of the chains in flight, in the order in which they were taken: that of their last descriptors."""
        entries = [self.entry(index) for index in range(SIZE)]
        heads = sorted((entry["counter"], index) for index, entry in enumerate(entries) if entry["inflight"])
        return [entries[entries[index]["last"]]["id"] for _, index in heads]

    def close(self) -> None:
        os.close(self.fd)


@pytest.fixture
def region() -> Iterator[Region]:
    made = Region()
    yield made
    made.close()


def ids(queue: DeviceQueue, most: int = 128) -> list[int]:
    return [request._chain.head for request in queue.pop(most)]


def chain(driver: PackedDriver, length: int) -> int:
    identity = driver.offer([(0x8000, 16)] * (length - 1), [(0x9000 + 16 * driver.next, 16)])
    assert identity is not None
    return identity


class PlainDevice:
    """The procedure of the specification. Each method yields after every store."""

    def __init__(self, ring: PackedRing, region: Region) -> None:
        self.ring, self.region = ring, region
        self.next = self.used = self.counter = 0
        self.entries: dict[int, tuple[int, int]] = {}
        region.set(version=1, desc_num=SIZE, used_wrap=1, old_used_wrap=1)
        for index in range(SIZE):
            region.set_entry(index, next=index + 1)

    def take(self, count: int) -> Iterator[None]:
        """The chain that is next, of ``count`` descriptors."""
        region, head = self.region, self.region.header["old_free_head"]
        region.set_entry(head, num=count, counter=self.counter)
        self.counter += 1
        yield
        region.set_entry(head, inflight=1)
        yield
        last = entry = head
        for offset in range(count):
            addr, length, identity, flags = self.ring.row(self.next + offset)
            region.set_entry(entry, addr=addr, len=length, id=identity, flags=flags)
            yield
            last, entry = entry, region.entry(entry)["next"]
        region.set_entry(head, last=last)
        yield
        region.set(free_head=entry)
        yield
        region.set(old_free_head=entry)
        yield
        self.entries[identity] = (head, count)
        self.next += count

    def give_back(self, batch: list[int]) -> Iterator[None]:
        region, ring, place = self.region, self.ring, self.used
        places = []
        for identity in batch:
            entry, count = self.entries[identity]
            region.set_entry(region.entry(entry)["last"], next=region.header["free_head"])
            yield
            region.set(free_head=entry)
            yield
            addr, _, _, flags = ring.row(place)
            ring.describe(place, (addr, 16, identity, flags))
            yield
            places.append(place)
            place += count
        region.set(used_wrap=ring.wrap(place))
        yield
        region.set(used_idx=place % SIZE)
        yield
        for at in (*places[1:], places[0]):
            addr, length, identity, _ = ring.row(at)
            ring.describe(at, (addr, length, identity, ring.used_flags(at) | WRITE))
            yield
        for identity in batch:
            region.set_entry(self.entries.pop(identity)[0], inflight=0)
            yield
        region.set(old_free_head=region.header["free_head"])
        yield
        region.set(old_used_wrap=ring.wrap(place))
        yield
        region.set(old_used_idx=place % SIZE)
        yield
        self.used = place


def finish(steps: Iterator[None]) -> None:
    for _ in steps:
        pass


# ---- while nothing crashes


def test_a_fresh_region_is_set_up_by_the_first_pop(guest: Guest, region: Region) -> None:
    ring = PackedRing(guest, SIZE)
    queue = ring.open(inflight=region.native, base=ring.base(11, 11))
    assert not any(region.bytes), "opening touches nothing"
    queue.pop()
    assert region.header == dict(zip(FIELDS, (0, 1, SIZE, 0, 0, 3, 3, 0, 0), strict=True))
    assert [region.entry(index)["next"] for index in range(SIZE)] == [1, 2, 3, 4, 5, 6, 7, 8]
    queue.close()


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_the_region_is_at_every_step_what_the_specification_says(data: st.DataObject) -> None:
    guest, ours, theirs = Guest((0, 1 << 16)), Region(), Region()
    ring = PackedRing(guest, SIZE)
    driver, device = PackedDriver(ring), PlainDevice(ring, theirs)
    queue = ring.open(inflight=ours.native)
    queue.pop()
    out, order = {}, []
    for _ in range(data.draw(st.integers(1, 12), "steps")):
        step = data.draw(st.sampled_from(["offer", "pop", "push"]), "step")
        if step == "offer" and (room := SIZE - driver.held):
            order.append(chain(driver, data.draw(st.integers(1, min(3, room)), "length")))
        elif step == "pop":
            for request in queue.pop():
                out[request._chain.head] = request
                finish(device.take(driver.out[request._chain.head][0]))
        elif step == "push" and out:
            batch = [out.pop(data.draw(st.sampled_from(sorted(out)))) for _ in range(min(len(out), 2))]
            for request in batch:
                request.complete(16)
            queue.flush()
            finish(device.give_back([request._chain.head for request in batch]))
            driver.take()
        assert ours.bytes == theirs.bytes
    queue.close()
    for made in (ours, theirs, guest):
        made.close()


# ---- a crash behind every store

Scene = Callable[[PackedDriver, PlainDevice], Iterator[None]]


def taking(driver: PackedDriver, device: PlainDevice) -> Iterator[None]:
    for length in (1, 3, 2):
        chain(driver, length)
        yield from device.take(length)


def returning(driver: PackedDriver, device: PlainDevice) -> Iterator[None]:
    finish(taking(driver, device))
    yield from device.give_back([1])
    yield from device.give_back([2, 0])


def alike(driver: PackedDriver, device: PlainDevice) -> Iterator[None]:
    """What a batch that did not count left behind its first descriptor would be taken for the next to be returned."""
    for _ in range(4):
        chain(driver, 1)
        finish(device.take(1))
    yield from device.give_back([0, 1, 2])


def turning(driver: PackedDriver, device: PlainDevice) -> Iterator[None]:
    """The ring turns in the middle of a batch of all that it has."""
    finish(returning(driver, device))
    driver.take()
    lengths = (2, 1, 4, 1)
    taken = [chain(driver, length) for length in lengths]
    for length in lengths:
        finish(device.take(length))
    yield from device.give_back(taken[::-1])


def crossing(driver: PackedDriver, device: PlainDevice) -> Iterator[None]:
    """A batch over the ring's end, shorter than the ring: place and wrap counter change one behind the other."""
    finish(returning(driver, device))
    driver.take()
    taken = [chain(driver, 2), chain(driver, 2)]
    for _ in taken:
        finish(device.take(2))
    yield from device.give_back(taken)


def overtaken(driver: PackedDriver, device: PlainDevice) -> Iterator[None]:
    """The same, and the driver offers the place of the batch's first descriptor anew as soon as it is back."""
    for _ in crossing(driver, device):
        if driver.take():
            for length in (3, 1, 2):
                chain(driver, length)
        yield


@pytest.mark.parametrize("scene", [taking, returning, alike, turning, crossing, overtaken])
def test_a_crash_behind_any_store_loses_nothing_and_returns_nothing_twice(guest: Guest, scene: Scene) -> None:
    with_device, at = [], 0
    while True:
        region, ring = Region(), PackedRing(guest, SIZE)
        driver = PackedDriver(ring)
        device = PlainDevice(ring, region)
        steps = scene(driver, device)
        if not all(next(steps, steps) is None for _ in range(at)):
            region.close()
            break
        steps.close()
        at += 1
        before = driver.take()
        offered = list(driver.out)
        queue = ring.open(inflight=region.native, base=ring.base(0, 0))  # all that a front-end knows
        assert driver.take() == []
        again = []
        while batch := queue.pop():
            again += batch
        assert sorted(request._chain.head for request in again) == sorted(offered), f"behind store {at}, {before}"
        for request in again:
            assert request.writable == 16
            request.complete(8)
            queue.flush()
            assert driver.take() == [(request._chain.head, 8)], "one by one, and no more than was returned"
        with_device.append(len(again))
        assert queue.base == ring.base(driver.next, driver.seen)
        assert region.taken() == []
        queue.close()
        region.close()
    assert at > 15 and len(set(with_device)) > 1


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_no_request_is_lost_or_served_twice_wherever_it_ends(data: st.DataObject) -> None:
    """A life of offers, completions and crashes, against the plain statement: offered is either out or returned."""
    guest, region = Guest((0, 1 << 16)), Region()
    ring = PackedRing(guest, SIZE)
    driver, queue = PackedDriver(ring), ring.open(inflight=region.native)
    with_device: list[int] = []
    out = []
    for _ in range(data.draw(st.integers(1, 20), "steps")):
        step = data.draw(st.sampled_from(["offer", "pop", "push", "crash"]), "step")
        if step == "offer" and (room := SIZE - driver.held):
            with_device.append(chain(driver, data.draw(st.integers(1, min(3, room)), "length")))
        elif step == "pop":
            out += queue.pop(data.draw(st.integers(1, 3)))
            assert [request._chain.head for request in out] == with_device[: len(out)]
        elif step == "push":
            for _ in range(min(len(out), data.draw(st.integers(1, 3)))):
                place = data.draw(st.integers(0, len(out) - 1))
                out.pop(place).complete()
                with_device.pop(place)
            queue.flush()
            driver.take()
            assert sorted(driver.out) == sorted(with_device)
        else:
            queue.close()
            queue, out = ring.open(inflight=region.native), []
    assert region.taken() == with_device[: len(region.taken())]
    queue.close()
    region.close()
    guest.close()


def test_what_was_taken_comes_as_it_was_then(guest: Guest, region: Region) -> None:
    """The ring's descriptors may have been overwritten by those that were returned since."""
    ring = PackedRing(guest, SIZE)
    driver, queue = PackedDriver(ring), ring.open(inflight=region.native)
    chain(driver, 3)
    chain(driver, 1)
    requests = queue.pop()
    wanted = (requests[0].readable, requests[0].writable)
    requests[1].complete()
    queue.flush()
    queue.close()
    again = ring.open(inflight=region.native)
    assert [(request.readable, request.writable) for request in again.pop()] == [wanted]
    again.close()


# ---- what a liar may put there


@pytest.mark.parametrize(
    "changes",
    [
        {"version": 2},
        {"desc_num": 4},
        {"used_idx": SIZE},
        {"old_used_idx": 0xFFFF},
        {"free_head": 0xFFFF, "old_free_head": 0xFFFF},
        {"free_head": SIZE, "old_free_head": SIZE},
    ],
    ids=str,
)
def test_a_header_that_contradicts_itself_is_refused(guest: Guest, region: Region, changes: dict[str, int]) -> None:
    ring = PackedRing(guest, SIZE)
    device, driver = PlainDevice(ring, region), PackedDriver(ring)
    chain(driver, 2)
    finish(device.take(2))
    region.set(**changes)
    with pytest.raises(QueueBroken) as caught:
        ring.open(inflight=region.native).pop()
    assert caught.value.code == lib.VU_E_INFLIGHT


@pytest.mark.parametrize(
    ("entry", "changes"),
    [
        (0, {"num": 0}),
        (0, {"num": 3}),
        (0, {"num": 0xFFFF}),
        (0, {"last": 5}),
        (0, {"next": 0}),
        (0, {"next": 4}),
        (0, {"next": 0xFFFF}),
        (1, {"inflight": 1, "num": 1, "last": 1}),
        (7, {"next": 0xFFFF}),
        (7, {"next": 2}),
        (4, {"next": 8}),
    ],
    ids=str,
)
def test_lists_that_leave_the_region_or_meet_are_refused(
    guest: Guest, region: Region, entry: int, changes: dict[str, int]
) -> None:
    ring = PackedRing(guest, SIZE)
    device, driver = PlainDevice(ring, region), PackedDriver(ring)
    chain(driver, 2)
    finish(device.take(2))
    region.set_entry(entry, **changes)
    with pytest.raises(QueueBroken) as caught:
        ring.open(inflight=region.native).pop()
    assert caught.value.code == lib.VU_E_INFLIGHT


def test_a_saved_descriptor_is_judged_as_any_other(guest: Guest, region: Region) -> None:
    ring = PackedRing(guest, SIZE)
    device, driver = PlainDevice(ring, region), PackedDriver(ring)
    chain(driver, 2)
    finish(device.take(2))
    region.set_entry(0, addr=1 << 50, flags=NEXT)
    with pytest.raises(QueueBroken) as caught:
        ring.open(inflight=region.native).pop()
    assert caught.value.code == lib.VU_E_RANGE


def test_a_saved_table_is_the_last_of_its_chain(guest: Guest, region: Region) -> None:
    ring = PackedRing(guest, SIZE)
    device, driver = PlainDevice(ring, region), PackedDriver(ring)
    chain(driver, 2)
    finish(device.take(2))
    region.set_entry(0, addr=0x8000, len=16, flags=INDIRECT)
    with pytest.raises(QueueBroken) as caught:
        ring.open(inflight=region.native).pop()
    assert caught.value.code == lib.VU_E_INDIRECT


def test_a_region_of_the_other_format_is_refused(guest: Guest) -> None:
    fd, size = InflightRegion.create(1, SIZE)
    split = InflightRegion.map(fd, Inflight(size, 0, 1, SIZE))
    with pytest.raises(QueueBroken) as caught:
        PackedRing(guest, SIZE).open(inflight=split)
    assert caught.value.code == lib.VU_E_INFLIGHT
    os.close(fd)


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_any_bytes_are_either_refused_or_followed_without_harm(data: st.DataObject) -> None:
    guest, region = Guest((0, 1 << 16)), Region()
    ring = PackedRing(guest, SIZE)
    driver, device = PackedDriver(ring), PlainDevice(ring, region)
    for length in (2, 1, 3):
        chain(driver, length)
        finish(device.take(length))
    content = bytearray(region.bytes)
    for _ in range(data.draw(st.integers(1, 4), "changes")):
        place = data.draw(st.integers(0, 32 + 32 * SIZE - 1), "place")
        content[place] = data.draw(st.integers(0, 8) | st.integers(0, 255), "value")
    region.bytes = bytes(content)
    queue = ring.open(inflight=region.native)
    try:
        for _ in range(3):
            for request in queue.pop():
                request.complete()
            queue.flush()
    except QueueBroken:
        pass
    queue.close()
    region.close()
    guest.close()
