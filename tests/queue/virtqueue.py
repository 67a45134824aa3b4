"""What a virtqueue is, whatever its format (virtio 1.3, 2.6): one slow model, and the sides that are held against it.

What belongs here: which chains are where, in what order, and who is to be notified; driver and device, native or plain,
with the same few steps. What does not: bytes (``guest``, ``packed``), what is wrong about them (``model``).

Positions are counted from the first on and never wrap: chains in a split ring, places in a packed one.
"""

from __future__ import annotations

import os
from collections import deque
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from tests.queue import model, packed
from tests.queue.guest import ALL, EVENT_IDX, INDIRECT_DESC, Guest, Ring
from tests.queue.model import Chain, Range
from tests.queue.packed import PACKED, PackedRing
from tests.queue.test_device_side import called, segments
from vhostuser._native import lib
from vhostuser.driverqueue import DriverQueue
from vhostuser.virtqueue import DeviceQueue, Request, RingSetup

Returned = tuple[int, int]
"""A head, or id, and how many bytes were written."""


@dataclass(frozen=True)
class Kind:
    """Of a ring, as it was negotiated. at: where it begins, places or chains behind the first."""

    size: int
    packed: bool
    indirect: bool = False
    event_idx: bool = False
    in_order: bool = False

    @property
    def features(self) -> int:
        return PACKED * self.packed | INDIRECT_DESC * self.indirect | EVENT_IDX * self.event_idx

    @property
    def modulus(self) -> int:
        """After how many positions they look the same."""
        return 2 * self.size if self.packed else 1 << 16


class Offered(NamedTuple):
    """A chain that the driver has offered. places: of the ring that it holds. at: its position, steps: to the next."""

    chain: Chain
    places: int
    at: int
    steps: int


@dataclass
class Wanted:
    """What one side says of notifications. at: the position that it wants to hear of; None: of all; -1: of none."""

    at: int | None

    def passed(self, before: int, after: int, modulus: int) -> bool:
        """Is it to be notified when positions go from ``before`` to ``after``?"""
        if self.at is None or before == after:
            return before != after
        return self.at >= 0 and any(position % modulus == self.at % modulus for position in range(before, after))


@dataclass
class Virtqueue:
    """Every chain is in one of these, in the order in which it came there."""

    kind: Kind
    waiting: deque[Offered] = field(default_factory=deque)
    taken: list[Offered] = field(default_factory=list)
    returned: deque[tuple[Offered, int]] = field(default_factory=deque)
    offered_to: int = 0
    taken_to: int = 0
    returned_to: int = 0
    seen_to: int = 0
    kicks: Wanted = field(default_factory=lambda: Wanted(None))
    calls: Wanted = field(default_factory=lambda: Wanted(None))

    def __post_init__(self) -> None:
        if self.kind.event_idx and not self.kind.packed:  # the memory of a new ring is all zeros, also its events
            self.kicks, self.calls = Wanted(0), Wanted(0)

    # ---- the driver's steps

    def holds(self) -> int:
        """Places that the driver has no more."""
        every = [*self.waiting, *self.taken, *(chain for chain, _ in self.returned)]
        return sum(offered.places for offered in every)

    def places(self, buffers: int) -> int:
        return 1 if self.kind.indirect else buffers

    def has_room(self, buffers: int) -> bool:
        return bool(buffers) and self.holds() + self.places(buffers) <= self.kind.size

    def offer(self, chain: Chain) -> None:
        places = self.places(len(chain.readable) + len(chain.writable))
        steps = places if self.kind.packed else 1
        self.waiting.append(Offered(chain, places, self._end(), steps))

    def _end(self) -> int:
        return self.taken_to + sum(offered.steps for offered in self.waiting)

    def publish(self) -> bool:
        """Is a kick wanted?"""
        before = self.offered_to
        self.offered_to = self._end()
        return self.kicks.passed(before, self.offered_to, self.kind.modulus)

    def see(self, most: int) -> list[Returned]:
        """What the driver takes back."""
        seen = [self.returned.popleft() for _ in range(min(most, len(self.returned)))]
        self.seen_to += sum(offered.steps for offered, _ in seen)
        return [(offered.chain.head, length) for offered, length in seen]

    def want_calls(self) -> bool:
        self.calls = Wanted(self.seen_to if self.kind.event_idx else None)
        return bool(self.returned)

    def want_no_calls(self) -> None:
        """A split ring with an event index has no way to say so but a position that has just gone by."""
        behind = self.seen_to + self.kind.modulus - 1
        self.calls = Wanted(behind if self.kind.event_idx and not self.kind.packed else -1)

    # ---- the device's

    def take(self, count: int) -> list[Chain]:
        taken = [self.waiting.popleft() for _ in range(count)]
        self.taken += taken
        self.taken_to += sum(offered.steps for offered in taken)
        return [offered.chain for offered in taken]

    def newest(self) -> int:
        """How many of the chains that were taken last are still out, counted from the last one on."""
        position, count = self.taken_to, 0
        for offered in reversed(self.taken):
            if offered.at + offered.steps != position:
                break
            position, count = offered.at, count + 1
        return count

    def give_up(self, count: int) -> None:
        """The chains that were taken last have not been."""
        for _ in range(count):
            self.waiting.appendleft(self.taken.pop())
            self.taken_to -= self.waiting[0].steps

    def give_back(self, chains: list[Returned]) -> bool:
        """Is a call wanted?"""
        before = self.returned_to
        for head, length in chains:
            offered = next(offered for offered in self.taken if offered.chain.head == head)
            self.taken.remove(offered)
            self.returned.append((offered, length))
            self.returned_to += offered.steps
        return self.calls.passed(before, self.returned_to, self.kind.modulus)

    def want_kicks(self) -> bool:
        self.kicks = Wanted(self.taken_to if self.kind.event_idx else None)
        return bool(self.waiting)

    def want_no_kicks(self) -> None:
        """A split ring with an event index says nothing: the position that it wanted has gone by."""
        if self.kind.packed or not self.kind.event_idx:
            self.kicks = Wanted(-1)

    def base(self) -> int:
        """For GET_VRING_BASE."""
        if not self.kind.packed:
            return self.taken_to % (1 << 16)
        return self._word(self.taken_to) | self._word(self.returned_to) << 16

    def _word(self, position: int) -> int:
        return position % self.kind.size | (position // self.kind.size % 2 == 0) << 15


# ---- the two sides


class DriverSide(Protocol):
    """Offers, and takes back, so many at most if it can choose."""

    def offer(self, readable: list[Range], writable: list[Range]) -> int | None: ...
    def publish(self) -> bool: ...
    def take(self, most: int) -> list[Returned]: ...


class DeviceSide(Protocol):
    """Takes chains, at most so many if it can choose, and gives them back."""

    def take(self, most: int) -> list[Chain]: ...
    def give_back(self, chains: list[Returned]) -> None: ...


class NativeDriver:
    def __init__(self, kind: Kind, guest: Guest) -> None:
        self.queue = DriverQueue(
            guest.memory, 0, kind.size,
            event_idx=kind.event_idx, indirect=kind.indirect, packed=kind.packed, in_order=kind.in_order,
        )  # fmt: skip

    def offer(self, readable: list[Range], writable: list[Range]) -> int | None:
        return self.queue.offer(readable, writable)

    def publish(self) -> bool:
        return self.queue.publish()

    def take(self, most: int) -> list[Returned]:
        return self.queue.take_many(most)

    def parts(self) -> tuple[int, int, int]:
        return self.queue.desc, self.queue.avail, self.queue.used


class PlainDriver:
    """Publishes at once, and takes everything back that is there."""

    def __init__(self, kind: Kind, guest: Guest) -> None:
        self.kind = kind
        self.guest = guest
        self.driver: model.Driver | packed.PackedDriver
        if kind.packed:
            self.ring: Ring | PackedRing = PackedRing(guest, kind.size, features=kind.features)
            self.driver = packed.PackedDriver(self.ring)
        else:
            self.ring = Ring(guest, kind.size, features=kind.features)
            self.driver = model.Driver(self.ring)
        self._tables = iter(range(TABLES, TABLES_END, 64))

    def offer(self, readable: list[Range], writable: list[Range]) -> int | None:
        return self.driver.offer(readable, writable, next(self._tables) if self.kind.indirect else None)

    def publish(self) -> bool:
        return True

    def take(self, most: int) -> list[Returned]:
        return self.driver.take()

    def parts(self) -> tuple[int, int, int]:
        if isinstance(self.ring, PackedRing):
            return self.ring.desc, self.ring.driver, self.ring.device
        return self.ring.desc, self.ring.avail, self.ring.used


class NativeDevice:
    def __init__(self, kind: Kind, guest: Guest, parts: tuple[int, int, int]) -> None:
        self.kind, self.guest, self.parts = kind, guest, parts
        self.call = os.eventfd(0, os.EFD_NONBLOCK)
        self.out: dict[int, Request] = {}
        self.queue = self.open(0x8000_8000 if kind.packed else 0)

    def open(self, base: int) -> DeviceQueue:
        setup = RingSetup(self.kind.size, *self.parts, base=base, features=self.kind.features, guest_addresses=True)
        queue = setup.open(self.guest.memory)
        queue.set_call(self.call)
        return queue

    def take(self, most: int) -> list[Chain]:
        requests = self.queue.pop(most)
        self.out |= {request._chain.head: request for request in requests}
        return [segments(request) for request in requests]

    def give_back(self, chains: list[Returned]) -> None:
        for head, length in chains:
            self.out.pop(head).complete(length)
        self.queue.flush()

    def give_up(self, heads: list[int]) -> None:
        chains = [self.out.pop(head)._chain for head in heads]
        assert lib.vu_queue_unpop(self.queue.native, chains, len(chains)) == 0
        self.queue.out -= len(chains)

    def restart(self) -> None:
        """As the next back-end, with the base that this one tells."""
        base = self.queue.base
        self.queue.close()
        self.queue = self.open(base)

    @property
    def called(self) -> bool:
        return called(self.call)

    def close(self) -> None:
        self.queue.close()
        os.close(self.call)


class PlainDevice:
    """Takes everything that is there."""

    def __init__(self, kind: Kind, guest: Guest, parts: tuple[int, int, int]) -> None:
        self.ring: Ring | PackedRing
        self.taken = self.used = 0
        if kind.packed:
            self.ring = ring = PackedRing.__new__(PackedRing)
            ring.guest, ring.size, ring.features = guest, kind.size, ALL | PACKED
            ring.desc, ring.driver, ring.device = parts
            self.device: packed.PackedDevice | None = packed.PackedDevice(ring)
        else:
            self.ring = Ring.__new__(Ring)
            self.ring.guest, self.ring.size, self.ring.features = guest, kind.size, ALL
            self.ring.desc, self.ring.avail, self.ring.used = parts
            self.device = None

    def take(self, most: int) -> list[Chain]:
        if self.device is not None:
            return self.device.take()
        assert isinstance(self.ring, Ring)
        chains, code = model.pop(self.ring, self.taken, set())
        assert code == 0
        self.taken += len(chains)
        return chains

    def give_back(self, chains: list[Returned]) -> None:
        if self.device is not None:
            for returned in chains:
                self.device.give_back(*returned)
            return
        assert isinstance(self.ring, Ring)
        self.ring.return_chains(self.used, chains)
        self.used += len(chains)


TABLES, TABLES_END = 0x40000, 0x60000
"""Where a plain driver's indirect tables lie, each at an address of its own."""
