"""A ring in the other byte order (SET_VRING_ENDIAN) against one in ours: the same driver, the same outcome.

The two differ in the order of the bytes in the ring and in nothing else.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.queue.guest import ALL, INDIRECT, NEXT, PAGE, WRITE, Guest
from vhostuser.driverqueue import RawRing
from vhostuser.memory import DirtyLog
from vhostuser.protocol import QueueBroken, VirtioFeature
from vhostuser.virtqueue import DeviceQueue, Request, RingSetup

SIZE = 8
DATA, TABLES = 0x40000, 0x20000
OFFSET = 1 << 20
"""Between what belongs to the one ring and to the other."""
EVENT_IDX = VirtioFeature.RING_EVENT_IDX.mask


class Side:
    """One of the rings, with its driver and its device; ``at``: where in guest memory."""

    def __init__(self, guest: Guest, at: int, features: int, log: DirtyLog | None = None, *, swapped: bool) -> None:
        self.guest, self.at = guest, at
        guest.put(at, bytes(OFFSET))
        parts = (at, at + PAGE, at + 2 * PAGE)
        self.ring = RawRing(guest.memory, SIZE, *parts, byteorder="big" if swapped else "little")
        setup = RingSetup(SIZE, *parts, features=features, guest_addresses=True, swapped=swapped)
        self.queue: DeviceQueue = setup.open(guest.memory, log=log)
        self.requests: list[Request] = []

    def offer(self, head: int, buffers: Sequence[tuple[int, bool]], *, indirect: bool) -> None:
        table = self.at + TABLES + head * PAGE if indirect else self.ring.desc
        first = 0 if indirect else head
        for number, (length, writable) in enumerate(buffers):
            more = number + 1 < len(buffers)
            guest = self.at + DATA + (head * 4 + number) * PAGE
            self.guest.put(guest, bytes([head + 1]) * length)
            flags = more * NEXT | writable * WRITE
            self.ring.describe_at(table, first + number, guest, length, flags, first + number + 1)
        if indirect:
            self.ring.describe(head, table, 16 * len(buffers), INDIRECT)
        index = self.ring.available_index
        self.ring.make_available(index, [head])
        self.ring.available_index = index + 1

    def pop(self) -> list[tuple[int, int, bytes]]:
        self.requests = self.queue.pop()
        return [(request.readable, request.writable, request.read()) for request in self.requests]

    def finish(self, count: int) -> None:
        for request in self.requests[:count]:
            request.write(b"answer")
            request.complete()
        self.queue.flush()

    def seen(self) -> tuple[object, ...]:
        """All that a driver sees."""
        ring = self.ring
        entries = [ring.used_entry(index) for index in range(SIZE)]
        memory = self.guest.get(self.at + DATA, 32 * PAGE)
        return ring.used_index, entries, ring.used_flags, ring.available_event, self.queue.base, memory


class Step(NamedTuple):
    """A chain of (bytes, writable) buffers, how far the device comes then, and what the driver asks for."""

    buffers: list[tuple[int, bool]]
    indirect: bool
    finished: int
    arm: bool
    event: int
    flags: int


buffers = st.lists(st.integers(1, 600), min_size=1, max_size=2).flatmap(
    lambda lengths: st.integers(0, len(lengths)).map(
        lambda readable: [(length, number >= readable) for number, length in enumerate(lengths)]
    )
)
steps = st.builds(
    Step, buffers, st.booleans(), st.integers(0, 4), st.booleans(), st.integers(0, 65535), st.integers(0, 1)
)


@pytest.fixture(scope="module")
def memory() -> Iterator[Guest]:
    made = Guest((0, 2 * OFFSET))
    yield made
    made.close()


@given(script=st.lists(steps, max_size=12), features=st.sampled_from([0, ALL, ALL & ~EVENT_IDX]))
def test_both_are_served_alike(memory: Guest, script: list[Step], features: int) -> None:
    features |= VirtioFeature.RING_INDIRECT_DESC.mask
    sides = [Side(memory, at, features, swapped=bool(at)) for at in (0, OFFSET)]
    call = os.eventfd(0, os.EFD_NONBLOCK)
    for turn, step in enumerate(script):
        told = []
        for side in sides:
            side.queue.set_call(call)
            side.offer(turn % 4 * 2, step.buffers, indirect=step.indirect)
            side.ring.used_event, side.ring.available_flags = step.event, step.flags
            popped = side.pop()
            side.finish(len(side.requests))
            armed = side.queue.arm() if step.arm else side.queue.disarm()
            told.append((popped, armed, calls(call), side.seen()))
        assert told[0] == told[1]
    for side in sides:
        side.queue.close()
    os.close(call)


def calls(event: int) -> int:
    try:
        return os.eventfd_read(event)
    except BlockingIOError:
        return 0


def test_the_used_ring_is_big_endian(memory: Guest) -> None:
    """And not merely read as it was written."""
    side = Side(memory, OFFSET, 0, swapped=True)
    side.offer(2, [(16, False), (32, True)], indirect=False)
    assert side.pop() == [(16, 32, b"\3" * 16)]
    side.finish(1)
    assert memory.get(side.ring.used, 12) == struct.pack(">HHII", 0, 1, 2, 6)
    side.queue.close()


def test_a_big_endian_index_in_a_ring_of_ours_breaks_it(memory: Guest) -> None:
    side = Side(memory, 0, 0, swapped=False)
    side.ring.available_index = 0x0100
    with pytest.raises(QueueBroken):
        side.pop()
    side.queue.close()
