"""The device's side of a ring: taking chains, giving them back, asking for kicks and calling.

What belongs here: steps, one method each, in the order of the specification. What does not: what a format makes of them
(``ring``, ``packed``), what requests ask for (``disk``), when the ring is looked at (``engine``).
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field

from tests.conformance.plain.inflight import Inflight, InflightQueue
from tests.conformance.plain.inflight_packed import PackedInflightQueue
from tests.conformance.plain.packed import PackedRing
from tests.conformance.plain.ring import INDIRECT, NEXT, NO_INTERRUPT, WRITE, Bad, Descriptor, Ring, pieces
from vhostuser._native import lib
from vhostuser.memory import DirtyLog, GuestMemory, explain
from vhostuser.protocol import QueueBroken, VirtioFeature
from vhostuser.queuestats import QueueStats
from vhostuser.virtqueue import RingSetup

Piece = tuple[int, int]
"""Guest address and bytes, in one region."""

LONGEST_TABLE = 1024


@dataclass
class Chain:
    """What the driver offers in one go. written: how far the device has come in the writable bytes."""

    memory: GuestMemory
    head: int
    readable: list[Piece] = field(default_factory=list)
    writable: list[Piece] = field(default_factory=list)
    written: int = 0
    places: int = 1
    """How many positions of the ring it takes."""

    @property
    def to_read(self) -> int:
        """Bytes from the driver."""
        return sum(length for _, length in self.readable)

    @property
    def room(self) -> int:
        """Bytes to the driver."""
        return sum(length for _, length in self.writable)

    def read(self, offset: int = 0, length: int = 1 << 32) -> bytes:
        """Readable bytes from ``offset`` on; fewer where the chain is shorter."""
        return b"".join(self.memory.read(*piece) for piece in _part(self.readable, offset, length))

    def write(self, data: bytes, offset: int = 0) -> None:
        """Writes where there is room."""
        for guest, length in _part(self.writable, offset, len(data)):
            self.memory.write(guest, data[:length])
            data, offset = data[length:], offset + length
        self.written = max(self.written, offset)


def _part(all_of_it: list[Piece], offset: int, length: int) -> Iterator[Piece]:
    for guest, size in all_of_it:
        skipped = min(offset, size)
        run = min(size - skipped, length)
        if run:
            yield guest + skipped, run
        offset, length = offset - skipped, length - run


class Queue:
    """Stands in for ``vhostuser.virtqueue.DeviceQueue``. Raises QueueBroken if the ring does not fit its memory."""

    def __init__(self, setup: RingSetup, memory: GuestMemory, log: DirtyLog | None, inflight: Inflight | None) -> None:
        self.setup = setup
        self.index = setup.index
        self.memory = memory
        self.log = log
        self.next = 0
        """The position of what is taken next."""
        self.used = 0
        """The position in which a chain is given back next."""
        self.signalled = 0
        """That when the driver was last called, or could have been."""
        self.forced = False
        self.returned = 0
        self.call_fd = -1
        self.ring: Ring
        self.started = False
        self.again: list[int] = []
        """Heads that a process before us had taken."""
        self.inflight: InflightQueue | None = None
        try:
            self.place()
            self.next, self.used = self.ring.bases(setup.base)
            if inflight is not None:
                packed = self.has(VirtioFeature.RING_PACKED)
                kind = PackedInflightQueue if packed else InflightQueue
                self.inflight = inflight.queue(kind, setup.index, setup.size)
        except Bad as bad:
            raise self.broken_by(bad.code) from None

    def broken_by(self, code: int, head: int = -1) -> QueueBroken:
        """The error that ends this ring."""
        return QueueBroken(self.index, head, code, explain(code))

    def has(self, feature: VirtioFeature) -> bool:
        """Was the feature negotiated?"""
        return bool(self.setup.features & feature.mask)

    # ---- start

    def place(self) -> None:
        """Finds the ring in memory: user addresses, aligned, each part within one region."""
        setup, size = self.setup, self.setup.size
        kind = PackedRing if self.has(VirtioFeature.RING_PACKED) else Ring
        parts = zip((setup.desc, setup.avail, setup.used), kind.parts(size), strict=True)
        self.ring = kind(self.memory, size, *(self.part(user, *part) for user, part in parts))

    def part(self, user: int, length: int, alignment: int) -> int:
        """The guest address of a part of the ring."""
        if user % alignment:
            raise Bad(lib.VU_E_ALIGN)
        for region in self.memory.regions:
            if region.user <= user and user + length <= region.user + region.size:
                return region.guest + user - region.user
        raise Bad(lib.VU_E_RANGE)

    def start(self) -> None:
        """Looks where the ring stands."""
        self.used = self.signalled = self.ring.started_at(self.used)
        if self.inflight is not None:
            self.inflight.resume(self)
        self.started = True

    # ---- taking

    def take(self) -> Chain | None:
        """The next chain, or None."""
        if not self.started:
            self.start()
        if self.again and self.inflight is not None:
            return self.inflight.chain_again(self, self.again.pop(0))
        if not self.waiting():
            return None
        head = self.ring.avail_head(self.next)
        chain = self.parse(head)
        if self.inflight is not None:
            self.inflight.take_chain(self.ring, self.next)
        self.next = self.after(self.next, chain.places)
        return chain

    def after(self, position: int, places: int = 1) -> int:
        """The position behind a chain."""
        return (position + places) % self.ring.modulus

    def waiting(self) -> int:
        """How many chains wait to be taken, at least."""
        return self.ring.ahead(self.next, self.used)

    def parse(self, head: int) -> Chain:
        """Follows a chain from its head."""
        chain = self.parse_all(self.chained(head))
        chain.head, chain.places = self.ring.name(head)
        return chain

    def parse_all(self, descriptors: Iterable[Descriptor]) -> Chain:
        """A chain of these."""
        chain = Chain(self.memory, 0)
        for descriptor in descriptors:
            self.add(chain, descriptor)
        return chain

    def chained(self, head: int) -> Iterator[Descriptor]:
        """The descriptors of a chain, those of its indirect table among them."""
        yield from self.entered(self.linked(self.ring.desc, self.ring.size, head))

    def entered(self, descriptors: Iterable[Descriptor]) -> Iterator[Descriptor]:
        """These, with what is in an indirect table in its place."""
        for descriptor in descriptors:
            if descriptor.flags & INDIRECT:
                yield from self.table(descriptor)
            else:
                yield descriptor

    def linked(self, table: int, count: int, index: int) -> Iterator[Descriptor]:
        """The descriptors of one table from ``index`` on."""
        yield from self.ring.linked(table, count, index)

    def table(self, descriptor: Descriptor) -> Iterator[Descriptor]:
        """The descriptors of an indirect table."""
        self.check_table(descriptor)
        pieces(self.memory, descriptor.guest, descriptor.length)
        for inner in self.linked(descriptor.guest, descriptor.length // 16, 0):
            if inner.flags & INDIRECT:
                raise Bad(lib.VU_E_INDIRECT)
            yield inner

    def check_table(self, descriptor: Descriptor) -> None:
        """An indirect table must be negotiated, end its chain, and have whole entries; WRITE means nothing."""
        if not self.has(VirtioFeature.RING_INDIRECT_DESC) or descriptor.flags & NEXT:
            raise Bad(lib.VU_E_INDIRECT)
        if not descriptor.length or descriptor.length % 16:
            raise Bad(lib.VU_E_INDIRECT)
        if descriptor.length // 16 > max(LONGEST_TABLE, self.ring.size):
            raise Bad(lib.VU_E_SIZE)

    def add(self, chain: Chain, descriptor: Descriptor) -> None:
        """One buffer more: within memory, and none to read behind one to write."""
        if descriptor.guest + descriptor.length > 1 << 64:
            raise Bad(lib.VU_E_OVERFLOW)
        found = pieces(self.memory, descriptor.guest, descriptor.length)
        if descriptor.flags & WRITE:
            chain.writable += found
        elif chain.writable:
            raise Bad(lib.VU_E_ORDER)
        else:
            chain.readable += found

    # ---- giving back

    def give_back(self, chain: Chain, length: int) -> None:
        """Log, in-flight list, entry, index: each is seen before what comes behind it."""
        self.mark_data(chain, max(length, chain.written))
        if self.inflight is not None:
            self.inflight.link(chain.head)
        self.put_entry(chain.head, length)
        self.used = self.after(self.used, chain.places)
        if self.inflight is not None:
            self.inflight.move(self.ring, self.used)
        self.put_index()
        if self.inflight is not None:
            self.inflight.finish(chain.head)
            self.inflight.seal(self.used)
        self.returned += 1

    def put_entry(self, head: int, length: int) -> None:
        """The used entry."""
        self.ring.put_used(self.used, head, length)
        self.mark_used(self.ring.used_entry_at(self.used), self.ring.ENTRY)

    def put_index(self) -> None:
        """The used index, or flags: from now on the driver has the chain."""
        for guest in self.ring.show(self.used):
            self.mark_used(guest, 2)

    # ---- the dirty log

    def mark_data(self, chain: Chain, length: int) -> None:
        """Marks the first ``length`` writable bytes."""
        for guest, run in _part(chain.writable, 0, length):
            self.mark(guest, run)

    def mark_used(self, guest: int, length: int) -> None:
        """Marks a part of the used ring where the front-end wants it, if it does."""
        if self.setup.log_used:
            self.mark(self.ring.logged_at(guest, self.setup.log), length)

    def mark(self, guest: int, length: int) -> None:
        """Marks what was written."""
        if self.log is not None:
            self.log.mark(guest, length)

    # ---- notifications

    def arm(self) -> bool:
        """Asks for a kick; whether there is something to take all the same."""
        for store in self.ring.asking(self.next, event_idx=self.has(VirtioFeature.RING_EVENT_IDX)):
            self.put_and_mark(*store)
        return bool(self.again or self.waiting())

    def disarm(self) -> None:
        """Asks for no kicks."""
        for store in self.ring.declining(event_idx=self.has(VirtioFeature.RING_EVENT_IDX)):
            self.put_and_mark(*store)

    def put_and_mark(self, guest: int, value: int) -> None:
        """Writes 16 bits of what asks for kicks."""
        self.ring.put(guest, value)
        self.mark_used(guest, 2)

    def wants_call(self) -> bool:
        """Does the driver want to hear of what was given back since it was last called?"""
        before, self.signalled = self.signalled, self.used
        if before == self.used:
            return False
        if self.runs_empty():
            return True
        if self.has(VirtioFeature.RING_EVENT_IDX) and self.ring.looks_at_event():
            return self.passed(self.ring.used_event(), self.used, before)
        return not self.ring.avail_flags() & NO_INTERRUPT

    def runs_empty(self) -> bool:
        """Does the driver want to hear of that, and is it so?"""
        return self.has(VirtioFeature.NOTIFY_ON_EMPTY) and not self.waiting()

    def passed(self, event: int, now: int, before: int) -> bool:
        """Did the index go over ``event`` on its way from ``before`` to ``now``? (2.7.7.2, vring_need_event)"""
        return (now - event - 1) % self.ring.modulus < (now - before) % self.ring.modulus

    def signal(self) -> None:
        """Calls the driver if it wants to be called."""
        if (self.wants_call() or self.forced) and self.call_fd >= 0:
            self.forced = False
            self.call()

    def call(self) -> None:
        """Writes the call eventfd; a full one has told the driver often enough."""
        with suppress(BlockingIOError):
            os.eventfd_write(self.call_fd, 1)

    # ---- what the runtime asks for

    @property
    def base(self) -> int:
        """For GET_VRING_BASE."""
        return self.ring.base(self.next, self.used)

    def stats(self) -> QueueStats:
        """Nothing else is counted here."""
        return QueueStats(self.returned)

    def set_call(self, fd: int) -> None:
        """Where to call, or -1."""
        self.call_fd = fd

    def leave_in_flight(self) -> bool:
        """Every chain that is taken is given back: there is nothing to leave."""
        return False

    def set_touch(self, pool: object) -> None:
        """Nothing is fetched ahead here: who touches a missing page waits for it."""

    def force_signal(self) -> None:
        """The next signal is sent whatever the driver asked for."""
        self.forced = True

    def close(self) -> None:
        """Lets go of guest memory."""
        self.memory = self.ring.memory = GuestMemory()
        self.log = None
